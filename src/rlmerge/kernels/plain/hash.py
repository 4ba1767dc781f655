"""The counter-based random numbers, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hash64(key: int | np.uint64, coordinates: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64-bit hashes of coordinates under a key, as `compiled.hash.hash64`."""
    word = coordinates.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(key, np.uint64)
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word
