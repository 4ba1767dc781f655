"""fisher and ota against plain references, and what a Fisher's scale and zeros mean."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_tensors
from tests.methods.small_models import (
    FORMS,
    make_recipe,
    merge_values,
    refusal,
    same_bits,
    small_blocks,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip

import rlmerge

SEEDS = st.integers(0, 2**32)


def given_models(folder, seed, count, dtype="F32"):
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, count, dtype, grid=False)
    fishers = some_fishers(rng, list(experts))
    for tensors in fishers.values():  # continuous, so that nothing ties; some zeros
        for name, value in tensors.items():
            tensors[name] = (value * rng.random(value.shape)).astype(np.float32)
    write_all(folder, base, experts, fishers, dtype=dtype)
    return base, experts, fishers


def relative(fishers):
    """F̂: each Fisher by its mean over all coordinates."""
    found = {}
    for key, tensors in fishers.items():
        flat = np.concatenate([value.astype(np.float64).reshape(-1) for value in tensors.values()])
        found[key] = {name: value.astype(np.float64) / flat.mean() for name, value in tensors.items()}
    return found


def weighted(values, shares, fallback):
    """Σ c·v / Σ c; where all c are 0, by the fallback's weights."""
    total = sum(shares)
    shares = [np.where(total == 0, other, own) for own, other in zip(shares, fallback)]
    total = sum(shares)
    return sum(c * v for c, v in zip(shares, values)) / np.where(total == 0, 1.0, total)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (np.abs(found[name] - value) <= np.spacing(np.abs(value).astype(np.float32)) + 1e-12).all(), name


@given(SEEDS, st.integers(1, 5), st.sampled_from([0.0, 1e-3, 0.5, 100.0]), st.sampled_from(FORMS))
def test_fisher_is_the_weighted_mean_of_weights(tmp_path_factory, seed, count, floor, dtype):
    folder = tmp_path_factory.mktemp("fisher")
    base, experts, fishers = given_models(folder, seed, count, dtype)
    weight = dict(zip(experts, (1.0, 0.5, 2.0, 0.0, 1.5)))
    own = {key: {"weight": w} for key, w in weight.items()}
    recipe = make_recipe(folder, "fisher", list(experts), {"floor": floor}, own, fishers=True, out_dtype="float32")
    hats, expected = relative(fishers), {}
    for name in base:
        shares = [weight[key] * np.maximum(hats[key][name], floor) for key in experts]
        values = [experts[key][name].astype(np.float64) for key in experts]
        expected[name] = weighted(values, shares, [weight[key] for key in experts])
    with small_blocks(8):
        close(merge_values(recipe), expected)


@given(SEEDS, st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from(["tensor", "model"]))
def test_ota_masks_and_averages(tmp_path_factory, seed, count, density, scope):
    folder = tmp_path_factory.mktemp("ota")
    base, experts, fishers = given_models(folder, seed, count)
    hats, kept = relative(fishers), {}
    for key, tensors in experts.items():
        delta = {name: tensors[name].astype(np.float64) - value for name, value in base.items()}
        kept[key] = {name: np.zeros(value.shape) for name, value in base.items()}
        for group in [list(base)] if scope == "model" else [[name] for name in base]:
            places = [(name, c) for name in group for c in np.ndindex(base[name].shape) if delta[name][c] != 0]
            places.sort(key=lambda at: -hats[key][at[0]][at[1]] * delta[at[0]][at[1]] ** 2)
            wanted = int(density * len(places))
            places = places[:wanted]
            if places and hats[key][places[-1][0]][places[-1][1]] == 0 and density < 1:
                return  # ties at a saliency of 0: chosen by a hash
            for name, c in places:
                kept[key][name][c] = delta[name][c]
    expected = {}
    for name, value in base.items():
        shares = [np.where(kept[key][name] != 0, hats[key][name] ** 0.5, 0.0) for key in experts]
        some = [(kept[key][name] != 0).astype(np.float64) for key in experts]
        expected[name] = value + weighted([kept[key][name] for key in experts], shares, some)
    recipe = make_recipe(folder, "ota", list(experts), {"density": density, "scope": scope}, fishers=True)
    close(merge_values(recipe), expected)


@pytest.mark.parametrize("method", ["fisher", "ota"])
def test_the_scale_of_a_fisher_means_nothing(tmp_path, method):
    base, experts, fishers = given_models(tmp_path, 3, 3)
    first = merge_values(make_recipe(tmp_path, method, list(experts), fishers=True))
    fishers["e1"] = {name: value * np.float32(2.0**-40) for name, value in fishers["e1"].items()}
    write_all(tmp_path, base, experts, fishers)
    assert same_bits(first, merge_values(make_recipe(tmp_path, method, list(experts), fishers=True)))


