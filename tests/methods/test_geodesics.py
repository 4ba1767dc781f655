"""slerp, nuslerp, multislerp, karcher, model_stock, passthrough: references, golden files, RL-sized updates, edges."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_model
from tests.methods.small_models import (
    make_recipe,
    merge_values,
    read_values,
    refusal,
    representable,
    same_bits,
    same_values,
    small_blocks,
    write_all,
)  # fmt: skip
from tests.reference import geodesic

import rlmerge
from rlmerge.methods.gram import geodesic as geodesic_of
from rlmerge.methods.karcher import karcher_mean
from rlmerge.methods.model_stock import stock
from rlmerge.methods.slerp import mean_direction

GOLDEN = Path(__file__).parents[1] / "golden"
SEEDS = st.integers(0, 2**32)
SHAPES = {"m": (6, 9), "v": (11,), "one": (1,), "two": (2,), "none": (0, 3), "stack": (3, 4, 5), "long": (2, 40)}
METHODS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
WEIGHTED = ("nuslerp", "multislerp")


def models(rng, count, size=0.1, density=0.7, dtype="F32"):
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    experts = {
        f"e{k}": {
            name: representable(
                value + size * rng.standard_normal(value.shape) * (rng.random(value.shape) < density), dtype
            )
            for name, value in base.items()
        }
        for k in range(count)
    }  # fmt: skip
    return base, experts


def close(found, expected, scale=1e-11):
    """One rounding to fp32, of fp64 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = np.spacing(np.abs(value).astype(np.float32)) * 0.51 + scale
        assert (np.abs(found[name] - value) <= bound).all(), name


def shares(keys, weights):
    return {key: {"weight": weight} for key, weight in zip(keys, weights)}


# -- against the references --------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([0.0, 0.3, 0.5, 1.0, -0.2, 1.4]), st.sampled_from([0.01, 0.5, 3.0]), st.booleans())
def test_slerp(tmp_path_factory, seed, t, size, circle):
    """Listed or not, the base is where t starts; without one it starts at the first model."""
    folder = tmp_path_factory.mktemp("slerp")
    base, experts = models(np.random.default_rng(seed), 2, size)
    write_all(folder, base, experts)
    parameters = {"t": t, "dot_threshold": 1.0 if circle else 0.9995}
    expected = geodesic.slerp(experts["e0"], experts["e1"], t, parameters["dot_threshold"])
    with small_blocks(8, 24):
        for listed, start in ((["e0", "e1"], "e0"), (["e1", "e0"], "e0"), (["e1"], "e0"), (["e0", "e1"], None)):
            close(merge_values(make_recipe(folder, "slerp", listed, parameters, base=start)), expected)
        close(merge_values(make_recipe(folder, "slerp", ["e0", "e1"], parameters)), expected)


@given(SEEDS, st.sampled_from([(1.0, 1.0), (0.4, 0.6), (2.0, 0.0), (1.5, -0.5)]), st.sampled_from([None, -1, 0]),
       st.booleans(), st.sampled_from([8, 2**16]))  # fmt: skip
def test_nuslerp(tmp_path_factory, seed, weights, axis, with_base, block):
    folder = tmp_path_factory.mktemp("nuslerp")
    base, experts = models(np.random.default_rng(seed), 2)
    write_all(folder, base, experts)
    own, parameters = shares(experts, weights), {"nuslerp_flatten": axis is None, "nuslerp_row_wise": axis == 0}
    expected = geodesic.nuslerp(
        base if with_base else None, experts["e0"], experts["e1"], weights[1] / sum(weights), axis
    )
    with small_blocks(block, 3 * block):
        recipe = make_recipe(folder, "nuslerp", ["e0", "e1"], parameters, own, base="base" if with_base else None)
        close(merge_values(recipe), expected)


def test_nuslerp_takes_vectors_by_filter(tmp_path):
    base, experts = models(np.random.default_rng(0), 2)
    write_all(tmp_path, base, experts)
    parameters = {
        "nuslerp_flatten": [{"filter": "m", "value": False}, {"filter": "long", "value": False}],
        "nuslerp_row_wise": [{"filter": "m", "value": True}],
    }
    found = merge_values(make_recipe(tmp_path, "nuslerp", ["e0", "e1"], parameters, shares(experts, (1, 1))))
    for name, axis in (("m", 0), ("long", -1), ("v", None)):
        expected = geodesic.nuslerp(base, experts["e0"], experts["e1"], 0.5, axis)
        close({name: found[name]}, {name: expected[name]})


