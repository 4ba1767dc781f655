"""The null model's permutation in NumPy (definitions: `compiled.shuffle`)."""

from __future__ import annotations

import math

import numpy as np

from .hash import hash64

BINS = 768


def _bins(words, fraction):
    wide = words.astype(np.int64)
    power = (wide & ((1 << fraction) - 1)) == 0
    return ((wide >> fraction) & 0xFF) * 3 + power * (1 + (wide >> (fraction + 8)))


def sort_by_exponent(bits, fraction, place, ordered, first):
    """Orders words by their exponents; powers of two stand apart, by sign."""
    bins = _bins(bits, fraction)
    order = np.argsort(bins, kind="stable")
    place[order] = np.arange(bits.size)
    ordered[:] = bits[order]
    first[:] = np.searchsorted(bins[order], np.arange(BINS + 1))


def draw_permutations(first, key, factor, shift):
    """Draws a and s of every bin for one expert."""
    factor[:], shift[:] = 1, 0
    for b in np.flatnonzero(np.diff(first) > 1).tolist():
        size = int(first[b + 1] - first[b])
        shift[b] = int(hash64(key, np.array([b], np.uint64))[0]) % size
        tried = BINS
        while True:
            found = int(hash64(key, np.array([tried + b], np.uint64))[0]) % size
            if math.gcd(found, size) == 1:
                break
            tried += BINS
        factor[b] = found


def targets(where, bits, fraction, place, first, factor, shift, out):
    """Where the null model puts the changes at `where`."""
    bins = _bins(bits[where], fraction)
    start = first[bins]
    out[:] = start + ((place[where] - start) * factor[bins] + shift[bins]) % (first[bins + 1] - start)


def put(values, where, out):
    """out[where] = values."""
    out[where] = values
