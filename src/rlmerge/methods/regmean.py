"""Averages of linear layers that their inputs decide: `regmean`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import GramError

from .base import Arity, Block, Merged, Method, Parameter, Result, Task, Whole
from .gram import F64, combine_deltas

ROUNDING = 2.0**-23
"""Times √in, twice the largest eigenvalue that rounding a matrix with a diagonal of ones to fp32 brings: that share of
each Gram matrix, at least, is its diagonal alone, so that rounding decides nothing."""
PIECE = 256
"""Columns of a factor that are eliminated at once."""


class RegMean(Method):
    """Source: RegMean (arXiv 2212.09849), equation 2 and section 3.2, and its authors' code.

    The published weight 0.9 of what is off the diagonals (0.1 for T5) is `alpha`; Gram matrices are means over
    positions, without padding. Solved in fp64 by Cholesky factors of ΣG̃, scaled to a diagonal of ones, for the deltas
    less those of the first expert, so that experts that agree are given back bit for bit, row by row. `alpha` counts as
    1 - 2⁻²³·√in at most: G̃ is then definite, as the Gram matrices of few data are not, and where no data reach, the
    mean by diagonals is the answer; inputs that are 0 in all data take the mean by `weight`, as do all tensors that are
    no linear layers.
    Cost: a Gram matrix of each expert, read once, and (K + 2)·in²·out + in³/3 multiplications.
    """

    name = "regmean"
    summary = "linear layers whose outputs are nearest to those of all models, on their data"
    formula = "W = (Σ Wi·G̃i)·(Σ G̃i)⁻¹, G̃i = wi·(α·Gi + (1 - α)·diag Gi), Gi = mean xᵀx; others: Σ wi·θi / Σ wi"
    source = "Dataless knowledge fusion by merging weights of language models (arXiv 2212.09849)"
    parameters = (
        Parameter("weight", "number", 1.0, "factor of this model's Gram matrices; 0 removes it", True, minimum=0),
        Parameter("alpha", "number", 0.9, "what is off the diagonals counts so much", minimum=0, maximum=1),
        Parameter("matrix", "flag", True, "solve for linear layers; filters may leave some to the mean"),
    )
    arity = Arity(minimum=1, base="optional")
    grain = "matrix"
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    @property
    def averages_base(self) -> bool:
        """No: a base that is to be averaged is listed, with its Gram matrices."""
        return False

    def uses_gram(self, values: Mapping[str, Any]) -> bool:
        """Always."""
        return True

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, NDArray[np.float64]]) -> list[str]:
        """A mean needs a weight."""
        if not np.any(per_model["weight"]):
            return ["all weights are 0, so there is nothing to average: give some model a weight"]
        return []

    def whole_cost(
        self, tensor: str, shape: tuple[int, ...], values: Mapping[str, Any], experts: int, gram: int | None = None
    ) -> tuple[float, int]:
        """Two multiplications for the 20 of a decomposition; a sum of Gram matrices, its factor (or the matrix that is
        added), what NumPy copies, and seven times the tensor.
        """
        if gram is None or not values["matrix"]:
            return 0, 0
        width, height = shape[gram], shape[1 - gram]
        products = (experts + 2) * width**2 * height + width**3 / 3
        share = products / 10 / max(1, width * height * min(shape))
        return share, 8 * (3 * width**2 + 7 * width * height)

    def whole(self, tensor: Whole, task: Task, results: Mapping[str, Result]) -> F64 | None:
        """The base and the solution for the deltas of a linear layer."""
        if task.gram is None or not task.values["matrix"] or not tensor.changed.any():
            return None
        used = np.flatnonzero(task.per_model["weight"]).tolist()
        first = _inputs_first(tensor.delta(used[0]), task.gram)
        if not np.isfinite(first).all():
            return np.full(task.size, np.nan)
        total, right, plain = np.zeros((len(first), len(first))), np.zeros(first.shape), np.zeros(first.shape)
        for k in used:
            weight = float(task.per_model["weight"][k])
            gram = _reduced(tensor.gram(k), float(task.values["alpha"]))
            gram *= weight
            total += gram
            if k == used[0]:
                continue
            apart = _inputs_first(tensor.delta(k), task.gram)
            if not np.isfinite(apart).all():
                return np.full(task.size, np.nan)
            apart -= first
            right += gram @ apart
            del gram
            apart *= weight
            plain += apart
        plain /= float(np.sum(task.per_model["weight"][used]))
        first += _solve(total, right, plain, task.tensor)
        out = tensor.base()
        out += first if task.gram == 0 else first.T
        return out.reshape(-1)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Σ wi·θi / Σ wi."""
        weight = task.per_model["weight"]
        return combine_deltas(block, weight / np.sum(weight))


def _inputs_first(delta: F64, side: int) -> F64:
    """The matrix as [in, out], contiguous."""
    return delta if side == 0 else np.ascontiguousarray(delta.T)


def _reduced(gram: F64, alpha: float) -> F64:
    """α·G + (1 - α)·diag G, in place."""
    diagonal = np.diagonal(gram).copy()
    gram *= min(alpha, 1.0 - ROUNDING * float(np.sqrt(len(gram))))
    np.fill_diagonal(gram, diagonal)
    return gram


def _solve(total: F64, right: F64, plain: F64, name: str) -> F64:
    """total⁻¹·right fp64[in, out]; `plain` at inputs that are 0 in all data. All three are used up.

    Raises GramError where `total` is no sum of Gram matrices.
    """
    diagonal = np.diagonal(total).copy()
    empty = diagonal == 0.0
    scale = 1.0 / np.sqrt(np.where(empty, 1.0, diagonal))
    total *= scale[:, None]
    total *= scale
    np.fill_diagonal(total, 1.0)
    right *= scale[:, None]
    try:
        factor = np.linalg.cholesky(total).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        raise GramError(
            f"the Gram matrices of {name!r} are none: some combination of inputs would have a negative square. Were "
            "they changed, or stored in too few bits? Estimate them again (rlmerge gram)."
        ) from None
    _eliminate(factor, right)
    right *= scale[:, None]
    right[empty] = plain[empty]
    return right


def _eliminate(factor: F64, right: F64) -> None:
    """(L·Lᵀ)⁻¹·right in place, L lower triangular, piece by piece: NumPy has no solver of triangles."""
    starts = range(0, len(factor), PIECE)
    for start in starts:
        rows = slice(start, start + PIECE)
        right[rows] -= factor[rows, :start] @ right[:start]
        right[rows] = np.linalg.solve(factor[rows, rows], right[rows])
    for start in reversed(starts):
        rows, below = slice(start, start + PIECE), slice(start + PIECE, None)
        right[rows] -= factor[below, rows].T @ right[below]
        right[rows] = np.linalg.solve(factor[rows, rows].T, right[rows])
