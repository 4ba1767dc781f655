"""Where updates fall: overlap with the base's principal and low-magnitude weights, beside the same update shuffled.

Small weights stand on a finer grid, so that rounding alone puts updates there: a figure means something only beside
that of the null model, in which each update keeps the binade of its weight and loses its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.execute.inputs import cast
from rlmerge.execute.memory import Space
from rlmerge.kernels.plain.hash import hash64

from .decompositions import F64

F32 = NDArray[np.float32]
CHUNK = 2**22
"""Coordinates that are rounded at once."""


@dataclass(frozen=True)
class Mask:
    """A share of the coordinates: those of code 2, and of the ties at the threshold, code 1, so much each."""

    code: NDArray[np.uint8]
    tie: float

    def overlap(self, moved: NDArray[np.bool_]) -> float | None:
        """|mask ∩ moved| / |moved|, its expectation over fair choices among ties; None where nothing moved."""
        count = int(np.count_nonzero(moved))
        if not count:
            return None
        inside, ties = (int(np.count_nonzero((self.code == code) & moved)) for code in (2, 1))
        return (inside + self.tie * ties) / count


def make_mask(size: NDArray[np.floating], share: float, largest: bool) -> Mask:
    """The share of the coordinates with the largest, or smallest, `size` [n] ≥ 0."""
    wanted = share * size.size
    place = min(max(int(np.ceil(wanted)) - 1, 0), size.size - 1)
    place = size.size - 1 - place if largest else place
    threshold = np.partition(size, place)[place]
    code = (size == threshold).astype(np.uint8)
    code[size > threshold if largest else size < threshold] = 2
    ties = int(np.count_nonzero(code == 1))
    inside = int(np.count_nonzero(code == 2))
    return Mask(code, float(np.clip((wanted - inside) / ties, 0.0, 1.0)))


def permute_within_bins(base: F32, delta: F64, key: int) -> F64:
    """The deltas fp64[n] shuffled among coordinates whose base value fp32[n] has the same exponent.

    Exact: every bin keeps its values. Counter-based under `key`; place plays no part, nor does the sign of the base but
    of powers of two, which are bins of their own: towards zero their grid is finer, and such a step would be rounded
    away elsewhere.
    """
    bits = base.view(np.uint32)
    bins = ((bits >> np.uint32(23)) & np.uint32(0xFF)).astype(np.uint16) * np.uint16(3)
    power = (bits & np.uint32(0x7FFFFF)) == 0
    bins[power] += np.uint16(1) + (bits[power] >> np.uint32(31)).astype(np.uint16)
    out = np.empty_like(delta)
    for number in np.flatnonzero(np.bincount(bins)).tolist():
        where = np.flatnonzero(bins == number)
        order = np.argsort(hash64(np.uint64(key), where.astype(np.uint64)))  # hashes of one key never tie
        out[where] = delta[where[order]]
    return out


def stored(
    base: F32, delta: F64, dtype: str | None, kernels: ModuleType, space: Space
) -> tuple[F64, NDArray[np.bool_]]:
    """base + delta fp64[n] rounded to a storage dtype (not at all where None), and which values then differ from base.

    base    fp32[n], representable in the dtype
    """
    if dtype is None:
        return base + delta, delta != 0.0
    out, moved = np.empty(delta.size), np.empty(delta.size, np.bool_)
    for start in range(0, delta.size, CHUNK):
        run = slice(start, min(start + CHUNK, delta.size))
        rounded = space.get("rounded", (run.stop - run.start,), np.float32)
        cast(base[run] + delta[run], dtype, kernels, space, rounded)
        out[run], moved[run] = rounded, rounded != base[run]
    return out, moved


def key_of(*parts: object) -> int:
    """64 bits from a seed and names."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def standard_error(share: float | None, one: int, other: int) -> float | None:
    """Of the difference of two overlaps, one of them the share expected: binomial counts of so many coordinates."""
    if share is None or not one or not other:
        return None
    return float(np.sqrt(share * (1.0 - share) * (1.0 / one + 1.0 / other)))
