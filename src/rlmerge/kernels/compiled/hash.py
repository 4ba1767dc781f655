"""The counter-based random numbers: a bijection of 64-bit words, keyed, applied to a coordinate."""

from __future__ import annotations

import numpy as np

from ._jit import inlined


@inlined
def hash64(key, coordinate):
    """A 64-bit hash of a coordinate under a key; for one key different coordinates have different hashes.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
    generators"), a Weyl sequence through two xor-multiply rounds; each step is a bijection.
    """
    word = np.uint64(coordinate) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word
