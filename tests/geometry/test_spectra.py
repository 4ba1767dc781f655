"""Spectra of model folders: against NumPy's own SVD, as means, in any number of threads, and where undefined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.geometry.planted import bf16, planted
from tests.methods.small_models import small_blocks

from rlmerge.errors import RecipeError
from rlmerge.execute.inputs import Inputs
from rlmerge.geometry.document import geometry_schema
from rlmerge.geometry.matrices import Matrix, MatrixReader, matrices_of
from rlmerge.geometry.matrix_figures import SpectraSettings
from rlmerge.geometry.spectra import mean_of, measure_spectra, spectra_cost
from rlmerge.kernels import plain
from rlmerge.packs.write import pack
from rlmerge.plan import Plan
from rlmerge.planner import make_plan
from rlmerge.recipe_flags import recipe_from_parts

Q, UP, EMBED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.experts.up_proj",
    "model.embed_tokens.weight",
)
SHAPES = {
    EMBED: (96, 32),
    Q: (40, 32),
    "model.layers.1.self_attn.q_proj.weight": (40, 32),
    UP: (3, 24, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.gate.weight": (1, 32),
}
SETTINGS = SpectraSettings(energies=(1, 4, 64), angles=6, principal_rank=4)


def plan_of(folder: Path, *experts: str) -> Plan:
    return make_plan(recipe_from_parts("base", experts, "task_arithmetic", {"weight": 1.0}, folder=folder))


def make_base(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: bf16(0.02 * rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def train(base: dict[str, np.ndarray], seed: int, scale: float = 2e-4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: bf16(array + scale * rng.standard_normal(array.shape)) for name, array in base.items()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = make_base()
    write_model(tmp_path / "base", base, dtype="BF16")
    write_model(tmp_path / "a", train(base, 1), dtype="BF16")
    write_model(tmp_path / "b", train(base, 2, 1e-3), dtype="BF16")
    return tmp_path


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["tensors"] if one["name"] == name)


def test_figures_are_those_of_numpys_svd(models: Path) -> None:
    found = measure_spectra(plan_of(models, "a", "b"), SETTINGS, threads=1)
    base = make_base()
    old = base[Q].astype(np.float64)
    delta = train(base, 1)[Q].astype(np.float64) - old
    u0, s0, v0 = np.linalg.svd(old, full_matrices=False)
    u1, s1, v1 = np.linalg.svd(old + delta, full_matrices=False)
    ud, sd, vd = np.linalg.svd(delta, full_matrices=False)
    scope = entry(found, Q)
    assert (scope["layer"], scope["kind"], scope["shape"]) == (0, "self_attn.q_proj.weight", [40, 32])
    one = scope["experts"]["a"]
    assert one["delta"]["norm"] == pytest.approx(np.linalg.norm(delta))
    assert one["delta"]["stable_rank"] == pytest.approx(np.sum(sd**2) / sd[0] ** 2)
    assert one["delta"]["energy"] == pytest.approx(
        {"1": sd[0] ** 2 / np.sum(sd**2), "4": np.sum(sd[:4] ** 2) / np.sum(sd**2)}
    )
    assert one["shift"]["nss"] == pytest.approx(np.linalg.norm(s1 - s0) / np.linalg.norm(s0), rel=1e-9)
    assert one["shift"]["residual"] == pytest.approx(np.linalg.norm(s1 - s0) / np.linalg.norm(delta), rel=1e-9)
    cosines = np.linalg.svd(u0[:, :6].T @ u1[:, :6], compute_uv=False)
    assert one["angles"]["left_max"] == pytest.approx(np.degrees(np.arccos(cosines[-1])), rel=1e-6)
    cosines = np.linalg.svd(v0[:6] @ v1[:6].T, compute_uv=False)
    assert one["angles"]["right_mean"] == pytest.approx(
        np.degrees(np.arccos(np.minimum(cosines, 1.0)).mean()), rel=1e-4
    )
    principal = np.abs((u0[:, :4] * s0[:4]) @ v0[:4])
    chosen = principal >= np.sort(principal, axis=None)[-int(0.5 * principal.size)]
    assert one["masks"]["principal"]["0.5"] == pytest.approx(np.mean(chosen[delta != 0.0]))
    assert one["masks"]["density"] == np.mean(delta != 0.0)
    # pairs
    other = train(base, 2, 1e-3)[Q].astype(np.float64) - old
    ue, _, ve = np.linalg.svd(other, full_matrices=False)
    pair = scope["pairs"][0]
    assert (pair["a"], pair["b"]) == ("a", "b")
    assert pair["similarity"]["4"]["left"] == pytest.approx(np.sum((ud[:, :4].T @ ue[:, :4]) ** 2) / 4)
    assert pair["similarity"]["4"]["right"] == pytest.approx(np.sum((vd[:4] @ ve[:4].T) ** 2) / 4)


def test_structureless_updates_equal_their_null(models: Path) -> None:
    found = measure_spectra(plan_of(models, "b"), SpectraSettings(null="all", angles=8), threads=2)
    total = found["total"]
    one, null = total["experts"]["b"], total["null"]["experts"]["b"]
    assert null["masks"]["density"] == pytest.approx(one["masks"]["density"], abs=0.01)
    for kind in ("low", "principal"):
        # the error of a matrix; the mean is over six of them
        assert abs(one["masks"][kind]["0.5"] - null["masks"][kind]["0.5"]) < 2 * one["masks"][f"{kind}_error"]["0.5"]
    assert null["shift"]["nss"] == pytest.approx(one["shift"]["nss"], rel=0.3)
    assert null["angles"]["left_mean"] == pytest.approx(one["angles"]["left_mean"], rel=0.5)
    # what noise does by arithmetic: 1/√max(m, n) of an update shows in the spectrum
    assert one["shift"]["residual"] == pytest.approx(one["shift"]["residual_of_noise"], rel=0.3)


def test_scopes_are_means_over_matrices(models: Path) -> None:
    found = measure_spectra(plan_of(models, "a", "b"), SETTINGS, threads=1)
    assert found["total"]["matrices"] == 6  # the stack of three counts three
    assert [scope["layer"] for scope in found["layers"]] == [None, 0, 1]
    assert [scope["kind"] for scope in found["kinds"]] == [
        "embed_tokens.weight",
        "mlp.experts.up_proj",
        "self_attn.q_proj.weight",
    ]
    assert entry(found, UP)["matrices"] == 3
    nss = {one["name"]: one["experts"]["b"]["shift"]["nss"] for one in found["tensors"]}
    weights = {name: 3 if name == UP else 1 for name in nss}
    assert found["total"]["experts"]["b"]["shift"]["nss"] == pytest.approx(sum(nss[n] * weights[n] for n in nss) / 6)
    assert found["layers"][0]["experts"]["b"]["shift"]["nss"] == nss[EMBED]
    assert {reason: len(names) for reason, names in found["left_out"].items()} == {
        "neither a matrix nor a stack of matrices": 1, "a vector: one row or column": 1
    }  # fmt: skip
    assert found["warnings"] == []
    # 64 directions: no matrix here has them
    assert set(found["total"]["experts"]["a"]["delta"]["energy"]) == {"1", "4"}


def test_a_mean_leaves_out_what_is_undefined() -> None:
    assert mean_of([{"a": {"x": 1.0}}, {"a": {"x": None}}, {"a": {"x": 4.0, "y": 2.0}}]) == {"a": {"x": 2.5, "y": 2.0}}
    assert mean_of([{"x": None}]) == {"x": None}


def test_the_same_numbers_in_any_threads_and_blocks(models: Path) -> None:
    whole = measure_spectra(plan_of(models, "a", "b"), SETTINGS, threads=1, kernels="numpy")
    text = json.dumps(whole, allow_nan=False)
    with small_blocks(100):  # blocks end inside rows and matrices
        assert json.dumps(measure_spectra(plan_of(models, "a", "b"), SETTINGS, threads=4, kernels="numba")) == text
    pack(models / "b", models / "base", models / "packed")
    steps = measure_spectra(plan_of(models, "a", "packed"), SETTINGS, threads=2)
    assert steps["total"]["experts"]["packed"]["shift"] == whole["total"]["experts"]["b"]["shift"]


def test_experts_that_did_nothing_or_the_same(models: Path) -> None:
    base = make_base()
    write_model(models / "same", base, dtype="BF16")
    write_model(models / "twin", train(base, 1), dtype="BF16")
    found = measure_spectra(plan_of(models, "a", "same", "twin"), SETTINGS, threads=2)
    json.dumps(found, allow_nan=False)
    nothing = found["total"]["experts"]["same"]
    assert nothing["changed"] == 0
    assert (nothing["shift"]["nss"], nothing["shift"]["residual"]) == (0.0, None)
    assert (nothing["angles"]["left_max"], nothing["angles"]["right_mean"]) == (0.0, 0.0)
    assert (nothing["delta"]["stable_rank"], nothing["delta"]["energy"]["1"], nothing["masks"]["low"]["0.3"]) == (
        None,
    ) * 3
    pairs = {(pair["a"], pair["b"]): pair["similarity"]["4"] for pair in found["total"]["pairs"]}
    assert pairs["a", "twin"]["left"] == pytest.approx(1.0)
    assert pairs["a", "same"]["left"] is None


def test_a_lora_has_its_rank_and_is_not_rounded(models: Path) -> None:
    rng = np.random.default_rng(3)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    write_tensors(
        models / "lora" / "adapter_model.safetensors",
        {
            f"{key}.lora_A.weight": 1e-4 * rng.standard_normal((2, 32)),
            f"{key}.lora_B.weight": rng.standard_normal((40, 2)),
        },
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (models / "lora" / "adapter_config.json").write_text(json.dumps(config))
    found = measure_spectra(plan_of(models, "lora"), SETTINGS, threads=1)
    one = entry(found, Q)["experts"]["lora"]
    # fp32 of B·A: the rank is 2 but for rounding, which does not count as energy
    assert one["delta"]["effective_rank"] < 2.01
    assert 1.0 - one["delta"]["energy"]["4"] < 1e-12
    assert one["masks"]["density"] > 0.99
    assert found["total"]["experts"]["lora"]["changed"] == 1


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    base, config = make_base(), {"tie_word_embeddings": True}
    for name, tensors in (("base", base), ("a", train(base, 1))):
        write_model(tmp_path / name, tensors | {"lm_head.weight": tensors[EMBED]}, config, dtype="BF16")
    found = measure_spectra(plan_of(tmp_path, "a"), SETTINGS, threads=1)
    assert found["total"]["matrices"] == 6
    assert found["left_out"]["tied to another tensor, which is measured"] == ["lm_head.weight"]


def test_mixed_dtypes_are_compared_as_stored(models: Path) -> None:
    """A base in fp32 against an expert in bf16: what rounding alone did is no update."""
    rng = np.random.default_rng(5)
    base = {Q: (0.02 * rng.standard_normal((40, 32))).astype(np.float32)}
    write_model(models / "wide", base, dtype="F32")
    write_model(models / "narrow", {Q: bf16(base[Q])}, dtype="BF16")
    recipe = recipe_from_parts("wide", ["narrow"], "task_arithmetic", {"weight": 1.0}, folder=models)
    plan = make_plan(recipe)
    found = measure_spectra(plan, SETTINGS, threads=1)
    assert found["total"]["experts"]["narrow"]["changed"] == 0
    # nor does the null take rounding for an update
    write_model(models / "trained", {Q: train({Q: bf16(base[Q])}, 1)[Q]}, dtype="BF16")
    recipe = recipe_from_parts("wide", ["trained"], "task_arithmetic", {"weight": 1.0}, folder=models)
    total = measure_spectra(make_plan(recipe), SETTINGS, threads=1)["total"]
    density = total["experts"]["trained"]["masks"]["density"]
    assert 0.5 < density < 0.95
    assert total["null"]["experts"]["trained"]["masks"]["density"] == pytest.approx(density, abs=0.03)
    inputs = Inputs(plan, plain)
    try:
        assert np.array_equal(MatrixReader(inputs).base(matrices_of(plan)[0][0], "BF16"), bf16(base[Q]))
    finally:
        inputs.close()


def test_a_sketch_agrees_with_the_exact_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, _, _ = planted(160, 120, np.concatenate([np.geomspace(1.0, 0.2, 12), np.full(108, 0.02)]))
    delta = 1e-3 * (planted(160, 120, np.geomspace(1.0, 0.1, 8), 5)[0] + 0.002 * rng.standard_normal((160, 120)))
    write_model(tmp_path / "base", {Q: base.astype(np.float32)})
    write_model(tmp_path / "a", {Q: (base.astype(np.float32) + delta).astype(np.float32)})
    common = {"energies": (1, 8), "angles": 12, "principal_rank": 12}
    exact = measure_spectra(plan_of(tmp_path, "a"), SpectraSettings(exact=True, limit=0.0, **common), 1)
    sketch = measure_spectra(plan_of(tmp_path, "a"), SpectraSettings(limit=0.0, **common), 1)
    assert (entry(exact, Q)["by"], entry(sketch, Q)["by"]) == ("exact", "sketch")
    one, other = (found["total"]["experts"]["a"] for found in (exact, sketch))
    for k in ("1", "8"):
        assert one["delta"]["energy"][k] - other["delta"]["energy"][k] + 1e-12 >= 0.0
        assert one["delta"]["energy"][k] - other["delta"]["energy"][k] <= other["delta"]["energy_error"][k]
    assert other["shift"]["nss"] is None
    assert other["shift"]["nss_leading"] <= one["shift"]["nss"] + other["shift"]["error"]
    assert abs(one["angles"]["left_max"] - other["angles"]["left_max"]) <= other["angles"]["error"] < 10.0
    assert one["masks"]["principal"]["0.3"] == pytest.approx(other["masks"]["principal"]["0.3"], abs=1e-3)


def test_a_dequantised_base_is_named(tmp_path: Path) -> None:
    blocks = make_base()[EMBED].reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 7
    base = {Q: bf16(np.round(blocks / step) * step), EMBED: make_base()[EMBED]}
    write_model(tmp_path / "base", base, dtype="BF16")
    write_model(tmp_path / "a", train(base, 1), dtype="BF16")
    found = measure_spectra(plan_of(tmp_path, "a"), SETTINGS, threads=1)
    assert "in 1 of 2 matrices" in found["warnings"][0]
    assert (entry(found, Q)["base"]["lattice"], entry(found, EMBED)["base"]["lattice"]) == (1.0, 0.0)


def test_small_matrices_have_fewer_directions() -> None:
    settings, small, large = SpectraSettings(), Matrix(0, 0, 300, 80), Matrix(0, 0, 4096, 11008)
    assert (settings.angles_of(small), settings.rank_of(small)) == (40, 20)
    assert (settings.energies_of(small), settings.common_of(small)) == ((1, 8, 64), (1, 8))
    assert (settings.angles_of(large), settings.rank_of(large)) == (512, 64)
    assert settings.common_of(large) == (1, 8, 64, 256)
    assert not settings.sketched(large)
    assert settings.sketched(Matrix(0, 0, 8192, 8192))
    assert not SpectraSettings(exact=True).sketched(Matrix(0, 0, 8192, 8192))


def test_it_says_first_how_long_it_takes(models: Path) -> None:
    steps = []
    measure_spectra(plan_of(models, "a", "b"), SETTINGS, threads=2, progress=steps.append)
    assert steps[0].message.startswith("spectra: 6 matrices 30 decompositions on 2 threads: about ")
    assert [step.done for step in steps] == list(range(7))
    assert steps[-1].share == pytest.approx(1.0)
    assert spectra_cost(plan_of(models, "a"), SpectraSettings(null="all")).decompositions == 24


def test_mistakes(models: Path) -> None:
    with pytest.raises(RecipeError, match=r"embed_tokens.weight' needs: its 96x32 values take"):
        measure_spectra(plan_of(models, "a"), SpectraSettings(memory=1000))
    with pytest.raises(RecipeError, match="choose none, masks or all"):
        SpectraSettings(null="some")
    with pytest.raises(RecipeError, match="from 1 on"):
        SpectraSettings(energies=(0,))
    with pytest.raises(RecipeError, match="between 0 and 1"):
        SpectraSettings(shares=(1.0,))
    recipe = recipe_from_parts(None, ["a", "b"], "linear", {"weight": 1.0}, folder=models)
    with pytest.raises(RecipeError, match="there is no base"):
        measure_spectra(make_plan(recipe))


def test_a_matrix_of_a_stack_is_read_whole(models: Path) -> None:
    base, other = make_base(), train(make_base(), 1)
    with small_blocks(100):
        plan = plan_of(models, "a")
    matrices, _ = matrices_of(plan)
    inputs = Inputs(plan, plain)
    try:
        reader = MatrixReader(inputs)
        second = [matrix for matrix in matrices if plan.tensors[matrix.tensor].name == UP][1]
        assert np.array_equal(reader.base(second), base[UP][1])
        assert np.array_equal(reader.delta(second, 0), other[UP][1].astype(np.float64) - base[UP][1])
        assert np.array_equal(reader.base(second, "F16"), base[UP][1].astype(np.float16).astype(np.float32))
    finally:
        inputs.close()


@pytest.mark.parametrize("null", ["none", "masks", "all"])
def test_the_section_keeps_to_the_schema(models, null):
    """Of a stack, of a sketch, of an expert that changed nothing; and of no matrix at all."""
    schema = geometry_schema()
    validator = jsonschema.Draft202012Validator({**schema["$defs"]["Spectra"], "$defs": schema["$defs"]})
    settings = SpectraSettings(energies=(1, 4, 64), angles=6, principal_rank=4, null=null, limit=30_000.0)
    found = measure_spectra(plan_of(models, "a", "base"), settings)
    validator.validate(json.loads(json.dumps(found, allow_nan=False)))
    assert {tensor["by"] for tensor in found["tensors"]} == {"exact", "sketch"}
    assert ("shift" in found["total"]["null"]["experts"].get("a", {})) == (null == "all")
    del found["total"]["experts"]["a"]["shift"]["nss"]
    assert not validator.is_valid(found)


def test_without_matrices_there_is_an_empty_section(tmp_path):
    for name in ("base", "a"):
        write_model(tmp_path / name, {"model.norm.weight": np.ones(8, np.float32)}, dtype="BF16")
    schema = geometry_schema()
    found = measure_spectra(plan_of(tmp_path, "a"), SETTINGS)
    jsonschema.Draft202012Validator({**schema["$defs"]["Spectra"], "$defs": schema["$defs"]}).validate(found)
    assert found["total"]["matrices"] == 0
