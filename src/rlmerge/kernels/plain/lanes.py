"""Sums in the order of the compiled loops: eight interleaved lanes, then the rest (np.sum has another order)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sum_in_lanes(values: NDArray[np.float64]) -> float:
    """The sum of fp64[n]: lane i holds elements i, i + 8, …; lanes are added in pairs, then the last n mod 8."""
    even = len(values) - len(values) % 8
    lanes = np.cumsum(values[:even].reshape(-1, 8), axis=0)[-1] if even else np.zeros(8)
    rest = np.cumsum(values[even:])[-1] if even < len(values) else 0.0
    a, b, c, d, e, f, g, h = lanes
    return float((((a + b) + (c + d)) + ((e + f) + (g + h))) + rest)
