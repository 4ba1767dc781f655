"""The null model's permutation: coordinates in the order of their exponents, and where each change goes.

Within a bin of m coordinates, rank r goes to (r·a + s) mod m: a permutation for every a without a common factor with m.
With s uniform, any two coordinates meet as often as chance has it, so what supports share after it has no bias.
"""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel
from .hash import hash64

BINS = 768


@inlined
def _bin(word, fraction):
    """Three times the exponent, and 1 or 2 more for a power of two, by its sign: steps towards zero are half as large
    there, and such a step would vanish elsewhere.
    """
    wide = np.uint32(word)
    shifted = wide >> fraction
    power = np.int64((wide & ((np.uint32(1) << fraction) - np.uint32(1))) == np.uint32(0))
    return np.int64(shifted & np.uint32(0xFF)) * 3 + power * (1 + np.int64(shifted >> np.uint32(8)))


@inlined
def _append(bits, j, shift, cursor, place, ordered):
    b = _bin(bits[j], shift)
    spot = cursor[b]
    cursor[b] = spot + np.int32(1)
    place[j] = spot
    ordered[np.uint32(spot)] = bits[j]


@kernel
def sort_by_exponent(bits, fraction, place, ordered, first):
    """Orders words uint16 (bf16, fraction 7) or uint32 (fp32, 23) by exponent; powers of two stand apart, by sign.

    Fills place int32[n] (where each goes), ordered (the words in that order; equal bins keep theirs) and first
    int64[769] (where each bin begins).
    """
    cursor = np.zeros((4, BINS), np.int32)
    shift = np.uint32(fraction)
    size = bits.shape[0]
    quarter = size // 4
    # four runs at a time: neighbours are often of one bin, and would wait for each other
    for i in range(quarter):
        for row in range(4):
            cursor[row, _bin(bits[row * quarter + i], shift)] += 1
    for j in range(4 * quarter, size):
        cursor[3, _bin(bits[j], shift)] += 1
    at = 0
    for b in range(BINS):
        first[b] = at
        for row in range(4):
            number = cursor[row, b]
            cursor[row, b] = at
            at += number
    first[BINS] = at
    for i in range(quarter):
        for row in range(4):
            _append(bits, row * quarter + i, shift, cursor[row], place, ordered)
    for j in range(4 * quarter, size):
        _append(bits, j, shift, cursor[3], place, ordered)


@kernel
def draw_permutations(first, key, factor, shift):
    """Draws a and s of every bin for one expert, into factor and shift int64[768]."""
    for b in range(BINS):
        size = first[b + 1] - first[b]
        factor[b] = 1
        shift[b] = 0
        if size < 2:
            continue
        shift[b] = np.int64(hash64(key, np.uint64(b)) % np.uint64(size))
        tried = BINS
        while True:
            found = np.int64(hash64(key, np.uint64(tried + b)) % np.uint64(size))
            one, other = found, size
            while other:
                one, other = other, one % other
            if one == 1:
                break
            tried += BINS
        factor[b] = found


@kernel
def targets(where, bits, fraction, place, first, factor, shift, out):
    """Where the null model puts the changes at `where` int32[m], as places among the ordered words, int32[m]."""
    inverse = np.empty(BINS, np.float64)
    for b in range(BINS):
        inverse[b] = 1.0 / np.float64(max(first[b + 1] - first[b], 1))
    moved = np.uint32(fraction)
    for j in range(where.shape[0]):
        i = np.uint32(where[j])
        b = _bin(bits[i], moved)
        start = first[b]
        product = (np.int64(place[i]) - start) * factor[b] + shift[b]
        # the exact quotient: half a unit is more than what the product loses, and less than what is to the next integer
        whole = np.int64((np.float64(product) + 0.5) * inverse[b])
        out[j] = np.int32(start + product - whole * (first[b + 1] - start))


@kernel
def put(values, where, out):
    """out[where] = values."""
    spot = where.view(np.uint32)
    for j in range(spot.shape[0]):
        out[spot[j]] = values[j]
