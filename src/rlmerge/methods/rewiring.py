"""One expert's leading directions, seen in the singular frames of the base: `subspace_rewiring`."""

from __future__ import annotations

from functools import partial

import numpy as np

from .base import Arity, Parameter, Task, Whole
from .gram import F64
from .spectral import MATRIX, Spectral, embeddings, noise
from .svd import svd


class SubspaceRewiring(Spectral):
    """Source: Subspace-Aligned Rewiring (arXiv 2607.03065) and its authors' script, which computes in fp32.

    The update is cut to its leading max(1, int(fraction·r)) singular directions, r = min(m, n), and projected onto the
    leading `base_rank` left and right singular vectors of the base (those of rounding noise left out). As many as a
    side is long span all of it, whatever the base: there is nothing to project, and with the default, all of them, a
    square matrix is only cut. The authors take seven projections of a layer; here it is every 2-D tensor that is no
    embedding or head. Other tensors are the expert's. Cost: two decompositions.
    """

    name = "subspace_rewiring"
    summary = "one expert's leading singular directions, projected onto those of the base"
    formula = "θ = θ0 + U·Uᵀ·δ_k·V·Vᵀ, δ_k the leading directions of δ, θ0 = U·S·Vᵀ"
    source = "Subspace-Aligned Rewiring (arXiv 2607.03065)"
    parameters = (
        Parameter("base_rank", "integer", 1_000_000, "singular vectors of the base, at most", minimum=1),
        Parameter("delta_rank_fraction", "number", 0.01, "share of the update's directions", above=0, maximum=1),
        embeddings(False),
        MATRIX,
    )
    arity = Arity(1, 1)
    svds = (2, 0)
    held = 2

    def update(self, tensor: Whole, task: Task) -> F64:
        """The cut and projected update."""
        keep = max(1, int(min(task.shape) * float(task.values["delta_rank_fraction"])))
        delta = partial(tensor.delta, 0)
        left, values, right = svd(delta, task.shape, noise(task.shape), keep).triplets(delta)
        left, right = left * values, right.copy()
        rank = min(int(task.values["base_rank"]), *task.shape)
        if rank < max(task.shape):
            if not np.isfinite(tensor.base()).all():
                return np.full(task.shape, np.nan)
            rows, _, columns = svd(tensor.base, task.shape, noise(task.shape), rank).triplets(tensor.base)
            if rank < task.shape[0]:
                left = rows @ (rows.T @ left)
            if rank < task.shape[1]:
                right = (right @ columns.T) @ columns
        return left @ right
