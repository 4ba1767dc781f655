"""The spectral methods against references and golden files, on strange matrices; the engine's whole tensors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.methods.small_models import (
    fitting,
    make_recipe,
    merge_values,
    needed_weights,
    read_values,
    representable,
    same_bits,
    same_values,
    small_blocks,
    write_all,
)  # fmt: skip
from tests.reference import spectral

import rlmerge
from rlmerge.errors import NonFiniteError
from rlmerge.methods.singular import own_directions
from rlmerge.preflight import check
from rlmerge.sample import take_sample
from rlmerge.settings import whole_cost

GOLDEN = Path(__file__).parents[1] / "golden"
SEEDS = st.integers(0, 2**32)
METHODS = ("tsv_m", "iso_c", "iso_cts", "iso_merger", "resmerge", "subspace_rewiring")
SHAPES = {
    "layers.0.mlp.up.weight": (9, 6), "layers.0.mlp.down.weight": (6, 9), "layers.0.square.weight": (7, 7),
    "embed.weight": (12, 5), "row": (1, 4), "column": (4, 1), "single": (1, 1), "none": (0, 3), "v": (8,),
    "one": (1,), "two": (2,), "stack": (2, 3, 4),
}  # fmt: skip


def models(rng, count, size=0.1, dtype="F32"):
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    experts = {
        f"e{k}": {
            name: representable(value + size * rng.standard_normal(value.shape), dtype) for name, value in base.items()
        }
        for k in range(count)
    }
    return base, experts


def expected(method, base, experts, more):
    """What the plain references say, tensor by tensor."""
    found = {}
    for name, value in base.items():
        start = value.astype(np.float64)
        values = [experts[key][name].astype(np.float64) for key in sorted(experts)]
        deltas = [expert - start for expert in values]
        inner = method in ("resmerge", "subspace_rewiring") and "embed" in name
        if value.ndim != 2 or inner or not value.size:
            found[name] = start + more.get("scaling", 1.0) * np.mean(deltas, axis=0)
        elif method == "iso_merger":
            found[name] = spectral.iso_merger(start, values)
        elif method == "subspace_rewiring":
            found[name] = start + spectral.subspace_rewiring(
                start, deltas[0], more.get("base_rank", 10**6), more.get("delta_rank_fraction", 0.01)
            )
        elif method == "resmerge":
            found[name] = start + spectral.resmerge(deltas, more.get("rank", 1), family="mlp" in name)
        elif method == "iso_cts":
            found[name] = start + spectral.iso_cts(
                deltas, more.get("scaling", 1.0), more.get("common_space_fraction", 0.8)
            )
        else:
            found[name] = start + getattr(spectral, method)(deltas, more.get("scaling", 1.0))
    return found


CASES = [
    ("tsv_m", 2, {}), ("tsv_m", 3, {"scaling": 0.7}), ("iso_c", 1, {}), ("iso_c", 4, {"scaling": 1.4}),
    ("iso_cts", 2, {"common_space_fraction": 0.5}), ("iso_cts", 2, {"common_space_fraction": 1.0}),
    ("iso_cts", 3, {"common_space_fraction": 0.6}), ("iso_cts", 4, {"common_space_fraction": 0.0}),
    ("iso_merger", 1, {}), ("iso_merger", 2, {}), ("iso_merger", 3, {}), ("resmerge", 2, {}), ("resmerge", 4, {}),
    ("subspace_rewiring", 1, {"base_rank": 3, "delta_rank_fraction": 0.5}), ("subspace_rewiring", 1, {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "count", "more"), CASES)
@settings(max_examples=settings.default.max_examples // 3)
@given(SEEDS)
def test_references(tmp_path_factory, method, count, more, seed):
    """One rounding to fp32, and what decompositions by other ways lose (they divide by the smallest singular value)."""
    folder = tmp_path_factory.mktemp("spectral")
    base, experts = models(np.random.default_rng(seed), count)
    write_all(folder, base, experts)
    with small_blocks(8, 16):
        found = merge_values(make_recipe(folder, method, list(experts), more))
    with np.errstate(all="ignore"):
        wanted = expected(method, base, experts, more)
    for name, value in wanted.items():
        thin = len(SHAPES[name]) == 2 and min(SHAPES[name]) < max(2, count)
        if thin and method in ("tsv_m", "resmerge", "iso_cts"):
            continue  # fewer directions than experts, or no residual: the references divide by zero
        np.testing.assert_allclose(found[name], value, rtol=3e-7, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_golden_recipes(name, tmp_path, monkeypatch):
    """1e-5 absolute for decompositions (tests/golden/README.md): the sources' are fp32, but iso_merger's."""
    monkeypatch.chdir(GOLDEN)
    found = merge_values(rlmerge.load_recipe(f"recipes/{name}.yml"))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / "expected" / f"{name}.safetensors")
    wanted = read_values(tmp_path)
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=1e-8 if name == "iso_merger" else 2e-6)


@pytest.mark.parametrize(
    ("rank", "count", "fraction", "own"),
    [(768, 3, 0.8, 51), (16, 5, 0.8, 1), (8, 3, 0.8, 1), (32, 3, 0.8, 2), (5, 2, 0.0, 2), (7, 2, 0.0, 3),
     (2, 3, 0.0, 0), (9, 2, 1.0, 0)],
)  # fmt: skip
def test_own_directions_of_iso_cts(rank, count, fraction, own):
    """Rounded as the authors round them (16, 5, 0.8: 4 directions that are not common, 1 for each of 5), and there."""
    assert own_directions(rank, count, fraction) == own


# -- what is no matrix, and what is a strange one ----------------------------------------------------------------------


def test_filters_leave_matrices_to_the_mean(tmp_path):
    base, experts = models(np.random.default_rng(1), 2)
    write_all(tmp_path, base, experts)
    flag = [{"filter": "mlp", "value": False}]
    found = merge_values(make_recipe(tmp_path, "tsv_m", ["e0", "e1"], {"matrix": flag, "embeddings": False}))
    mean = merge_values(make_recipe(tmp_path, "linear", ["e0", "e1"], {}, needed_weights("linear", ["e0", "e1"])))
    whole = merge_values(make_recipe(tmp_path, "tsv_m", ["e0", "e1"]))
    for name in base:
        kept = "mlp" in name or "embed" in name or len(SHAPES[name]) != 2
        np.testing.assert_allclose(found[name], (mean if kept else whole)[name], rtol=0, atol=3e-7)
    embeds = [
        merge_values(make_recipe(tmp_path, "resmerge", ["e0", "e1"], {"embeddings": flag}))["embed.weight"]
        for flag in (False, True)
    ]
    assert (embeds[0] != embeds[1]).any()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("method", METHODS)
def test_experts_equal_to_the_base(tmp_path, method, dtype):
    base, experts = models(np.random.default_rng(2), 3, dtype=dtype)
    write_all(tmp_path, base, dict.fromkeys(experts, base), dtype=dtype)
    assert same_values(merge_values(make_recipe(tmp_path, method, fitting(method, list(experts)))), base)


@pytest.mark.parametrize("size", [1e-5, 1e-3])
@pytest.mark.parametrize("method", METHODS)
def test_equal_experts(tmp_path, method, size):
    """K copies of an expert: no direction is invented from the noise of what cancels."""
    base, experts = models(np.random.default_rng(3), 1, size)
    name = "layers.0.square.weight"
    keys = fitting(method, ["e0", "e1", "e2"])
    write_all(tmp_path, base, dict.fromkeys(keys, experts["e0"]))
    found = merge_values(make_recipe(tmp_path, method, keys))[name].astype(np.float64) - base[name]
    delta = experts["e0"][name].astype(np.float64) - base[name]
    left, values, right = np.linalg.svd(delta)
    wanted = {
        "tsv_m": (left[:, :2] * values[:2]) @ right[:2],
        "iso_c": left @ right * 3 * values.mean(),
        # 7 - int(5.6) = 2 directions for three experts: one each, which is the same, beside four in common
        "iso_cts": left[:, :5] @ right[:5] * 3 * values[:5].sum() / 7,
        "iso_merger": None,
        "resmerge": delta - np.outer(left[:, 0], right[0]) * (values[0] - 0.2 * np.linalg.norm(values[1:])),
        "subspace_rewiring": np.outer(left[:, 0], right[0]) * values[0],
    }[method]  # fmt: skip
    if wanted is not None:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-7)
    # of the size of the updates, whatever cancels
    assert np.linalg.norm(found) <= 3.5 * np.linalg.norm(delta) + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_that_changed_nothing(tmp_path, method):
    """It has no direction: the others' result is finite and of their size."""
    base, experts = models(np.random.default_rng(4), 2)
    keys = fitting(method, ["e0", "e1", "e2"])
    write_all(tmp_path, base, {"e0": base, "e1": experts["e0"], "e2": experts["e1"]})
    found = merge_values(make_recipe(tmp_path, method, keys))
    for name, value in base.items():
        size = sum(np.linalg.norm(expert[name] - value) for expert in experts.values())
        assert np.linalg.norm(found[name] - value) <= 1.5 * size + 1e-6, name


