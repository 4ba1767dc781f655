"""What the spectral methods share: which tensors are matrices, decompositions without noise, and the mean of the rest.

A matrix is decomposed whole, in fp64, with one thread of BLAS; matrices run side by side. Singular directions whose
value is rounding noise have no meaning, so they are dropped everywhere (LAPACK returns some, and what is made of them
would differ from machine to machine).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Block, Merged, Method, Parameter, Result, Task, Whole
from .gram import F64, combine_deltas
from .svd import ROUNDING, svd, work_bytes

NOT_INNER = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of embeddings and heads."""

MATRIX = Parameter("matrix", "flag", True, "decompose 2-D tensors; filters may leave some to the rule for the others")


def embeddings(default: bool) -> Parameter:
    """The parameter that says what embeddings and head are."""
    return Parameter("embeddings", "flag", default, "decompose embeddings and head (by name), too")


SCALING = Parameter("scaling", "number", 1.0, "factor of the merged update of matrices and of the mean of the others")


class Spectral(Method):
    """A method that merges matrices whole. The others are the base and the mean of the updates, unless it differs."""

    grain = "matrix"
    laws = frozenset({"permutation", "zero"})

    svds: tuple[int, int] = (0, 0)
    """Decompositions of a matrix: so many, and so many for each expert."""
    held: int = 0
    """Arrays of its size that are held beside a decomposition."""

    def whole_cost(
        self, tensor: str, shape: tuple[int, ...], values: Mapping[str, Any], experts: int, gram: int | None = None
    ) -> tuple[float, int]:
        """As declared, beside what a decomposition takes."""
        if not self.decomposes(tensor, shape, values):
            return 0, 0
        return self.svds[0] + self.svds[1] * experts, self.beside(shape, experts) + work_bytes(shape)

    def beside(self, shape: tuple[int, ...], experts: int) -> int:
        """Bytes that are held beside a decomposition, at most."""
        return 8 * self.held * shape[0] * shape[1]

    def decomposes(self, tensor: str, shape: tuple[int, ...], values: Mapping[str, Any]) -> bool:
        """Exactly two dimensions, not filtered, and no embedding unless asked for."""
        inside = not any(part in tensor for part in NOT_INNER)
        return len(shape) == 2 and bool(values["matrix"]) and (inside or bool(values["embeddings"]))

    @abstractmethod
    def update(self, tensor: Whole, task: Task) -> F64:
        """The merged update of a matrix, fp64[m, n]; of no expert without a delta."""

    def whole(self, tensor: Whole, task: Task, results: Mapping[str, Result]) -> F64 | None:
        """The base and the merged update of a matrix."""
        if not self.decomposes(task.tensor, task.shape, task.values) or not tensor.changed.any():
            return None
        if not tensor.finite:
            return np.full(task.size, np.nan)
        out = self.update(tensor, task)
        out += tensor.base()
        return out.reshape(-1)

    def scale(self, task: Task) -> float:
        """The factor of the mean of the updates of what is no matrix."""
        return float(task.values.get("scaling", 1.0))

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """θ0 + s·mean δi."""
        count = len(task.experts)
        return combine_deltas(block, np.full(count, self.scale(task) / count))


def noise(shape: tuple[int, ...]) -> float:
    """Singular values below this share of the largest are rounding (NumPy's rule for ranks)."""
    return max(shape) * ROUNDING


FRAMES = 2.0**-26
"""Share of the largest singular value of singular vectors side by side below which they are one direction: a vector is
known to the rounding of fp64 times the largest singular value of its matrix over its own, which may be 10⁷."""


def polar(frames: F64) -> F64:
    """The nearest matrix to orthonormal sets of vectors side by side that is orthonormal itself, within their span.

    In the memory of the frames.
    """
    return svd(lambda: frames, frames.shape, FRAMES).polar(lambda: frames)


def inner(one: F64, other: F64) -> float:
    """⟨A, B⟩, one after the other in a fixed order."""
    return float(np.einsum("ij,ij", one, other))


def norm(matrix: F64) -> float:
    """Frobenius norm."""
    return float(np.sqrt(inner(matrix, matrix)))
