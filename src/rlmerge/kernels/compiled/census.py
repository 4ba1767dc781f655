"""What the experts did and what became of it: supports and conflicts of a block, survival and direction after the cast."""

from __future__ import annotations

import numpy as np

from ._jit import kernel

TILE = 1024


@kernel
def census(expert, reference, which, sign, min_change, base, additive, support, regions, overlap, conflict):
    """Counts who changed what, for K ≤ 64 experts and a block of n coordinates.

    sign int64[K] is the sign of each weight (0 removes the expert). Adds to support int64[K], to regions int64[4]
    (unique, overlap, conflict, agreement) and, per pair, to overlap and conflict int64[K, K] (upper triangle).
    """
    count = expert.shape[0]
    size = expert.shape[1]
    up = np.empty(TILE, np.uint64)
    down = np.empty(TILE, np.uint64)
    for first in range(0, size, TILE):
        last = min(first + TILE, size)
        up[:] = np.uint64(0)
        down[:] = np.uint64(0)
        for k in range(count):
            if sign[k] == 0:
                continue
            bit = np.uint64(1) << np.uint64(k)
            row = which[k]
            plus = bit if sign[k] > 0 else np.uint64(0)
            minus = np.uint64(0) if sign[k] > 0 else bit
            if min_change == 0.0:
                for i in range(first, last):
                    new = expert[k, i]
                    old = reference[row, i]
                    up[i - first] |= plus if new > old else (minus if new < old else np.uint64(0))
                    down[i - first] |= minus if new > old else (plus if new < old else np.uint64(0))
            else:
                for i in range(first, last):
                    delta = np.float64(expert[k, i]) - np.float64(reference[row, i])
                    old_ = np.float64(base[i]) if additive[k] else np.float64(reference[row, i])
                    new_ = old_ + delta if additive[k] else np.float64(expert[k, i])
                    if abs(delta) > min_change * max(abs(new_), abs(old_)):
                        up[i - first] |= plus if delta > 0.0 else minus
                        down[i - first] |= minus if delta > 0.0 else plus
        for i in range(last - first):
            active = up[i] | down[i]
            if active == np.uint64(0):
                continue
            several = active & (active - np.uint64(1)) != np.uint64(0)
            if several:
                regions[1] += 1
                mixed = up[i] != np.uint64(0) and down[i] != np.uint64(0)
                if mixed:
                    regions[2] += 1
                else:
                    regions[3] += 1
            else:
                regions[0] += 1
            for k in range(count):
                bit = np.uint64(1) << np.uint64(k)
                if active & bit == np.uint64(0):
                    continue
                support[k] += 1
                if several:
                    for j in range(k + 1, count):
                        other = np.uint64(1) << np.uint64(j)
                        if active & other != np.uint64(0):
                            overlap[k, j] += 1
                            if (up[i] & bit != np.uint64(0)) != (up[i] & other != np.uint64(0)):
                                conflict[k, j] += 1


@kernel
def realised(base, stored_base, intended, stored, counts, sums):
    """Compares the intended update with the one that the stored values make.

    base fp32[n] as read, stored_base fp32[n] the base cast to the output dtype, intended fp64[n] the values before the
    cast, stored fp32[n] after it. Adds to counts int64[2] (intended non-zero updates, those that still differ from the
    base) and to sums fp64[3] (Σ intended², Σ realised², Σ intended·realised), in coordinate order.
    """
    wanted = 0
    survived = 0
    square = 0.0
    real_square = 0.0
    product = 0.0
    for i in range(base.shape[0]):
        update = intended[i] - np.float64(base[i])
        real = np.float64(stored[i]) - np.float64(stored_base[i])
        if update != 0.0:
            wanted += 1
            survived += real != 0.0
            square += update * update
            product += update * real
        real_square += real * real
    counts[0] += wanted
    counts[1] += survived
    sums[0] += square
    sums[1] += real_square
    sums[2] += product


@kernel
def fisher_sums(fisher, total, negative):
    """Adds the sum of each row of fp32[K, n] to total fp64[K], in eight interleaved lanes; counts negative entries."""
    size = fisher.shape[1]
    even = size - size % 8
    for k in range(fisher.shape[0]):
        a = b = c = d = e = f = g = h = 0.0
        bad = 0
        for i in range(0, even, 8):
            a += np.float64(fisher[k, i])
            b += np.float64(fisher[k, i + 1])
            c += np.float64(fisher[k, i + 2])
            d += np.float64(fisher[k, i + 3])
            e += np.float64(fisher[k, i + 4])
            f += np.float64(fisher[k, i + 5])
            g += np.float64(fisher[k, i + 6])
            h += np.float64(fisher[k, i + 7])
        rest = 0.0
        for i in range(even, size):
            rest += np.float64(fisher[k, i])
        for i in range(size):
            bad += fisher[k, i] < np.float32(0.0)
        total[k] += (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest
        negative[k] += bad
