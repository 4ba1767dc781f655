"""The end of a merge: values are rounded once and put where they belong, and what the rounding left is measured."""

from __future__ import annotations

import numpy as np

from ._jit import helper, kernel
from .codec import decode_bf16, decode_f16, encode_bf16, encode_f16, encode_f32

TILE = 2048
RESIDUE = 2.0**-48


@helper
def _compare(base, stored_base, intended, stored, counts, sums):
    """Adds to counts (intended updates, those that survive) and, in coordinate order, to sums."""
    wanted = 0
    survived = 0
    square = sums[0]
    real_square = sums[1]
    product = sums[2]
    for j in range(base.shape[0]):
        update = intended[j] - base[j]
        # what is left of Σ w·θ where deltas cancel is rounding and no update: no stored change is that small
        update = update if abs(update) > RESIDUE * abs(base[j]) else 0.0
        real = np.float64(stored[j]) - stored_base[j]
        wanted += update != 0.0
        survived += (update != 0.0) & (real != 0.0)
        square += update * update
        real_square += real * real
        product += update * real
    counts[0] += wanted
    counts[1] += survived
    sums[0] = square
    sums[1] = real_square
    sums[2] = product


@kernel
def settle_bf16(base, intended, values, where, out, counts, sums):
    """Stores new values fp64[m] as bf16 words at `where` in out uint16[n], and says what is left of the updates.

    base fp64[m] holds the old values, exact in bf16; intended fp64[m] the new ones before a stochastic rounding, if
    there was one. Adds to counts and sums as `realised`. Returns how many results are NaN or infinite.
    """
    words = np.empty(TILE, np.uint16)
    stored = np.empty(TILE, np.float32)
    sum_ = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_bf16(some, words[:size])
        decode_bf16(words[:size], stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, sum_)
        for j in range(size):
            out[where[first + j]] = words[j]
    for place in range(3):
        sums[place] += sum_[place]
    return bad


@kernel
def settle_f16(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for fp16."""
    words = np.empty(TILE, np.uint16)
    stored = np.empty(TILE, np.float32)
    sum_ = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_f16(some, words[:size])
        decode_f16(words[:size], stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, sum_)
        for j in range(size):
            out[where[first + j]] = words[j]
    for place in range(3):
        sums[place] += sum_[place]
    return bad


@kernel
def settle_f32(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for out fp32[n]."""
    stored = np.empty(TILE, np.float32)
    sum_ = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_f32(some, stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, sum_)
        for j in range(size):
            out[where[first + j]] = stored[j]
    for place in range(3):
        sums[place] += sum_[place]
    return bad


@kernel
def realised(base, stored_base, intended, stored, counts, sums):
    """Compares intended updates with those that the stored values make.

    base fp64[m] as read, stored_base fp64[m] cast to the output dtype, intended fp64[m] the values before the cast,
    stored fp32[m] after it. Adds to counts int64[2] (intended non-zero updates, those that still differ from the base)
    and to sums fp64[3] (Σ intended², Σ realised², Σ intended·realised), in coordinate order.
    """
    sum_ = np.zeros(3, np.float64)
    _compare(base, stored_base, intended, stored, counts, sum_)
    for place in range(3):
        sums[place] += sum_[place]
