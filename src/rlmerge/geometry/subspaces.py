"""How two matrices stand to each other: turned subspaces, moved singular values, subspaces in common."""

from __future__ import annotations

import numpy as np

from .decompositions import F64, Spectrum

DETERMINED = 0.1
"""Radians: a subspace whose computed basis may be off by more has no figure (values that are equal at its edge)."""


def principal_angles(one: F64, other: F64) -> F64:
    """Degrees, ascending, between the column spaces of fp64[n, k] with orthonormal columns.

    From cosines and sines together: alone, a cosine knows no angle below 10⁻⁶ degrees, as rounding turns 1 into one.
    Sines are known to 10⁻⁸ of the largest one.
    """
    product = one.T @ other
    cosines = np.linalg.svd(product, compute_uv=False)
    rest = other - one @ product
    sines = np.sqrt(np.maximum(np.linalg.eigvalsh(rest.T @ rest), 0.0))
    return np.degrees(np.arctan2(sines, cosines))


def similarity(one: F64, other: F64, k: int) -> float:
    """‖VaᵀVb‖²/k of the leading k columns: 1 for one subspace, k/n for random ones, 0 for orthogonal ones."""
    product = one[:, :k].T @ other[:, :k]
    return float(np.einsum("ij,ij", product, product)) / k


def determined(spectrum: Spectrum, k: int) -> bool:
    """Whether the leading k directions are set apart from the others by more than rounding.

    Of a sketch only their existence is asked: its figures carry the bound.
    """
    if k > len(spectrum.values) or spectrum.left.shape[1] < k or spectrum.values[k - 1] <= spectrum.errors[k - 1]:
        return False
    return not spectrum.exact or spectrum.blurred(k) <= DETERMINED


def angle_figures(base: Spectrum, moved: Spectrum, k: int) -> dict[str, float | None]:
    """Largest and mean principal angle (degrees) of the leading k left and right subspaces, and their error.

    None where either has no such subspace of its own: equal values at the edge, or fewer than k values above 0.
    """
    names = ("left_max", "left_mean", "right_max", "right_mean", "error")
    if not (determined(base, k) and determined(moved, k)):
        return dict.fromkeys(names)
    found = []
    for one, other in ((base.left, moved.left), (base.right, moved.right)):
        angles = principal_angles(one[:, :k], other[:, :k])
        found += [float(angles[-1]), float(np.mean(angles))]
    error = float(np.degrees(min(np.pi / 2, base.blurred(k) + moved.blurred(k))))
    return dict(zip(names, [*found, error]))


def shift_figures(base: Spectrum, moved: Spectrum, delta: float) -> dict[str, float | None]:
    """How far the singular values moved, for an update of Frobenius norm `delta`.

    nss            ‖σ(W₊) − σ(W₀)‖/‖σ(W₀)‖ (2511.08567); None where not all values are known
    nss_leading    the same of the leading values that are known, over the whole ‖σ(W₀)‖: never more than nss
    relative_norm  ‖δ‖/‖W₀‖, the most that nss can be (Mirsky)
    residual       ‖σ(W₊) − σ(W₀)‖/‖δ‖: the share of the update that no turn of the frames explains, for U₊·S₀·V₊ᵀ is
                   the nearest matrix to W₊ that has the spectrum of W₀
    error          what nss may be off
    """
    scale = float(np.sqrt(base.square))
    if scale == 0.0:
        return dict.fromkeys(("nss", "nss_leading", "relative_norm", "residual", "error"))
    count = min(len(base.values), len(moved.values)) - (0 if base.exact and moved.exact else 1)
    change = float(np.linalg.norm(moved.values[:count] - base.values[:count]))
    error = float(np.linalg.norm(moved.errors[:count] + base.errors[:count]))
    whole = base.exact and moved.exact
    return {
        "nss": change / scale if whole else None,
        "nss_leading": change / scale,
        "relative_norm": delta / scale,
        "residual": min(1.0, change / delta) if whole and delta > 0.0 else None,
        "error": error / scale,
    }


def pair_figures(one: Spectrum, other: Spectrum, counts: tuple[int, ...]) -> dict[str, dict[str, float | None]]:
    """Similarity of the leading left and right subspaces of two deltas for each k, beside that of random ones."""
    found: dict[str, dict[str, float | None]] = {}
    for k in counts:
        known = determined(one, k) and determined(other, k)
        found[str(k)] = {
            "left": similarity(one.left, other.left, k) if known else None,
            "right": similarity(one.right, other.right, k) if known else None,
            "left_chance": k / one.left.shape[0],
            "right_chance": k / one.right.shape[0],
        }
    return found
