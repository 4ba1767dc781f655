"""Sequences to differentiate, as token ids, and batches of them.

A sequence is a prompt and a completion; the completion's tokens are scored, the prompt's are not. Several sequences can
be one *unit*, whose gradient is squared as a whole: one sequence, except under `policy`, where it is a group.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """Token ids, and by what factor its log-probability counts.

    ids      prompt and completion
    start    number of prompt tokens, at least 1: the first scored token is ids[start]
    weight   1; under `policy` the advantage, divided by the size of the group
    """

    ids: tuple[int, ...]
    start: int
    weight: float = 1.0

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Unit:
    """Sequences whose weighted log-probabilities are added up before the gradient is squared; as many in all units."""

    sequences: tuple[Sequence, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)


@dataclass(frozen=True)
class Batch:
    """Units as tensors, padded on the right, where causal attention does not see it.

    ids      int64[R, T], R = units · rows
    mask     int64[R, T], 1 for tokens
    factor   fp64[R, T]: what the log-probability of token t is multiplied by; 0 where it is not scored
    units    number of units, each of `rows` consecutive rows
    """

    ids: torch.Tensor
    mask: torch.Tensor
    factor: torch.Tensor
    units: int
    rows: int

    @property
    def scored(self) -> tuple[int, int]:
        """The columns [first, last) in which some row scores a token."""
        columns = (self.factor != 0.0).any(0).nonzero()[:, 0]
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (1, 2)


def make_batch(units: Several[Unit], mean: bool) -> Batch:
    """Pads units to one length. With `mean` a sequence's log-probability is divided by its number of scored tokens."""
    rows = [sequence for unit in units for sequence in unit.sequences]
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    factor = torch.zeros((len(rows), width), dtype=torch.float64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        factor[place, row.start : len(row.ids)] = row.weight / (row.scored if mean else 1)
    return Batch(ids, mask, factor, len(units), len(units[0].sequences))


def make_batches(units: Several[Unit], tokens: int, mean: bool) -> list[Batch]:
    """Batches of at most `tokens` padded tokens (one unit at least), units of like length together."""
    order = sorted(range(len(units)), key=lambda place: (units[place].length, place))
    found: list[list[Unit]] = []
    for place in order:
        unit = units[place]
        rows = len(unit.sequences)
        if not found or (len(found[-1]) + 1) * rows * unit.length > tokens:
            found.append([])
        found[-1].append(unit)
    return [make_batch(part, mean) for part in found]


def units_of(batch: Batch, places: list[int]) -> Batch:
    """Some units of a batch, without the columns that are padding to all of them."""
    rows = [unit * batch.rows + row for unit in places for row in range(batch.rows)]
    width = int(batch.mask[rows].sum(1).max())
    return Batch(batch.ids[rows, :width], batch.mask[rows, :width], batch.factor[rows, :width], len(places), batch.rows)


def shortened(batch: Batch, most: int) -> Batch:
    """The same units with fewer tokens: at most so many, from a window that has scored ones of every row."""
    width = batch.ids.shape[1]
    if width <= most:
        return batch
    starts = (batch.factor != 0.0).int().argmax(1)
    rows = [slice(max(0, min(int(start) - most // 2, width - most)), None) for start in starts]
    cut = [
        torch.stack([values[row, part][:most] for row, part in enumerate(rows)])
        for values in (batch.ids, batch.mask, batch.factor)
    ]
    cut[2][:, 0] = 0.0  # the first token has nothing before it
    return Batch(cut[0], cut[1], cut[2], batch.units, batch.rows)


def log_probability_gradient(logits: Tensor, batch: Batch, first: int, last: int) -> tuple[Tensor, float]:
    """∂ Σ factor·log p / ∂ logits, in the dtype of the logits [R, last - first, V], and the sum itself.

    The gradient of log softmax: factor·(one-hot of the token − p).
    """
    with torch.no_grad():
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        tokens = batch.ids[:, first:last, None]
        factor = batch.factor[:, first:last, None].to(wide.dtype)
        chosen = wide.gather(2, tokens)
        value = float(((chosen - wide.logsumexp(2, keepdim=True)) * factor).double().sum())
        found = wide.softmax(2).mul_(-factor)
        found.scatter_add_(2, tokens, factor)
    return found.to(logits.dtype), value
