"""The null model: what support, overlap and conflict of experts would be if training had chosen coordinates blindly.

Deltas are permuted among the coordinates of a run of their tensor whose base weights have one exponent, each expert
with a permutation of its own, added to the base there and rounded to the expert's dtype. Density and sizes stay, and
what rounding makes of them; which coordinate, and what another expert did there, is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlmerge.execute.blocks import InputBlock, reads_words, reference_of
from rlmerge.execute.inputs import Inputs, cast
from rlmerge.execute.memory import Space
from rlmerge.execute.storing import hash_key
from rlmerge.methods.base import Patch
from rlmerge.plan import TensorPlan

Words = NDArray[np.uint16] | NDArray[np.uint32]
RUN = 2**18
"""Coordinates that a thread handles at once."""
LEAST, PARTS = 2**18, 8
"""Coordinates of a tensor on which the null model is measured at least, and the smallest part of it: one in so many."""
BINS = 768


def part_of(plan: TensorPlan, start: int, size: int, seed: int) -> tuple[int, int]:
    """The part [first, last) of a run that the null model looks at: all of it, or an eighth or more drawn at random.

    The parts are spread evenly over a tensor, so that what changes along it (rows of rare tokens) is in its share.
    """
    parts = min(max(plan.size // LEAST, 1), PARTS)
    if size < parts:
        return 0, size
    length = -(-size // parts)
    first = hash_key(seed, "null part", str(start), plan.known_as) % parts * length
    return min(first, size - length), min(first + length, size)


def null_patches(
    inputs: Inputs, plan: TensorPlan, block: InputBlock, part: tuple[int, int], experts: Sequence[str], seed: int,
    space: Space,
) -> list[Patch]:  # fmt: skip
    """The patches of a part of a block under the null model, over places that no longer are those of the tensor.

    Where all are bf16, stored words are moved; every other mixture is moved as fp32. Powers of two have bins of their
    own, by sign: towards zero their steps are half as large, and such a step would vanish elsewhere.
    """
    keys = [hash_key(seed, "null", f"{key}\0{block.start}", plan.known_as) for key in experts]
    maker = _NullOfWords if reads_words(plan) else _NullOfValues
    return maker(inputs, plan, block, part, keys, space).patches()


def _cut(patch: Patch, first: int, last: int) -> Patch:
    """What of a patch lies in a part, with places from its beginning."""
    low, high = np.searchsorted(patch.where, [first, last])
    return Patch(patch.experts, patch.where[low:high] - np.int32(first), patch.delta[:, low:high])


class _Null:
    """What both kinds share: the order of a block and where each expert's changes go."""

    fraction: int

    def __init__(
        self, inputs: Inputs, plan: TensorPlan, block: InputBlock, part: tuple[int, int], keys: list[int], space: Space
    ) -> None:
        self.inputs, self.plan, self.block, self.keys, self.space = inputs, plan, block, keys, space
        self.kernels = inputs.kernels
        self.part, self.size = slice(*part), part[1] - part[0]
        self.given = [_cut(patch, *part) for patch in block.patches]
        self.place = space.get("null place", (self.size,), np.int32)
        self.first = space.get("null first", (BINS + 1,), np.int64)

    def sort(
        self, bits: NDArray[np.uint16] | NDArray[np.uint32], ordered: NDArray[np.uint16] | NDArray[np.uint32]
    ) -> None:
        """Orders the block by the exponents of these words."""
        self.bits = bits
        self.kernels.sort_by_exponent(bits, self.fraction, self.place, ordered, self.first)

    def moves(self, expert: int) -> list[tuple[NDArray[np.float64], NDArray[np.int32]]]:
        """The deltas of an expert with the places that they go to."""
        factor, shift = (self.space.get(f"null {part}", (BINS,), np.int64) for part in ("factor", "shift"))
        self.kernels.draw_permutations(self.first, np.uint64(self.keys[expert]), factor, shift)
        found = []
        for number, patch in enumerate(self.given):
            for row in np.flatnonzero(patch.experts == expert).tolist():
                to = self.space.get(f"null to {number}", (patch.where.size,), np.int32)
                self.kernels.targets(patch.where, self.bits, self.fraction, self.place, self.first, factor, shift, to)
                found.append((patch.delta[row], to))
        return found

    def gather(
        self, places: NDArray[np.int32], counts: NDArray[np.int64], deltas: list[NDArray[np.float64]]
    ) -> list[Patch]:
        """Patches from places by owner, as a block makes them."""
        every = np.arange(len(self.keys))
        groups = [*(every[k : k + 1] for k in every), every]
        return [
            Patch(group, places[row, : counts[row]], deltas[row]) for row, group in enumerate(groups) if counts[row]
        ]


