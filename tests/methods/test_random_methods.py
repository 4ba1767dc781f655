"""dare_linear, dare_ties, della, della_linear: exact against slow references, and as distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.small_models import (
    FORMS,
    make_recipe,
    merge_values,
    refusal,
    representable,
    same_bits,
    small_blocks,
    sparse_model,
    write_all,
)  # fmt: skip
from tests.reference.sparsified import chances, drawn, generalised

import rlmerge

PUBLISHED = "inverse_probability"
METHODS = ("dare_linear", "dare_ties", "della_linear", "della")
SEEDS = st.integers(0, 2**32)


def close(found, expected):
    """One rounding to fp32, of fp64 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (np.abs(found[name] - value) <= np.spacing(np.abs(value).astype(np.float32)) + 1e-12).all(), name


@pytest.mark.parametrize("method", METHODS)
@given(
    SEEDS, st.integers(1, 5), st.sampled_from(["inverse_probability", "l1", "none"]), st.booleans(), st.booleans(),
    st.booleans(), st.sampled_from([8, 2**16]),
)  # fmt: skip
def test_against_the_reference(tmp_path_factory, method, seed, count, rescale, normalize, grid, of_support, block):
    """Same random numbers, so the same coordinates stay, whatever the blocks are."""
    folder = tmp_path_factory.mktemp("random")
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, count, grid=grid)
    write_all(folder, base, experts)
    weight = {key: float(rng.choice([1.0, 0.5, 0.25, 1.3])) for key in experts}
    density = {key: float(rng.choice([0.3, 0.5, 0.8, 1.0, 0.0])) for key in experts}
    parameters = {"lambda": 1.2, "normalize": normalize, "rescale": rescale}
    more = {}
    if method.startswith("della"):
        more = {"epsilon": float(rng.choice([0.15, 0.05, -0.1, 0.0])), "of_support": of_support}
        parameters |= {"epsilon": more["epsilon"], "density_of": "support" if of_support else "all"}
    own = {key: {"weight": weight[key], "density": density[key]} for key in experts}
    recipe = make_recipe(folder, method, list(experts), parameters, own, seed=seed % 7)
    cut = drawn(base, experts, method=method, density=density, seed=seed % 7, rescale=rescale, **more)
    sign = method in ("dare_ties", "della")
    expected = generalised(base, cut, weight=weight, lam=1.2, normalize=normalize, sign=sign)
    with small_blocks(block):
        found = merge_values(recipe)
    close(found, expected)
    for name, value in base.items():  # what is dropped leaves the base as it is
        dropped = np.all([tensors[name] == 0 for tensors in cut.values()], axis=0)
        assert found[name][dropped].tobytes() == value[dropped].tobytes()


SHAPE = (40, 500)


def one_model(tmp_path, method, size, parameters, seed=0):
    """The merged delta of one expert of a zero base whose magnitudes are `size`."""
    expert = {"w": size.astype(np.float32)}
    write_all(tmp_path, {"w": np.zeros(size.shape, np.float32)}, {"a": expert})
    recipe = make_recipe(tmp_path, method, ["a"], parameters, {"a": {"weight": 1.0}}, seed=seed)
    return merge_values(recipe, kernels="numba")["w"]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_density_and_the_mean(tmp_path, method, density):
    """20,000 coordinates: five standard deviations of a binomial count; halves and quarters, too."""
    found = one_model(tmp_path, method, np.ones(SHAPE), {"density": density, "rescale": PUBLISHED})
    kept = found != 0
    assert set(np.unique(found[kept])) == {np.float32(1 / density)}
    for part in (kept, kept[:20], kept[:, ::2], kept[::2, 1::4]):
        assert abs(part.mean() - density) < 5 * np.sqrt(density * (1 - density) / part.size)


