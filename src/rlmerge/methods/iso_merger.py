"""Turning the singular frames of the base, its spectrum fixed: `iso_merger`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from .base import Parameter, Task, Whole
from .gram import F64
from .spectral import MATRIX, Spectral, embeddings, polar
from .svd import ROWS, Svd, multiply, svd


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

    def beside(self, shape: tuple[int, ...], experts: int) -> int:
        """Both frames of the base, and the turns of the experts."""
        size, square = shape[0] * shape[1], min(shape) ** 2
        each = square + (size if shape[0] != shape[1] else 0)
        return 8 * (size + square + experts * each)

    def update(self, tensor: Whole, task: Task) -> F64:
        """The merged matrix, less what the base's own decomposition gives back, so that its rounding cancels."""
        if not np.isfinite(tensor.base()).all():
            return np.full(task.shape, np.nan)
        base = svd(tensor.base, task.shape, 0.0)
        base.release()
        count = len(base.values)
        keep = max(1, round(float(task.values["keep"]) * count))
        found = [_turn(tensor, k, base, keep, task.shape) for k in np.flatnonzero(tensor.changed).tolist()]
        factors = _factors(_gram(found, base.values, keep), float(task.values["clip"]))
        turn = found.pop(0)
        turn.scale(factors[0])
        for factor in factors[1:]:
            turn.add(found.pop(0), factor)
        far = base.far(tensor.base)
        far = far.copy() if base.tall is not None else far
        multiply(far, turn.rotation(lower=True, keep=keep))
        if turn.away is not None:
            far[:, :keep] += turn.away
            turn.away = None
        far = polar(far)
        near = turn.rotation(lower=False, keep=keep).T @ base.near
        del turn
        near = polar(near)
        far *= base.values
        out = near.T @ far.T if base.wide else far @ near
        del far, near
        far, tall = base.far(tensor.base), out.T if base.wide else out
        for start in range(0, len(tall), ROWS):
            rows = slice(start, start + ROWS)
            tall[rows] -= (far[rows] * base.values) @ base.near
        return out


@dataclass
class Turn:
    """ξ of an expert in the frames of the base, before columns beyond `keep` are set to 0; n is the shorter side.

    Along a frame X, a tangent is X·Ω with Ω skew: half of it says all.

    both     fp64[n, n]: Ω of the longer side's frame below the diagonal, that of the shorter side's above
    away     fp64[m, keep]: what is left of the longer side's tangent outside the span of its frame; None: nothing
    """

    both: F64
    away: F64 | None

    def scale(self, factor: float) -> None:
        """In place."""
        self.both *= factor
        if self.away is not None:
            self.away *= factor

    def add(self, other: Turn, factor: float) -> None:
        """So much of another, which is overwritten."""
        other.scale(factor)
        self.both += other.both
        if self.away is not None and other.away is not None:
            self.away += other.away

    def rotation(self, lower: bool, keep: int) -> F64:
        """1 + Ω of a side, of the tangent with columns beyond `keep` set to 0, projected once more: fp64[n, n]."""
        triangle = self.both if lower else self.both.T
        count = len(triangle)
        out = np.eye(count)
        for a in range(1, count):
            # entries of Ω with one end beyond `keep` lose their mirror image, and half is what is skew
            row = triangle[a, :a] * (1.0 if lower else -1.0)
            row = row if a < keep else np.where(np.arange(a) < keep, 0.5 * row, 0.0)
            out[a, :a] = row
            out[:a, a] = -row
        return out


def _turn(tensor: Whole, k: int, base: Svd, keep: int, shape: tuple[int, ...]) -> Turn:
    """The tangent of an expert, its singular vectors' signs as in the base's left ones."""
    expert = partial(tensor.expert, k)
    own = svd(expert, shape, 0.0)
    tall, near = own.far(expert), own.near
    del own
    multiply(near, base.near.T)
    frame = base.far(tensor.base)
    # rows are the expert's vectors, columns the base's
    if len(tall) == len(near):
        multiply(tall.T, frame)
        cross = tall.T
    else:
        cross = tall.T @ frame
    sign = np.where(np.diagonal(near if base.wide else cross) >= 0.0, 1.0, -1.0)
    away = None
    if len(tall) != len(near):
        for start in range(0, len(tall), ROWS):
            rows = slice(start, start + ROWS)
            tall[rows] -= frame[rows] @ cross.T
        tall *= sign
        away = tall[:, :keep]
    del frame
    for one in (cross, near):
        one *= sign[:, None]
        _make_skew(one)
    for row in range(len(near)):
        cross[row, row + 1 :] = near[row, row + 1 :]
    return Turn(cross, away)


def _make_skew(matrix: F64) -> None:
    """(Aᵀ - A)/2, block by block, in place."""
    for i in range(0, len(matrix), ROWS):
        for j in range(0, i + 1, ROWS):
            one, other = matrix[i : i + ROWS, j : j + ROWS], matrix[j : j + ROWS, i : i + ROWS]
            half = (other.T - one) / 2.0
            one[...], other[...] = half, -half.T


def _gram(turns: list[Turn], values: F64, keep: int) -> F64:
    """⟨ri, rj⟩ from what Ω are, without an r: columns of ξ have the weights S, and mixed terms are products of Ω."""
    once = np.where(np.arange(len(values)) < keep, values, 0.0)
    gram = np.zeros((len(turns), len(turns)))
    for i, one in enumerate(turns):
        for j, other in enumerate(turns[: i + 1]):
            total = 0.0
            for start in range(0, len(values), ROWS):
                rows = slice(start, start + ROWS)
                # an entry and its mirror image, each with the weight of its column
                same = one.both[rows] * other.both[rows]
                total += float(np.sum(same @ once**2) + once[rows] ** 2 @ np.sum(same, axis=1))
                # ⟨ξui·S·Vᵀ, U·S·ξvjᵀ⟩ is the trace of (Ωui·S)·(Ωvj·S)
                mixed = one.both[rows] * other.both[:, rows].T
                total += 2.0 * float(once[rows] @ (mixed @ once))
            if one.away is not None and other.away is not None:
                total += float(np.einsum("ij,ij,j", one.away, other.away, values[:keep] ** 2))
            gram[i, j] = gram[j, i] = total
    return gram


def _factors(gram: F64, clip: float) -> F64:
    """c of G·c = diag(G), clipped; all 1 where nothing turns."""
    wanted = np.diagonal(gram)
    ridge = 1e-12 * float(np.mean(wanted))
    if ridge == 0.0:
        return np.ones(len(gram))
    found = np.linalg.solve(gram + ridge * np.eye(len(gram)), wanted)
    return np.clip(found, 0.0, clip).astype(np.float64)
