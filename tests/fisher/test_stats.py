"""Winners as the merge has them, ranks as they are defined, and samples that are the same in every Fisher."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlmerge.fisher.stats import rank_correlation, winners
from rlmerge.fisher.store import sample_positions, sample_stride


def winner_by_hand(s: list[float], d: list[float]) -> int:
    """The rule of the design, section 2, one coordinate at a time."""
    active = [k for k in range(len(d)) if d[k] != 0.0]
    best = [k for k in active if s[k] == max(s[j] for j in active)]
    best = [k for k in best if abs(d[k]) == max(abs(d[j]) for j in best)]
    return best[0] if len({np.sign(d[k]) for k in best}) == 1 else -1


SMALL = st.sampled_from([0.0, 1.0, 2.0, 3.0])


@given(hnp.arrays(float, (3, 6), elements=SMALL), hnp.arrays(float, (3, 6), elements=st.sampled_from([-2.0, -1, 1, 2])))
def test_winners_follow_the_rule(s: np.ndarray, d: np.ndarray) -> None:
    found = winners(s, d)
    assert found.tolist() == [winner_by_hand(s[:, i].tolist(), d[:, i].tolist()) for i in range(6)]


def test_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=50)
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1.0)
    assert rank_correlation(one, -one) == pytest.approx(-1.0)
    # Spearman with ties: Pearson's of the mid-ranks (worked by hand: ranks 0.5, 0.5, 2 and 0, 1, 2)
    assert rank_correlation(np.array([1.0, 1.0, 5.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(np.sqrt(3) / 2)
    assert rank_correlation(np.ones(3), np.arange(3.0)) is None


@given(st.integers(1, 5000), st.integers(1, 97))
def test_a_sample_has_one_place_a_run(size: int, stride: int) -> None:
    found = sample_positions("a.weight", size, stride)
    assert (np.diff(found) > 0).all()
    assert (found // stride == np.arange(len(found))).all()
    assert (found < size).all()
    assert len(found) >= size // stride
    assert stride == 1 or size < 500 or not np.array_equal(found, sample_positions("b.weight", size, stride))


def test_stride() -> None:
    assert sample_stride([10, 20]) == 1
    assert sample_stride([2**25, 2**25]) == 128