@given(SEEDS, st.lists(st.sampled_from([1.0, 0.5, 0.2, -0.3]), min_size=5, max_size=5), st.integers(1, 5),
       st.booleans(), st.booleans())  # fmt: skip
def test_multislerp(tmp_path_factory, seed, weights, count, with_base, normalize):
    folder = tmp_path_factory.mktemp("multislerp")
    base, experts = models(np.random.default_rng(seed), count)
    write_all(folder, base, experts)
    weight = dict(zip(experts, weights))
    if abs(sum(weight.values())) < 1e-9:
        return
    recipe = make_recipe(
        folder, "multislerp", list(experts), {"normalize_weights": normalize}, shares(experts, weights),
        base="base" if with_base else None,
    )  # fmt: skip
    expected = (
        experts["e0"] if count == 1 else geodesic.multislerp(base if with_base else None, experts, weight, normalize)
    )
    with small_blocks(8, 24):
        close(merge_values(recipe), expected, 1e-9)


@given(SEEDS, st.integers(1, 5), st.sampled_from([0.01, 0.5, 3.0]), st.booleans())
def test_karcher(tmp_path_factory, seed, count, size, with_base):
    folder = tmp_path_factory.mktemp("karcher")
    base, experts = models(np.random.default_rng(seed), count, size)
    write_all(folder, base, experts)
    recipe = make_recipe(folder, "karcher", list(experts), {"tol": 1e-9}, base="base" if with_base else None)
    points = {**experts, "base": base} if with_base else experts  # as in mergekit, a base is one more
    with small_blocks(8, 24):
        close(merge_values(recipe), experts["e0"] if len(points) == 1 else geodesic.karcher(points, tol=1e-9), 1e-9)


@given(SEEDS, st.integers(2, 5), st.booleans(), st.sampled_from([8, 2**16]), st.sampled_from([0.05, 1.0]))
def test_model_stock(tmp_path_factory, seed, count, rows, block, density):
    folder = tmp_path_factory.mktemp("stock")
    base, experts = models(np.random.default_rng(seed), count, density=density)
    write_all(folder, base, experts)
    recipe = make_recipe(folder, "model_stock", list(experts), {"filter_wise": rows})
    with small_blocks(block, 3 * block):
        close(merge_values(recipe), geodesic.model_stock(base, experts, rows))


def test_passthrough(tmp_path):
    base, experts = models(np.random.default_rng(0), 1)
    write_all(tmp_path, base, experts)
    for start in ("base", None):
        scale = [{"filter": "m", "value": 0.5}, {"filter": "v", "value": 0}]
        found = merge_values(make_recipe(tmp_path, "passthrough", ["e0"], {"scale": scale}, base=start))
        for name, value in experts["e0"].items():
            assert (found[name] == value * {"m": 0.5, "v": 0.0}.get(name, 1.0)).all()
    assert same_bits(merge_values(make_recipe(tmp_path, "passthrough", ["e0"])), experts["e0"])


# -- golden files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "slerp", "nuslerp", "nuslerp_base_rowwise", "multislerp", "multislerp_base", "karcher", "model_stock",
    "model_stock_filterwise",
])  # fmt: skip
@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_golden_recipes(name, kernels, tmp_path, monkeypatch):
    """1e-5 absolute for geodesics (tests/golden/README.md); found: 4e-7, for mergekit computes in fp32."""
    monkeypatch.chdir(GOLDEN)
    found = merge_values(rlmerge.load_recipe(f"recipes/{name}.yml"), kernels=kernels)
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / "expected" / f"{name}.safetensors")
    expected = read_values(tmp_path)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=1e-6, err_msg=tensor)


# -- updates as small as those of RL -----------------------------------------------------------------------------------


def small_updates(rng, count, size):
    """A large vector and updates of relative length `size`, all in fp64."""
    base = rng.standard_normal(4096)
    base /= np.linalg.norm(base)
    steps = rng.standard_normal((count, 4096))
    return base + size * steps / np.linalg.norm(steps, axis=1)[:, None]


@pytest.mark.parametrize("size", [1e-5, 7e-5, 1e-4, 4e-4, 7e-4, 1e-3])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_experts_of_equal_size_count_alike(size, count):
    """In fp32 an arccos gives some of them .44 and others .11 (notes on mergekit's karcher)."""
    values = small_updates(np.random.default_rng(1), count, size)
    gram = values @ values.T
    for coefficients in (karcher_mean(gram, 10, 1e-5), mean_direction(gram, np.full(count, 1 / count), 1e-8)):
        # the circle is size² away from the straight line, and lengths differ by as much as the updates lengthen
        np.testing.assert_allclose(coefficients, 1 / count, rtol=3 * size / math.sqrt(4096) + size**2)
    if count == 2:
        np.testing.assert_allclose(geodesic_of(gram, 0.3), [0.7, 0.3], rtol=size**2)


