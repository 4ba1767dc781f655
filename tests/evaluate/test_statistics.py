"""Formulas against brute force, laws against made-up scores, and the coverage of every interval against simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmerge.evaluate import statistics as s

scores = st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), min_size=3, max_size=40).map(np.array)
pairs = st.integers(3, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from([0, 0.5, 1]), min_size=n, max_size=n).map(np.array)] * 2)
)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062047), (2, 4.3026527), (5, 2.5705818), (30, 2.0422725), (1000, 1.9623391)]
)
def test_student_quantile_is_that_of_the_tables(df: int, expected: float):
    assert s.student_quantile(df) == pytest.approx(expected, abs=1e-6)
    assert s.student_p(expected, df) == pytest.approx(0.05, abs=1e-7)


@pytest.mark.parametrize(("a", "b"), [(1, 3), (4, 2), (7, 5)])
def test_incomplete_beta_is_a_binomial_tail_for_integers(a: int, b: int):
    for x in (0.0, 0.1, 0.5, 0.93, 1.0):
        n = a + b - 1
        tail = sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))
        assert s.incomplete_beta(a, b, x) == pytest.approx(tail, abs=1e-13)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert s.pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-14)
    with pytest.raises(ValueError, match="at least 3"):
        s.pass_at_k([4, 2], [1, 1], 3)


def test_wilson_is_the_published_example():
    """Newcombe 1998 (Stat. Med. 17:857), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert [*map(float, s.wilson(right / n, n))] == pytest.approx([low, high], abs=6e-5)
        values = np.arange(n) < right
        found = s.mean_score(values)
        assert [found.low, found.high] == pytest.approx([*map(float, s.wilson(right / n, n))], abs=1e-12)


def test_mcnemar_counts_coin_tosses():
    for lost, won in itertools.product(range(8), repeat=2):
        n, few = lost + won, min(lost, won)
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
        at_most = np.mean([t <= few for t in tosses])
        same = np.mean([t == few for t in tosses])
        exact, mid = s.mcnemar(lost, won)
        assert exact == pytest.approx(min(1, 2 * at_most))
        assert mid == pytest.approx(min(1, 2 * at_most - same))
    assert s.mcnemar(10, 20)[0] == pytest.approx(0.098737, abs=1e-6)


def test_mid_p_holds_its_level():
    """By the binomial itself: 5 % on average over the number of flips, a little more at single ones."""
    found = []
    for n in range(10, 120):
        chance = [math.comb(n, i) / 2**n for i in range(n + 1)]
        exact, mid = (sum(c for i, c in enumerate(chance) if s.mcnemar(i, n - i)[j] <= 0.05) for j in (0, 1))
        assert exact <= 0.05
        assert exact <= mid <= 0.08
        found.append(mid)
    assert 0.045 <= np.mean(found) <= 0.052


def test_holm_is_the_closed_test():
    """p adjusted = the largest Bonferroni p over all families that hold the test, for every subset."""
    for p in ([0.01, 0.04, 0.03], [0.5, 0.001, 0.2, 0.2], [0.9], []):
        closed = []
        for i in range(len(p)):
            families = [
                f for size in range(1, len(p) + 1) for f in itertools.combinations(range(len(p)), size) if i in f
            ]
            closed.append(max(min(1, len(f) * min(p[j] for j in f)) for f in families))
        assert s.holm(p) == pytest.approx(closed)


def test_bonett_price_by_hand():
    """10 lost, 3 won of 50: (4 - 11)/52, and the square root of (15/52 - (7/52)²)/51 by Student's t."""
    difference = np.array([-1.0] * 10 + [1] * 3 + [0] * 37)
    found = s.paired_difference(difference)
    error = math.sqrt((15 / 52 - (7 / 52) ** 2) / 51)
    assert found.value == -7 / 50
    assert (found.low, found.high) == pytest.approx([-7 / 52 + sign * 2.0075838 * error for sign in (-1, 1)], abs=1e-7)


