"""Merging in the singular directions of the updates: `tsv_m`, `iso_c`, `iso_cts`."""

from __future__ import annotations

import numpy as np

from .base import Parameter, Task, Whole
from .gram import F64
from .spectral import FRAMES, MATRIX, SCALING, Spectral, decompose, embeddings, norm, polar

Triplets = tuple[F64, F64, F64]
"""U fp64[m, r], S fp64[r], Vᵀ fp64[r, n]."""


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
    held = (3, 0)

    def update(self, tensor: Whole, task: Task) -> F64:
        """Triplets of all experts, orthogonalised."""
        count = len(task.experts)
        keep = max(1, min(task.shape) // count)
        parts = [leading(tensor.delta(k), keep) for k in np.flatnonzero(tensor.changed).tolist()]
        values = self.scale(task) * np.concatenate([value for _, value, _ in parts])
        left, right = orthogonal(parts)
        left *= values
        return left @ right


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
    held = (1, 0)

    def update(self, tensor: Whole, task: Task) -> F64:
        """U·Vᵀ at the mean singular value."""
        left, values, right = decompose(tensor.combine(np.ones(len(task.experts))))
        return left @ (right * (self.scale(task) * float(np.sum(values)) / min(task.shape)))


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
    held = (3, 0)

    def update(self, tensor: Whole, task: Task) -> F64:
        """Common and own directions, orthogonalised."""
        count, rank = len(task.experts), min(task.shape)
        own = own_directions(rank, count, float(task.values["common_space_fraction"]))
        common = rank - own * count
        parts = [leading(tensor.combine(np.ones(count)), common)]
        for k in np.flatnonzero(tensor.changed).tolist() if own else ():
            rest = tensor.delta(k)
            least = FRAMES * norm(rest)  # what the common directions leave of themselves is no more
            rest -= parts[0][0] @ (parts[0][0].T @ rest)
            parts.append(leading(rest, own, least))
        size = self.scale(task) * float(np.sum(np.concatenate([value for _, value, _ in parts]))) / rank
        left, right = orthogonal(parts)
        left *= size
        return left @ right


def own_directions(rank: int, count: int, fraction: float) -> int:
    """Directions of each of `count` experts: the nearest to an equal part of what is not common, as the authors' code
    rounds it; but no more than there are, where it fails.
    """
    return min(round((rank - int(rank * fraction)) / count), rank // count)


def leading(matrix: F64, count: int, least: float = 0.0) -> Triplets:
    """Leading triplets of a matrix, at most so many, with values above `least`; copies: the rest is freed."""
    left, values, right = decompose(matrix)
    kept = min(count, int(np.count_nonzero(values > least)))
    return left[:, :kept].copy(), values[:kept], right[:kept].copy()


def orthogonal(parts: list[Triplets]) -> tuple[F64, F64]:
    """Left and right vectors side by side, both made orthonormal; empties the list, for its arrays are large."""
    lefts, rights = [left for left, _, _ in parts], [right for _, _, right in parts]
    parts.clear()
    joined = np.hstack(lefts)
    lefts.clear()
    left = polar(joined)
    joined = np.vstack(rights)
    rights.clear()
    return left, polar(joined)
