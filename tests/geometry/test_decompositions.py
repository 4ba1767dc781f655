"""Planted spectra come back within their stated errors, exactly and from a sketch."""

from __future__ import annotations

import numpy as np
import pytest
from tests.geometry.planted import planted

from rlmerge.geometry.decompositions import (
    effective_rank,
    energy,
    energy_error,
    exact_spectrum,
    sketched_spectrum,
    stable_rank,
)

SHAPES = [(60, 40), (40, 60), (50, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_values_and_vectors_are_the_planted_ones(shape: tuple[int, int]) -> None:
    values = np.geomspace(1.0, 1e-3, 40)
    matrix, left, right = planted(*shape, values)
    found = exact_spectrum(lambda: matrix, 10)
    wrong = np.abs(found.values[:40] - values)
    assert (wrong <= found.errors[:40]).all()
    assert found.errors[0] < 1e-13
    assert found.square == pytest.approx(np.sum(values**2), rel=1e-13)
    for one, other in ((found.left, left[:, :10]), (found.right, right[:, :10])):
        assert np.abs(np.abs(np.einsum("ij,ij->j", one, other)) - 1.0).max() < 1e-12
        assert np.abs(one.T @ one - np.eye(10)).max() < 1e-13


def test_figures_of_a_planted_spectrum() -> None:
    values = np.array([2.0, 1.0, 1.0, 1.0])
    found = exact_spectrum(lambda: planted(30, 20, values)[0], 2)
    share = values / 5.0
    assert stable_rank(found) == pytest.approx(7.0 / 4.0)
    assert effective_rank(found) == pytest.approx(np.exp(-np.sum(share * np.log(share))))
    assert found.rank == 4
    assert energy(found, 1) == pytest.approx(4.0 / 7.0)
    assert energy(found, 20) == pytest.approx(1.0)
    assert energy(found, 21) is None
    assert found.gap(1) == pytest.approx(0.5)


def test_rank_one_and_zero() -> None:
    one = exact_spectrum(lambda: np.outer(np.arange(1.0, 9.0), np.ones(5)), 3)
    assert one.rank == 1
    assert stable_rank(one) == pytest.approx(1.0)
    assert effective_rank(one) == pytest.approx(1.0)
    # directions beyond the rank are some orthonormal ones
    assert np.abs(one.left.T @ one.left - np.eye(3)).max() < 1e-12
    none = exact_spectrum(lambda: np.zeros((8, 5)), 2)
    assert (stable_rank(none), effective_rank(none), energy(none, 1), none.rank, none.gap(1)) == (
        None,
        None,
        None,
        0,
        0,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 8])
def test_left_and_right_vectors_belong_together(shape: tuple[int, int], rank: int) -> None:
    matrix, *_ = planted(*shape, np.geomspace(1.0, 0.1, rank))
    for found in (exact_spectrum(lambda: matrix, 8), sketched_spectrum(lambda: matrix, 8, 1)):
        assert np.abs((found.left * found.values[:8]) @ found.right.T - matrix).max() < 1e-7


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_sketch_is_right_within_its_stated_error(shape: tuple[int, int]) -> None:
    # a flat tail, where sketches are hard; the basis, 4·(8 + 8) wide, does not span the matrix
    values = np.concatenate([np.geomspace(1.0, 0.1, 16), np.linspace(0.095, 0.02, 184)])
    matrix, *_ = planted(*shape, values)
    found = sketched_spectrum(lambda: matrix, 16, 7)
    assert found.left.shape == (shape[0], 16)
    assert found.right.shape == (shape[1], 16)
    assert len(found.values) == 17
    wrong = values[:16] - found.values[:16]
    assert (wrong >= -1e-12).all()
    assert (wrong <= found.errors[:16]).all()
    assert found.errors[15] < 0.02
    # and it is a sketch: the last value was not found exactly
    assert wrong.max() > 1e-9
    for k in (1, 16):
        true = np.sum(values[:k] ** 2) / np.sum(values**2)
        assert -1e-12 <= true - energy(found, k) <= energy_error(found, k) < 0.05
    assert np.array_equal(found.values, sketched_spectrum(lambda: matrix, 16, 7).values)
    assert not np.array_equal(found.values, sketched_spectrum(lambda: matrix, 16, 8).values)
    assert effective_rank(found) is None


def test_a_sketch_of_low_rank_is_exact() -> None:
    matrix, left, _ = planted(300, 200, np.array([3.0, 2.0, 1.0]))
    found = sketched_spectrum(lambda: matrix, 4, 1)
    assert found.values[:4] == pytest.approx([3.0, 2.0, 1.0, 0.0], abs=1e-12)
    assert np.abs(np.abs(np.einsum("ij,ij->j", found.left[:, :3], left)) - 1.0).max() < 1e-12
    assert found.blurred(3) < 1e-9
