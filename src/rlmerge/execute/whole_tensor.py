"""Whole tensors for methods that decompose matrices, put together from blocks whenever they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlmerge.methods.base import Block, Whole


class WholeTensor(Whole):
    """A tensor of a plan. `blocks` reads all its blocks anew, in order; what it yields is valid until the next.

    A delta is taken from the same patches that other methods see, so every mixture of dtypes, LoRA, packs and
    `min_change` mean the same here. Reading all experts for one of them costs little beside a decomposition.
    """

    def __init__(self, shape: tuple[int, ...], experts: int, blocks: Callable[[], Iterator[Block]]) -> None:
        self.shape = shape
        self._experts = experts
        self._blocks = blocks

    @cached_property
    def _found(self) -> tuple[NDArray[np.bool_], bool]:
        changed, finite = np.zeros(self._experts, np.bool_), True
        for block in self._blocks():
            for patch in block.patches:
                changed[patch.experts] |= (patch.delta != 0.0).any(axis=1)
                finite &= bool(np.isfinite(patch.delta).all())
        return changed, finite

    @property
    def changed(self) -> NDArray[np.bool_]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Read on first use."""
        return self._found[0]

    @property
    def finite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Read on first use."""
        return self._found[1]

    def base(self) -> NDArray[np.float64]:
        """Decoded block by block."""
        out = np.empty(self.shape)
        flat = out.reshape(-1)
        for block in self._blocks():
            flat[block.start : block.start + block.size] = block.base
        return out

    def combine(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Patch by patch, in fp64."""
        out = np.zeros(self.shape)
        flat = out.reshape(-1)
        for block in self._blocks():
            run = flat[block.start : block.start + block.size]
            for patch in block.patches:
                total = np.zeros(patch.where.size)
                for row, k in enumerate(patch.experts.tolist()):
                    if coefficients[k] != 0.0:
                        total += coefficients[k] * patch.delta[row]
                run[patch.where] = total
        return out
