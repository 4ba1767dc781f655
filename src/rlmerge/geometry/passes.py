"""What a model's forward passes say of sequences: log-likelihoods, and distributions beside those of another model.

Scored are the tokens of completions, as for a Fisher; logarithms and sums are fp64.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmerge.errors import NonFiniteError
from rlmerge.fisher.sequences import Batch

CELLS = 2**22
"""Positions × vocabulary of which fp64 logarithms are made at once: 32 MB."""


class Scored(NamedTuple):
    """Logits fp32[m, V] of m scored tokens, the tokens int64[m], and the row of the batch that each is in, int64[m]."""

    logits: Tensor
    tokens: Tensor
    rows: Tensor


class Divergence(NamedTuple):
    """Sums over the scored tokens of each row, fp64[R]: KL(p ‖ q), KL(q ‖ p), entropy of p, entropy of q, in nats."""

    forward: Tensor
    reverse: Tensor
    entropy: Tensor
    other_entropy: Tensor


@torch.inference_mode()
def score(model: Any, batch: Batch) -> Scored:
    """One forward pass. Raises NonFiniteError if the model answers with NaN or infinity."""
    first, last = batch.scored
    given: dict[str, Any] = {}
    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if keeps:
        given["logits_to_keep"] = torch.arange(first - 1, last - 1)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **given).logits
    logits = logits if keeps else logits[:, first - 1 : last - 1]
    wanted = batch.factor[:, first:last] != 0.0
    found = logits[wanted].float()
    if not bool(torch.isfinite(found.sum(-1)).all()):
        raise NonFiniteError(
            "a model answers with NaN or infinity: its weights are damaged, or the point is too far from all of them. "
            "Look at `rlmerge check`, or take a smaller grid."
        )
    return Scored(found, batch.ids[:, first:last][wanted], wanted.nonzero()[:, 0])


def negative_log_likelihoods(scored: Scored, rows: int) -> Tensor:
    """−Σ log p(token) of each row's scored tokens, fp64[rows], in nats."""
    found = torch.zeros(rows, dtype=torch.float64)
    for here in _slices(scored):
        chosen = log_probabilities(scored.logits[here]).gather(1, scored.tokens[here, None])[:, 0]
        found.index_add_(0, scored.rows[here], -chosen)
    return found


def divergences(scored: Scored, other: Scored, rows: int) -> Divergence:
    """KL between the distributions of two models over the whole vocabulary at each scored token, summed by row."""
    found = Divergence(*(torch.zeros(rows, dtype=torch.float64) for _ in range(4)))
    for here in _slices(scored):
        p, q = log_probabilities(scored.logits[here]), log_probabilities(other.logits[here])
        at, difference = scored.rows[here], p - q
        found.forward.index_add_(0, at, (p.exp() * difference).sum(1))
        found.reverse.index_add_(0, at, -(q.exp() * difference).sum(1))
        found.entropy.index_add_(0, at, -(p.exp() * p).sum(1))
        found.other_entropy.index_add_(0, at, -(q.exp() * q).sum(1))
    return found


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax in fp64."""
    return logits.double().log_softmax(-1)


def slabs(batches: Sequence[Batch], vocabulary: int, most: int) -> Iterator[Sequence[int]]:
    """Numbers of consecutive batches whose scored logits take at most so many bytes together; one at least."""
    found: list[int] = []
    size = 0
    for place, batch in enumerate(batches):
        own = 4 * vocabulary * int((batch.factor != 0.0).sum())
        if found and size + own > most:
            yield found
            found, size = [], 0
        found.append(place)
        size += own
    if found:
        yield found


def _slices(scored: Scored) -> Iterator[slice]:
    step = max(1, CELLS // scored.logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(scored.tokens), step))
