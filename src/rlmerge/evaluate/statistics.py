"""Intervals and tests for accuracies on shared problems: every 95 % interval here is checked by simulation.

Problems are the units of chance: another benchmark of the same kind would hold other problems. Samples of one problem
belong together, so more samples sharpen the score of a problem and never count as more problems. Training seeds, where
there are any, are drawn as well, and cross with the problems. The measured coverage is a table in docs/compare.md.

An array of scores has problems on its last axis and, in what is `crossed`, seeds on the one before; leading axes are
independent repetitions, so a simulation is one call. Scores are shares of right samples, 0 to 1; a 95 % level
is fixed throughout. No SciPy: the few functions needed are below, with their sources.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Z = NormalDist().inv_cdf(0.975)
PRIOR = 0.5
"""Weight of 'samples of a problem all agree' in the design effect, in problems: our choice."""
DRAWS = 4000


class Estimate(NamedTuple):
    """A value with its 95 % interval and standard error: numbers, or arrays of one shape.

    centre     the middle of the interval before it is cut to what is possible; the value, or the value shrunk
    factor     half the interval's width in standard errors: Student's quantile, where there is one
    """

    value: Any
    low: Any
    high: Any
    error: Any
    centre: Any
    factor: Any


# --- distributions ----------------------------------------------------------------------------------------------------


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-12.

    Source: the continued fraction DLMF 8.17.22, evaluated by the modified Lentz algorithm.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges faster on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            total *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(log) / a * total


def student_p(t: float, df: float) -> float:
    """Two-sided tail P(|T| >= |t|) of Student's t with `df` > 0 degrees of freedom."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


@functools.cache
def student_quantile(df: float) -> float:
    """The t with P(|T| >= t) = 0.05: by bisection, to 1e-9. For df >= 1."""
    return _bisect(lambda t: student_p(t, df) < 0.05, 1.9, 12.8)


def p_value(estimate: Estimate) -> float:
    """Two-sided, that the true value is 0, for one estimate; below 0.05 where the interval, uncut, leaves out 0.

    Student's t with the degrees of freedom whose quantile is the estimate's factor.
    """
    if not estimate.error:
        return 1.0 if not estimate.centre else 0.0
    factor = float(estimate.factor)
    df = _bisect(lambda df: student_p(factor, df) < 0.05, 0.5, 1e6)
    return student_p(float(estimate.centre / estimate.error), df)


def _bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """Where `reached` becomes true between two positive numbers, halving their ratio."""
    while high / low > 1 + 1e-10:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


# --- one model --------------------------------------------------------------------------------------------------------


def pass_at_k(n: Any, c: Any, k: int) -> Array:
    """Per problem, the chance that one of k samples is right, unbiased from c right ones of n: 1 - C(n-c, k)/C(n, k).

    Every n >= k. Source: Chen et al. 2021 (arXiv 2107.03374), equation 1, as the product that never overflows.
    """
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if k < 1 or np.any(n < k):
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of every problem")
    none = np.ones(n.shape)
    for j in range(k):
        none = none * np.maximum(n - c - j, 0) / (n - j)
    return 1 - none


def wilson(share: Any, size: Any, z: Any = Z) -> tuple[Array, Array]:
    """The score interval of a share of `size` (an effective size: any number > 0). Source: Wilson 1927."""
    share, size = np.asarray(share, np.float64), np.asarray(size, np.float64)
    scale = 1 + z * z / size
    centre = (share + z * z / (2 * size)) / scale
    half = z / scale * np.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half, 1)
    return np.where(share <= 0, 0.0, low), np.where(share >= 1, 1.0, high)  # no rounding at the ends


