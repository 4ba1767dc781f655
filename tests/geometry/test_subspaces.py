"""Planted angles, shifts and common directions come back; what is not determined is None."""

from __future__ import annotations

import numpy as np
import pytest
from tests.geometry.planted import frame, planted

from rlmerge.geometry.decompositions import exact_spectrum, sketched_spectrum
from rlmerge.geometry.subspaces import (
    angle_figures,
    determined,
    pair_figures,
    principal_angles,
    shift_figures,
    similarity,
)

VALUES = np.geomspace(1.0, 0.05, 30)


def spectrum(matrix: np.ndarray, k: int = 8):
    return exact_spectrum(lambda: matrix, k)


@pytest.mark.parametrize("degrees", [(0.0, 1e-7, 0.5, 10.0, 60.0), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), (90.0,) * 5])
def test_planted_angles(degrees: tuple[float, ...]) -> None:
    whole, angles = frame(40, 10, 3), np.radians(degrees)
    other = whole[:, :5] * np.cos(angles) + whole[:, 5:] * np.sin(angles)
    mixed = other @ frame(5, 5, 4)
    found = principal_angles(whole[:, :5], mixed)
    # the sine of each is known to 1e-8 of the largest
    assert found == pytest.approx(sorted(degrees), rel=1e-7, abs=1e-6 * np.sin(angles).max())


def test_a_scaled_spectrum_is_all_shift_and_no_turn() -> None:
    base, left, right = planted(50, 40, VALUES)
    moved = (left * (VALUES * 1.001)) @ right.T
    one, other = spectrum(base), spectrum(moved)
    found = shift_figures(one, other, float(np.linalg.norm(moved - base)))
    assert found["nss"] == pytest.approx(1e-3, abs=found["error"] + 1e-15)
    assert found["relative_norm"] == pytest.approx(1e-3)
    assert found["residual"] == pytest.approx(1.0)
    assert found["error"] < 1e-6
    assert max(angle_figures(one, other, 8).values()) < 1e-5


def test_a_turned_matrix_is_all_turn_and_no_shift() -> None:
    base, left, right = planted(50, 40, VALUES)
    angle = np.radians(3.0)
    turned = left.copy()
    # within the plane of the 8th and 9th directions: the leading eight are turned by it, in one direction
    turned[:, 7], turned[:, 8] = (
        np.cos(angle) * left[:, 7] + np.sin(angle) * left[:, 8],
        np.cos(angle) * left[:, 8] - np.sin(angle) * left[:, 7],
    )
    moved = (turned * VALUES) @ right.T
    one, other = spectrum(base), spectrum(moved)
    shift = shift_figures(one, other, float(np.linalg.norm(moved - base)))
    assert shift["nss"] <= shift["error"] < 1e-6
    assert shift["residual"] < 1e-4
    found = angle_figures(one, other, 8)
    assert found["left_max"] == pytest.approx(3.0, abs=1e-6)
    assert found["left_mean"] == pytest.approx(3.0 / 8, abs=1e-6)
    assert found["right_max"] < 1e-5
    assert found["error"] < 1e-9


def test_structureless_noise_has_the_residual_of_noise() -> None:
    rng = np.random.default_rng(0)
    base, delta = rng.standard_normal((120, 200)), 1e-5 * rng.standard_normal((120, 200))
    found = shift_figures(spectrum(base, 0), spectrum(base + delta, 0), float(np.linalg.norm(delta)))
    assert found["residual"] * np.sqrt(200) == pytest.approx(1.0, abs=0.25)


def test_equal_values_leave_directions_undetermined() -> None:
    left, right = frame(40, 30, 1), frame(30, 30, 2)
    values = np.array([3.0, 2.0, *([1.0] * 28)])
    base = spectrum((left * values) @ right.T)
    moved = spectrum((left * values) @ right.T + 1e-9 * left[:, :1] @ right[:, :1].T)
    assert set(angle_figures(base, moved, 8).values()) == {None}
    # the two that stand apart have directions of their own
    assert angle_figures(base, moved, 2)["left_max"] < 1e-5
    # as has a space that reaches to the end of the spectrum, but not beyond it
    short = spectrum(planted(40, 30, np.array([2.0, 1.0]))[0])
    assert angle_figures(short, short, 2)["left_max"] < 1e-5
    assert set(angle_figures(short, short, 3).values()) == {None}
    sketch = sketched_spectrum(lambda: planted(300, 200, np.array([2.0, 1.0]))[0], 3, 1)
    assert determined(sketch, 2)
    assert not determined(sketch, 3)
    assert not determined(sketch, 5)


def test_common_directions() -> None:
    whole = frame(60, 16, 5)
    # 3 of 8 directions in common
    assert similarity(whole[:, :8], whole[:, 5:13], 8) == pytest.approx(3 / 8)
    values = np.geomspace(1.0, 0.2, 8)
    right = frame(50, 8, 6)
    one = spectrum((whole[:, :8] * values) @ right.T)
    other = spectrum((whole[:, 8:] * values) @ right.T)
    found = pair_figures(one, other, (1, 8))
    assert found["8"]["left"] == pytest.approx(0.0, abs=1e-12)
    assert found["8"]["right"] == pytest.approx(1.0)
    assert (found["8"]["left_chance"], found["8"]["right_chance"]) == (8 / 60, 8 / 50)
    assert pair_figures(one, one, (1, 8))["1"]["left"] == pytest.approx(1.0)
    zero = spectrum(np.zeros((60, 50)))
    assert pair_figures(one, zero, (1,))["1"]["left"] is None


def test_the_leading_part_of_a_sketch_is_a_lower_bound() -> None:
    values = np.concatenate([np.geomspace(1.0, 0.3, 8), np.full(192, 0.01)])
    base, left, right = planted(300, 200, values)
    grown = values.copy()
    grown[:8] *= 1.01
    moved = (left * grown) @ right.T
    size = float(np.linalg.norm(moved - base))
    one, other = sketched_spectrum(lambda: base, 8, 1), sketched_spectrum(lambda: moved, 8, 1)
    found = shift_figures(one, other, size)
    assert (found["nss"], found["residual"]) == (None, None)
    assert found["nss_leading"] == pytest.approx(size / np.linalg.norm(values), abs=found["error"] + 1e-12)
    assert angle_figures(one, other, 8)["left_max"] < 0.01