@pytest.mark.parametrize("value", [0.2109375, -0.7, 1.0, 3e-5])
@pytest.mark.parametrize("size", [1, 7])
def test_karcher_with_a_model_at_the_other_pole(value, size):
    """One way to the other pole is as good as another: whoever is there turns nothing, and counts in the length."""
    values = value * np.array([1.0, 1.0, 1.0, -8.0, 1.0])[:, None] * np.arange(1, size + 1)
    found = karcher_mean(values @ values.T, 10, 1e-5) @ values
    np.testing.assert_allclose(found, 12 / 5 * values[0], rtol=1e-12)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("method", METHODS)
def test_small_updates_scale(tmp_path, method, size):
    """The merged update is that of updates a thousand times larger, in proportion: no constant of ours is absolute."""
    rng, found = np.random.default_rng(2), {}
    count = 2 if method in ("slerp", "nuslerp") else 3
    base, experts = {"w": rng.standard_normal((40, 60))}, {}
    steps = rng.standard_normal((count, 40, 60)) * (rng.random((count, 40, 60)) < 0.2) + 0.1
    for key, scale in (("large", 1e-2), ("small", size)):
        folder = tmp_path / key
        experts = {f"e{k}": {"w": (base["w"] + scale * step).astype(np.float32)} for k, step in enumerate(steps)}
        write_all(folder, {"w": base["w"].astype(np.float32)}, experts)
        own = shares(experts, [1.0] * count) if method in WEIGHTED else None
        merged = merge_values(make_recipe(folder, method, list(experts), {}, own))["w"].astype(np.float64)
        found[key] = (merged - base["w"].astype(np.float32)) / scale
    # fp32 holds the weights to 1e-7 of their size
    np.testing.assert_allclose(found["small"], found["large"], rtol=0, atol=4e-7 / size + 0.03)


def test_model_stock_needs_no_length(tmp_path):
    """mergekit's clamp makes t .08 here; the cosine says .89."""
    rng = np.random.default_rng(3)
    common = rng.standard_normal(512)
    deltas = np.stack([common + 0.5 * rng.standard_normal(512) for _ in range(2)])
    t = stock(deltas @ deltas.T).sum()
    assert 0.8 < t < 0.95
    tiny = 1e-12 * deltas
    assert stock(tiny @ tiny.T).sum() == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("cosine", [-0.5, -0.99, -0.999999, -1.0])
def test_model_stock_goes_no_further_than_its_experts(cosine):
    """mergekit's t is -198 at cos = -.99."""
    gram = np.array([[1.0, cosine], [cosine, 1.0]])
    coefficients = stock(gram)
    assert math.sqrt(max(0.0, coefficients @ gram @ coefficients)) <= 1.0 + 1e-9
    assert np.isfinite(coefficients).all()


# -- order, equality, edges --------------------------------------------------------------------------------------------


def recipe_for(folder, method, keys, base="", /, **more):
    own = shares(keys, [0.7] * len(keys)) if method in WEIGHTED else None
    return make_recipe(folder, method, keys, more, own, base=base)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("method", "more"), [
    *((method, {}) for method in METHODS), ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"nuslerp_flatten": False}), ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
])  # fmt: skip
def test_equal_experts(tmp_path, method, more, dtype):
    """Equal to each other: that expert; equal to the base: the base. In every dtype, for tensors of 0, 1, 2 entries."""
    base, experts = models(np.random.default_rng(4), 1, dtype=dtype)
    count = 2 if method in ("slerp", "nuslerp") else 3
    keys = [f"e{k}" for k in range(count)]
    write_all(tmp_path, base, dict.fromkeys(keys, experts["e0"]), dtype=dtype)
    assert same_values(merge_values(recipe_for(tmp_path, method, keys, **more)), experts["e0"])
    write_all(tmp_path, base, dict.fromkeys(keys, base), dtype=dtype)
    assert same_values(merge_values(recipe_for(tmp_path, method, keys, **more)), base)