@pytest.mark.parametrize("method", ["della_linear", "della"])
@pytest.mark.parametrize("epsilon", [0.15, -0.15, 0.0])
def test_della_keeps_large_ones_more_often(tmp_path, method, epsilon):
    """In each twentieth of the ranks, within rows whose scales differ: the share that stays, and its divisor."""
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random(SHAPE), axis=1)
    size = (1.0 + order) * 2.0 ** rng.integers(-9, 9, (SHAPE[0], 1))
    found = one_model(tmp_path, method, size, {"density": 0.5, "epsilon": epsilon, "rescale": PUBLISHED})
    rank = order / (SHAPE[1] - 1)
    chance = 0.5 - epsilon + 2 * epsilon * rank
    kept = found != 0
    np.testing.assert_allclose(found[kept], (size / chance)[kept], rtol=1e-6)
    for low in np.arange(20) / 20:
        here = (rank >= low) & (rank < low + 0.05)
        mean = chance[here].mean()
        assert abs(kept[here].mean() - mean) < 5 * np.sqrt(mean * (1 - mean) / here.sum())
    assert abs(found.sum() / size.sum() - 1) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_published_rescaling_is_unbiased(tmp_path, method):
    """The mean over 100 seeds is the delta itself: within five standard errors at each of 24 coordinates."""
    size = np.arange(1, 25, dtype=np.float64).reshape(3, 8)
    write_all(tmp_path, {"w": np.zeros((3, 8), np.float32)}, {"a": {"w": size.astype(np.float32)}})
    epsilon = 0.2 if method.startswith("della") else 0.0
    parameters = {"density": 0.6, "rescale": PUBLISHED} | ({"epsilon": epsilon} if epsilon else {})
    own = {"a": {"weight": 1.0}}
    found = np.mean(
        [merge_values(make_recipe(tmp_path, method, ["a"], parameters, own, seed=s))["w"] for s in range(100)], axis=0
    )
    chance = chances(size, 0.6, epsilon)
    error = size * np.sqrt((1 - chance) / chance / 100)
    assert (np.abs(found - size) < 5 * error).all()
    pooled = np.sqrt(np.square(error / size).sum()) / size.size
    assert abs((found / size).mean() - 1) < 5 * pooled, "all of them together, which see a divisor that is a little off"


def test_masks_of_experts_tensors_seeds_and_methods_are_independent(tmp_path):
    """Shares that stay in both of two draws: the square of the density, five standard deviations at most away."""
    ones = {name: np.ones(SHAPE, np.float32) for name in ("v", "w")}
    write_all(tmp_path, {name: np.zeros(SHAPE, np.float32) for name in ones}, dict.fromkeys("ab", ones))

    def mask(method, key, tensor, seed):
        recipe = make_recipe(tmp_path, method, [key], {"density": 0.3}, {key: {"weight": 1.0}}, seed=seed)
        return merge_values(recipe)[tensor] != 0

    first = mask("dare_linear", "a", "v", 0)
    assert (first == mask("dare_linear", "a", "v", 0)).all()
    for other in (("dare_linear", "b", "v", 0), ("dare_linear", "a", "w", 0), ("dare_linear", "a", "v", 1),
                  ("dare_ties", "a", "v", 0), ("della_linear", "a", "v", 0)):  # fmt: skip
        both = first & mask(*other)
        assert abs(both.mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91 / first.size), other
    shifted = first[:, 1:] & first[:, :-1]
    assert abs(shifted.mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91 / shifted.size)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_depends_on_no_other_model(tmp_path, method):
    """mergekit's masks do: here, another expert of weight 0 changes no bit, nor does the order."""
    base, experts = sparse_model(np.random.default_rng(1), 3, grid=False)
    write_all(tmp_path, base, experts)
    own = {key: {"weight": 1.0, "density": 0.5} for key in experts}
    alone = merge_values(make_recipe(tmp_path, method, ["e0", "e1"], {}, own))
    own["e2"]["weight"] = 0.0
    for order in (["e0", "e1", "e2"], ["e2", "e1", "e0"]):
        assert same_bits(alone, merge_values(make_recipe(tmp_path, method, order, {}, own)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rescale", ["inverse_probability", "l1"])
@pytest.mark.parametrize("dtype", FORMS)
def test_same_bits_for_threads_blocks_and_kernels(tmp_path, method, rescale, dtype):
    rng = np.random.default_rng(5)
    shapes = {"a": (64, 33), "b": (300,), "c": (4, 6, 5), "d": (1, 1), "e": (7, 1), "f": (0, 3)}
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    experts = {
        f"e{k}": {n: representable(v + (rng.random(v.shape) < 0.6) * rng.standard_normal(v.shape) * 0.1, dtype)
                  for n, v in base.items()}
        for k in range(3)
    }  # fmt: skip
    write_all(tmp_path, base, experts, dtype=dtype)
    own = {key: {"weight": 1.0, "density": 0.5} for key in experts}
    recipe = make_recipe(tmp_path, method, list(experts), {"rescale": rescale}, own)
    first = merge_values(recipe, kernels="numba")
    assert same_bits(first, merge_values(recipe, kernels="numpy"))
    assert same_bits(first, dict(rlmerge.merge(recipe, threads=2)))
    for block, unit in ((7, 7), (64, 128)):
        with small_blocks(block, unit):
            other = merge_values(recipe, kernels="numba")
            if rescale == "l1" and dtype == "F32":  # fp64 norms are added up block by block: one fp32 rounding apart
                close(other, {name: value.astype(np.float64) for name, value in first.items()})
            else:
                assert same_bits(first, other)


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_density_one_is_the_uncut_method_and_zero_is_the_base(tmp_path, method):
    base, experts = sparse_model(np.random.default_rng(2), 2, grid=False)
    write_all(tmp_path, base, experts)
    plain = "task_arithmetic" if method.endswith("linear") else "ties"
    own = {key: {"weight": 0.7} for key in experts}
    expected = merge_values(make_recipe(tmp_path, plain, list(experts), {"normalize": False}, own))
    for rescale in ("inverse_probability", "l1", "none", True, False):
        given_ = {"normalize": False, "rescale": rescale}
        assert same_bits(merge_values(make_recipe(tmp_path, method, list(experts), given_, own)), expected)
        nothing = merge_values(make_recipe(tmp_path, method, list(experts), given_ | {"density": 0}, own))
        assert same_bits(nothing, base)


@pytest.mark.parametrize("method", METHODS)
def test_mergekits_flag_means_l1_or_none(tmp_path, method):
    base, experts = sparse_model(np.random.default_rng(2), 2, grid=False)
    write_all(tmp_path, base, experts)
    own = {key: {"weight": 1.0, "density": 0.5} for key in experts}
    for flag, word in ((True, "l1"), (False, "none")):
        pair = [merge_values(make_recipe(tmp_path, method, list(experts), {"rescale": v}, own)) for v in (flag, word)]
        assert same_bits(*pair)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.85, 0.15), (0.15, 0.15), (0.5, 0.5), (0.5, -0.5), (0.9, 0.15), (0.1, -0.2)]
)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_impossible_chances_are_refused_before_anything_is_read(tmp_path, method, density, epsilon):
    base, experts = sparse_model(np.random.default_rng(2), 1)
    write_all(tmp_path, base, experts)
    parameters = {"density": density, "epsilon": epsilon, "weight": 1}
    message = refusal(lambda: make_recipe(tmp_path, method, ["e0"], parameters))
    assert message is not None
    assert "epsilon" in message
    assert "must lie between 0 and 1" in message