def mean_score(scores: Array, samples: float = 1) -> Estimate:
    """Accuracy: the mean of the problems' scores [..., n], each in [0, 1] and from `samples` samples.

    The interval is Wilson's with an effective size: n over the design effect, the variance of the scores relative to
    that of single samples, which lies between 1/samples (they differ freely) and 1 (they all agree). With one sample
    this is Wilson's interval. Few problems away from the bounds say little about the effect, so it is drawn to 1 with
    the weight of half a problem. Sources: Kish 1965 for the effective size, Franco et al. 2019 (J. Surv. Stat.
    Methodol. 7) for putting it into Wilson's interval; the prior is ours.
    """
    scores = np.asarray(scores, np.float64)
    n = scores.shape[-1]
    mean = scores.mean(-1)
    single = mean * (1 - mean)
    spread = scores.var(-1, ddof=1) if n > 1 else single
    raw = np.divide(spread, single, out=np.ones_like(single), where=single > 0)
    telling = np.minimum((scores > 0).sum(-1), (scores < 1).sum(-1))
    effect = np.clip((telling * raw + PRIOR) / (telling + PRIOR), 1 / max(samples, 1), 1)
    low, high = wilson(mean, n / effect)
    return Estimate(mean, low, high, np.sqrt(single * effect / n), mean, Z)


# --- two models on the same problems ----------------------------------------------------------------------------------


def paired_difference(difference: Array) -> Estimate:
    """Mean of the differences [..., n] of two models on the same problems.

    Two made-up problems are added, one for either side, as large as a typical difference that is not 0 (1 where there
    is none): without them, the interval of a few discordant problems is too short, and [0, 0] of none. With one sample
    a problem this is the interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37), with Student's t; the size of
    the two problems for several samples is ours. `value` is the plain mean; the interval is centred at the shrunk one.
    """
    difference = np.asarray(difference, np.float64)
    n = difference.shape[-1]
    squares = (difference**2).sum(-1) + 2 * _typical(difference) ** 2
    centre = difference.sum(-1) / (n + 2)
    error = np.sqrt(np.maximum(squares / (n + 2) - centre**2, 0) / (n + 1))
    return _cut(difference.mean(-1), centre, error, student_quantile(n + 1))


def _typical(difference: Array) -> Array:
    """The root mean square of the differences that are not 0, over the last axis; 1 where all are."""
    differing = np.count_nonzero(difference, axis=-1)
    squares = (difference**2).sum(-1)
    return np.sqrt(np.divide(squares, differing, out=np.ones(squares.shape), where=differing > 0))


def _cut(value: Array, centre: Array, error: Array, factor: Any) -> Estimate:
    """The interval of a difference, which lies between -1 and 1."""
    half = factor * error
    return Estimate(value, np.maximum(centre - half, -1), np.minimum(centre + half, 1), error, centre, factor)


def mcnemar(lost: int, won: int) -> tuple[float, float]:
    """P-values of `lost` right→wrong against `won` wrong→right: exact and mid-p, two-sided; 1 where nothing flipped.

    The mid-p value counts half of the chance of the outcome itself: near its level on average over the number of flips
    (up to 8 % instead of 5 at single ones), where the exact one stays far below.
    Source: McNemar 1947; Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91) for mid-p.
    """
    flips, few = lost + won, min(lost, won)
    if not flips:
        return 1.0, 1.0

    def chance(i: int) -> float:
        log = math.lgamma(flips + 1) - math.lgamma(i + 1) - math.lgamma(flips - i + 1)
        return math.exp(log - flips * math.log(2))

    tail = math.fsum(chance(i) for i in range(few + 1))
    return min(1.0, 2 * tail), min(1.0, 2 * tail - chance(few))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in the same order. Source: Holm 1979 (Scand. J. Statist. 6)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# --- seeds x problems -------------------------------------------------------------------------------------------------


