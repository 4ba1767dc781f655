"""One recipe, one set of bytes: whatever the threads, kernels, hash seeds, blocks, sweeps and orders of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.methods.small_models import (
    SHAPES,
    fitting,
    make_recipe,
    needed_weights,
    read_words,
    refusal,
    small_blocks,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip

import rlmerge

METHODS = rlmerge.method_names()
SAR = {
    "default": {"density": 0.5},
    "model": {"density": 0.5, "scope": "model", "score": "merged", "agreement": "multiplicity"},
    "magprune": {"density": 0.5, "sparsify": "magprune", "rescale": "inverse_probability", "arbitration": "random"},
    "soft": {"density": 0.3, "arbitration": "soft", "power": 0.5, "agreement": "mean", "rescale": "l1"},
}
CASES = [(method, {}) for method in METHODS if method != "sar"] + [("sar", parameters) for parameters in SAR.values()]
IDS = [method for method in METHODS if method != "sar"] + [f"sar-{name}" for name in SAR]


def contents(folder: Path, but: tuple[str, ...] = ("run.log",)) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three bf16 experts with Fishers."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 3, "BF16")
    write_all(folder, base, experts, some_fishers(rng, list(experts)), "BF16")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "none", "torch_dtype": "bfloat16"}))
    return folder


def recipe_of(folder, method, parameters, order=("e0", "e1", "e2"), **top):
    keys = fitting(method, order)
    own = needed_weights(method, keys, 0.7)
    return make_recipe(folder, method, keys, parameters, own, method in ("sar", "fisher", "ota"), **top)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
def test_threads_and_kernels(models, tmp_path, method, parameters):
    recipe = recipe_of(models, method, parameters)
    with small_blocks(8, 16):
        found = [
            contents(
                rlmerge.merge_to_folder(recipe, tmp_path / f"{kernels}{threads}", threads=threads, kernels=kernels).out
            )
            for threads, kernels in ((1, "numba"), (2, "numba"), (3, "numba"), (1, "numpy"), (3, "numpy"))
        ]
    assert {"rlmerge.json", "README.md", "model.safetensors"} <= found[0].keys()
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
def test_blocks_and_units_change_no_weight(models, tmp_path, method, parameters):
    """Sums run block by block, so fp64 statistics may differ in the last bits; bf16 weights do not."""
    recipe = recipe_of(models, method, parameters)
    found = []
    for block, unit in ((2**16, 2**24), (8, 8), (8, 24), (16, 48)):
        with small_blocks(block, unit):
            found.append(weights(rlmerge.merge_to_folder(recipe, tmp_path / f"{block}-{unit}").out))
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=IDS)
def test_order_in_the_recipe(models, tmp_path, method, parameters):
    """Symmetric methods process experts in the order of their keys."""
    if not rlmerge.get_method(method).symmetric:
        pytest.skip("the order means something")
    orders = (("e0", "e1", "e2"), ("e2", "e0", "e1"), ("e1", "e2", "e0"))
    found = [
        weights(rlmerge.merge_to_folder(recipe_of(models, method, parameters, order), tmp_path / "-".join(order)).out)
        for order in orders
    ]
    assert found[0] == found[1] == found[2]


ORDERED = [*((method, {}) for method in METHODS if method != "sar"), *(
    ("sar", {"sensitivity": "delta2", "density": 1.0, "arbitration": arbitration, "agreement": agreement})
    for arbitration in ("winner", "soft", "elect", "margin", "random")
    for agreement in ("sensitivity_mean", "mean", "sum", "multiplicity")
)]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "parameters"),
    ORDERED,
    ids=lambda value: "-".join(map(str, dict(value).values())) if isinstance(value, dict) else value,
)
def test_order_where_sums_depend_on_it(tmp_path, method, parameters):
    """(1 + 1e-17) - 1 is not (1 - 1) + 1e-17: a sum in the order of the recipe would show."""
    if not rlmerge.get_method(method).symmetric:
        pytest.skip("the order means something")
    rng = np.random.default_rng(0)
    sizes = np.array([0, 1, -1, 1e-17, 3e-17, -1e-17, 0.1, 1 / 3], np.float32)
    experts = {key: {"w": rng.choice(sizes, (30, 40))} for key in ("e0", "e1", "e2", "e3")}
    write_all(tmp_path, {"w": np.zeros((30, 40), np.float32)}, experts)
    found = []
    for order in (["e0", "e1", "e2", "e3"], ["e3", "e2", "e1", "e0"], ["e1", "e3", "e0", "e2"]):
        order = fitting(method, order)
        own = needed_weights(method, order, 0.7)
        if method == "sar":
            own = {key: {"weight": 0.7} for key in order}
        found.append(dict(rlmerge.merge(make_recipe(tmp_path, method, order, parameters, own)))["w"].tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", ["ties", "sar"])
def test_the_error_state_of_numpy_is_not_the_callers(tmp_path, method):
    """One thread is the one that asks, which may have been told to raise where a subnormal number comes out."""
    base = {"w": np.full((4, 8), 1e-39, np.float32)}
    experts = {f"e{k}": {"w": base["w"] + np.float32(k + 1) * np.float32(1e-42)} for k in range(2)}
    write_all(tmp_path, base, experts, some_fishers(np.random.default_rng(0), []))
    recipe = make_recipe(
        tmp_path, method, list(experts), {"sensitivity": "delta2"} if method == "sar" else {"weight": 1.0}
    )
    found = []
    for threads in (1, 2):
        with np.errstate(all="raise"):
            found.append(dict(rlmerge.merge(recipe, threads=threads, kernels="numpy")))
    assert found[0]["w"].tobytes() == found[1]["w"].tobytes()


def test_hash_seed_of_python_and_the_command_line(models, tmp_path):
    """The command in processes with other PYTHONHASHSEEDs writes what the API writes."""
    recipe = recipe_of(models, "sar", SAR["magprune"])
    (models / "recipe.yml").write_text(recipe.to_yaml())
    expected = contents(rlmerge.merge_to_folder(models / "recipe.yml", tmp_path / "api").out)
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "rlmerge.cli.main", "merge", str(models / "recipe.yml"), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, "--quiet", "--threads", "2"], check=True, env=environment)
        assert contents(tmp_path / seed) == expected


def test_the_output_says_nothing_of_times_and_places(models, tmp_path):
    """Paths as written in the recipe: no absolute path, nor anything that differs between two folders."""
    recipe = recipe_of(models, "sar", SAR["default"])
    first = rlmerge.merge_to_folder(recipe, tmp_path / "one", threads=1)
    second = rlmerge.merge_to_folder(recipe, tmp_path / "two" / "deeper", threads=2)
    assert contents(first.out) == contents(second.out)
    for data in contents(first.out).values():
        assert str(models).encode() not in data
        assert str(tmp_path).encode() not in data


@pytest.mark.parametrize("key", ["lambda", "density", "arbitration"])
def test_sweep_equals_single_runs(models, tmp_path, key):
    values = {"lambda": [0.3, 0.5, 1.0], "density": [0.2, 0.9], "arbitration": ["winner", "elect"]}[key]
    recipe = recipe_of(models, "sar", SAR["default"])
    with small_blocks(8, 16):
        sweep = rlmerge.merge_to_folder(recipe, tmp_path / "sweep", sweep=[{key: value} for value in values])
        for value in values:
            single = rlmerge.merge_to_folder(recipe.with_settings({key: value}), tmp_path / f"single-{value}")
            assert contents(sweep.out / f"{key}={value}") == contents(single.out)
    found = [weights(sweep.out / name) for name in sweep.names]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("key", "values"),
    [("dtype", ["bfloat16", "float32"]), ("out_dtype", ["float16", "float32"]), ("min_change", [0.0, 0.2]),
     ("rounding", ["nearest", "stochastic"]), ("seed", [0, 1])],
)  # fmt: skip
def test_sweep_over_settings_equals_single_runs_or_is_refused(models, tmp_path, key, values):
    recipe = recipe_of(models, "sar", SAR["magprune"])
    sweep = tmp_path / "sweep"
    said = refusal(lambda: rlmerge.merge_to_folder(recipe, sweep, sweep=[{key: value} for value in values]))
    if said is not None:
        assert key in said
        return
    for value in values:
        single = rlmerge.merge_to_folder(recipe.with_settings({key: value}), tmp_path / f"single-{value}")
        assert weights(sweep / f"{key}={value}") == weights(single.out), (key, value)


def test_a_sweep_on_the_command_line(models, tmp_path):
    (models / "sweep.yml").write_text(recipe_of(models, "sar", {}).to_yaml())
    command = [sys.executable, "-m", "rlmerge.cli.main", "merge", str(models / "sweep.yml"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--set", "lambda=0.3,1", "--json", "--quiet"], check=True, capture_output=True, text=True
    )
    assert [entry["folder"] for entry in json.loads(done.stdout)["merges"]] == ["lambda=0.3", "lambda=1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lambda=0.3", "lambda=1"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_is_reproducible_and_depends_on_the_seed(models, tmp_path, dtype):
    # density 1 and soft shares: nothing but the rounding is random
    parameters = {"arbitration": "soft", "agreement": "mean", "density": 1.0}
    recipe = recipe_of(models, "sar", parameters, rounding="stochastic", dtype=dtype)
    found = []
    for run, (threads, kernels, block) in enumerate(((1, "numba", 2**16), (3, "numpy", 8), (2, "numba", 16))):
        with small_blocks(block):
            out = rlmerge.merge_to_folder(recipe, tmp_path / str(run), threads=threads, kernels=kernels).out
        found.append(weights(out))
    assert found[0] == found[1] == found[2]
    other = rlmerge.merge_to_folder(recipe.with_settings({"seed": 5}), tmp_path / "other").out
    nearest = rlmerge.merge_to_folder(recipe.with_settings({"rounding": "nearest"}), tmp_path / "nearest").out
    assert weights(other) != found[0] != weights(nearest)
    again = rlmerge.merge_to_folder(recipe.with_settings({"rounding": "nearest", "seed": 5}), tmp_path / "again").out
    assert weights(again) == weights(nearest)
    for name, (kind, words) in read_words(nearest).items():
        moved = np.abs(words.astype(np.int64) - read_words(tmp_path / "0")[name][1].astype(np.int64))
        assert kind in ("BF16", "F16")
        assert moved.max() <= (1 if kind == "BF16" else 2**16)
    assert set(SHAPES) == set(read_words(nearest))


def test_the_written_recipe_makes_the_same_merge(models, tmp_path):
    recipe = recipe_of(models, "sar", SAR["soft"])
    first = rlmerge.merge_to_folder(recipe, tmp_path / "first").out
    said = json.loads((first / "rlmerge.json").read_text())["recipe"]
    again = rlmerge.parse_recipe(yaml.safe_dump(said), folder=models)
    assert contents(rlmerge.merge_to_folder(again, tmp_path / "again").out) == contents(first)
