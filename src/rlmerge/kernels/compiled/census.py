"""What the experts did: supports, overlaps and conflicts; and the sums of their Fishers."""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel

FEW = 8
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
def census(delta, sign, support, regions, overlap, conflict):
    """Counts who changed what where several did, from deltas fp64[K, m].

    sign int64[K] is the sign of each weight (0 removes the expert). Adds to support int64[K], to regions int64[4]
    (unique, overlap, conflict, agreement) and, per pair, to overlap and conflict int64[K, K] (upper triangle).
    """
    count = delta.shape[0]
    if count <= FEW:
        _census_of_few(delta, sign, support, regions, overlap, conflict)
        return
    for j in range(delta.shape[1]):
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
def fisher_sums(fisher, total, negative):
    """Adds the sum of each row of fp32[K, n] to total fp64[K], in eight interleaved lanes; counts negative entries."""
    size = fisher.shape[1]
    even = size - size % 8
    for k in range(fisher.shape[0]):
        row = fisher[k]
        a = b = c = d = e = f = g = h = 0.0
        for i in range(0, even, 8):
            a += np.float64(row[i])
            b += np.float64(row[i + 1])
            c += np.float64(row[i + 2])
            d += np.float64(row[i + 3])
            e += np.float64(row[i + 4])
            f += np.float64(row[i + 5])
            g += np.float64(row[i + 6])
            h += np.float64(row[i + 7])
        rest = 0.0
        for i in range(even, size):
            rest += np.float64(row[i])
        total[k] += (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest
        # as integers, floats with a sign are negative: one quick look before counting
        signed = row.view(np.int32)
        least = np.int32(0)
        for i in range(size):
            least = min(least, signed[i])
        if least < 0:
            for i in range(size):
                negative[k] += row[i] < np.float32(0.0)
