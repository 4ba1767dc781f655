"""Differences with intervals, and the words that the study has for them (docs/study/protocol.md).

A difference is one that a hypothesis says is above 0. Intervals are 95 %, so that a word in one direction is a test at
2.5 %. A claim about several at once holds where all of them hold (intersection and union: Berger 1982), each without
correction; it is refuted where one of them is, by a p adjusted after Holm, as any one of them would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import (
    Estimate,
    crossed_difference,
    holm,
    p_value,
    paired_difference,
    ratio,
    student_quantile,
)

Table = NDArray[np.float64]
Row = dict[str, Any]
HOLDS, SMALL, REFUTED, OPEN = "holds", "holds, below interest", "refuted", "open"
LEVEL = 0.025


def difference(table: Table) -> Estimate:
    """Mean of a table of differences [sets, problems], for other sets and other problems; of one set, for others."""
    return crossed_difference(table) if len(table) > 1 else paired_difference(table[0])


def uncut(estimate: Estimate) -> tuple[float, float]:
    """The interval without the bounds of accuracies: shares of a gain have none."""
    half = float(estimate.factor * estimate.error)
    return float(estimate.centre) - half, float(estimate.centre) + half


def verdict(low: float, high: float, interest: float) -> str:
    """Of a difference with this interval: above 0 and perhaps of interest, above 0 and too small for it, below what is
    of interest, or open.
    """
    if low > 0.0:
        return HOLDS if high >= interest else SMALL
    return REFUTED if high < interest else OPEN


def as_row(estimate: Estimate, interest: float) -> Row:
    """As JSON: value and interval, p that it is not above 0 and p that it is not below what is of interest (one-sided),
    and the word for it.
    """
    low, high = uncut(estimate)
    above = _one_sided(estimate)
    below = 1.0 - _one_sided(estimate._replace(centre=estimate.centre - interest))
    found = {"value": float(estimate.value), "low": low, "high": high, "p": above, "p_below": below}
    return found | {"verdict": verdict(low, high, interest)}


def _one_sided(estimate: Estimate) -> float:
    half = p_value(estimate) / 2
    return half if estimate.centre > 0 else 1.0 - half


def over_runs(values: Sequence[float], interest: float) -> Row | None:
    """Mean of one number a run (or pair of runs), with Student's interval; None of fewer than two."""
    if len(values) < 2:
        return None
    found = np.array(values, np.float64)
    mean, error = float(found.mean()), float(found.std(ddof=1)) / np.sqrt(len(found))
    return as_row(Estimate(mean, mean, mean, error, mean, student_quantile(len(found) - 1)), interest)


def all_of(rows: Sequence[Row | None]) -> str:
    """The word for a claim that every one of some differences is above 0; what is not known (None) is open, and counts
    in Holm's adjustment.
    """
    if not rows:
        return OPEN
    known = [row for row in rows if row is not None]
    # of what is above 0, however little, nothing refutes that it is
    below = [1.0 if row is None or row["low"] > 0.0 else row["p_below"] for row in rows]
    if min(holm(below)) < LEVEL:
        return REFUTED
    words = {row["verdict"] for row in known}
    if len(known) < len(rows) or not words <= {HOLDS, SMALL}:
        return OPEN
    return HOLDS if words == {HOLDS} else SMALL


def retained(above: Table, below: Table) -> Row:
    """Share of a gain that is kept: merge less base over single experts less base (Fieller's interval)."""
    crossed = len(above) > 1
    found = ratio(above if crossed else above[0], below if crossed else below[0], crossed)
    ends = [float(number) if np.isfinite(number) else None for number in (found.value, found.low, found.high)]
    return dict(zip(("value", "low", "high"), ends))


def retained_difference(one: tuple[Table, Table], other: tuple[Table, Table], interest: float) -> Row | None:
    """Difference of two retentions; None where a gain is not clear of 0.

    By the influence of each set and problem, (above − r·below) / mean(below), whose differences are a table like any
    other: sets are paired by their place (matched runs share a seed; of runs that do not, no harm), problems are
    shared. Source: the delta method, for ratios of means.
    """
    parts, values = [], []
    for above, below in (one, other):
        if uncut(difference(below))[0] <= 0.0:
            return None
        values.append(above.mean() / below.mean())
        parts.append((above - values[-1] * below) / below.mean())
    more = float(values[0] - values[1])
    around = difference(parts[0] - parts[1])
    return as_row(around._replace(value=more, centre=more + around.centre), interest)
