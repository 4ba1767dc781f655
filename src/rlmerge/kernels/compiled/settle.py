"""The end of a merge: values are rounded once and put where they belong, and what the rounding left is measured."""

from __future__ import annotations

import numpy as np

from ._jit import helper, kernel
from .codec import decode_bf16, decode_f16, encode_bf16, encode_f16, encode_f32
from .trim import in_pairs

TILE = 2048
RESIDUE = 2.0**-48


@helper
def _add_products(left, right, size, lane, rest, place):
    even = size - size % 8
    for i in range(0, even, 8):
        for j in range(8):
            lane[j] += left[i + j] * right[i + j]
    for i in range(even, size):
        rest[place] += left[i] * right[i]


@helper
def _compare(base, stored_base, intended, stored, counts, lane, rest):
    """Adds to counts (intended updates, those that survive) and to sums in eight interleaved lanes, fp64[3, 8].

    The last few, which fill no group of eight, go to rest fp64[3]; all calls but the last have multiples of eight.
    """
    update = np.empty(TILE, np.float64)
    real = np.empty(TILE, np.float64)
    for first in range(0, base.shape[0], TILE):
        old = base[first : first + TILE]
        new = intended[first : first + TILE]
        was = stored_base[first : first + TILE]
        now = stored[first : first + TILE]
        size = old.shape[0]
        for j in range(size):
            moved = new[j] - old[j]
            # what is left of Σ w·θ where deltas cancel is rounding and no update: no stored change is that small
            update[j] = moved if abs(moved) > RESIDUE * abs(old[j]) else 0.0
            real[j] = np.float64(now[j]) - was[j]
        wanted = 0
        survived = 0
        for j in range(size):
            wanted += np.int64(update[j] != 0.0)
            survived += np.int64((update[j] != 0.0) & (real[j] != 0.0))
        counts[0] += wanted
        counts[1] += survived
        _add_products(update, update, size, lane[0], rest, 0)
        _add_products(real, real, size, lane[1], rest, 1)
        _add_products(update, real, size, lane[2], rest, 2)


@helper
def _add_lanes(lane, rest, sums):
    for place in range(3):
        sums[place] += in_pairs(lane[place]) + rest[place]


@kernel
def settle_bf16(base, intended, values, where, out, counts, sums):
    """Stores new values fp64[m] as bf16 words at `where` in out uint16[n], and says what is left of the updates.

    base fp64[m] holds the old values, exact in bf16; intended fp64[m] the new ones before a stochastic rounding, if
    there was one. Adds to counts and sums as `realised`. Returns how many results are NaN or infinite.
    """
    words = np.empty(TILE, np.uint16)
    stored = np.empty(TILE, np.float32)
    lane = np.zeros((3, 8), np.float64)
    rest = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_bf16(some, words[:size])
        decode_bf16(words[:size], stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, lane, rest)
        spot = where[first : first + size].view(np.uint32)
        for j in range(size):
            out[spot[j]] = words[j]
    _add_lanes(lane, rest, sums)
    return bad


@kernel
def add_bf16(update, gain, scale, where, out, counts, sums):
    """Adds scale·(gain·t), t fp64[m], to the bf16 words at `where` in out uint16[n], rounding once; else `settle_bf16`.

    The words there are those of the base.
    """
    words = np.empty(TILE, np.uint16)
    old_words = np.empty(TILE, np.uint16)
    stored = np.empty(TILE, np.float32)
    old = np.empty(TILE, np.float64)
    new = np.empty(TILE, np.float64)
    lane = np.zeros((3, 8), np.float64)
    rest = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, update.shape[0], TILE):
        some = update[first : first + TILE]
        spot = where[first : first + TILE].view(np.uint32)
        size = some.shape[0]
        for j in range(size):
            old_words[j] = out[spot[j]]
        decode_bf16(old_words[:size], stored[:size])
        for j in range(size):
            old[j] = np.float64(stored[j])
            new[j] = old[j] + scale * (gain * some[j])
        bad += encode_bf16(new[:size], words[:size])
        decode_bf16(words[:size], stored[:size])
        _compare(old[:size], old[:size], new[:size], stored[:size], counts, lane, rest)
        for j in range(size):
            out[spot[j]] = words[j]
    _add_lanes(lane, rest, sums)
    return bad


@kernel
def linear_bf16(words, weight, out):
    """Σ weight[k]·θk of stored bf16 words uint16[K, n], rounded once, as words to out uint16[n]; sums as `linear`.

    Returns how many inputs and results are NaN or infinite.
    """
    single = np.empty(TILE, np.float32)
    sum_ = np.empty(TILE, np.float64)
    bad = 0
    for first in range(0, out.shape[0], TILE):
        size = min(TILE, out.shape[0] - first)
        sum_[:] = 0.0
        for k in range(words.shape[0]):
            bad += decode_bf16(words[k, first : first + size], single[:size])
            factor = weight[k]
            if factor != 0.0:
                for i in range(size):
                    sum_[i] += factor * np.float64(single[i])
        bad += encode_bf16(sum_[:size], out[first : first + size])
    return bad


@kernel
def settle_f16(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for fp16."""
    words = np.empty(TILE, np.uint16)
    stored = np.empty(TILE, np.float32)
    lane = np.zeros((3, 8), np.float64)
    rest = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_f16(some, words[:size])
        decode_f16(words[:size], stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, lane, rest)
        spot = where[first : first + size].view(np.uint32)
        for j in range(size):
            out[spot[j]] = words[j]
    _add_lanes(lane, rest, sums)
    return bad


@kernel
def settle_f32(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for out fp32[n]."""
    stored = np.empty(TILE, np.float32)
    lane = np.zeros((3, 8), np.float64)
    rest = np.zeros(3, np.float64)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        size = min(TILE, values.shape[0] - first)
        some = values[first : first + size]
        old = base[first : first + size]
        bad += encode_f32(some, stored[:size])
        _compare(old, old, intended[first : first + size], stored, counts, lane, rest)
        spot = where[first : first + size].view(np.uint32)
        for j in range(size):
            out[spot[j]] = stored[j]
    _add_lanes(lane, rest, sums)
    return bad


@kernel
def realised(base, stored_base, intended, stored, counts, sums):
    """Compares intended updates with those that the stored values make.

    base fp64[m] as read, stored_base fp64[m] cast to the output dtype, intended fp64[m] the values before the cast,
    stored fp32[m] after it. Adds to counts int64[2] (intended non-zero updates, those that still differ from the base)
    and to sums fp64[3] (Σ intended², Σ realised², Σ intended·realised), in eight interleaved lanes.
    """
    lane = np.zeros((3, 8), np.float64)
    rest = np.zeros(3, np.float64)
    _compare(base, stored_base, intended, stored, counts, lane, rest)
    _add_lanes(lane, rest, sums)
