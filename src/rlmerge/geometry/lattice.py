"""Tells a base whose weights were dequantised: blocks of 32 hold few values, or whole multiples of one step.

A lattice survives fine-tuning in part: what an update moved has left it, the rest has not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Weights of a block, in the order of storage: GGUF's, and a part of those of GPTQ, AWQ and NF4."""
BLOCKS = 1024
"""Blocks that are looked at, evenly spread."""

LEAST = 8
"""Values other than 0 that a block must have to be looked at."""
FEW = 28.0
"""Distinct values of 32, in the median, up to which weights lie on a lattice. Independent bf16 weights have 31 or 32;
4 bits leave 12, 5 bits 18, 6 bits 24, fp8 26 (normal weights, simulated)."""
NEAR = 0.15
"""Mean distance from whole multiples of max/127 up to which weights lie on an 8-bit lattice; of others it is 0.25."""
MULTIPLES = (4.0, 24.0)
"""Multiples that are looked at: below, rounding to 0 tells nothing; above, the rounding of bf16 blurs them."""


@dataclass(frozen=True)
class Lattice:
    """What was seen: distinct values of 32 that are not 0 (median over blocks) and distance from an 8-bit lattice
    (mean), or None.
    """

    distinct: float | None
    distance: float | None

    @property
    def found(self) -> bool:
        """Whether the weights lie on a lattice."""
        few = self.distinct is not None and self.distinct <= FEW
        return few or (self.distance is not None and self.distance <= NEAR)


def look_for_lattice(matrix: NDArray[np.float32]) -> Lattice:
    """Looks at blocks of a matrix fp32[m, n]. Zeros say nothing: weights may have been pruned."""
    count = matrix.size // BLOCK
    if not count or matrix.shape[-1] % BLOCK:
        return Lattice(None, None)
    chosen = np.unique(np.linspace(0, count - 1, min(count, BLOCKS)).astype(np.int64))
    blocks = np.sort(matrix.reshape(-1, BLOCK)[chosen], axis=1)
    counts = np.count_nonzero(blocks, axis=1)
    blocks, counts = blocks[counts >= LEAST], counts[counts >= LEAST]
    if not len(blocks):
        return Lattice(None, None)
    fresh = np.count_nonzero((blocks[:, 1:] != blocks[:, :-1]) & (blocks[:, 1:] != 0.0), axis=1)
    distinct = BLOCK * (fresh + (blocks[:, 0] != 0.0)) / counts
    multiples = np.abs(blocks) * (127.0 / np.max(np.abs(blocks), axis=1, keepdims=True))
    multiples = multiples[(multiples >= MULTIPLES[0]) & (multiples <= MULTIPLES[1])]
    distance = float(np.mean(np.abs(multiples - np.round(multiples)))) if multiples.size else None
    return Lattice(float(np.median(distinct)), distance)
