"""The matrices of a base and its experts: which tensors they are, and reading one of them whole, base or delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import RecipeError
from rlmerge.execute.inputs import Inputs, cast
from rlmerge.execute.memory import Space
from rlmerge.methods.base import Block
from rlmerge.plan import Plan, TensorPlan

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix: the index of its tensor in the plan, its number in a stack, its shape."""

    tensor: int
    number: int
    rows: int
    columns: int

    @property
    def short(self) -> int:
        """min(m, n)."""
        return min(self.rows, self.columns)

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.rows * self.columns


def matrices_of(plan: Plan) -> tuple[list[Matrix], dict[str, list[str]]]:
    """All matrices in the plan's order, stacks of three dimensions one by one; and what is left out, by reason.

    Raises RecipeError where there is no base.
    """
    if not plan.has_base:
        raise RecipeError("spectra are measured of updates, and there is no base that the experts were trained from.")
    found: list[Matrix] = []
    left: dict[str, list[str]] = {}
    for index, tensor in enumerate(plan.tensors):
        reason = _reason(tensor)
        if reason:
            left.setdefault(reason, []).append(tensor.name)
            continue
        rows, columns = tensor.shape[-2:]
        found += [Matrix(index, number, rows, columns) for number in range(prod(tensor.shape[:-2]))]
    return found, left


def _reason(tensor: TensorPlan) -> str:
    """Why a tensor is left out, or ''."""
    if tensor.carry is not None:
        return f"not compared: {tensor.carry}"
    if tensor.base is None:
        return "not in the base"
    if tensor.repeats:
        return "tied to another tensor, which is measured"
    if len(tensor.shape) not in (2, 3):
        return "neither a matrix nor a stack of matrices"
    if min(tensor.shape[-2:]) < 2:
        return "a vector: one row or column"
    return "" if tensor.size else "empty"


class MatrixReader:
    """Reads matrices of a plan's base and deltas for one thread. The inputs are shared by all threads."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.space = Space()

    @property
    def kernels(self) -> ModuleType:
        """Compiled or plain."""
        return self._inputs.kernels

    def _blocks(self, matrix: Matrix) -> Iterator[tuple[Block, int, int, int]]:
        """Blocks that hold the matrix, each with the part [low, high) of it that counts and where it goes."""
        step = self._inputs.plan.tensors[matrix.tensor].block
        start = matrix.number * matrix.size
        stop = start + matrix.size
        size = self._inputs.plan.tensors[matrix.tensor].size
        for first in range(start // step * step, stop, step):
            low, high = max(start, first), min(stop, first + step)
            block = self._inputs.block(matrix.tensor, first, min(first + step, size), self.space)
            yield block, low - first, high - first, low - start

    def base(self, matrix: Matrix, dtype: str | None = None) -> F32:
        """The base's values fp32[m, n], as this dtype has them where one is given."""
        out = np.empty(matrix.size, np.float32)
        for block, low, high, place in self._blocks(matrix):
            run = out[place : place + high - low]
            run[:] = block.base[low:high]
            if dtype is not None:
                cast(run.astype(np.float64), dtype, self.kernels, self.space, run)
        return out.reshape(matrix.rows, matrix.columns)

    def delta(self, matrix: Matrix, expert: int) -> F64:
        """One expert's delta fp64[m, n], from the patches that merges see."""
        out = np.zeros(matrix.size)
        for block, low, high, place in self._blocks(matrix):
            for patch in block.patches:
                row = np.flatnonzero(patch.experts == expert)
                if row.size:
                    first, last = np.searchsorted(patch.where, (low, high))
                    out[place - low + patch.where[first:last]] = patch.delta[row[0], first:last]
        return out.reshape(matrix.rows, matrix.columns)

    def storage(self, matrix: Matrix, expert: int) -> str | None:
        """The dtype that an expert's values are rounded to; None where an adapter adds what is not rounded."""
        source = self._inputs.plan.tensors[matrix.tensor].experts[expert]
        if source.kind in ("low_rank", "sum"):
            return None
        return source.place.dtype if source.place is not None else self.base_dtype(matrix)

    def base_dtype(self, matrix: Matrix) -> str:
        """As stored."""
        place = self._inputs.plan.tensors[matrix.tensor].base
        assert place is not None
        return place.dtype