class MeanSquares(NamedTuple):
    """Mean products of two arrays [..., seeds, problems] between seeds, between problems, and of what is left."""

    seeds: Array
    problems: Array
    rest: Array
    sizes: tuple[int, int]

    def variance(self, of_seeds: Array | float, of_problems: Array | float, factors: tuple[float, float]) -> Array:
        """Variance of the mean over all (covariance, for two arrays), its parts times the squares of two `factors`.

        of_seeds, of_problems   1 where that part counts, 0 where it is taken to be nothing
        """
        first, second = factors[0] ** 2, factors[1] ** 2
        seeds, problems = self.seeds - self.rest, self.problems - self.rest
        return (first * of_seeds * seeds + second * (of_problems * problems + self.rest)) / math.prod(self.sizes)

    def positive(self) -> tuple[Array, Array]:
        """Of one array with itself: whether seeds, and problems, vary by more than what is left explains."""
        return self.seeds > self.rest, self.problems > self.rest

    def quantiles(self) -> tuple[float, float]:
        """Student's, with the degrees of freedom of the seeds and of the problems."""
        return student_quantile(self.sizes[0] - 1), student_quantile(self.sizes[1] - 1)


def mean_squares(x: Array, y: Array) -> MeanSquares:
    """The two-way table without repetition, both ways random; at least two seeds and two problems.

    Source: Searle, Casella and McCulloch 1992, Variance Components, chapter 4.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    count, n = x.shape[-2:]
    x, y = x - x.mean((-2, -1), keepdims=True), y - y.mean((-2, -1), keepdims=True)
    rows = n * (x.mean(-1) * y.mean(-1)).sum(-1)
    columns = count * (x.mean(-2) * y.mean(-2)).sum(-1)
    rest = np.asarray((x * y).sum((-2, -1)) - rows - columns)
    rest = rest / ((count - 1) * (n - 1))
    return MeanSquares(rows / (count - 1), columns / (n - 1), rest, (count, n))


def crossed_difference(difference: Array) -> Estimate:
    """Mean of differences [..., seeds, problems] over both, for other seeds and other problems.

    The squared half-width is the sum of both parts of the variance, each times the square of its own Student
    quantile: with few seeds, what seeds do is hardly known, and what problems do is. Two made-up problems are added as
    in `paired_difference`. Measured coverage: 93 to 97 % from five seeds on, 91 to 98 % with three; with two it can
    be 85 %. Source: Cochran 1964 (Biometrics 20), whose weighted t this is, on variance components cut at 0.
    """
    difference = np.asarray(difference, np.float64)
    added = np.broadcast_to(_typical(difference.mean(-2))[..., None, None], (*difference.shape[:-1], 1))
    table = np.concatenate([difference, added, -added], axis=-1)
    variance, factor = _crossed(table)
    return _cut(difference.mean((-2, -1)), table.mean((-2, -1)), np.sqrt(variance), factor)


def crossed_score(scores: Array, samples: float = 1) -> Estimate:
    """Accuracy over seeds and problems [..., seeds, problems]: Wilson's interval with the effective size of both.

    The variance lies between that of independent samples and that of a single one.
    """
    scores = np.asarray(scores, np.float64)
    mean = scores.mean((-2, -1))
    single = mean * (1 - mean)
    count, n = scores.shape[-2:]
    variance, factor = _crossed(scores)
    variance = np.clip(variance, single / (count * n * max(samples, 1)), single)
    size = np.divide(single, variance, out=np.full(mean.shape, float(n)), where=variance > 0)
    low, high = wilson(mean, size, factor)
    return Estimate(mean, low, high, np.sqrt(variance), mean, factor)


def _crossed(table: Array) -> tuple[Array, Array]:
    """The variance of a table's mean, and the half-width of its interval in standard errors."""
    parts = mean_squares(table, table)
    counted = parts.positive()
    variance = np.maximum(parts.variance(*counted, (1, 1)), 0)
    wide = np.maximum(parts.variance(*counted, parts.quantiles()), 0)
    ratio = np.divide(wide, variance, out=np.full(variance.shape, Z * Z), where=variance > 0)
    return variance, np.sqrt(ratio)


