"""Means over problems with bootstrap intervals: problems are drawn again, the same ones for every point of a curve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import Z, student_quantile

Array = NDArray[np.float64]
ENDS = (0.025, 0.975)
TURNED = (("value", "value"), ("low", "high"), ("high", "low"))
"""Which bound of −x is which of x."""


class Resampling:
    """Draws of n problems with replacement.

    weight   fp64[n] of each problem: its tokens, or ones. A mean is Σ of values over Σ of weights
    stretch  by which draws lie too close together with few problems: Student's quantile and n/(n − 1), as for a mean
    """

    def __init__(self, weight: Array, draws: int, seed: int) -> None:
        self.weight = weight
        n = len(weight)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
        self.counts = counts.astype(np.float64)
        self.drawn = np.einsum("n,dn->d", weight, self.counts)
        self.stretch = student_quantile(n - 1) / Z * math.sqrt(n / (n - 1)) if n > 1 else math.inf

    def mean(self, values: Array) -> Array:
        """Means of values [..., n]."""
        return values.sum(-1) / self.weight.sum()

    def draws(self, values: Array) -> Array:
        """The same in every draw, [..., draws]; equal rows of values have equal ones, bit for bit (BLAS's differ)."""
        return np.einsum("...n,dn->...d", values, self.counts) / self.drawn

    def estimate(self, values: Array) -> dict[str, float | None]:
        """Mean of values [n] with its interval."""
        return self.interval(float(self.mean(values)), self.draws(values))

    def interval(self, value: float, draws: Array) -> dict[str, float | None]:
        """A value with the central 95 % of its stretched draws; null with a single problem."""
        if not math.isfinite(self.stretch):
            return {"value": value, "low": None, "high": None}
        low, high = np.quantile(value + (draws - value) * self.stretch, ENDS)
        return {"value": value, "low": float(low), "high": float(high)}

    def largest(self, values: Array, draws: Array) -> dict[str, float | None]:
        """The largest of values [P], with bounds that hold for the largest true one.

        The largest of several uncertain values is too large, and so are its draws: plain percentiles would see a
        barrier on one flat path in five. So the bounds are the largest of bands that hold for all P at once, as wide as
        the largest deviations of draws are (Chernozhukov, Lee and Rosen 2013, Econometrica 81).
        """
        value = float(values.max())
        if not math.isfinite(self.stretch):
            return {"value": value, "low": None, "high": None}
        errors = draws.std(axis=-1)
        off = np.divide(draws - values[:, None], errors[:, None], out=np.zeros_like(draws), where=errors[:, None] > 0.0)
        below, above = (float(np.quantile(side.max(0), ENDS[1])) * self.stretch for side in (off, -off))
        low, high = (values - below * errors).max(), (values + above * errors).max()
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
    means, draws = sampled.mean(values), sampled.draws(values)
    over, drawn = excess(means, alphas), excess(draws, alphas)
    top, bottom = sampled.largest(over, drawn), sampled.largest(-over, -drawn)
    turned = {end: None if (bound := bottom[other]) is None else 0.0 - bound for end, other in TURNED}
    return {
        "values": [sampled.interval(float(mean), row) for mean, row in zip(means, draws)],
        "excess": [sampled.interval(float(mean), row) for mean, row in zip(over, drawn)],
        "barrier": top | {"at": float(alphas[over.argmax()])},
        "dip": turned | {"at": float(alphas[over.argmin()])},
    }
