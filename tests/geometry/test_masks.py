"""Planted overlaps come back, and the shuffled update shows no effect where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from tests.geometry.planted import bf16

from rlmerge.execute.memory import Space
from rlmerge.geometry.masks import make_mask, permute_within_bins, standard_error, stored
from rlmerge.kernels import plain

N = 2**20


def weights(seed: int = 0, n: int = N) -> np.ndarray:
    return bf16(0.02 * np.random.default_rng(seed).standard_normal(n))


def noise_of_density(base: np.ndarray, density: float) -> np.ndarray:
    """The deltas of normal noise, stored in bf16, whose scale is set so that this share of the weights changes."""
    noise = np.random.default_rng(1).standard_normal(base.size)
    low, high = 1e-8, 1.0
    for _ in range(40):
        scale = np.sqrt(low * high)
        delta = bf16(base + scale * noise).astype(np.float64) - base
        low, high = (scale, high) if np.mean(delta != 0.0) < density else (low, scale)
    assert abs(np.mean(delta != 0.0) - density) < 1e-3
    return delta


def test_planted_overlaps() -> None:
    size = np.random.default_rng(0).permutation(1000).astype(np.float64)
    low, high = make_mask(size, 0.3, False), make_mask(size, 0.3, True)
    assert low.overlap(size < 100) == 1.0
    assert low.overlap(size >= 300) == 0.0
    assert low.overlap((size >= 200) & (size < 400)) == 0.5
    assert high.overlap(size >= 700) == 1.0
    assert high.overlap((size >= 690) & (size < 710)) == 0.5
    assert low.overlap(np.zeros(1000, bool)) is None


def test_ties_are_shared_fairly() -> None:
    even = make_mask(np.ones(1000), 0.3, False)
    assert even.overlap(np.arange(1000) < 50) == pytest.approx(0.3)
    # 100 zeros are in; 200 of the 900 ones are
    mixed = make_mask(np.repeat([0.0, 1.0], [100, 900]), 0.3, False)
    assert mixed.overlap(np.arange(1000) < 200) == pytest.approx((100 + 100 * 200 / 900) / 200)


def test_shuffles_stay_in_their_binade() -> None:
    base = weights(n=4096)
    base[:64], base[64:128] = 2.0**-6, -(2.0**-6)
    delta = np.random.default_rng(2).standard_normal(4096)
    found = permute_within_bins(base, delta, 5)
    assert not np.array_equal(found, delta)
    assert np.array_equal(found, permute_within_bins(base, delta, 5))
    assert not np.array_equal(found, permute_within_bins(base, delta, 6))
    # powers of two are bins of their own, by sign
    fraction, exponent = np.frexp(base)
    bins = exponent * 10 + np.where(np.abs(fraction) == 0.5, np.sign(base) * 2, 0)
    for number in np.unique(bins):
        assert np.array_equal(np.sort(found[bins == number]), np.sort(delta[bins == number]))


def test_steps_below_powers_of_two_survive_the_shuffle() -> None:
    base = np.repeat(bf16(np.array([0.5, -0.5, 0.75])), 100)
    delta = np.repeat([-(2.0**-9), 2.0**-9, 2.0**-8], 100)  # half a step, towards zero, from either power of two
    _, moved = stored(base, permute_within_bins(base, delta, 1), "BF16", plain, Space())
    assert moved.all()


def test_every_place_is_as_likely() -> None:
    base, delta = np.full(64, 0.75, np.float32), np.zeros(64)
    delta[3] = 1.0
    counts = sum(permute_within_bins(base, delta, key) for key in range(6400))
    assert counts.sum() == 6400
    # 64 counts of mean 100 and standard deviation 10
    assert np.sum((counts - 100) ** 2 / 100) < 110


def test_stored_values() -> None:
    base = np.array([1.0, 1.0, 0.5], np.float32)
    delta = np.array([2.0**-9, 2.0**-7, 2.0**-9])
    values, moved = stored(base, delta, "BF16", plain, Space())
    # 2⁻⁹ is a quarter of a step at 1 (down to a half, ties to even), and half of one at 0.5
    assert values.tolist() == [1.0, 1.0 + 2.0**-7, 0.5]
    assert moved.tolist() == [False, True, False]
    values, moved = stored(base, delta, None, plain, Space())
    assert values.tolist() == (base + delta).tolist()
    assert moved.all()


@pytest.mark.parametrize(("density", "published"), [(0.28, (0.68, 0.77)), (0.46, (0.51, 0.56)), (0.93, (0.31, 0.33))])
def test_no_effect_on_structureless_noise(density: float, published: tuple[float, float]) -> None:
    base = weights()
    delta = noise_of_density(base, density)
    shuffled = permute_within_bins(base, delta, 3)
    _, there = stored(base, shuffled, "BF16", plain, Space())
    moved = delta != 0.0
    # what looks like a preference for small weights is rounding (notes: .69-.76, .52-.54, .318)
    low = make_mask(np.abs(base), 0.3, False)
    assert published[0] < low.overlap(moved) < published[1]
    reconstruction = np.random.default_rng(9).standard_normal(N)
    for mask in (low, make_mask(np.abs(base), 0.5, False), make_mask(np.abs(reconstruction), 0.3, True)):
        expected = mask.overlap(there)
        error = standard_error(expected, int(moved.sum()), int(there.sum()))
        assert error < 2e-3
        assert abs(mask.overlap(moved) - expected) < 4 * error
    assert abs(np.mean(moved) - np.mean(there)) < 4e-3


def test_an_update_that_avoids_principal_weights_shows() -> None:
    base = weights()
    delta = noise_of_density(base, 0.46)
    reconstruction = np.abs(np.random.default_rng(9).standard_normal(N))
    mask = make_mask(reconstruction, 0.3, True)
    delta[(reconstruction > np.quantile(reconstruction, 0.7)) & (np.random.default_rng(4).random(N) < 0.2)] = 0.0
    _, there = stored(base, permute_within_bins(base, delta, 3), "BF16", plain, Space())
    found, expected = mask.overlap(delta != 0.0), mask.overlap(there)
    # a fifth fewer in the mask: 0.24 of 0.94
    assert found == pytest.approx(0.24 / 0.94, abs=2e-3)
    assert expected == pytest.approx(0.3, abs=4e-3)
