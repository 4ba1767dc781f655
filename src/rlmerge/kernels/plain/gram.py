"""Inner products of experts, in NumPy (definitions: `compiled.gram`)."""

from __future__ import annotations

import numpy as np


def gram_rows(values, total):
    """Adds products over rows, in lanes."""
    count = values.shape[0]
    for i in range(count):
        for j in range(i + 1):
            found = _sums(values[i].astype(np.float64) * values[j].astype(np.float64))
            total[:, i, j] += found
            if i != j:
                total[:, j, i] += found


def _sums(products):
    """Sums of fp64[R, C] along rows: eight lanes, then the last C mod 8."""
    rows, columns = products.shape
    even = columns - columns % 8
    lanes = np.zeros((8, rows))
    if even:
        lanes = np.cumsum(products[:, :even].reshape(rows, even // 8, 8), axis=1)[:, -1].T
    rest = np.cumsum(products[:, even:], axis=1)[:, -1] if even < columns else np.zeros(rows)
    a, b, c, d, e, f, g, h = lanes
    return (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest


def gram_columns(values, start, total):
    """Adds products by column, one coordinate after the other."""
    count, size = values.shape
    columns = (start + np.arange(size)) % total.shape[0]
    for i in range(count):
        for j in range(count):
            np.add.at(total[:, i, j], columns, values[i] * values[j])
