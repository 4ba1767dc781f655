"""Random cuts: ranks of magnitudes within rows, and the draw that keeps an update or drops it."""

from __future__ import annotations

import numpy as np

from ._jit import helper, kernel
from .hash import hash64

FEW = 128
"""Magnitudes of a row that are told apart by a table; rows with more are sorted."""
SLOT_BITS = 9
SLOTS = 2**SLOT_BITS


@kernel
def draw(values, chance, keys, start, where, inverse, kept):
    """Keeps each value of fp64[E, m], in place, with its chance fp64[E, m] or [E, 1]; what is not kept becomes 0.

    The random number of coordinate start + where[j] of row e is its hash under keys[e], in [0, 1). With `inverse`, what
    is kept is divided by its chance. Adds to kept int64[E] how many non-zero values stay.
    """
    shared = chance.shape[1] == 1
    for e in range(values.shape[0]):
        value = values[e]
        number = 0
        for j in range(value.shape[0]):
            own = chance[e, 0 if shared else j]
            uniform = np.float64(hash64(keys[e], np.uint64(start + where[j])) >> np.uint64(11)) * 2.0**-53
            keep = (value[j] != 0.0) & (uniform < own)
            number += keep
            if keep:
                value[j] = value[j] / own if inverse else value[j]
            else:
                value[j] = 0.0
        kept[e] += number


@helper
def _ranks_by_sorting(size, number, zeros, steps, out):
    """Mid-ranks of size fp64[number] into out fp64[number], whatever the values."""
    order = np.argsort(size[:number])
    low = 0
    while low < number:
        high = low
        while high + 1 < number and size[order[high + 1]] == size[order[low]]:
            high += 1
        rank = (zeros + (low + high) / 2.0) / steps if steps > 0 else 0.5
        for i in range(low, high + 1):
            out[order[i]] = rank
        low = high + 1


@helper
def _sort_classes(value, number, order):
    """Places of value fp64[number] in ascending order, by insertion: there are few."""
    for i in range(number):
        at = i
        while at > 0 and value[order[at - 1]] > value[i]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@kernel
def row_ranks(where, values, others_where, others, length, stride, of_support, out, others_out):
    """Ranks in [0, 1] of the non-zero magnitudes of one expert within their rows; 0 for what is 0.

    Its deltas are fp64[m] at where int32[m], ascending, and more of them in a second such list; the ranks go to out and
    others_out. A row is `length` coordinates at a distance of `stride`; a block begins with a row. The smallest of a
    row has rank 0, the largest 1; zeros come first, or with `of_support` do not count. Equal magnitudes share the
    middle of their places; a row of one has the rank 1/2.
    """
    size = np.empty(length, np.float64)
    bits = size.view(np.uint64)
    place = np.empty(length, np.int64)
    rank = np.empty(length, np.float64)
    # bf16 deltas of a row have few magnitudes: each is found once, in a table by hash, and only these are sorted
    class_of = np.empty(length, np.int64)
    key = np.empty(SLOTS, np.uint64)
    owner = np.empty(SLOTS, np.int64)
    filled = np.zeros(SLOTS, np.int64)
    value = np.empty(FEW, np.float64)
    count = np.empty(FEW, np.int64)
    order = np.empty(FEW, np.int64)
    of_class = np.empty(FEW, np.float64)
    span = length * stride
    first = 0
    second = 0
    stamp = 0
    while first < where.shape[0] or second < others_where.shape[0]:
        group = np.int64(2**62)
        if first < where.shape[0]:
            group = where[first] // span
        if second < others_where.shape[0]:
            group = min(group, others_where[second] // span)
        end = (group + 1) * span
        last = first
        while last < where.shape[0] and where[last] < end:
            last += 1
        other_last = second
        while other_last < others_where.shape[0] and others_where[other_last] < end:
            other_last += 1
        for column in range(stride):
            number = 0
            for j in range(first, last):
                if stride == 1 or where[j] % stride == column:
                    out[j] = 0.0
                    size[number] = abs(values[j])
                    place[number] = j
                    number += values[j] != 0.0
            own = number
            for j in range(second, other_last):
                if stride == 1 or others_where[j] % stride == column:
                    others_out[j] = 0.0
                    if others[j] != 0.0:
                        size[number] = abs(others[j])
                        place[number] = j
                        number += 1
            zeros = 0 if of_support else length - number
            steps = (number if of_support else length) - 1
            stamp += 1
            classes = 0
            for i in range(number):
                slot = np.int64((bits[i] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - SLOT_BITS))
                while filled[slot] == stamp and key[slot] != bits[i]:
                    slot = (slot + 1) & (SLOTS - 1)
                if filled[slot] != stamp:
                    if classes == FEW:
                        classes += 1
                        break
                    filled[slot] = stamp
                    key[slot] = bits[i]
                    owner[slot] = classes
                    value[classes] = size[i]
                    count[classes] = 0
                    classes += 1
                class_of[i] = owner[slot]
                count[owner[slot]] += 1
            if classes > FEW:
                _ranks_by_sorting(size, number, zeros, steps, rank)
            else:
                _sort_classes(value, classes, order)
                low = 0
                for i in range(classes):
                    high = low + count[order[i]] - 1
                    of_class[order[i]] = (zeros + (low + high) / 2.0) / steps if steps > 0 else 0.5
                    low = high + 1
                for i in range(number):
                    rank[i] = of_class[class_of[i]]
            for i in range(own):
                out[place[i]] = rank[i]
            for i in range(own, number):
                others_out[place[i]] = rank[i]
        first = last
        second = other_last
