"""Inner products of experts: over rows (or a whole run, which is one row), and over columns.

Sums run in eight interleaved lanes, as everywhere, so that the plain twin has the same bits.
"""

from __future__ import annotations

import numpy as np

from ._jit import kernel


@kernel
def gram_rows(values, total):
    """Adds Σ_c values[i, r, c]·values[j, r, c] to total fp64[R, E, E], for values fp32 or fp64[E, R, C]."""
    count, rows, columns = values.shape
    even = columns - columns % 8
    for r in range(rows):
        for i in range(count):
            for j in range(i + 1):
                one = values[i, r]
                other = values[j, r]
                a = b = c = d = e = f = g = h = 0.0
                for x in range(0, even, 8):
                    a += np.float64(one[x]) * np.float64(other[x])
                    b += np.float64(one[x + 1]) * np.float64(other[x + 1])
                    c += np.float64(one[x + 2]) * np.float64(other[x + 2])
                    d += np.float64(one[x + 3]) * np.float64(other[x + 3])
                    e += np.float64(one[x + 4]) * np.float64(other[x + 4])
                    f += np.float64(one[x + 5]) * np.float64(other[x + 5])
                    g += np.float64(one[x + 6]) * np.float64(other[x + 6])
                    h += np.float64(one[x + 7]) * np.float64(other[x + 7])
                rest = 0.0
                for x in range(even, columns):
                    rest += np.float64(one[x]) * np.float64(other[x])
                found = (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest
                total[r, i, j] += found
                if i != j:
                    total[r, j, i] += found


@kernel
def gram_columns(values, start, total):
    """Adds products of values fp64[E, n] to total fp64[C, E, E] by column, that is (start + place) mod C."""
    count, size = values.shape
    columns = total.shape[0]
    for x in range(size):
        column = (start + x) % columns
        for i in range(count):
            for j in range(count):
                total[column, i, j] += values[i, x] * values[j, x]
