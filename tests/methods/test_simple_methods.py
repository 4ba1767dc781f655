"""linear, task_arithmetic, ties, ram against plain references and golden files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.small_models import (
    make_recipe,
    merge_values,
    needed_weights,
    read_values,
    refusal,
    small_blocks,
    sparse_model,
    write_all,
)  # fmt: skip
from tests.reference import simple

import rlmerge

GOLDEN = Path(__file__).parents[1] / "golden"
SEEDS = st.integers(0, 2**32)
# no three of these cancel, so sums of weights never vanish
WEIGHTS = st.lists(st.sampled_from([1.0, 0.5, 0.25, 1.3, -0.4]), min_size=3, max_size=3)


def setup(factory, seed, count=3, dtype="F32", grid=False):
    folder = factory.mktemp("simple")
    base, experts = sparse_model(np.random.default_rng(seed), count, dtype, grid=grid)
    write_all(folder, base, experts, dtype=dtype)
    return folder, base, experts


def close(found, expected, scale=1.0):
    """One rounding to fp32, of fp64 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (np.abs(found[name] - value) <= np.spacing(np.abs(value).astype(np.float32)) + 1e-12 * scale).all(), name


def own_of(experts, weights, **more):
    return {key: {"weight": weight, **{k: v[i] for k, v in more.items()}}
            for i, (key, weight) in enumerate(zip(experts, weights))}  # fmt: skip


# -- against the references --------------------------------------------------------------------------------------------


@given(SEEDS, WEIGHTS, st.booleans(), st.booleans())
def test_linear(tmp_path_factory, seed, weights, normalize, with_base):
    folder, _, experts = setup(tmp_path_factory, seed)
    if normalize and sum(weights) == 0:
        return
    own = own_of(experts, weights)
    recipe = make_recipe(
        folder, "linear", list(experts), {"normalize": normalize}, own, base="base" if with_base else None
    )
    weight = dict(zip(experts, weights))
    close(merge_values(recipe), simple.linear(experts, weight=weight, normalize=normalize))


@given(SEEDS, WEIGHTS, st.sampled_from([1.0, 0.3, -1.0]))
def test_task_arithmetic(tmp_path_factory, seed, weights, lam):
    folder, base, experts = setup(tmp_path_factory, seed)
    recipe = make_recipe(folder, "task_arithmetic", list(experts), {"lambda": lam}, own_of(experts, weights))
    close(merge_values(recipe), simple.task_arithmetic(base, experts, weight=dict(zip(experts, weights)), lam=lam))


@given(SEEDS, st.sampled_from([0.0, 1e-5, 0.05, 0.1]), st.booleans())
def test_ram(tmp_path_factory, seed, epsilon, grid):
    folder, base, experts = setup(tmp_path_factory, seed, grid=grid)
    recipe = make_recipe(folder, "ram", list(experts), {"epsilon": epsilon})
    close(merge_values(recipe), simple.ram(base, experts, epsilon=epsilon))


@given(
    SEEDS, WEIGHTS, st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), min_size=3, max_size=3), st.booleans(),
    st.sampled_from(["tensor", "model"]), st.sampled_from(["all", "support"]), st.sampled_from([None, 8]),
    st.booleans(),
)  # fmt: skip
def test_ties(tmp_path_factory, seed, weights, densities, normalize, scope, density_of, block, rescale):
    """Continuous deltas: none tie, so the reference's rule for ties and ours agree."""
    folder, base, experts = setup(tmp_path_factory, seed)
    own = own_of(experts, weights, density=densities)
    parameters = {"normalize": normalize, "lambda": 1.2, "scope": scope, "density_of": density_of, "rescale": rescale}
    recipe = make_recipe(folder, "ties", list(experts), parameters, own)
    expected = simple.ties(
        base, experts, weight=dict(zip(experts, weights)), density=dict(zip(experts, densities)), lam=1.2,
        normalize=normalize, scope=scope, count="all" if density_of == "all" else "nonzero", rescale=rescale,
    )  # fmt: skip
    with small_blocks(block or 2**16):
        found = merge_values(recipe)
    close(found, expected)