@pytest.mark.parametrize("method", METHODS)
def test_updates_of_few_rows(tmp_path, method):
    """Rank-deficient updates, as of tokens that no text had: rows that nobody changed stay (but where frames turn)."""
    base, experts = models(np.random.default_rng(5), 2)
    for key in experts:
        for name in experts[key]:
            if len(SHAPES[name]) == 2:
                experts[key][name][2:] = base[name][2:]
    keys = fitting(method, list(experts))
    write_all(tmp_path, base, experts)
    found = merge_values(make_recipe(tmp_path, method, keys))
    for name, value in base.items():
        assert np.isfinite(found[name]).all()
        if len(SHAPES[name]) == 2 and method in ("tsv_m", "iso_c", "iso_cts", "resmerge"):
            np.testing.assert_allclose(found[name][2:], value[2:], rtol=0, atol=3e-7, err_msg=name)


ADAPTED = "model.layers.0.self_attn.q_proj.weight"


def write_adapters(folder, rng, shape, rank, shared, spread):
    """Base of zeros, full model `tuned` equal to it, adapters l0 and l1 on it; returns the exact deltas, fp64.

    shared: both have the same A, as where A is frozen. spread: the largest singular value over the least, about.
    """
    write_model(folder / "base", {ADAPTED: np.zeros(shape, np.float32)})
    frozen, deltas = rng.standard_normal((rank, shape[1])), []
    for k in range(2):
        a = (frozen if shared else rng.standard_normal((rank, shape[1]))).astype(np.float32)
        scales = spread ** -np.linspace(0.0, 1.0, rank)
        b = (rng.standard_normal((shape[0], rank)) * scales).astype(np.float32)
        prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        tensors = {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
        write_tensors(folder / f"l{k}" / "adapter_model.safetensors", tensors)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank, "base_model_name_or_path": "base"}
        (folder / f"l{k}" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
        deltas.append(3.0 * b.astype(np.float64) @ a.astype(np.float64))
    return deltas


@pytest.mark.parametrize("models", [("l0", "l1"), ("base+l0", "base+l1")])
@pytest.mark.parametrize(("shared", "spread"), [(False, 1.0), (False, 1e3), (True, 1e4)])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_adapters_have_no_more_directions_than_their_rank(tmp_path, method, shared, spread, models):
    """Rounding of B·A is no direction: raised to the mean singular value, it would be nearly all of the update."""
    deltas = write_adapters(tmp_path, np.random.default_rng(9), (24, 40), 4, shared, spread)
    found = merge_values(make_recipe(tmp_path, method, list(models)))[ADAPTED].astype(np.float64)
    left, values, right = np.linalg.svd(np.sum(deltas, axis=0), full_matrices=False)
    rank = 4 if shared else 8
    got = np.linalg.svd(found, compute_uv=False)
    assert np.count_nonzero(got > 1e-6 * got[0]) == rank
    for matrix, sides in ((found, np.hstack(deltas)), (found.T, np.vstack(deltas).T)):
        span = np.linalg.svd(sides)[0][:, : np.linalg.matrix_rank(sides, rtol=1e-9)]
        assert np.linalg.norm(matrix - span @ (span.T @ matrix)) < 1e-6 * np.linalg.norm(matrix)
    if method == "iso_c" or (method == "iso_cts" and not shared):
        # without a shared A, nothing that an expert has lies outside the directions of the sum
        wanted = left[:, :rank] @ right[:rank] * values.sum() / 24
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_small_updates_scale(tmp_path, method):
    """A thousandth of the update gives a thousandth of the merged one, as far as fp32 holds it."""
    rng, name = np.random.default_rng(6), "layers.0.mlp.up.weight"
    base = {name: rng.standard_normal((30, 20)).astype(np.float32)}
    steps, found = rng.standard_normal((3, 30, 20)), {}
    keys = fitting(method, ["e0", "e1", "e2"])
    for size in (1e-3, 1e-5):
        folder = tmp_path / str(size)
        experts = {f"e{k}": {name: (base[name] + size * step).astype(np.float32)} for k, step in enumerate(steps)}
        write_all(folder, base, experts)
        found[size] = (merge_values(make_recipe(folder, method, keys))[name].astype(np.float64) - base[name]) / size
    # frames turn far where singular values of the base nearly meet: there the first order ends early
    apart = 0.3 if method == "iso_merger" else 0.08
    np.testing.assert_allclose(found[1e-5], found[1e-3], rtol=0, atol=apart)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", METHODS)
def test_infinities_that_all_models_share(tmp_path, method, dtype):
    """`allow_nonfinite` lets them in, no delta shows them, and a base with them cannot be decomposed."""
    base, experts = models(np.random.default_rng(10), 3, dtype=dtype)
    for tensors in (base, *experts.values()):
        tensors["layers.0.mlp.up.weight"][2, 3] = np.inf
    write_all(tmp_path, base, experts, dtype=dtype)
    recipe = make_recipe(tmp_path, method, fitting(method, list(experts)), {}, allow_nonfinite=True)
    with pytest.raises(NonFiniteError):
        merge_values(recipe)
    sample = take_sample(rlmerge.planner.make_plan(recipe))["experts"]["e0"]
    assert sample["cosine_to_base"] is None
    assert sample["support"] > 0


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)])
def test_rewiring_with_a_base_of_low_rank(tmp_path, shape):
    """All the vectors of a side span it, also those that a base of rank 2 has not: only the other side is cut."""
    rng, name = np.random.default_rng(11), "layers.0.mlp.up.weight"
    left, right = rng.standard_normal((shape[0], 2)), rng.standard_normal((2, shape[1]))
    base = {name: (left @ right).astype(np.float32)}
    base[name][:, 2:] = base[name][:, :1] * rng.choice([-2, -1, 1, 2], shape[1] - 2)  # rank 2 after rounding, too
    write_all(tmp_path, base, {"e0": {name: base[name] + rng.standard_normal(shape).astype(np.float32)}})
    found = {}
    for rank in (10**6, 8, 7):
        values = {"base_rank": rank, "delta_rank_fraction": 1.0}
        found[rank] = merge_values(make_recipe(tmp_path, "subspace_rewiring", ["e0"], values))[name] - base[name]
    assert np.array_equal(found[10**6], found[8])
    delta = read_values(tmp_path / "e0")[name].astype(np.float64) - base[name]
    rows, _, columns = np.linalg.svd(base[name].astype(np.float64), full_matrices=False)
    wanted = rows[:, :2] @ rows[:, :2].T @ delta if shape[0] > 8 else delta
    wanted = wanted @ columns[:2].T @ columns[:2] if shape[1] > 8 else wanted
    np.testing.assert_allclose(found[8], wanted, rtol=0, atol=2e-6)
    assert np.linalg.matrix_rank(found[7], tol=1e-4) == 2


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_blocks_threads_and_sweeps(tmp_path, method):
    """Whole tensors are put together from any blocks; each point of a sweep is what it is alone."""
    base, experts = models(np.random.default_rng(7), 3, dtype="BF16")
    write_all(tmp_path, base, experts, dtype="BF16")
    recipe = make_recipe(tmp_path, method, fitting(method, list(experts)))
    whole = merge_values(recipe)
    with small_blocks(8, 16):
        assert same_bits(merge_values(recipe, kernels="numba"), whole)
        assert same_bits(dict(rlmerge.merge(recipe, threads=3)), whole)
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "sweep", sweep=[{"matrix": True}, {"matrix": False}])
    assert same_values(read_values(tmp_path / "sweep" / outcome.names[0]), whole)
    alone = merge_values(recipe.with_settings({"matrix": False}))
    assert same_values(read_values(tmp_path / "sweep" / outcome.names[1]), alone)


def test_memory_and_time_are_foreseen(tmp_path):
    """`check` counts decompositions and what they hold; the merge keeps within it."""
    rng = np.random.default_rng(8)
    name = "layers.0.mlp.up.weight"
    base = {name: rng.standard_normal((400, 300)).astype(np.float32)}
    experts = {f"e{k}": {name: base[name] + rng.standard_normal((400, 300)).astype(np.float32) * 0.1} for k in range(3)}
    write_all(tmp_path, base, experts)
    for method, number in {"tsv_m": 5, "iso_c": 1, "iso_cts": 6, "iso_merger": 6, "resmerge": 3}.items():
        recipe = make_recipe(tmp_path, method, list(experts))
        report = check(recipe, threads=1)
        plan = rlmerge.planner.make_plan(recipe)
        ((found, work, held),) = whole_cost(plan)
        assert (found, work) == (number, 400 * 300 * 300)
        assert report.estimate["hours"] * 3600 >= number * work * 4e-10
        tracemalloc.start()
        merge_values(recipe)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # NumPy's arrays; the blocks' buffers are counted elsewhere
        assert peak < held + 120_000 * 120, method