def test_weights_that_cancel_cannot_be_normalised(tmp_path):
    base, experts = sparse_model(np.random.default_rng(2), 2)
    write_all(tmp_path, base, experts)
    own = {"e0": {"weight": 1}, "e1": {"weight": -1}}
    message = refusal(lambda: make_recipe(tmp_path, "dare_linear", list(experts), {"normalize": True}, own))
    assert "weights sum to 0" in (message or "")


def test_the_report_says_factors_and_kept_shares(tmp_path):
    base, experts = sparse_model(np.random.default_rng(2), 2)
    write_all(tmp_path, base, experts)
    own = {key: {"weight": 1.0, "density": 0.5} for key in experts}
    recipe = make_recipe(tmp_path, "dare_linear", list(experts), {"rescale": "l1"}, own)
    report = rlmerge.merge_to_folder(recipe, tmp_path / "out").report
    assert 0.2 < report["total"]["kept"]["e0"]["share"] < 0.8
    assert report["tensors"]["a.weight"]["rescale"]["e0"] > 1.0


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_rows_run_along_the_second_dimension(tmp_path, method):
    """With chances of 1/10000 and its complement the larger of two neighbours in a row stays, also in a kernel."""
    delta = np.random.default_rng(4).permutation(600).reshape(50, 2, 6).astype(np.float32) + 1
    write_all(tmp_path, {"w": np.zeros_like(delta)}, {"e0": {"w": delta}})
    parameters = {"density": 0.5, "epsilon": 0.4999, "rescale": "none", "weight": 1.0}
    found = merge_values(make_recipe(tmp_path, method, ["e0"], parameters))["w"]
    assert np.count_nonzero((found != 0) != (delta == delta.max(axis=1, keepdims=True))) <= 2
