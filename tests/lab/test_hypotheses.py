"""Estimates and verdicts of the study: against the definition, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rlmerge.evaluate.statistics import paired_difference
from rlmerge.lab.hypotheses import as_row, difference, retained, retained_difference, uncut, verdict


def test_verdicts() -> None:
    assert verdict(0.001, 0.3, 0.02) == "holds"
    assert verdict(-0.3, 0.01, 0.02) == "refuted"
    assert verdict(-0.3, 0.3, 0.02) == "open"


def test_p_is_one_sided_and_nats_are_not_cut() -> None:
    random = np.random.default_rng(0)
    worse = as_row(difference(random.normal(-1.5, 0.1, (4, 200))), 0.01)
    assert worse["p"] > 0.999
    assert worse["low"] < -1.45
    assert worse["high"] == pytest.approx(-1.5, abs=0.1)
    assert worse["verdict"] == "refuted"
    better = as_row(paired_difference(random.normal(0.5, 0.1, 200)), 0.01)
    assert better["p"] < 1e-6


def tables(random: np.random.Generator, kept: float, sets: int, problems: int) -> tuple[np.ndarray, np.ndarray]:
    """(merge − base, experts − base) of 0s and 1s: a gain of .3 of which a share is kept, seeds that differ."""
    level = random.uniform(0.2, 0.5, problems)
    base = random.random(problems) < level
    gain = np.clip(0.3 + random.normal(0, 0.03, (sets, 1)), 0, 1)
    expert = random.random((sets, problems)) < np.clip(level + gain, 0, 1)
    merge = random.random((sets, problems)) < np.clip(level + kept * gain, 0, 1)
    return merge - base.astype(float), expert - base.astype(float)


@pytest.mark.parametrize("sets", [1, 6])
def test_differences_of_retentions_are_covered(sets: int) -> None:
    """Near 95 %, for one pair and for six; the intervals of both retentions are about their own."""
    random, inside, runs = np.random.default_rng(1), 0, 300
    for _ in range(runs):
        one, other = tables(random, 0.9, sets, 300), tables(random, 0.7, sets, 300)
        found = retained_difference(one, other)
        assert found is not None
        inside += found["low"] <= 0.2 <= found["high"]
    assert 0.91 <= inside / runs <= 0.99
    assert retained(*one)["low"] < 0.9 < retained(*one)["high"]


def test_no_gain_no_difference() -> None:
    random = np.random.default_rng(2)
    nothing = random.choice([-1.0, 0.0, 1.0], (3, 100))
    assert retained_difference((nothing, nothing), tables(random, 0.9, 3, 100)) is None


def test_an_interval_is_about_its_centre() -> None:
    estimate = difference(np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    low, high = uncut(estimate)
    assert (low + high) / 2 == pytest.approx(float(estimate.centre))
