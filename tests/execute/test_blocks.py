"""Stored words, casts and copies: what a block is made of must not depend on how it was read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.methods.small_models import (
    make_recipe,
    merge_values,
    needed_weights,
    read_values,
    representable,
    same_bits,
    sparse_model,
    write_all,
)

import rlmerge

KERNELS = pytest.mark.parametrize("kernels", ["numba", "numpy"])
KEYS = ["e0", "e1"]


@KERNELS
@pytest.mark.parametrize(("base", "expert"), [("BF16", "F16"), ("F16", "BF16")])
def test_what_nobody_changed_is_copied_though_the_base_was_cast(tmp_path, kernels, base, expert):
    """The cast that finds deltas between two 16-bit types must not touch the words that are copied."""
    rng = np.random.default_rng(0)
    value = representable(representable(rng.standard_normal((16, 16)), "BF16"), "F16")
    changed = value.copy()
    changed[0, :5] = representable(representable(value[0, :5] + 1.0, "BF16"), "F16")
    write_model(tmp_path / "base", {"w": value}, dtype=base)
    write_model(tmp_path / "e0", {"w": changed}, dtype=expert)
    name = {"BF16": "bfloat16", "F16": "float16"}[base]
    recipe = make_recipe(tmp_path, "ram", ["e0"], {"epsilon": 0.0}, out_dtype=name)
    rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)
    merged = read_values(tmp_path / "out")["w"]
    assert (merged == changed).all()


@KERNELS
def test_a_sweep_with_another_output_dtype_is_its_single_merges(tmp_path, kernels):
    base, experts = sparse_model(np.random.default_rng(1), 2, "BF16")
    write_all(tmp_path, base, experts, dtype="BF16")
    weights = needed_weights("task_arithmetic", KEYS)
    points = [{"lambda": 0.5}, {"lambda": 1.0}]
    recipe = make_recipe(tmp_path, "task_arithmetic", KEYS, own=weights, out_dtype="float16")
    rlmerge.merge_to_folder(recipe, tmp_path / "sweep", sweep=points, kernels=kernels)
    for point in points:
        single = merge_values(recipe.with_settings(point), kernels="numpy")
        swept = read_values(tmp_path / "sweep" / f"lambda={point['lambda']}")
        assert same_bits(swept, {name: array.astype(np.float32) for name, array in single.items()})


@KERNELS
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_min_change_holds_for_every_dtype(tmp_path, kernels, dtype):
    value = np.ones((4, 4), np.float32)
    changed = value.copy()
    changed[0, 0], changed[1, 1] = 1.0078125, 2.0
    write_all(tmp_path, {"w": value}, {"e0": {"w": changed}}, dtype=dtype)
    merged = merge_values(make_recipe(tmp_path, "ram", ["e0"], min_change=0.1), kernels=kernels)["w"]
    assert (merged[0, 0], merged[1, 1]) == (1.0, 2.0)


@KERNELS
def test_survival_is_measured_against_the_update_before_stochastic_rounding(tmp_path, kernels):
    base, experts = sparse_model(np.random.default_rng(2), 2, "BF16", grid=False)
    write_all(tmp_path, base, experts, dtype="BF16")
    totals = {}
    for rounding in ("nearest", "stochastic"):
        weights = needed_weights("task_arithmetic", KEYS, 0.01)
        recipe = make_recipe(tmp_path, "task_arithmetic", KEYS, own=weights, rounding=rounding)
        outcome = rlmerge.merge_to_folder(recipe, tmp_path / rounding, kernels=kernels)
        totals[rounding] = outcome.report["total"]
    assert totals["stochastic"]["survival"]["share"] < 1.0
    assert totals["stochastic"]["realised_cosine"] < 1.0
    assert totals["stochastic"]["intended_norm"] == totals["nearest"]["intended_norm"]


@KERNELS
def test_a_weight_of_zero_removes_an_expert_whatever_it_holds(tmp_path, kernels):
    base, experts = sparse_model(np.random.default_rng(3), 3)
    experts["e2"]["a.weight"][0] = np.inf
    write_all(tmp_path, base, experts)
    weights: dict[str, Any] = needed_weights("ties", [*KEYS, "e2"])
    weights["e2"] = {"weight": 0.0}
    recipe = make_recipe(tmp_path, "ties", [*KEYS, "e2"], own=weights, allow_nonfinite=True)
    without = make_recipe(tmp_path, "ties", KEYS, own=needed_weights("ties", KEYS))
    assert same_bits(merge_values(recipe, kernels=kernels), merge_values(without, kernels="numpy"))


TIED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sar", {"sensitivity": "delta2"}, {}),
    ("sar", {"density": 1.0}, {}),
    ("sar", {"sensitivity": "delta2", "density": 1.0, "arbitration": "random"}, {}),
    ("ties", {"density": 0.3}, {}),
    ("ram", {}, {"rounding": "stochastic"}),
    ("ram", {}, {"exclude": ["lm_head"]}),
]


@pytest.mark.parametrize(("method", "parameters", "top"), TIED)
def test_copies_of_a_tied_matrix_stay_equal(tmp_path, method, parameters, top):
    """The base stores embedding and head, equal; a loader of the result uses one of them."""
    rng = np.random.default_rng(4)
    value = representable(rng.standard_normal((32, 8)), "BF16")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    write_model(tmp_path / "base", dict.fromkeys(names, value), {"tie_word_embeddings": True}, dtype="BF16")
    for key in KEYS:
        step = rng.integers(-2, 3, value.shape) * np.float32(2**-4)
        write_model(tmp_path / key, dict.fromkeys(names, representable(value + step, "BF16")), dtype="BF16")
        write_tensors(tmp_path / f"fisher_{key}" / "fisher.safetensors", {names[0]: rng.random(value.shape)}, "F32")
    fishers = method == "sar" and "sensitivity" not in parameters
    recipe = make_recipe(tmp_path, method, KEYS, parameters, needed_weights(method, KEYS), fishers, **top)
    merged = merge_values(recipe)
    assert same_bits({"": merged[names[0]]}, {"": merged[names[1]]})
    assert not any("not in every Fisher" in note for note in rlmerge.check(recipe).notes)


def test_a_sweep_of_one_point_is_that_recipe(tmp_path):
    base, experts = sparse_model(np.random.default_rng(5), 1)
    write_all(tmp_path, base, experts)
    recipe = make_recipe(tmp_path, "ram", ["e0"])
    rlmerge.merge_to_folder(recipe, tmp_path / "out", sweep=[{"out_dtype": "bfloat16"}])
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    single = merge_values(recipe.with_settings({"out_dtype": "bfloat16"}))
    assert same_bits(read_values(folder), single)