class _NullOfWords(_Null):
    """Models that are bf16 throughout."""

    fraction = 7

    def patches(self) -> list[Patch]:
        """Moves the deltas, rounds, and compares the words."""
        count, size = len(self.keys), self.size
        words = self.space.get("null words", (1 + count, size), np.uint16)
        self.sort(self.block.words(0)[self.part], words[0])
        for k in range(count):
            words[1 + k] = words[0]
            for delta, to in self.moves(k):
                values = self.space.get("null values", to.shape, np.float64)
                moved = self.space.get("null moved", to.shape, np.uint16)
                self.kernels.take_bf16(words[0], to, values)
                np.add(values, delta, values)
                self.kernels.encode_bf16(values, moved)
                self.kernels.put(moved, to, words[1 + k])
        places = self.space.get("null places", (count + 1, size + 8), np.int32)
        counts = np.zeros(count + 1, np.int64)
        alone = self.space.get("null alone", (count, size), np.float64)
        several = self.space.get("null several", (count * size,), np.float64)
        self.kernels.patches_bf16(words, places, counts, alone, several)
        shared = int(counts[-1])
        together = several[: count * shared].reshape(count, shared)
        return self.gather(places, counts, [*(alone[k : k + 1, : counts[k]] for k in range(count)), together])


class _NullOfValues(_Null):
    """Every other mixture of dtypes, and adapters, whose deltas are not rounded."""

    fraction = 23

    def patches(self) -> list[Patch]:
        """Moves the deltas of fp32 values; the order is that of the base in the narrowest dtype that an expert has."""
        plan, size, count = self.plan, self.size, len(self.keys)
        kinds = ["zeros" if s.kind in ("low_rank", "sum") else reference_of(plan, s) for s in plan.experts]
        rows = list(dict.fromkeys(["base", *kinds]))
        reference = self.space.get("null reference", (len(rows), size), np.float32)
        for row, kind in enumerate(rows):
            self._reference(kind, reference[row])
        narrow = next((rows.index(dtype) for dtype in ("BF16", "F16") if dtype in rows), 0)
        ordered = self.space.get("null ordered", (len(rows), size), np.float32)
        self.sort(reference[narrow].view(np.uint32), ordered[narrow].view(np.uint32))
        for row in range(len(rows)):
            if row != narrow:
                self.kernels.put(reference[row], self.place, ordered[row])
        values = self.space.get("null values", (count, size), np.float32)
        which = np.array([rows.index(kind) for kind in kinds], np.int64)
        for k, kind in enumerate(kinds):
            values[k] = ordered[which[k]]
            source = plan.experts[k].place
            stored = "F32" if kind == "zeros" or source is None else source.dtype
            for delta, to in self.moves(k):
                # zeros in a patch of several are no change; a sum with them would be rounded, where the base is wider
                self._move(delta[delta != 0.0], to[delta != 0.0], ordered[which[k]], stored, values[k])
        additive = np.array([kind == "zeros" for kind in kinds])
        compared = ordered[0], values, ordered, which, additive, 0.0
        places = self.space.get("null places", (count + 1, size + 8), np.int32)
        counts = np.zeros(count + 1, np.int64)
        self.kernels.changes(*compared, places, counts)
        deltas = []
        for row, number in enumerate(counts.tolist()):
            experts = np.arange(count) if row == count else np.arange(row, row + 1)
            deltas.append(np.empty((len(experts), number)))
            self.kernels.deltas(*compared, experts, places[row, :number], deltas[row])
        return self.gather(places, counts, deltas)

    def _reference(self, kind: str, out: NDArray[np.float32]) -> None:
        if kind == "zeros":
            out[:] = 0.0
        elif kind == "base":
            out[:] = self.block.base[self.part]
        else:
            cast(self.block.base[self.part].astype(np.float64), kind, self.kernels, self.space, out)

    def _move(
        self, delta: NDArray[np.float64], to: NDArray[np.int32], reference: NDArray[np.float32], dtype: str,
        out: NDArray[np.float32],
    ) -> None:  # fmt: skip
        values = np.empty(to.size)
        self.kernels.take(reference, to, values)
        values += delta
        stored = np.empty(to.size, np.float32)
        cast(values, dtype, self.kernels, self.space, stored)
        self.kernels.put(stored, to, out)
