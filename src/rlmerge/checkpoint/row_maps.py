"""Which row of which model becomes which row of a new vocabulary: index maps, never matrices.

A model that lacks a token gets a row for it all the same: that of another model, zeros, or the mean of several rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

ZERO, MEAN = -1, -2
"""In place of the number of a model: zeros; the mean whose number stands in place of the row."""


@dataclass(frozen=True)
class RowMap:
    """For each row of the output: `origin` int32[rows], the number of a model, ZERO or MEAN; `row` int64[rows]."""

    origin: NDArray[np.int32]
    row: NDArray[np.int64]

    def is_identity(self, origin: int, rows: int) -> bool:
        """Whether it takes all rows of a model, in their order."""
        same = self.row.size == rows and bool((self.origin == origin).all())
        return same and bool((self.row == np.arange(rows)).all())

    def only(self, origin: int) -> RowMap:
        """The same with zeros wherever a row does not come from this model, which is then number 0."""
        return RowMap(np.where(self.origin == origin, 0, ZERO).astype(np.int32), self.row)


@dataclass(frozen=True)
class RowTable:
    """The maps that a plan knows by their numbers, and the members of each mean (maps of rows that are averaged)."""

    maps: tuple[RowMap, ...]
    means: tuple[RowMap, ...]

    def digest(self) -> str:
        """xxh3-128 (hex) of everything in it."""
        state = xxhash.xxh3_128(f"{len(self.maps)} {len(self.means)}".encode())
        for entry in (*self.maps, *self.means):
            state.update(f" {entry.row.size} ".encode())
            state.update(np.ascontiguousarray(entry.origin, "<i4").tobytes())
            state.update(np.ascontiguousarray(entry.row, "<i8").tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class Rows:
    """The vocabulary of one model: `tokens` that have a row of the embedding, and how many rows there are."""

    tokens: Mapping[str, int]
    count: int

    def spare(self) -> NDArray[np.bool_]:
        """bool[count]: the rows that belong to no token, as padding does."""
        free = np.ones(self.count, np.bool_)
        free[np.fromiter(self.tokens.values(), np.int64, len(self.tokens))] = False
        return free


Origin = tuple[int, int]
"""The number of a model (or ZERO) and a row of it."""


class Mapper:
    """Makes the map of every model for one output vocabulary."""

    def __init__(
        self,
        models: Sequence[Rows],
        tokens: Mapping[str, int],
        rows: int,
        base: int | None,
        donor: int,
        padding: Sequence[int],
        chosen: Mapping[str, Origin],
        forced: frozenset[str],
    ) -> None:
        """
        models   in their order; `base` is the number of the base, `donor` of the model that stands for it without one
        tokens   of the output, with ids below `rows`
        padding  models from which a row without a token is taken if the model itself has none, the first before
        chosen   what the recipe says of tokens: where their rows come from; those of `forced` in every model
        """
        self.models = models
        self.rows = rows
        self.base = base
        self.means: list[RowMap] = []
        self._known: dict[tuple[Origin, ...], int] = {}
        self._spare = [model.spare() for model in models]
        self.origin = np.full(rows, ZERO, np.int32)
        self.row = np.zeros(rows, np.int64)
        """What a model gets where it has nothing of its own."""
        self.own = np.full((len(models), rows), -1, np.int64)
        """The row of each model that means the token of an output row; -1 for none."""
        self.nowhere: list[str] = []
        by_id = {place: token for token, place in tokens.items()}
        places = np.fromiter(by_id, np.int64, len(by_id))
        for number, model in enumerate(models):
            found = (model.tokens.get(token, -1) for token in by_id.values())
            self.own[number, places] = np.fromiter(found, np.int64, len(by_id))
        told = chosen.keys() | forced
        lacking = set(places[(self.own[:, places] < 0).any(axis=0)].tolist())
        for place, token in by_id.items():
            if place in lacking or token in told:
                self._place(token, place, chosen.get(token), token in forced)
        taken = np.zeros(rows, np.bool_)
        taken[places] = True
        self._pad(np.flatnonzero(~taken), padding, donor)

    def maps(self) -> tuple[RowMap, ...]:
        """One map a model."""
        found = []
        for number, own in enumerate(self.own):
            has = own >= 0
            origin = np.where(has, np.int32(number), self.origin).astype(np.int32)
            found.append(RowMap(origin, np.where(has, own, self.row)))
        return tuple(found)

    def _place(self, token: str, place: int, chosen: Origin | None, forced: bool) -> None:
        """The row of a token for models that lack it, or for all of them."""
        own = [model.tokens.get(token, -1) for model in self.models]
        if forced:
            self.own[:, place] = -1
        having = [(number, row) for number, row in enumerate(own) if row >= 0]
        if chosen is None and not having:
            self.nowhere.append(token)
        self.origin[place], self.row[place] = chosen or self._default(having)

    def _default(self, having: list[Origin]) -> Origin:
        """The row for models that lack a token: the base's, else the only one there is, else the mean of all."""
        if len(having) <= 1:
            return having[0] if having else (ZERO, 0)
        of_base = next((one for one in having if one[0] == self.base), None)
        return of_base or (MEAN, self._mean(tuple(having)))

    def _mean(self, members: tuple[Origin, ...]) -> int:
        if members not in self._known:
            self._known[members] = len(self.means)
            origin, row = np.array(members, np.int64).reshape(-1, 2).T
            self.means.append(RowMap(origin.astype(np.int32), row.copy()))
        return self._known[members]

    def _pad(self, places: NDArray[np.int64], padding: Sequence[int], donor: int) -> None:
        """Rows without a token: each model's own where it has such a row there, else another's, else a mean row.

        The mean of all tokens, as an untrained row of zeros would be a logit of 0, more than most tokens get.
        """
        for number, free in enumerate(self._spare):
            here = places[places < free.size]
            here = here[free[here]]
            self.own[number, here] = here
        left = places
        for number in padding:
            here = left[self.own[number, left] >= 0]
            self.origin[here], self.row[here] = number, here
            left = left[self.own[number, left] < 0]
        if left.size:
            used = np.unique(np.fromiter(self.models[donor].tokens.values(), np.int64))
            self.origin[left], self.row[left] = MEAN, self._mean(tuple((donor, row) for row in used.tolist()))


def count_origins(entry: RowMap, number: int, name: Callable[[int], str]) -> dict[str, int]:
    """How many rows of a model's map come from elsewhere, by what they come from."""
    codes, counts = np.unique(entry.origin, return_counts=True)
    words = {ZERO: "zeros", MEAN: "means"}
    return {
        words.get(code) or name(code): count for code, count in zip(codes.tolist(), counts.tolist()) if code != number
    }