def test_mean_squares_by_loops():
    x = np.random.default_rng(0).normal(size=(3, 5))
    grand, rows, columns = x.mean(), x.mean(1), x.mean(0)
    seeds = sum(5 * (row - grand) ** 2 for row in rows) / 2
    problems = sum(3 * (column - grand) ** 2 for column in columns) / 4
    rest = sum((x[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(3) for j in range(5)) / 8
    found = s.mean_squares(x, x)
    assert [found.seeds, found.problems, found.rest] == pytest.approx([seeds, problems, rest])


def test_fieller_ends_are_where_the_test_turns():
    rng = np.random.default_rng(1)
    below = rng.normal(1, 1, 60)
    above = 0.7 * below + rng.normal(0, 0.5, 60)
    found = s.ratio(above, below)
    for end in (found.low, found.high):
        off = above - end * below
        t = off.mean() / (off.std(ddof=1) / math.sqrt(60))
        assert s.student_p(t, 59) == pytest.approx(0.05, abs=1e-6)
    assert found.low < found.value < found.high


def test_an_unbounded_ratio_has_no_bounds():
    found = s.ratio(np.array([1.0, 0, 1, 0]), np.array([1.0, -1, 1, -1]) + 0.01)
    assert np.isnan([found.low, found.high]).all()
    none = s.ratio(np.array([1.0, 0, 1]), np.zeros(3))
    assert np.isnan([none.value, none.low, none.high, none.error]).all()


# --- laws -------------------------------------------------------------------------------------------------------------


def bounds(estimate: s.Estimate) -> tuple[Any, Any]:
    return float(estimate.low), float(estimate.high)


@given(values=scores, seed=st.integers(0, 9))
def test_order_of_problems_is_irrelevant(values: Any, seed: int):
    order = np.random.default_rng(seed).permutation(len(values))
    other = values[order]
    assert bounds(s.mean_score(values, 4)) == pytest.approx(bounds(s.mean_score(other, 4)), abs=1e-12)
    signed, moved = values - 0.5, other - 0.5
    assert bounds(s.paired_difference(signed)) == pytest.approx(bounds(s.paired_difference(moved)), abs=1e-12)
    assert s.paired_bootstrap(signed, draws=300) == pytest.approx(s.paired_bootstrap(moved, draws=300), abs=1e-9)


@given(values=scores)
def test_right_and_wrong_are_mirror_images(values: Any):
    one, other = s.mean_score(values, 4), s.mean_score(1 - values, 4)
    assert bounds(one) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)
    assert 0 <= one.low <= one.value <= one.high <= 1


@given(both=pairs)
def test_swapping_models_swaps_the_sign(both: Any):
    one, other = both
    there, back = s.paired_difference(one - other), s.paired_difference(other - one)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)
    assert s.p_value(there) == pytest.approx(s.p_value(back))
    assert -1 <= there.low <= there.high <= 1


@given(both=pairs)
def test_p_and_interval_agree(both: Any):
    found = s.paired_difference(both[0] - both[1])
    half = found.factor * found.error
    distance = abs(abs(found.centre) - half)
    if distance > 1e-9:
        assert (s.p_value(found) < 0.05) == (abs(found.centre) > half)


@given(st.integers(2, 6), st.integers(3, 20), st.integers(0, 99))
def test_crossed_order_of_seeds_and_problems_is_irrelevant(count: int, n: int, seed: int):
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 2, (count, n)).astype(float)
    other = table[rng.permutation(count)][:, rng.permutation(n)]
    assert bounds(s.crossed_difference(table)) == pytest.approx(bounds(s.crossed_difference(other)), abs=1e-9)
    mirrored = s.crossed_difference(-table)
    assert bounds(s.crossed_difference(table)) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)


@given(st.integers(0, 99))
def test_order_of_problems_is_irrelevant_to_the_crossed_bootstrap(seed: int):
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 2, (4, 12)).astype(float)
    other = table[:, rng.permutation(12)]
    assert s.paired_bootstrap(table, draws=200) == pytest.approx(s.paired_bootstrap(other, draws=200), abs=1e-9)


def test_seeds_that_agree_are_one_seed():
    """Identical seeds say nothing about seeds, and the same as one about problems."""
    one = np.random.default_rng(2).integers(-1, 2, 50).astype(float)
    single, crossed = s.paired_difference(one), s.crossed_difference(np.stack([one] * 4))
    assert bounds(crossed) == pytest.approx(bounds(single), abs=1e-12)


