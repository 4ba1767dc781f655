"""The identities of the design, section 2, each a test of its own, through the public API."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.small_models import (
    DTYPE,
    FORMS,
    SHAPES,
    make_recipe,
    merge_values,
    representable,
    same_bits,
    same_values,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip

import rlmerge

SEEDS = st.integers(0, 2**32)
WINNER = {"sensitivity": "delta2", "density": 1.0, "arbitration": "winner", "agreement": "winner"}
ARBITRATION = ("winner", "soft", "elect", "margin", "random")
AGREEMENT = ("sensitivity_mean", "mean", "winner", "sum", "multiplicity")
each_form = pytest.mark.parametrize("dtype", FORMS)


def merged(folder, base, experts, parameters, fishers=None, dtype="F32", order=None, own=None, **top):
    write_all(folder, base, experts, fishers, dtype)
    recipe = make_recipe(folder, "sar", order or list(experts), parameters, own, bool(fishers), **top)
    return merge_values(recipe)


def fresh(factory):
    return factory.mktemp("sar")


# -- always ------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize(("arbitration", "agreement"), list(zip(ARBITRATION, AGREEMENT)))
@settings(max_examples=settings.default.max_examples // 3)  # six merges each
@given(SEEDS)
def test_order_of_experts_is_irrelevant(tmp_path_factory, dtype, arbitration, agreement, seed):
    folder = fresh(tmp_path_factory)
    base, experts = sparse_model(np.random.default_rng(seed), 3, dtype)
    fishers = some_fishers(np.random.default_rng(seed), list(experts))
    parameters = {"arbitration": arbitration, "agreement": agreement, "density": 0.5}
    write_all(folder, base, experts, fishers, dtype)
    first, *others = (
        merge_values(make_recipe(folder, "sar", list(order), parameters, fishers=True))
        for order in itertools.permutations(experts)
    )
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("factor", [2.0**10, 2.0**-20])
@given(SEEDS, st.sampled_from(ARBITRATION), st.sampled_from(AGREEMENT))
def test_a_power_of_two_times_a_fisher_changes_no_bit(tmp_path_factory, factor, seed, arbitration, agreement):
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, 3)
    fishers = {
        key: {name: (rng.standard_normal(shape) ** 2).astype(np.float32) for name, shape in SHAPES.items()}
        for key in experts
    }
    scaled = {**fishers, "e1": {name: value * np.float32(factor) for name, value in fishers["e1"].items()}}
    parameters = {"arbitration": arbitration, "agreement": agreement, "density": 0.5}
    first = merged(fresh(tmp_path_factory), base, experts, parameters, fishers)
    second = merged(fresh(tmp_path_factory), base, experts, parameters, scaled)
    assert same_bits(first, second)


@given(SEEDS)
def test_a_factor_of_a_fisher_changes_nothing_but_exact_ties(tmp_path_factory, seed):
    """Continuous Fishers do not tie, so each value stays within one unit in the last place (the mean rounds)."""
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, 3, grid=False)
    fishers = {
        key: {name: (rng.random(shape) + 0.01).astype(np.float32) for name, shape in SHAPES.items()} for key in experts
    }
    scaled = {**fishers, "e1": {name: value * np.float32(3) for name, value in fishers["e1"].items()}}
    # F is fp32: 3·F rounds, which is the user's rounding; take the rounded Fisher divided by 3 as the other one
    fishers["e1"] = {name: value / np.float32(3) for name, value in scaled["e1"].items()}
    first = merged(fresh(tmp_path_factory), base, experts, {"density": 1.0}, fishers)
    second = merged(fresh(tmp_path_factory), base, experts, {"density": 1.0}, scaled)
    for name, value in first.items():
        # relative difference of F̂: two fp32 roundings, 2⁻²³; shares move by so much of the update (0.5 at most here)
        assert (np.abs(second[name] - value) <= np.spacing(np.abs(value)) + 0.5 * 2.0**-22).all()


@each_form
@pytest.mark.parametrize("power", [3, -2])
@given(SEEDS, st.sampled_from(ARBITRATION), st.sampled_from(AGREEMENT), st.sampled_from([0.5, 1.0]))
def test_a_power_of_two_times_the_deltas_scales_the_merged_delta(
    tmp_path_factory, dtype, power, seed, arbitration, agreement, density
):
    """A base of zeros: the merged value is the merged delta. Exact in fp32, except that soft shares keep their bits."""
    rng = np.random.default_rng(seed)
    _, experts = sparse_model(rng, 3, dtype)
    base = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    scaled = {
        key: {n: value * np.float32(2.0**power) for n, value in tensors.items()} for key, tensors in experts.items()
    }
    parameters = {"sensitivity": "delta2", "arbitration": arbitration, "agreement": agreement, "density": density}
    first, second = (
        merged(fresh(tmp_path_factory), base, tensors, parameters, dtype=dtype, out_dtype="float32")
        for tensors in (experts, scaled)
    )
    assert same_bits({name: value * np.float32(2.0**power) for name, value in first.items()}, second)


# -- at density 1, weights and λ 1 -------------------------------------------------------------------------------------


@each_form
@given(SEEDS, st.sampled_from(ARBITRATION), st.sampled_from(AGREEMENT))
def test_one_expert_comes_back_bit_for_bit(tmp_path_factory, dtype, seed, arbitration, agreement):
    """Apart from -0 against +0, which are no change."""
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, 1, dtype, grid=False)
    tiny = representable(rng.standard_normal(SHAPES["b.bias"]) * 1e-30, dtype)
    experts["e0"]["b.bias"] = tiny  # far from the base, where base + (expert - base) rounds in fp32
    parameters = {"sensitivity": "delta2", "density": 1.0, "arbitration": arbitration, "agreement": agreement}
    found = merged(fresh(tmp_path_factory), base, experts, parameters, dtype=dtype)
    assert same_values(found, experts["e0"])


@each_form
@pytest.mark.parametrize("agreement", ["sensitivity_mean", "mean", "winner", "multiplicity"])
@given(SEEDS, st.integers(2, 5))
def test_identical_experts_give_that_expert(tmp_path_factory, dtype, agreement, seed, count):
    """`sum` adds them instead, by its name."""
    base, experts = sparse_model(np.random.default_rng(seed), 1, dtype, grid=False)
    same = {f"e{k}": experts["e0"] for k in range(count)}
    parameters = {"sensitivity": "delta2", "density": 1.0, "agreement": agreement}
    found = merged(fresh(tmp_path_factory), base, same, parameters, dtype=dtype)
    if agreement == "multiplicity" and dtype == "F32":
        # shares by multiplicity are no whole in general, so base + Σ is rounded: within one unit in the last place
        for name, value in experts["e0"].items():
            assert (np.abs(found[name] - value) <= np.spacing(np.maximum(np.abs(value), np.abs(base[name])))).all()
    else:
        assert same_values(found, experts["e0"])


@each_form
@given(SEEDS, st.sampled_from(ARBITRATION), st.sampled_from(AGREEMENT))
def test_disjoint_supports_give_the_exact_sum(tmp_path_factory, dtype, seed, arbitration, agreement):
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, 3, dtype, grid=False)
    expected = {name: value.copy() for name, value in base.items()}
    for name, shape in SHAPES.items():
        owner = rng.integers(0, 4, shape)
        for k, tensors in enumerate(experts.values()):
            tensors[name] = np.where(owner == k, tensors[name], base[name])
            expected[name] = np.where(owner == k, tensors[name], expected[name])
    parameters = {"sensitivity": "delta2", "density": 1.0, "arbitration": arbitration, "agreement": agreement}
    found = merged(fresh(tmp_path_factory), base, experts, parameters, dtype=dtype)
    assert same_values(found, expected)


@each_form
@given(SEEDS, st.booleans())
def test_soft_with_power_zero_and_mean_is_ram_without_epsilon(tmp_path_factory, dtype, seed, grid):
    """Within one unit in the last place of fp32: Σ(1/m)·d against (Σ d)/m."""
    folder = fresh(tmp_path_factory)
    base, experts = sparse_model(np.random.default_rng(seed), 3, dtype, grid=grid)
    parameters = {"sensitivity": "delta2", "density": 1.0, "arbitration": "soft", "power": 0, "agreement": "mean"}
    first = merged(folder, base, experts, parameters, dtype=dtype, out_dtype="float32")
    second = merge_values(make_recipe(folder, "ram", list(experts), {"epsilon": 0}, out_dtype="float32"))
    for name, value in first.items():
        assert (np.abs(second[name] - value) <= np.spacing(np.abs(value)) + 1e-15).all()


@each_form
@pytest.mark.parametrize("fisher", [True, False])
@given(SEEDS, st.integers(2, 4), st.booleans())
def test_winner_in_both_stores_only_values_of_inputs(tmp_path_factory, dtype, fisher, seed, count, grid):
    rng = np.random.default_rng(seed)
    folder = fresh(tmp_path_factory)
    base, experts = sparse_model(rng, count, dtype, grid=grid)
    fishers = some_fishers(rng, list(experts)) if fisher else None
    write_all(folder, base, experts, fishers, dtype)
    parameters = {**WINNER, "sensitivity": "fisher_delta2" if fisher else "delta2"}
    recipe = make_recipe(folder, "sar", list(experts), parameters, fishers=fisher, dtype=DTYPE[dtype])
    outcome = rlmerge.merge_to_folder(recipe, folder / "out", threads=1)
    for name, value in merge_values(recipe).items():
        inputs = np.stack([base[name], *(tensors[name] for tensors in experts.values())])
        assert (value == inputs).any(axis=0).all()
    survival = outcome.report["total"]["survival"]
    assert survival["count"] > 0
    assert survival["share"] == 1.0


def test_winner_returns_to_the_base_in_a_draw(tmp_path):
    base = {"w": np.zeros((2, 2), np.float32)}
    up, down = np.array([[1, 1], [0, 2]], np.float32), np.array([[-1, 1], [0, -1]], np.float32)
    found = merged(tmp_path, base, {"a": {"w": up}, "b": {"w": down}}, WINNER)
    assert found["w"].tolist() == [[0, 1], [0, 2]]
