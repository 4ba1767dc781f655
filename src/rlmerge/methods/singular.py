"""Merging in the singular directions of the updates: `tsv_m`, `iso_c`, `iso_cts`."""

from __future__ import annotations

from functools import partial

import numpy as np

from .base import Parameter, Task, Whole
from .gram import F64
from .spectral import FRAMES, MATRIX, SCALING, Spectral, embeddings, noise, norm, polar
from .svd import ROWS, Make, svd


class TsvMerge(Spectral):
    """Source: Task Singular Vectors (arXiv 2412.00081), TSV-M, and its authors' code.

    Of each of K updates the leading r/K singular triplets are kept (r = min(m, n); at least one), side by side; both
    sets of vectors are made orthonormal by their polar factor. The authors compute in fp32; directions of rounding
    noise, which they keep, are dropped. Other tensors take the mean update. Cost: K + 2 decompositions of a matrix.
    """

    name = "tsv_m"
    summary = "the leading singular directions of each update, made orthogonal to those of the others"
    formula = "Δ = s·polar([U1 … UK])·diag(S1 … SK)·polar([V1 … VK])ᵀ, each of rank r/K"
    source = "Task Singular Vectors (arXiv 2412.00081)"
    parameters = (SCALING, embeddings(True), MATRIX)
    svds = (2, 1)
    held = 2

    def update(self, tensor: Whole, task: Task) -> F64:
        """Triplets of all experts, orthogonalised."""
        keep = max(1, min(task.shape) // len(task.experts))
        changed = np.flatnonzero(tensor.changed).tolist()
        found = SideBySide(task.shape, keep * len(changed))
        for k in changed:
            found.add(partial(tensor.delta, k), keep)
        return found.merged(self.scale(task) * found.values)


class IsoC(Spectral):
    """Source: No Task Left Behind (arXiv 2502.04959), Iso-C, and its authors' code, which computes in fp32.

    The sum of the updates keeps its singular vectors, and each of its singular values becomes their mean. Directions
    of rounding noise have no vector and stay 0. Other tensors take the mean update. Cost: one decomposition.
    """

    name = "iso_c"
    summary = "the sum of the updates with all its singular values made equal"
    formula = "Δ = s·mean(S)·U·Vᵀ, U·S·Vᵀ = Σ δi"
    source = "No Task Left Behind (arXiv 2502.04959)"
    parameters = (SCALING, embeddings(True), MATRIX)
    svds = (1, 0)

    def update(self, tensor: Whole, task: Task) -> F64:
        """U·Vᵀ at the mean singular value."""
        total = partial(tensor.combine, np.ones(len(task.experts)))
        found = svd(total, task.shape, noise(task.shape))
        out = found.polar(total)
        out *= self.scale(task) * float(np.sum(found.values)) / min(task.shape)
        return out


class IsoCts(Spectral):
    """Source: No Task Left Behind (arXiv 2502.04959), Iso-CTS, and its authors' code, which computes in fp32.

    Of the r directions, the leading ones of the sum of the updates are common; the others are shared out among the
    experts: the leading directions of what of each update the common ones leave. Both sets of vectors are made
    orthonormal, all values equal. Other tensors take the mean update. Cost: K + 3 decompositions.
    """

    name = "iso_cts"
    summary = "common directions of the sum and own ones of each update, all with the same singular value"
    formula = "Δ = s·mean(S)·polar([U0 U1 … UK])·polar([V0 V1 … VK])ᵀ, Ui from (1 - U0·U0ᵀ)·δi"
    source = "No Task Left Behind (arXiv 2502.04959)"
    parameters = (
        SCALING,
        Parameter(
            "common_space_fraction", "number", 0.8, "share of the directions that is common", minimum=0, maximum=1
        ),
        embeddings(True),
        MATRIX,
    )
    svds = (3, 1)
    held = 2

    def update(self, tensor: Whole, task: Task) -> F64:
        """Common and own directions, orthogonalised."""
        count, rank = len(task.experts), min(task.shape)
        own = own_directions(rank, count, float(task.values["common_space_fraction"]))
        common = rank - own * count
        found = SideBySide(task.shape, rank)
        found.add(partial(tensor.combine, np.ones(count)), common)
        shared = found.lefts[: found.used]
        for k in np.flatnonzero(tensor.changed).tolist() if own else ():
            # what the common directions leave of themselves is no more
            least = FRAMES * norm(tensor.delta(k))
            found.add(partial(_outside, shared, partial(tensor.delta, k)), own, least)
        size = self.scale(task) * float(np.sum(found.values)) / rank
        return found.merged(np.full(found.used, size))


def own_directions(rank: int, count: int, fraction: float) -> int:
    """Directions of each of `count` experts: the nearest to an equal part of what is not common, as the authors' code
    rounds it; but no more than there are, where it fails.
    """
    return min(round((rank - int(rank * fraction)) / count), rank // count)


class SideBySide:
    """Leading singular triplets of several matrices of a shape, at most r of them all.

    lefts     fp64[r, m]: left vectors as rows, the first `used` of them
    rights    fp64[r, n]
    values    fp64[used]
    """

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self.shape = shape
        self.lefts, self.rights = np.empty((most, shape[0])), np.empty((most, shape[1]))
        self.values = np.empty(0)

    @property
    def used(self) -> int:
        """How many there are."""
        return len(self.values)

    def add(self, make: Make, count: int, floor: float = 0.0) -> None:
        """Leading triplets of a matrix, at most so many, with values above `floor`."""
        found = svd(make, self.shape, noise(self.shape), count, floor)
        left, values, right = found.triplets(make)
        rows = slice(self.used, self.used + len(values))
        self.lefts[rows], self.rights[rows] = left.T, right
        self.values = np.append(self.values, values)

    def merged(self, values: F64) -> F64:
        """Both sets of vectors made orthonormal, in their own memory, with these values between them."""
        left, right = polar(self.lefts[: self.used].T), polar(self.rights[: self.used])
        left *= values
        return left @ right


def _outside(rows: F64, make: Make) -> F64:
    """A matrix less what lies along orthonormal left vectors, the rows of an array."""
    matrix = make()
    for start in range(0, matrix.shape[1], ROWS):
        part = matrix[:, start : start + ROWS]
        part -= rows.T @ (rows @ part)
    return matrix
