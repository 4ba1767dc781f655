"""Squares of gradients, added up: whole ones, and outer products by tiles."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 2**20
"""Gradient entries of a unit that are formed at once: 4 MB in fp32, which stay in the third-level cache. With 1 MB,
calls and threads that start cost a tenth more (docs/fisher.md)."""


def add_square(total: Tensor, gradient: Tensor, factor: float = 1.0) -> None:
    """Adds factor·gradient², in the dtype of the total."""
    wide = gradient.to(total.dtype)
    total.addcmul_(wide, wide, value=factor)


def add_outer_squares(total: Tensor, left: Tensor, right: Tensor, left_out: list[Tensor] | None) -> None:
    """Adds Σ over units of (left[u]ᵀ·right[u])² to total [a, b], from left [U, M, a] and right [U, M, b], by tiles.

    Rows that `left_out` names for a unit are left out of its sum.
    """
    height = max(1, TILE // total.shape[1])
    buffer = torch.empty((min(height, total.shape[0]), total.shape[1]), dtype=left.dtype)
    for start in range(0, total.shape[0], height):
        stop = min(start + height, total.shape[0])
        tile, some = total[start:stop], buffer[: stop - start]
        for unit in range(left.shape[0]):
            torch.mm(left[unit, :, start:stop].T, right[unit], out=some)
            if left_out is not None:
                rows = left_out[unit]
                some[rows[(rows >= start) & (rows < stop)] - start] = 0.0
            wide = some.to(tile.dtype)
            tile.addcmul_(wide, wide)