@pytest.mark.parametrize("method", ["fisher", "ota"])
@pytest.mark.parametrize("dtype", FORMS)
def test_same_bits_for_threads_blocks_and_kernels(tmp_path, method, dtype):
    _, experts, _ = given_models(tmp_path, 5, 3, dtype)
    recipe = make_recipe(tmp_path, method, list(experts), fishers=True)
    first = merge_values(recipe, kernels="numba")
    assert same_bits(first, merge_values(recipe, kernels="numpy"))
    assert same_bits(first, dict(rlmerge.merge(recipe, threads=2)))


@pytest.mark.parametrize("method", ["fisher", "ota"])
def test_without_fishers_or_weights_it_says_so(tmp_path, method):
    _, experts, _ = given_models(tmp_path, 5, 2)
    message = refusal(lambda: merge_values(make_recipe(tmp_path, method, list(experts), fishers=False))) or ""
    assert "averages by Fisher information" in message
    message = refusal(lambda: make_recipe(tmp_path, method, list(experts), {"weight": 0}, fishers=True)) or ""
    assert "all weights are 0" in message


def spoiled(folder, experts, fishers, value, recorded=False):
    """One entry of the Fisher of e1 becomes `value`; with `recorded`, every fisher.json says a sum and no digest."""
    fishers["e1"]["c.weight"].flat[3] = value
    for key in experts:
        write_tensors(folder / f"fisher_{key}" / "fisher.safetensors", fishers[key], "F32")
        sums = {n: {"sum": max(1.0, float(a.sum())), "count": a.size} for n, a in fishers[key].items()}
        (folder / f"fisher_{key}" / "fisher.json").write_text(json.dumps({"tensors": sums} if recorded else {}))


@pytest.mark.parametrize("method", ["sar", "fisher", "ota"])
def test_the_way_out_is_one_that_the_method_has(tmp_path, method):
    """`sensitivity: delta2` is offered by sar alone, whoever finds what is wrong with a Fisher."""
    _, experts, fishers = given_models(tmp_path, 5, 2)
    keys = list(experts)

    def recipe(with_fishers=True):
        return make_recipe(tmp_path, method, keys, fishers=with_fishers)

    messages = {"none": refusal(lambda: rlmerge.check(recipe(False)))}
    one = recipe()
    lacking = dataclasses.replace(one, models=(one.models[0], dataclasses.replace(one.models[1], fisher=None)))
    messages["of one"] = refusal(lambda: rlmerge.check(lacking))
    on_demand = dataclasses.replace(lacking.models[0], fisher={"data": "math"})
    lacking = dataclasses.replace(lacking, models=(on_demand, lacking.models[1]))
    messages["of one, estimated"] = refusal(lambda: rlmerge.check(lacking))
    spoiled(tmp_path, keys, fishers, -1.0)
    messages["negative, sampled"] = refusal(lambda: rlmerge.check(recipe()))
    messages["negative, summed"] = refusal(lambda: merge_values(recipe()))
    spoiled(tmp_path, keys, fishers, -1.0, recorded=True)
    with mock.patch("rlmerge.api.take_sample", return_value={}):  # in a larger model the sample misses it
        messages["negative, recorded"] = refusal(lambda: rlmerge.merge_to_folder(recipe(), tmp_path / "out"))
    spoiled(tmp_path, keys, fishers, np.nan)
    messages["no number"] = refusal(lambda: merge_values(recipe()))
    fishers["e1"] = {name: np.zeros_like(value) for name, value in fishers["e1"].items()}
    spoiled(tmp_path, keys, fishers, 0.0)
    messages["zero"] = refusal(lambda: merge_values(recipe()))
    assert "holds -1.0 at coordinate" in (messages["negative, recorded"] or "")
    for case, message in messages.items():
        assert message is not None, case
        assert ("sensitivity: delta2" in message) == (method == "sar"), f"{case}: {message}"
        assert ("choose a method that needs no Fisher" in message) == (method != "sar"), f"{case}: {message}"


def test_a_note_says_what_becomes_of_tensors_without_a_fisher(tmp_path):
    _, experts, fishers = given_models(tmp_path, 5, 2)
    for key in experts:
        some = {name: value for name, value in fishers[key].items() if name != "c.weight"}
        write_tensors(tmp_path / f"fisher_{key}" / "fisher.safetensors", some, "F32")
    for method, words in (("sar", "arbitrated by δ² alone"), ("ota", "averaged as if it were the same everywhere")):
        notes = rlmerge.check(make_recipe(tmp_path, method, list(experts), fishers=True)).notes
        assert any("c.weight" in note and words in note for note in notes), notes
