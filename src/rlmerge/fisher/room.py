"""How much fits into a bound on memory: tokens of a batch, and whether activations are computed twice."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlmerge.errors import FisherError
from rlmerge.figures import size

from .gradients import LOGITS
from .layers import layers_of

AROUND = 700 * 10**6
"""Bytes of Python, torch and transformers."""


def fit(model: Any, longest: int, most: int, memory: int | None) -> tuple[int, bool]:
    """(tokens of a batch, checkpointing) for units of up to `longest` tokens and at most `most` tokens a batch.

    An estimate, to be on the safe side: activations are what linear layers read and write, half as much again, and
    three copies of the logits. Raises FisherError if not even one unit fits.
    """
    if memory is None:
        return most, False
    kept, twice, fixed = _costs(model)
    vocabulary = model.config.get_text_config().vocab_size
    free = memory - fixed
    for each, checkpointing in ((kept, False), (twice, True)):
        if free >= _needed(longest, each, vocabulary):
            return max(1, min(most, int(free // (each + 12 * vocabulary)))), checkpointing
    unit = _needed(longest, twice, vocabulary)
    weights = _weights(model)
    needed = fixed + unit
    raise FisherError(
        f"--memory {size(memory)} is too little: weights and Fisher take {weights / 1e9:.2g} GB, and a unit of "
        f"{longest:,} tokens {unit / 1e9:.2g} GB even with activations computed twice. Give "
        f"{-(-needed // 10**8) / 10:.1f} GB, lower --max-new-tokens, or estimate some tensors only (--only)."
    )


def taken(model: Any, longest: int, tokens: int, checkpointing: bool) -> int:
    """Bytes that a process takes for units of up to `longest` tokens in batches of `tokens`; the same estimate."""
    kept, twice, fixed = _costs(model)
    each, vocabulary = twice if checkpointing else kept, model.config.get_text_config().vocab_size
    return fixed + max(_needed(longest, each, vocabulary), tokens * (each + 12 * vocabulary))


def _costs(model: Any) -> tuple[int, int, int]:
    """Bytes a token with activations kept, and computed twice; bytes whatever the tokens."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers, _ = layers_of(model, names, set(names.values()))
    head = model.get_output_embeddings()
    width = sum(
        sum(parameter.shape[-2:])
        for layer in layers
        if layer.module is not head and layer.rule != "embedding"
        for parameter in layer.module.parameters(recurse=False)
        if parameter.dim() > 1
    )
    blocks = max(1, getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    hidden = model.config.get_text_config().hidden_size
    largest = max((_size(layer.module) for layer in layers), default=0)
    kept = 6 * width
    return kept, 6 * hidden * blocks + kept // blocks, _weights(model) + 4 * largest + AROUND


def _weights(model: Any) -> int:
    """Bytes of weights and sums."""
    return sum(parameter.numel() * (parameter.element_size() + 4) for parameter in model.parameters())


def _needed(longest: int, each: int, vocabulary: int) -> int:
    """Bytes for one unit: activations, and three copies of its logits, which are made in pieces."""
    return longest * each + 12 * min(longest * vocabulary, max(LOGITS, 64 * vocabulary))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
