"""What the experts did and what became of it: supports and conflicts, survival and direction after the cast."""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel

RESIDUE = 2.0**-48
FEW = 5
"""Up to so many experts, coordinates are counted by their pattern of signs (3^K patterns)."""
TILE = 2048


@inlined
def _census_of_few(delta, sign, support, regions, overlap, conflict):
    """The census by patterns: one number in base 3 a coordinate (digit 1 up, 2 down), counted, then read off."""
    count = delta.shape[0]
    code = np.empty(TILE, np.int32)
    table = np.zeros(3**count, np.int64)
    for first in range(0, delta.shape[1], TILE):
        size = min(TILE, delta.shape[1] - first)
        code[:] = 0
        place = np.int32(1)
        for k in range(count):
            row = delta[k, first : first + size]
            plus = place if sign[k] > 0 else np.int32(2) * place if sign[k] < 0 else np.int32(0)
            minus = np.int32(2) * place if sign[k] > 0 else place if sign[k] < 0 else np.int32(0)
            for j in range(size):
                code[j] += (plus if row[j] > 0.0 else np.int32(0)) + (minus if row[j] < 0.0 else np.int32(0))
            place *= np.int32(3)
        for j in range(size):
            table[code[j]] += 1
    digit = np.zeros(count, np.int64)
    for pattern in range(1, table.shape[0]):
        number = table[pattern]
        if number == 0:
            continue
        left = pattern
        up = 0
        down = 0
        for k in range(count):
            digit[k] = left % 3
            left //= 3
            up += digit[k] == 1
            down += digit[k] == 2
            if digit[k] != 0:
                support[k] += number
                for other in range(k):
                    if digit[other] != 0:
                        overlap[other, k] += number
                        if digit[other] != digit[k]:
                            conflict[other, k] += number
        if up + down == 1:
            regions[0] += number
        else:
            regions[1] += number
            if up > 0 and down > 0:
                regions[2] += number
            else:
                regions[3] += number


@kernel
def census(delta, owner, sign, support, regions, overlap, conflict):
    """Counts who changed what, from deltas fp64[K, m] and their owners.

    sign int64[K] is the sign of each weight (0 removes the expert). Adds to support int64[K], to regions int64[4]
    (unique, overlap, conflict, agreement) and, per pair, to overlap and conflict int64[K, K] (upper triangle).
    """
    count = delta.shape[0]
    if count <= FEW:
        _census_of_few(delta, sign, support, regions, overlap, conflict)
        return
    alone = np.zeros(count + 1, np.int64)
    for j in range(owner.shape[0]):
        alone[owner[j] + 1] += 1
    for k in range(count):
        if sign[k] != 0:
            support[k] += alone[k + 1]
            regions[0] += alone[k + 1]
    several = np.empty(alone[0], np.int32)
    found = 0
    for j in range(owner.shape[0]):
        if owner[j] < 0:
            several[found] = j
            found += 1
    for place in range(found):
        j = several[place]
        up = 0
        down = 0
        for k in range(count):
            value = delta[k, j] * sign[k]
            if value == 0.0:
                continue
            support[k] += 1
            up += value > 0.0
            down += value < 0.0
            for other in range(k):
                second = delta[other, j] * sign[other]
                if second != 0.0:
                    overlap[other, k] += 1
                    conflict[other, k] += (second > 0.0) != (value > 0.0)
        if up + down == 1:
            regions[0] += 1
        elif up + down > 1:
            regions[1] += 1
            if up > 0 and down > 0:
                regions[2] += 1
            else:
                regions[3] += 1


@kernel
def realised(base, stored_base, intended, stored, where, counts, sums):
    """Compares the intended update with the one that the stored values make.

    base fp32[n] as read, stored_base fp32[n] the base cast to the output dtype, intended fp64[n] the values before the
    cast, stored fp32[n] after it; only the coordinates in `where` are compared. Adds to counts int64[2] (intended
    non-zero updates, those that still differ from the base) and to sums fp64[3] (Σ intended², Σ realised²,
    Σ intended·realised), in coordinate order.
    """
    wanted = 0
    survived = 0
    square = 0.0
    real_square = 0.0
    product = 0.0
    for j in range(where.shape[0]):
        i = where[j]
        old = np.float64(base[i])
        update = intended[i] - old
        # what is left of Σ w·θ where deltas cancel is rounding and no update: no stored change is that small
        update = update if abs(update) > RESIDUE * abs(old) else 0.0
        real = np.float64(stored[i]) - np.float64(stored_base[i])
        wanted += update != 0.0
        survived += (update != 0.0) & (real != 0.0)
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