def test_nothing_differs():
    found = s.paired_difference(np.zeros(100))
    assert found.low < 0 < found.high < 0.05
    assert s.p_value(found) == 1
    assert s.paired_bootstrap(np.zeros(100)) == (found.low, found.high)
    assert bounds(s.crossed_difference(np.zeros((3, 100)))) == pytest.approx(bounds(found))
    assert bounds(s.mean_score(np.zeros(50), 4))[0] == 0
    assert s.crossed_score(np.ones((3, 50))).high == 1


@given(both=pairs)
def test_a_model_retains_itself(both: Any):
    base, expert = both
    kept = s.ratio(expert - base, expert - base)
    if np.isfinite(kept.low):
        assert (kept.value, kept.low, kept.high) == pytest.approx((1, 1, 1), abs=1e-6)


def test_bootstrap_is_deterministic_and_seeded():
    table = np.random.default_rng(3).integers(-1, 2, (5, 40)).astype(float)
    assert s.paired_bootstrap(table) == s.paired_bootstrap(table)
    assert s.paired_bootstrap(table, seed=1) != s.paired_bootstrap(table)


# --- coverage ---------------------------------------------------------------------------------------------------------

GRID = np.linspace(-6, 6, 4001)
NORMAL = np.array([0.5 * (1 + math.erf(z / math.sqrt(2))) for z in GRID])


def simulated(
    accuracies: tuple[float, ...], n: int, k: int, rho: float, shared: float, times: int
) -> tuple[list[Any], list[Any]]:
    """Scores [times, n] of models: right of k samples, beta-binomial, correlation `rho` between a problem's samples.

    How hard a problem is correlates with `shared` between models (a Gaussian copula). Second, the abilities
    that were drawn from, all equally likely: their mean is a model's true accuracy. It misses the nominal one by up to
    0.004, which is most of a standard error with 2000 problems, so nothing is ever compared with the nominal one.
    Models of equal accuracy draw from the same abilities: their true difference is exactly 0.
    """
    rng = np.random.default_rng([n, k, int(100 * rho), int(100 * shared), *(int(1000 * p) for p in accuracies)])
    spread = 1 / rho - 1
    tables = {p: np.sort(rng.beta(p * spread, (1 - p) * spread, 100_001)) for p in accuracies}
    common, found = rng.standard_normal((times, n)), []
    for p in accuracies:
        z = math.sqrt(shared) * common + math.sqrt(1 - shared) * rng.standard_normal((times, n))
        rank = np.minimum(np.interp(z, GRID, NORMAL), 1 - 1e-9)
        found.append(rng.binomial(k, tables[p][(rank * 100_001).astype(int)]) / k)
    return found, [tables[p] for p in accuracies]


def coverage(estimate: s.Estimate, truth: float) -> float:
    return 100 * float(np.mean((estimate.low <= truth + 1e-12) & (truth - 1e-12 <= estimate.high)))


def assert_covers(percent: float, times: int, low: float = 93, high: float = 97):
    """Within the bounds, but for the error of the simulation (two of its standard errors)."""
    slack = 2 * math.sqrt(95 * 5 / times)
    assert low - slack <= percent <= high + slack, percent


@pytest.mark.parametrize("n", [50, 100, 200, 500, 1000, 2000])
def test_coverage_of_an_accuracy_with_one_sample_is_exact(n: int):
    """No simulation: the binomial itself. 95 % on average; at single accuracies it jumps, as every such interval."""
    right = np.arange(n + 1)
    low, high = s.wilson(right / n, n)
    log = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in right])

    def covers(p: float) -> float:
        chance = np.exp(log + right * math.log(p) + (n - right) * math.log1p(-p))
        return 100 * float(chance[(low <= p) & (p <= high)].sum())

    for p in (0.03, 0.5, 0.97):
        assert 93 <= covers(p) <= 97
    found = [covers(p) for p in np.linspace(0.02, 0.98, 193)]
    assert 94.5 <= np.mean(found) <= 95.5
    assert min(found) >= 92


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("p", [0.03, 0.5, 0.97])
@pytest.mark.parametrize(("k", "rho"), [(4, 0.1), (4, 0.3), (4, 0.8)])
def test_coverage_of_an_accuracy_with_samples(n: int, p: float, k: int, rho: float):
    times = 3000 if n < 1000 else 1000
    (found,), (abilities,) = simulated((p,), n, k, rho, 0.0, times)
    assert_covers(coverage(s.mean_score(found, k), abilities.mean()), times)


