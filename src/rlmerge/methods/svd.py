"""Singular value decompositions of whole matrices by eigenvectors of Gram matrices, level by level, in fp64.

LAPACK's divide and conquer takes eight times a square matrix, and thrice the time. The Gram matrix of the shorter side
tells vectors well whose values are near the largest, and loses small ones by its squares. So only values above a share
of the largest are taken from it; what these directions leave of the matrix is decomposed in the same way, until nothing
is left but rounding. A matrix is made anew when it is needed, so that it need not be held beside LAPACK's arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from .gram import F64
from .lapack import eigenvectors, work_arrays

Make = Callable[[], F64]
"""Makes a matrix fp64[m, n], always the same. What it returns last may be overwritten."""

LEVEL = 2.0**-8
"""Share of the largest singular value down to which a Gram matrix is believed. Vectors of the longer side are then
orthogonal within its inverse square times the rounding of fp64, 1.5e-11."""
REMADE = 2.0**-20
"""Share down to which vectors of the longer side are made again of the matrix: they lose its inverse times rounding."""
ROUNDING = float(np.finfo(np.float64).eps)
ROWS = 128
"""Rows or columns of a matrix that are multiplied at a time, in its own memory."""


@dataclass
class Svd:
    """The leading r singular directions of a matrix, whose longer side is m and whose shorter side is n.

    values     fp64[r], descending but for rounding
    near       fp64[r, n], orthonormal rows: the vectors of the shorter side
    wide       whether the matrix has fewer rows than columns
    starts     the first direction of each level
    tall       fp64[m, n], whose first r columns are the vectors of the longer side, where they are held
    """

    values: F64
    near: F64
    wide: bool
    starts: list[int]
    tall: F64 | None = None

    def release(self) -> None:
        """Frees the vectors of the longer side if they can be made again."""
        if len(self.values) and self.values[-1] > REMADE * self.values[0]:
            self.tall = None

    def far(self, make: Make) -> F64:
        """The vectors of the longer side, fp64[m, r], orthonormal columns: the first of m×n numbers in memory."""
        return self._far(make)[:, : len(self.values)]

    def triplets(self, make: Make) -> tuple[F64, F64, F64]:
        """U fp64[rows, r], s fp64[r], Vᵀ fp64[r, columns]."""
        far = self.far(make)
        return (self.near.T, self.values, far.T) if self.wide else (far, self.values, self.near)

    def polar(self, make: Make) -> F64:
        """U·Vᵀ, in the memory of what is held or made."""
        tall = self._far(make)
        multiply(tall, self.near)
        self.tall = None
        return tall.T if self.wide else tall

    def _far(self, make: Make) -> F64:
        """What is held, or A·V with its columns made orthogonal to those of the levels before, and of length 1."""
        if self.tall is not None:
            return self.tall
        tall, rank = _upright(make(), self.wide), len(self.values)
        multiply(tall, self.near.T)
        for start, end in zip(self.starts, [*self.starts[1:], rank]):
            _remove(tall[:, :start], tall[:, start:rank])
            tall[:, start:end] /= _lengths(tall[:, start:end])
        return tall


def svd(make: Make, shape: tuple[int, ...], least: float, count: int | None = None, floor: float = 0.0) -> Svd:
    """The directions whose values are above `least` times the largest, and above `floor`; at most the leading `count`.

    With `least` and `floor` 0, min(m, n) of them: those of a value of 0 are any that are orthonormal to the others.
    Values must lie between 1e-150 and 1e150, for their squares are formed. What `triplets` gives are views of what
    `polar` overwrites.
    Raises numpy.linalg.LinAlgError for a matrix that holds NaN or infinity.
    """
    wide, wanted = shape[0] < shape[1], min(shape) if count is None else min(count, *shape)
    squares, near = eigenvectors(lambda: _negative_gram(_upright(make(), wide)))
    if not np.isfinite(squares).all():
        raise np.linalg.LinAlgError("the matrix holds NaN, infinity, or values beyond 1e150")
    values = np.sqrt(np.maximum(-squares, 0.0))
    top = float(values[0])
    whole, bound = least == floor == 0.0, max(least * top, floor)
    taken = min(wanted, _leading(values, max(LEVEL * top, bound)))
    if taken == wanted or (bound >= LEVEL * top and not whole):
        return Svd(values[:taken], near[:taken], wide, [0])
    tall = _upright(make(), wide)
    multiply(tall, near.T)
    return _deeper(tall, near, wide, (values, taken), (bound, wanted))


def _deeper(tall: F64, near: F64, wide: bool, first: tuple[F64, int], limits: tuple[float, int]) -> Svd:
    """Goes on in what `taken` directions of a matrix leave of it, where tall is A·V and V the rows of near."""
    (values, end), (bound, wanted) = first, limits
    starts, filled = [0], False
    values, top = values.copy(), float(values[0])
    values[end:] = 0.0
    tall[:, :end] /= _lengths(tall[:, :end])
    while end < wanted:
        rest = tall[:, end:]
        _remove(tall[:, :end], rest)
        size = float(np.sqrt(np.sum(_lengths(rest) ** 2)))
        if not filled and size <= max(bound, max(tall.shape) * ROUNDING * top):
            if bound > 0.0:
                break
            _fill(tall[:, :end], rest)
            filled = True
        _, turn = eigenvectors(partial(_negative_gram, rest))
        multiply(rest, turn.T)
        multiply(near[end:].T, turn.T)
        del turn
        lengths = _lengths(rest)
        taken = _leading(lengths, max(LEVEL * float(lengths.max()), 0.0 if filled else bound))
        if not taken:
            break
        rest[:, :taken] /= lengths[:taken]
        values[end : end + taken] = 0.0 if filled else lengths[:taken]
        starts.append(end)
        end += taken
    rank = min(end, wanted)
    return Svd(values[:rank], near[:rank], wide, starts, tall)


def work_bytes(shape: tuple[int, ...]) -> int:
    """Bytes that `svd` takes at most, with what it returns: the matrix, Gram matrices, vectors of the shorter side."""
    return 8 * (prod(shape) + (1 + work_arrays()) * min(shape) ** 2)


def multiply(left: F64, right: F64) -> None:
    """The leading columns of a matrix times another, fp64[p, q], into its first q columns, in its own memory."""
    p, q = right.shape
    for start in range(0, len(left), ROWS):
        rows = left[start : start + ROWS]
        rows[:, :q] = rows[:, :p] @ right


def _upright(matrix: F64, wide: bool) -> F64:
    """The matrix or its transpose: the longer side first."""
    return matrix.T if wide else matrix


def _negative_gram(tall: F64) -> F64:
    """-AᵀA: its eigenvalues ascend where the singular values descend."""
    gram = tall.T @ tall
    return np.negative(gram, out=gram)


def _leading(values: F64, bound: float) -> int:
    """How many values stand before the first that is no more than a bound."""
    below = np.flatnonzero(~(values > bound))
    return int(below[0]) if below.size else len(values)


def _lengths(columns: F64) -> F64:
    """Euclidean lengths of columns."""
    return np.sqrt(np.einsum("ij,ij->j", columns, columns))


def _remove(frame: F64, columns: F64) -> None:
    """Takes from columns what lies along orthonormal ones, in place."""
    for start in range(0, columns.shape[1] if frame.shape[1] else 0, ROWS):
        part = columns[:, start : start + ROWS]
        part -= frame @ (frame.T @ part)


def _fill(frame: F64, columns: F64) -> None:
    """Columns that lie along none of a frame, the same every time, for directions that a matrix has not."""
    places = np.arange(1.0, 1.0 + len(columns))
    for j in range(columns.shape[1]):
        columns[:, j] = np.cos(places * (j + 1.0) + places**2)
    for _ in range(2):
        _remove(frame, columns)
