"""Random cuts, in NumPy (definitions: `compiled.draw`)."""

from __future__ import annotations

import numpy as np

from .hash import hash64


def draw(values, chance, keys, start, where, inverse, kept):
    """Keeps each value with its chance."""
    places = where.astype(np.uint64) + np.uint64(start)
    for e, value in enumerate(values):
        own = np.broadcast_to(chance[e], value.shape)
        uniform = (hash64(keys[e], places) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        keep = (value != 0.0) & (uniform < own)
        kept[e] += np.count_nonzero(keep)
        value[~keep] = 0.0
        if inverse:
            value[keep] = value[keep] / own[keep]


def row_ranks(where, values, others_where, others, length, stride, of_support, out, others_out):
    """Ranks of the non-zero magnitudes of one expert within their rows."""
    every, size = np.concatenate([where, others_where]).astype(np.int64), np.abs(np.concatenate([values, others]))
    rank = np.zeros(size.size)
    chosen = np.flatnonzero(size)
    at, size = every[chosen], size[chosen]
    row = at // (length * stride) * stride + at % stride
    order = np.lexsort((size, row))
    row, value = row[order], size[order]
    index = np.arange(at.size)
    # first and last place, in the sorted list, of the row and of the magnitude that each entry belongs to
    starts = np.r_[True, row[1:] != row[:-1]][: at.size]
    begins = starts | np.r_[True, value[1:] != value[:-1]][: at.size]
    own = np.maximum.accumulate(np.where(starts, index, 0))
    low = np.maximum.accumulate(np.where(begins, index, 0)) - own
    ends = np.r_[begins[1:], True][: at.size]
    high = np.minimum.accumulate(np.where(ends, index, at.size)[::-1])[::-1] - own
    number = (np.minimum.accumulate(np.where(np.r_[starts[1:], True][: at.size], index, at.size)[::-1])[::-1] - own) + 1
    zeros = np.zeros_like(number) if of_support else length - number
    steps = (number if of_support else np.full_like(number, length)) - 1
    some = steps > 0
    found = np.full(at.size, 0.5)
    found[some] = (zeros[some] + (low[some] + high[some]) / 2.0) / steps[some]
    rank[chosen[order]] = found
    out[:], others_out[:] = rank[: where.size], rank[where.size :]