@pytest.mark.parametrize(("k", "rho"), [(4, 0.3), (4, 0.7)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_coverage_of_pass_at_k(p: float, k: int, rho: float):
    samples, times = 16, 2000
    (found,), (abilities,) = simulated((p,), 200, samples, rho, 0.0, times)
    truth = float(1 - ((1 - abilities) ** k).mean())
    values = s.pass_at_k(samples, np.rint(found * samples), k)
    assert values.mean() == pytest.approx(truth, abs=0.003)
    assert_covers(coverage(s.mean_score(values, samples / k), truth), times)


PAIRS = [(0.03, 0.1), (0.5, 0.5), (0.5, 0.6), (0.97, 0.9), (0.2, 0.9)]
SAMPLES = [(1, 0.4, 0.7), (4, 0.3, 0.7), (4, 0.8, 0.95)]


@pytest.mark.parametrize("n", [100, 500])
@pytest.mark.parametrize("accuracies", PAIRS)
@pytest.mark.parametrize(("k", "rho", "shared"), SAMPLES)
def test_coverage_of_a_paired_difference(n: int, accuracies: tuple[float, float], k: int, rho: float, shared: float):
    times = 2000
    (one, two), (first, second) = simulated(accuracies, n, k, rho, shared, times)
    assert_covers(coverage(s.paired_difference(two - one), second.mean() - first.mean()), times)


def test_coverage_where_hardly_a_problem_differs():
    """About two problems of 50 differ: nothing covers 95 %. With one sample it is too wide, with more too short."""
    (one, two), (first, second) = simulated((0.03, 0.06), 50, 1, 0.8, 0.95, 2000)
    assert coverage(s.paired_difference(two - one), second.mean() - first.mean()) > 97
    (one, two), (first, second) = simulated((0.03, 0.06), 50, 4, 0.8, 0.95, 2000)
    assert 88 < coverage(s.paired_difference(two - one), second.mean() - first.mean()) < 94


def bootstrap_coverage(tables: Any, truth: float) -> float:
    found = np.array([s.paired_bootstrap(table, draws=500) for table in tables])
    return 100 * float(np.mean((found[:, 0] <= truth) & (truth <= found[:, 1])))


@pytest.mark.parametrize("accuracies", [(0.03, 0.1), (0.5, 0.6)])
@pytest.mark.parametrize(("k", "rho", "shared"), SAMPLES[:2])
def test_coverage_of_the_bootstrap(accuracies: tuple[float, float], k: int, rho: float, shared: float):
    (one, two), (first, second) = simulated(accuracies, 200, k, rho, shared, 1000)
    assert_covers(bootstrap_coverage(two - one, second.mean() - first.mean()), 1000)


@pytest.mark.parametrize("null", [0.03, 0.5])
def test_paired_p_values_hold_their_level(null: float):
    (one, two), _ = simulated((null, null), 300, 4, 0.4, 0.6, 2000)
    found = s.paired_difference(two - one)
    assert_covers(100 * float(np.mean(np.abs(found.centre) <= found.factor * found.error)), 2000)


def seeds_simulated(count: int, n: int, spread: float, times: int, gains: tuple[float, ...]) -> tuple[Any, list[float]]:
    """Right or wrong [model, times, seeds, n]: logits of problem, seed (sd `spread`, own to each model), and both.

    The second value is each model's true accuracy.
    """
    rng = np.random.default_rng([count, n, int(100 * spread), len(gains)])
    problem = rng.normal(0, 1.5, (times, 1, n))
    found, truths = [], []
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for gain in gains:
        own = rng.normal(0, 0.5, (times, 1, n)) + rng.normal(0, 0.8, (times, count, n))
        logit = gain + problem + own + rng.normal(0, spread, (times, count, 1))
        found.append((rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(np.float64))
        deviation = math.sqrt(1.5**2 + 0.5**2 + 0.8**2 + spread**2)
        truths.append(float((weights / weights.sum() / (1 + np.exp(-gain - deviation * nodes))).sum()))
    return np.stack(found), truths


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("count", "low"), [(2, 85.0), (3, 91.0), (5, 93.0), (10, 93.0)])
def test_coverage_over_seeds_and_problems(count: int, low: float, spread: float):
    """Five seeds are enough. Two and three are not where seeds differ much, and `rlmerge compare` says so."""
    times = 1500
    (base, model), truths = seeds_simulated(count, 100, spread, times, (0.0, 0.5))
    truth, high = truths[1] - truths[0], 97 if count >= 5 else 98
    assert_covers(coverage(s.crossed_difference(model - base), truth), times, low, high)
    assert_covers(coverage(s.crossed_score(model), truths[1]), times, low, high)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_coverage_of_the_crossed_bootstrap(spread: float):
    (base, model), truths = seeds_simulated(6, 100, spread, 500, (0.0, 0.5))
    assert_covers(bootstrap_coverage(model - base, truths[1] - truths[0]), 500, high=97.5)


@pytest.mark.parametrize(("n", "k"), [(200, 1), (200, 4), (1000, 1)])
@pytest.mark.parametrize("accuracies", [(0.1, 0.35, 0.28), (0.3, 0.6, 0.3), (0.03, 0.2, 0.1), (0.75, 0.97, 0.95)])
def test_coverage_of_retention_where_the_gain_is_shown(n: int, k: int, accuracies: tuple[float, float, float]):
    (base, expert, model), abilities = simulated(accuracies, n, k, 0.4, 0.8, 1500)
    low, high, true = (float(table.mean()) for table in abilities)
    gain = s.paired_difference(expert - base)
    shown = gain.value > 4 * gain.error
    assert shown.mean() > 0.7
    kept = s.ratio((model - base)[shown], (expert - base)[shown])
    truth = (true - low) / (high - low)
    assert_covers(coverage(kept, truth), int(shown.sum()))
    assert_covers(coverage(s.ratio(model, expert), true / high), 1500)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_coverage_of_retention_over_seeds(spread: float):
    (base, expert, model), truths = seeds_simulated(6, 200, spread, 1000, (0.0, 1.5, 1.0))
    gain = s.crossed_difference(expert - base)
    shown = gain.value > 4 * gain.error
    assert shown.mean() > 0.8
    kept = s.ratio((model - base)[shown], (expert - base)[shown], crossed=True)
    assert_covers(coverage(kept, (truths[2] - truths[0]) / (truths[1] - truths[0])), int(shown.sum()))


@pytest.mark.long
@pytest.mark.parametrize("n", [50, 100, 200, 500, 1000, 2000])
@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize(("k", "rho"), [(1, 0.5), (4, 0.1), (4, 0.3), (4, 0.8)])
def test_long_coverage_of_an_accuracy(n: int, p: float, k: int, rho: float):
    (found,), (abilities,) = simulated((p,), n, k, rho, 0.0, 8000 if n < 1000 else 3000)
    assert_covers(coverage(s.mean_score(found, k), abilities.mean()), len(found))


@pytest.mark.long
@pytest.mark.parametrize("n", [100, 200, 1000, 2000])
@pytest.mark.parametrize("accuracies", PAIRS)
@pytest.mark.parametrize(("k", "rho", "shared"), SAMPLES)
def test_long_coverage_of_a_difference(n: int, accuracies: tuple[float, float], k: int, rho: float, shared: float):
    (one, two), (first, second) = simulated(accuracies, n, k, rho, shared, 4000)
    truth = second.mean() - first.mean()
    assert_covers(coverage(s.paired_difference(two - one), truth), 4000)
    assert_covers(bootstrap_coverage((two - one)[:1500], truth), 1500)


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize(("count", "n"), [(5, 50), (5, 500), (10, 50), (10, 500)])
def test_long_coverage_over_seeds(count: int, n: int, spread: float):
    (base, model), truths = seeds_simulated(count, n, spread, 4000 if n < 500 else 1500, (0.0, 0.5))
    table, truth = model - base, truths[1] - truths[0]
    assert_covers(coverage(s.crossed_difference(table), truth), len(table))
    assert_covers(bootstrap_coverage(table[:1500], truth), 1500)