@pytest.mark.parametrize("method", ["multislerp", "karcher", "model_stock"])
def test_order_of_nearly_parallel_experts(tmp_path, method):
    for size in (1e-5, 3e-4):
        base, experts = models(np.random.default_rng(5), 3, size)
        write_all(tmp_path, base, experts)
        found = [merge_values(recipe_for(tmp_path, method, list(keys))) for keys in itertools.permutations(experts)]
        assert all(same_bits(found[0], other) for other in found[1:])


def test_opposite_and_absent_updates():
    opposite = np.array([[4.0, -4.0], [-4.0, 4.0]])
    np.testing.assert_array_equal(geodesic_of(opposite, 0.25), [0.75, 0.25])
    absent = np.array([[0.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(geodesic_of(absent, 0.5), [math.sqrt(0.5)] * 2)
    np.testing.assert_array_equal(mean_direction(opposite, np.array([0.5, 0.5]), 1e-8), [0.5, 0.5])
    np.testing.assert_array_equal(mean_direction(np.zeros((2, 2)), np.array([0.5, 0.5]), 1e-8), [0.0, 0.0])
    np.testing.assert_array_equal(stock(np.zeros((3, 3))), [0.0] * 3)
    assert np.isfinite(karcher_mean(opposite, 10, 1e-5)).all()
    np.testing.assert_array_equal(karcher_mean(np.zeros((2, 2)), 10, 1e-5), [0.0, 0.0])


def test_a_long_row_is_one_block(tmp_path):
    """Rows longer than a block stay whole."""
    base, experts = models(np.random.default_rng(6), 3)
    write_all(tmp_path, base, experts)
    recipe = recipe_for(tmp_path, "model_stock", list(experts), filter_wise=True)
    whole = merge_values(recipe)
    with small_blocks(4, 4):
        assert same_bits(merge_values(recipe, kernels="numba"), whole)


@pytest.mark.parametrize("tol", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("count", [2, 3])
def test_karcher_of_directions_that_cancel(count, tol):
    """Their mean has no direction but rounding; any of them is as good a start, whatever `tol`."""
    turn = 2.0 * np.pi * np.arange(count) / count
    # a plane of numbers that binary fractions do not hold, so that the sum is not exactly 0
    points = np.outer(np.cos(turn), [0.1, 0.7, 0.3]) + np.outer(np.sin(turn), [0.7, 0.2, -0.7])
    place = karcher_mean(points @ points.T, 10, tol)
    assert np.isfinite(place).all()
    assert np.linalg.norm(place @ points) > 0.5


def test_what_cannot_work(tmp_path):
    base, experts = models(np.random.default_rng(7), 3)
    write_all(tmp_path, base, experts)
    one = refusal(lambda: make_recipe(tmp_path, "slerp", ["e0"], base=None))
    assert "goes from one model to another" in (one or "")
    own = shares(["e0", "e1"], (1.0, -1.0))
    assert "sum to 0" in (refusal(lambda: make_recipe(tmp_path, "nuslerp", ["e0", "e1"], {}, own)) or "")
    assert "exactly 2 models" in (
        refusal(lambda: make_recipe(tmp_path, "nuslerp", ["e0"], {}, shares(["e0"], [1]))) or ""
    )
    listed = make_recipe(tmp_path, "nuslerp", ["base", "e0", "e1"], {}, shares(["base", "e0", "e1"], (1, 1, 1)))
    assert [entry.key for entry in listed.experts] == ["e0", "e1"]


def test_lora_experts_are_weights_too(tmp_path):
    """An adapter is the base and its update: the same merge as of the model that it stands for."""
    rng = np.random.default_rng(8)
    base = {"model.layers.0.q_proj.weight": rng.standard_normal((8, 6)).astype(np.float32)}
    a, b = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
    full = {name: (value + (b.astype(np.float64) @ a)).astype(np.float32) for name, value in base.items()}
    write_all(tmp_path, base, {"e0": full, "e1": {name: value * 1.5 for name, value in base.items()}})
    inside = "base_model.model.model.layers.0.q_proj"
    write_model(tmp_path / "lora", {f"{inside}.lora_A.weight": a, f"{inside}.lora_B.weight": b})
    (tmp_path / "lora" / "model.safetensors").rename(tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "config.json").unlink(missing_ok=True)
    (tmp_path / "lora" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    for method in (*METHODS, "passthrough"):
        others = [] if method == "passthrough" else ["e1"]
        found = [merge_values(recipe_for(tmp_path, method, [key, *others], "base")) for key in ("e0", "lora")]
        for name in base:
            np.testing.assert_allclose(found[0][name], found[1][name], rtol=0, atol=2e-6, err_msg=method)
