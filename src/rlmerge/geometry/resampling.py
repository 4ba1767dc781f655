"""Means over problems with bootstrap intervals: problems are drawn again, the same ones for every point of a curve."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Resampling:
    """Draws of n problems with replacement.

    weight   fp64[n] of each problem: its tokens, or ones. A mean is Σ of values over Σ of weights
    """

    def __init__(self, weight: Array, draws: int, seed: int) -> None:
        self.weight = weight
        n = len(weight)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
        self.counts = counts.astype(np.float64)
        self.drawn = np.einsum("n,dn->d", weight, self.counts)

    def mean(self, values: Array) -> Array:
        """Means of values [..., n]."""
        return values.sum(-1) / self.weight.sum()

    def draws(self, values: Array) -> Array:
        """The same in every draw, [..., draws]; equal rows of values have equal ones, bit for bit (BLAS's differ)."""
        return np.einsum("...n,dn->...d", values, self.counts) / self.drawn

    def estimate(self, values: Array) -> dict[str, float | None]:
        """Mean of values [n] with its interval."""
        return interval(float(self.mean(values)), self.draws(values), len(self.weight))


def interval(value: float, draws: Array, problems: int) -> dict[str, float | None]:
    """A value with the central 95 % of its draws (percentile bootstrap); null with a single problem."""
    if problems < 2:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


def excess(means: Array, alphas: Array) -> Array:
    """How far a curve [P, ...] lies above the chord between its ends, at α fp64[P] from 0 to 1.

    L(α) − [(1 − α)·L(0) + α·L(1)], in a form that is 0 exactly where nothing changes.
    """
    along = alphas.reshape(-1, *[1] * (means.ndim - 1))
    return (means - means[0]) - along * (means[-1] - means[0])


def barrier(sampled: Resampling, values: Array, alphas: Array) -> dict[str, Any]:
    """The curve of values [P, n] (sums of problems) along a path, and what it has of barriers.

    barrier   the largest excess over the chord, with the α where it is; at least 0, as the ends are on the chord
    dip       the smallest, at most 0: how far the path lies below
    """
    n = len(sampled.weight)
    means, draws = sampled.mean(values), sampled.draws(values)
    over, drawn = excess(means, alphas), excess(draws, alphas)
    found: dict[str, Any] = {
        "values": [interval(float(mean), row, n) for mean, row in zip(means, draws)],
        "excess": [interval(float(mean), row, n) for mean, row in zip(over, drawn)],
    }
    for name, where, most in (("barrier", over.argmax(), drawn.max(0)), ("dip", over.argmin(), drawn.min(0))):
        found[name] = interval(float(over[where]), most, n) | {"at": float(alphas[where])}
    return found
