"""Turning the singular frames of the base, its spectrum fixed: `iso_merger`."""

from __future__ import annotations

import numpy as np

from .base import Parameter, Task, Whole
from .gram import F64
from .spectral import MATRIX, Spectral, embeddings, inner, thin


class IsoMerger(Spectral):
    """Source: ISO-Merger (arXiv 2607.19331) and its authors' code, both in fp64.

    Each expert's singular vectors, signs as in the base W0 = U·S·Vᵀ, are moved to the tangent space of the base's
    frames: Π_X(Y) = Y - X·sym(XᵀY) of their differences, columns beyond `keep` set to 0. With ri = ξui·S·Vᵀ + U·S·ξviᵀ
    and Gij = ⟨ri, rj⟩, factors c solve G·c = diag(G) (each expert's update survives whole), clipped. The summed
    tangents are projected and retracted by polar factors; the spectrum stays that of the base. The authors' ridge,
    1e-12, is taken relative to the mean of diag(G). Other tensors take the mean update. Cost: K + 3 decompositions.
    """

    name = "iso_merger"
    summary = "the rotations of the base's singular vectors, summed; the base's singular values stay"
    formula = "θ = polar(U + Π(Σ ci·ξui))·S·polar(V + Π(Σ ci·ξvi))ᵀ, θ0 = U·S·Vᵀ"
    source = "ISO-Merger (arXiv 2607.19331)"
    parameters = (
        Parameter("keep", "number", 0.9, "share of the leading directions that turn", above=0, maximum=1),
        Parameter("clip", "number", 1.5, "largest factor of an expert; the least is 0", minimum=0),
        embeddings(True),
        MATRIX,
    )
    svds = (3, 1)
    held = (4, 2)

    def update(self, tensor: Whole, task: Task) -> F64:
        """The merged matrix, less what the base's own decomposition gives back, so that its rounding cancels."""
        base = tensor.base()
        if not np.isfinite(base).all():
            return np.full(task.shape, np.nan)
        left, values, right_t = thin(base)
        del base
        right = right_t.T
        keep = max(1, round(float(task.values["keep"]) * len(values)))
        found = [_tangents(_expert(tensor, k), left, right, keep) for k in np.flatnonzero(tensor.changed).tolist()]
        factors = _factors(_gram(found, left, values, right), float(task.values["clip"]))
        steps = [np.zeros(left.shape), np.zeros(right.shape)]
        while found:
            for step, side in zip(steps, found.pop()):
                side *= factors[len(found)]
                step += side
        turned_right = _retract(right, steps.pop())
        turned_left = _retract(left, steps.pop())
        turned_left *= values
        left *= values
        out = turned_left @ turned_right.T
        out -= left @ right_t
        return out


def _expert(tensor: Whole, k: int) -> F64:
    """The weights of an expert."""
    out = tensor.base()
    out += tensor.delta(k)
    return out


def _tangents(matrix: F64, left: F64, right: F64, keep: int) -> tuple[F64, F64]:
    """ξu fp64[m, q] and ξv fp64[n, q] of an expert's matrix, 0 beyond the first `keep` columns."""
    own_left, _, own_right = thin(matrix)
    sign = np.where(np.einsum("ij,ij->j", left, own_left) >= 0.0, 1.0, -1.0)
    pair = _project(left, own_left * sign - left), _project(right, own_right.T * sign - right)
    for side in pair:
        side[:, keep:] = 0.0
    return pair


def _project(frame: F64, step: F64) -> F64:
    """Onto the tangent space of the Stiefel manifold at a frame."""
    product = frame.T @ step
    return step - frame @ ((product + product.T) / 2.0)


def _gram(tangents: list[tuple[F64, F64]], left: F64, values: F64, right: F64) -> F64:
    """⟨ri, rj⟩, without an r: ⟨ξui·S, ξuj·S⟩ + ⟨ξvi·S, ξvj·S⟩ and twice mixed terms of size q×q."""
    gram = np.zeros((len(tangents), len(tangents)))
    squares = values**2
    turns = [((left.T @ u) * values, (right.T @ v) * values) for u, v in tangents]
    for i, one in enumerate(tangents):
        for j, other in enumerate(tangents[: i + 1]):
            same = sum(float(np.einsum("ij,ij,j", one[side], other[side], squares)) for side in (0, 1))
            # ⟨ξui·S·Vᵀ, U·S·ξvjᵀ⟩ is the trace of (Uᵀ·ξui·S)·(Vᵀ·ξvj·S)
            mixed = inner(turns[i][0], turns[j][1].T) + inner(turns[j][0], turns[i][1].T)
            gram[i, j] = gram[j, i] = same + mixed
    return gram


def _factors(gram: F64, clip: float) -> F64:
    """c of G·c = diag(G), clipped; all 1 where nothing turns."""
    wanted = np.diagonal(gram)
    ridge = 1e-12 * float(np.mean(wanted))
    if ridge == 0.0:
        return np.ones(len(gram))
    found = np.linalg.solve(gram + ridge * np.eye(len(gram)), wanted)
    return np.clip(found, 0.0, clip).astype(np.float64)


def _retract(frame: F64, step: F64) -> F64:
    """The nearest frame to that which a tangent step leads to."""
    left, _, right = thin(frame + _project(frame, step))
    return left @ right
