"""A Llama of a million parameters from nothing, and its tokenizer: small enough to be trained in minutes and shipped.

The tokenizer is byte-level BPE over the lab's own text; digits stay single, and a blank line, which ends every
completion, is the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlmerge.evaluate.tasks.splits import END
from rlmerge.lab.policy import Policy

_PIECES = r"\n\n| ?\d|\n *| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s+"
_PAD = "<pad>"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int = 128
    inner: int = 512
    layers: int = 4
    heads: int = 4
    vocabulary: int = 384
    positions: int = 256


def make_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A tokenizer of at most `size` tokens (257 at least), trained on these texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def make_policy(texts: Iterable[str], shape: Shape, seed: int) -> Policy:
    """Random weights and a trained tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(texts, shape.vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        tie_word_embeddings=True,
        max_position_embeddings=shape.positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Policy(LlamaForCausalLM(config), tokenizer)