# --- ratios and resampling --------------------------------------------------------------------------------------------


def ratio(above: Array, below: Array, crossed: bool = False) -> Estimate:
    """mean(above) / mean(below) over the same problems [..., n], or seeds and problems if `crossed`.

    All values r for which the mean of above - r·below does not differ from 0 at 5 %: right where a quotient of normal
    means is far from normal. The bounds are NaN where `below` itself does not differ from 0, and the interval would be
    unbounded. Source: Fieller 1954 (J. R. Stat. Soc. B 16). `error` is the delta method's.
    """
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    axes = (-2, -1) if crossed else -1
    a, b = above.mean(axes), below.mean(axes)
    value = np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)
    pairs = ((above, above), (above, below), (below, below))
    if crossed:
        off = above - np.nan_to_num(value)[..., None, None] * below
        counted = mean_squares(off, off).positive()
        tables = [mean_squares(x, y) for x, y in pairs]
        narrow = [table.variance(*counted, (1, 1)) for table in tables]
        wide = [table.variance(*counted, table.quantiles()) for table in tables]
    else:
        n = above.shape[-1]
        narrow = [((x * y).mean(-1) - x.mean(-1) * y.mean(-1)) / (n - 1) for x, y in pairs]
        wide = [student_quantile(n - 1) ** 2 * part for part in narrow]
    low, high = _fieller(a, b, *wide)
    aa, ab, bb = narrow
    at = np.nan_to_num(value)
    variance = np.maximum(aa - 2 * at * ab + at**2 * bb, 0)
    error = np.divide(np.sqrt(variance), np.abs(b), out=np.full(np.shape(a), np.nan), where=b != 0)
    return Estimate(value, low, high, error, value, Z)


def _fieller(a: Array, b: Array, aa: Array, ab: Array, bb: Array) -> tuple[Array, Array]:
    """Both ends of (a - r·b)² <= aa - 2r·ab + r²·bb, in which the variances hold the squared quantile; else NaN."""
    lead, half, last = b * b - bb, a * b - ab, a * a - aa
    root = np.sqrt(np.maximum(half * half - lead * last, 0))
    low, high = (
        np.divide(half + sign * root, lead, out=np.full(np.shape(a), np.nan), where=(lead > 0) & (b != 0))
        for sign in (-1, 1)
    )
    return low, high


def paired_bootstrap(difference: Array, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Percentile bootstrap of the mean of differences [n] over problems, or [seeds, n] crossed: seeds × problems.

    Seeds and problems are drawn independently of each other. The draws are then stretched about the mean to the width
    of `paired_difference` or `crossed_difference`: plain percentiles are too narrow for few problems, and with seeds
    they cover anything from 64 % (few seeds that differ) to 99 % (seeds that do not), see docs/compare.md. So the
    bootstrap gives the shape of the interval and the formula its width. The order of problems changes nothing.
    Source: Owen 2007 (Ann. Appl. Stat. 1), the pigeonhole bootstrap.
    """
    difference = np.asarray(difference, np.float64)
    crossed = difference.ndim == 2
    wide = crossed_difference(difference) if crossed else paired_difference(difference)
    table = np.atleast_2d(difference)
    columns, counts = np.unique(table, axis=1, return_counts=True)
    seeds, n = len(table), table.shape[1]
    random = np.random.default_rng(seed)
    rows = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = np.empty(draws)
    for start in range(0, draws, 500):
        weight = random.multinomial(n, counts / n, size=len(rows[start : start + 500])) / n
        means[start : start + 500] = ((weight @ columns.T) * rows[start : start + 500]).sum(1)
    spread = means.std()
    if not spread:
        return float(wide.low), float(wide.high)
    stretched = float(wide.centre) + (means - means.mean()) * float(wide.factor * wide.error) / (Z * spread)
    low, high = np.quantile(stretched, (0.025, 0.975))
    return max(float(low), -1.0), min(float(high), 1.0)
