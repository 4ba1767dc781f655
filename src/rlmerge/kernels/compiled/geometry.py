"""What training did, on a patch: sizes of changes, steps in units in the last place, and what pairs of experts share.

Every sum runs in eight interleaved lanes, as everywhere, so that the plain twin has the same bits.
"""

from __future__ import annotations

import numpy as np

from ._jit import helper, inlined, kernel
from .trim import in_pairs

TILE = 2048
BF16, F16, F32 = 0, 1, 2
"""Forms of stored values, for `sizes`."""


@inlined
def _ordered(value, bits, form):
    """A stored value as an integer that grows by one from each value of its dtype to the next (both zeros are 0)."""
    size = np.int64(bits & np.uint32(0x7FFFFFFF))
    if form == BF16:
        size >>= 16
    elif form == F16:
        small = np.int64(abs(value) * np.float32(2.0**24))  # below 2^-14 values are multiples of 2^-24
        size = (size - (112 << 23)) >> 13 if size >= (113 << 23) else small
    return -size if bits >> np.uint32(31) else size


@inlined
def _nearest_bf16(bits):
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@helper
def _count_steps(old, new, form, steps):
    """Histogram of |ordered(new) - ordered(old)| in powers of two; returns how many change as bf16."""
    one, other = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    left, right = one.view(np.uint32), other.view(np.uint32)
    size = np.empty(TILE, np.float64)
    exponent = size.view(np.uint64)
    bins = np.zeros((4, 2048), np.int64)
    cast = 0
    for first in range(0, old.shape[0], TILE):
        number = min(TILE, old.shape[0] - first)
        before = old[first : first + number]
        after = new[first : first + number]
        for j in range(number):
            one[j] = np.float32(before[j]) + np.float32(0.0)
            other[j] = np.float32(after[j]) + np.float32(0.0)
        if form == BF16:
            for j in range(number):
                low = np.int32(left[j] & np.uint32(0x7FFFFFFF)) >> np.int32(16)
                high = np.int32(right[j] & np.uint32(0x7FFFFFFF)) >> np.int32(16)
                low = -low if left[j] >> np.uint32(31) else low
                high = -high if right[j] >> np.uint32(31) else high
                size[j] = np.float64(abs(high - low))
        else:
            for j in range(number):
                size[j] = np.float64(abs(_ordered(other[j], right[j], form) - _ordered(one[j], left[j], form)))
                # zeros of either sign are one value, also those that the rounding makes
                low, high = _nearest_bf16(left[j]), _nearest_bf16(right[j])
                cast += np.int64((low != high) & (((low | high) & np.uint32(0x7FFF)) != np.uint32(0)))
        for j in range(number):
            bins[j & 3, exponent[j] >> np.uint64(52)] += 1
    for place in range(1, steps.shape[0]):
        some = 0
        for row in range(4):
            some += bins[row, 1022 + place]
        steps[place] += some
        if form == BF16:
            cast += some
    return cast


@kernel
def sizes(old, new, delta, form, absolute, relative, above, steps):
    """Counts the changes fp64[m] of one expert that exceed thresholds, and how many steps they are.

    old, new   fp64[m], the values as stored in a dtype: form 0 bf16, 1 fp16, 2 fp32
    above      int64[A + B]: |δ| > absolute[a], then |δ| > relative[b]·max(|old|, |new|)
    steps      int64[34]: steps[1 + e] counts changes by 2^e up to 2^(e + 1) - 1 units in the last place
    Returns how many change when both are cast to bf16.
    """
    change = np.empty(TILE, np.float64)
    larger = np.empty(TILE, np.float64)
    for first in range(0, delta.shape[0], TILE):
        number = min(TILE, delta.shape[0] - first)
        some = delta[first : first + number]
        before = old[first : first + number]
        after = new[first : first + number]
        for j in range(number):
            change[j] = abs(some[j])
            larger[j] = max(abs(before[j]), abs(after[j]))
        for place in range(absolute.shape[0]):
            bound = absolute[place]
            found = 0
            for j in range(number):
                found += np.int64(change[j] > bound)
            above[place] += found
        for place in range(relative.shape[0]):
            bound = relative[place]
            found = 0
            for j in range(number):
                found += np.int64(change[j] > bound * larger[j])
            above[absolute.shape[0] + place] += found
    return _count_steps(old, new, form, steps)


@helper
def _add(values, number, lane, rest, place):
    even = number - number % 8
    for i in range(0, even, 8):
        for j in range(8):
            lane[place, j] += values[i + j]
    for i in range(even, number):
        rest[place] += values[i]


@helper
def _pair(one, other, overlap, conflict, sums):
    """One pair of rows: see `pairs`."""
    lane = np.zeros((7, 8), np.float64)
    rest = np.zeros(7, np.float64)
    terms = np.empty((7, TILE), np.float64)
    for first in range(0, one.shape[0], TILE):
        number = min(TILE, one.shape[0] - first)
        left = one[first : first + number]
        right = other[first : first + number]
        both = 0
        opposed = 0
        for j in range(number):
            product = left[j] * right[j]
            shared = (left[j] != 0.0) & (right[j] != 0.0)
            apart = shared & ((left[j] > 0.0) != (right[j] > 0.0))
            smaller = min(abs(left[j]), abs(right[j]))
            both += np.int64(shared)
            opposed += np.int64(apart)
            terms[0, j] = product
            terms[1, j] = left[j] * left[j] if shared else 0.0
            terms[2, j] = right[j] * right[j] if shared else 0.0
            terms[3, j] = smaller
            terms[4, j] = smaller if apart else 0.0
            terms[5, j] = product * product
            terms[6, j] = product * product if apart else 0.0
        overlap += both
        conflict += opposed
        for place in range(7):
            _add(terms[place], number, lane, rest, place)
    for place in range(7):
        sums[place] += in_pairs(lane[place]) + rest[place]
    return overlap, conflict


@kernel
def pairs(delta, overlap, conflict, sums):
    """What each pair of experts has in common, from deltas fp64[K, m] where several changed something.

    Adds to overlap and conflict int64[K, K] (upper triangle) and to sums fp64[K, K, 7]: over the overlap Σ δaδb, Σ δa²,
    Σ δb², Σ min(|δa|, |δb|), the same over conflicts, Σ (δaδb)², the same over conflicts.
    """
    for k in range(delta.shape[0]):
        for other in range(k):
            found = _pair(delta[other], delta[k], 0, 0, sums[other, k])
            overlap[other, k] += found[0]
            conflict[other, k] += found[1]


@kernel
def changers(delta, number, agreement):
    """How many experts change a coordinate, from deltas fp64[K, m]: adds to number int64[K + 1].

    Adds to agreement int64[1] the coordinates that several change, all of them in one direction.
    """
    up = np.empty(TILE, np.int32)
    down = np.empty(TILE, np.int32)
    count = delta.shape[0]
    for first in range(0, delta.shape[1], TILE):
        size = min(TILE, delta.shape[1] - first)
        up[:] = 0
        down[:] = 0
        for k in range(count):
            some = delta[k, first : first + size]
            for j in range(size):
                up[j] += np.int32(some[j] > 0.0)
                down[j] += np.int32(some[j] < 0.0)
        agreed = 0
        for j in range(size):
            agreed += np.int64((up[j] + down[j] > 1) & ((up[j] == 0) | (down[j] == 0)))
        agreement[0] += agreed
        for wanted in range(count + 1):
            found = 0
            for j in range(size):
                found += np.int64(up[j] + down[j] == wanted)
            number[wanted] += found
