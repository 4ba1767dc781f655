"""What training did, on a patch, in NumPy (definitions: `compiled.geometry`)."""

from __future__ import annotations

import numpy as np

from .codec import encode_bf16, encode_f16
from .lanes import sum_in_lanes


def _ordered(values, form):
    """Stored values as integers in their order; both zeros are 0."""
    single = values.astype(np.float32)
    if form == 2:
        words, sign = single.view(np.uint32), np.uint32(0x80000000)
    else:
        words, sign = np.empty(values.shape, np.uint16), np.uint16(0x8000)
        (encode_bf16, encode_f16)[form](values, words)
    size = (words & ~sign).astype(np.int64)
    return np.where(words & sign, -size, size)


def sizes(old, new, delta, form, absolute, relative, above, steps):
    """Counts changes above thresholds and their steps; returns how many change as bf16."""
    change = np.abs(delta)
    larger = np.maximum(np.abs(old), np.abs(new))
    above += [np.count_nonzero(change > bound) for bound in absolute] + [
        np.count_nonzero(change > bound * larger) for bound in relative
    ]
    apart = np.abs(_ordered(new, form) - _ordered(old, form))
    exponent = np.frexp(apart[apart > 0].astype(np.float64))[1]
    steps += np.bincount(exponent, minlength=len(steps))
    return int(np.count_nonzero(_ordered(_as_bf16(old), 0) != _ordered(_as_bf16(new), 0)))


def _as_bf16(values):
    words = np.empty(values.shape, np.uint16)
    encode_bf16(values, words)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def pairs(delta, overlap, conflict, sums):
    """What each pair of experts has in common."""
    for k in range(len(delta)):
        for other in range(k):
            a, b = delta[other], delta[k]
            product = a * b
            shared = (a != 0) & (b != 0)
            apart = shared & ((a > 0) != (b > 0))
            smaller = np.minimum(np.abs(a), np.abs(b))
            overlap[other, k] += np.count_nonzero(shared)
            conflict[other, k] += np.count_nonzero(apart)
            terms = (product, a * a * shared, b * b * shared, smaller, smaller * apart, product**2, product**2 * apart)
            sums[other, k] += [sum_in_lanes(term) for term in terms]


def changers(delta, number, agreement):
    """How many experts change a coordinate, and how many coordinates several change in one direction."""
    up, down = (delta > 0).sum(axis=0), (delta < 0).sum(axis=0)
    number += np.bincount(up + down, minlength=len(number))
    agreement += np.count_nonzero((up + down > 1) & ((up == 0) | (down == 0)))
