"""Power: parts come back from made-up tables, and what is foreseen is what the test finds."""

from __future__ import annotations

import numpy as np
import pytest

from rlmerge.evaluate.statistics import crossed_difference
from rlmerge.lab.power import Parts, all_found, bounds_of_one, detectable, parts_of, power, problems_needed, upper_parts

PILOT = Parts(seeds=0.0004, problems=0.02, rest=0.04)


def draw(random: np.random.Generator, parts: Parts, effect: float, seeds: int, problems: int, tables: int):
    """Tables [tables, seeds, problems] with these parts."""
    return (
        effect
        + np.sqrt(parts.seeds) * random.standard_normal((tables, seeds, 1))
        + np.sqrt(parts.problems) * random.standard_normal((tables, 1, problems))
        + np.sqrt(parts.rest) * random.standard_normal((tables, seeds, problems))
    )


def test_parts_come_back():
    tables = draw(np.random.default_rng(0), PILOT, 0.03, 12, 200, 300)
    found = [parts_of(table) for table in tables]
    for name in ("seeds", "problems", "rest"):
        mean = np.mean([getattr(one, name) for one in found])
        assert mean == pytest.approx(getattr(PILOT, name), rel=0.05)
    assert np.std(tables.mean((1, 2))) == pytest.approx(PILOT.error(12, 200), rel=0.15)


@pytest.mark.parametrize(("seeds", "problems"), [(6, 300), (12, 100)])
@pytest.mark.parametrize("effect", [0.0, 0.02, 0.04])
def test_what_is_foreseen_is_found(seeds, problems, effect):
    """In the direction of the effect; without one, a fortieth by mistake."""
    tables = draw(np.random.default_rng(1), PILOT, effect, seeds, problems, 2000)
    found = crossed_difference(tables)
    share = np.mean(found.low > 0)
    expected = power(effect, PILOT, seeds, problems)
    assert share == pytest.approx(expected, abs=0.06)


def test_where_problems_differ_by_chance_alone_less_is_found():
    """The estimate of what seeds differ by is cut off at 0, so that intervals are wider than foreseen."""
    parts = Parts(0.0, 0.0, 0.06)
    effect = detectable(parts, 6, 400)
    share = np.mean(crossed_difference(draw(np.random.default_rng(3), parts, effect, 6, 400, 2000)).low > 0)
    assert 0.62 < share < 0.74


def test_more_of_everything_finds_more():
    assert power(0.02, PILOT, 6, 400) > power(0.02, PILOT, 6, 100)
    assert power(0.02, PILOT, 12, 400) > power(0.02, PILOT, 6, 400)
    assert power(0.04, PILOT, 6, 400) > power(0.02, PILOT, 6, 400)
    assert power(-0.02, PILOT, 6, 400) == power(0.02, PILOT, 6, 400)


def test_detectable_effects_and_problems_needed():
    effect = detectable(PILOT, 6, 400)
    assert power(effect, PILOT, 6, 400) == pytest.approx(0.8)
    needed = problems_needed(effect, PILOT, 6)
    assert needed == 400
    assert problems_needed(0.001, PILOT, 6) is None, "seeds alone hide it, whatever the number of problems"
    assert problems_needed(1e-9, Parts(0, 0, 0), 6) == 2


def test_one_pair_bounds_what_several_see_if_pairs_do_not_differ():
    parts = Parts(0.0, 0.02, 0.04)
    tables = draw(np.random.default_rng(2), parts, 0.0, 1, 400, 50)
    found = [[detectable(one, 6, 400) for one in bounds_of_one(table[0])] for table in tables]
    assert np.all(np.diff(found, axis=1) < 0)
    alike, apart = np.mean(found, axis=0)
    assert apart < detectable(parts, 6, 400) < alike
    assert apart == pytest.approx(detectable(Parts(0.0, 0.0, 0.06), 6, 400), rel=0.05)


def test_several_at_once():
    low, high = all_found([0.9, 0.95, 0.8])
    assert low == pytest.approx(0.65)
    assert high == 0.8
    assert all_found([0.2, 0.3])[0] == 0.0


def test_an_upper_limit_of_what_pairs_differ_by():
    """Above the truth in four tables of five, whatever their number of pairs."""
    for pairs in (3, 6):
        tables = draw(np.random.default_rng(3), Parts(0.002, 0.02, 0.04), 0.0, pairs, 200, 2000)
        above = np.mean([upper_parts(table).seeds > 0.002 for table in tables])
        assert above == pytest.approx(0.8, abs=0.03)
