"""Sequences to differentiate, as token ids, and batches of them.

A sequence is a prompt and a completion; the completion's tokens are scored, the prompt's are not. Several sequences can
be one *unit*, whose gradient is squared as a whole: one sequence, except under `policy`, where it is a group.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch


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