@given(SEEDS)
def test_ties_with_cancelled_positive_is_mergekits_rule(tmp_path_factory, seed):
    """Deltas on a grid cancel exactly, often: + is elected, or the base stays."""
    folder, base, experts = setup(tmp_path_factory, seed, grid=True)
    own = own_of(experts, [1.0] * 3)
    plus = merge_values(make_recipe(folder, "ties", list(experts), {"cancelled": "positive"}, own))
    close(plus, simple.ties(base, experts, density=1.0))
    stay = merge_values(make_recipe(folder, "ties", list(experts), {}, own))
    cancelled = 0
    for name, value in base.items():
        total = sum(tensors[name].astype(np.float64) - value for tensors in experts.values())
        zero = np.abs(total) < 1e-6
        near = np.spacing(np.abs(value)) * 4  # grid deltas are rounded into fp32, so few cancel to the last bit
        assert (np.abs(stay[name] - plus[name])[~zero] == 0).all()
        exact = zero & (total == 0)
        assert (stay[name] == value)[exact].all()
        cancelled += np.count_nonzero(exact & (np.abs(plus[name] - value) > near))
    assert cancelled > 0


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_ties_does_not_divide_by_rounding(tmp_path, kernels):
    """All three agree, with weights that cancel but for 6e-17: as where they cancel exactly, the sum stays."""
    experts = {key: {"w": np.full((2, 3), value, np.float32)} for key, value in zip("abc", (1.0, 1.0, -1.0))}
    write_all(tmp_path, {"w": np.zeros((2, 3), np.float32)}, experts)
    for weights in ((0.1, 0.2, -0.3), (0.25, 0.25, -0.5)):
        recipe = make_recipe(tmp_path, "ties", list("abc"), {}, own_of("abc", weights))
        np.testing.assert_allclose(merge_values(recipe, kernels=kernels)["w"], sum(map(abs, weights)), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}), ("task_arithmetic", {"normalize": True}), ("dare_linear", {"normalize": True}),
        ("della_linear", {"normalize": True}), ("breadcrumbs", {"normalize": True}), ("multislerp", {}),
        ("nuslerp", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_weights_that_cancel_but_for_rounding(tmp_path, method, parameters, size):
    """0.1 + 0.2 - 0.3 is 6e-17: divided by it, a model grows to 10¹⁵. Small weights are no rounding."""
    base, experts = sparse_model(np.random.default_rng(4), 2 if method == "nuslerp" else 3)
    write_all(tmp_path, base, experts)
    weights = (0.1 + 0.2, -0.3) if method == "nuslerp" else (0.1, 0.2, -0.3)
    own = own_of(experts, [size * weight for weight in weights])
    message = refusal(lambda: make_recipe(tmp_path, method, list(experts), parameters, own))
    assert "weights sum to 0" in (message or "")
    own = own_of(experts, [abs(size * weight) for weight in weights])
    assert refusal(lambda: make_recipe(tmp_path, method, list(experts), parameters, own)) is None


def test_ties_at_the_threshold_keep_exactly_k(tmp_path):
    base, expert = {"w": np.zeros((10, 10), np.float32)}, {"w": np.ones((10, 10), np.float32)}
    write_all(tmp_path, base, {"a": expert})
    for density, kept in ((0.25, 25), (0.5, 50), (0.0, 0)):
        recipe = make_recipe(tmp_path, "ties", ["a"], {"density": density}, {"a": {"weight": 1}})
        assert np.count_nonzero(merge_values(recipe)["w"]) == kept


def test_statistics_of_ram_and_ties(tmp_path):
    base = {"w": np.zeros((2, 3), np.float32)}
    a = {"w": np.array([[1, 1, 1e-6], [0, 1, 0]], np.float32)}
    b = {"w": np.array([[1, -1, 0], [2, 0, 0]], np.float32)}
    write_all(tmp_path, base, {"a": a, "b": b})
    total = rlmerge.merge_to_folder(make_recipe(tmp_path, "ram", ["a", "b"]), tmp_path / "ram").report["total"]
    assert [total["ignored"][key]["count"] for key in "ab"] == [1, 0]
    assert [total["support"][key]["count"] for key in "ab"] == [4, 3]
    assert (total["unique"]["count"], total["overlap"]["count"], total["conflict"]["count"]) == (3, 2, 1)
    assert total["pairs"] == [{"experts": ["a", "b"], "overlap": 2, "conflict": {"count": 1, "share": 0.5}}]
    recipe = make_recipe(tmp_path, "ties", ["a", "b"], {}, needed_weights("ties", ["a", "b"]))
    total = rlmerge.merge_to_folder(recipe, tmp_path / "ties").report["total"]
    assert total["cancelled"] == {"count": 1, "share": 0.2}


# -- golden files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear_unnormalized",
        "task_arithmetic",
        "ties",
        "ties_weighted_lambda",
        "ties_global",
        "ram",
        "breadcrumbs",
        "breadcrumbs_ties",
        "sce",
        "nearswap",
        "ramplus",
        "ramplus_tl",
    ],
)
@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_golden_recipes(name, kernels, tmp_path, monkeypatch):
    """1e-6 absolute: mergekit sums in fp32, in its own order (tests/golden/README.md)."""
    monkeypatch.chdir(GOLDEN)
    rlmerge.merge_to_folder(f"recipes/{name}.yml", tmp_path / "out", kernels=kernels)
    found, folder = read_values(tmp_path / "out"), tmp_path / "expected"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(GOLDEN / "expected" / f"{name}.safetensors")
    expected = read_values(folder)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=1e-6, err_msg=tensor)
