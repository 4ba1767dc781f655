"""What a study can see: the parts of a difference's variance from a pilot, and the power of a larger table.

A difference between two merges is a table [seeds, problems]: seeds are pairs (or sets) of training runs, problems are
shared. Its variance has three parts: seeds differ, problems differ, and a problem differs from seed to seed.
`evaluate.statistics.crossed_difference` is the test that this foresees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import mean_squares, student_quantile


@dataclass(frozen=True)
class Parts:
    """Variances of a difference: between seeds, between problems, and of what is left (both together).

    Noise of samples is in `problems` where all seeds draw with the same random numbers, as in the lab; else in `rest`.
    """

    seeds: float
    problems: float
    rest: float

    def error(self, seeds: int, problems: int) -> float:
        """Standard error of the mean of a table of this size."""
        return math.sqrt(self.seeds / seeds + self.problems / problems + self.rest / (seeds * problems))

    def half_width(self, seeds: int, problems: int) -> float:
        """Of the 95 % interval: each part with its own Student quantile, as `crossed_difference` has it."""
        of_seeds = student_quantile(seeds - 1) ** 2 * self.seeds / seeds
        of_problems = student_quantile(problems - 1) ** 2 * (self.problems / problems + self.rest / (seeds * problems))
        return math.sqrt(of_seeds + of_problems)


def parts_of(table: NDArray[np.float64]) -> Parts:
    """From a pilot's table [seeds, problems], at least 2 × 2; parts that come out negative are 0.

    Source: Searle, Casella and McCulloch 1992, Variance Components, chapter 4 (analysis of variance estimators).
    """
    found = mean_squares(table, table)
    seeds, problems = found.sizes
    rest = float(found.rest)
    return Parts(
        max(0.0, (float(found.seeds) - rest) / problems), max(0.0, (float(found.problems) - rest) / seeds), rest
    )


def bounds_of_one(row: NDArray[np.float64]) -> tuple[Parts, Parts]:
    """From one pair's differences [problems], of which it is not known what another pair would show: as if problems
    differed in all pairs alike, and as if from pair to pair by chance. If pairs do not differ, the truth is between.
    """
    spread = float(np.var(row, ddof=1))
    return Parts(0.0, spread, 0.0), Parts(0.0, 0.0, spread)


def upper_parts(table: NDArray[np.float64], chance: float = 0.8) -> Parts:
    """The same, but for the variance between seeds its upper limit with this confidence: few pairs say little about it.

    A mean square is its expectation times χ²/df; quantiles of χ² by Wilson and Hilferty 1931, within 1 % from df 2 on.
    """
    found, own = mean_squares(table, table), parts_of(table)
    df = found.sizes[0] - 1
    low = df * (1.0 - 2.0 / (9.0 * df) + _quantile(1.0 - chance) * math.sqrt(2.0 / (9.0 * df))) ** 3
    seeds = (float(found.seeds) * df / low - own.rest) / found.sizes[1]
    return Parts(max(0.0, seeds), own.problems, own.rest)


def power(effect: float, parts: Parts, seeds: int, problems: int) -> float:
    """The chance that the interval leaves out 0 on the side of a true effect; normal mean, width as if known.

    Within 6 points of the share that is found, from six seeds on, where problems differ in all seeds alike (a test);
    where they differ by chance alone and seeds do not, it is some 15 points too high at six seeds (a test, too).
    """
    error = parts.error(seeds, problems)
    if error == 0.0:
        return 1.0 if effect else 0.0
    return _normal((abs(effect) - parts.half_width(seeds, problems)) / error)


def detectable(parts: Parts, seeds: int, problems: int, chance: float = 0.8) -> float:
    """The smallest effect that is found with this chance."""
    return parts.half_width(seeds, problems) + _quantile(chance) * parts.error(seeds, problems)


def problems_needed(effect: float, parts: Parts, seeds: int, chance: float = 0.8, most: int = 100_000) -> int | None:
    """Problems for which an effect is found with this chance; None where no number up to `most` does it."""
    if power(effect, parts, seeds, most) < chance:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, parts, seeds, middle) >= chance else (middle, high)
    return high


def all_found(chances: Sequence[float]) -> tuple[float, float]:
    """Bounds of the chance that every one of several comparisons is found, whatever they have in common: the test of
    'above every baseline' by intersection and union (Berger 1982) needs them all.
    """
    return max(0.0, 1.0 - sum(1.0 - chance for chance in chances)), min(chances)


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def _quantile(chance: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _normal(middle) >= chance else (middle, high)
    return high
