"""`model+adapter`: the stored model and the product of the adapter, added without rounding, as PEFT merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.checkpoint.test_adapter import VARIETIES, train
from tests.methods.small_models import merge_values, read_values, representable, same_bits, small_blocks

import rlmerge
from rlmerge.errors import AdapterError, MismatchError, RecipeError
from rlmerge.execute.inputs import Inputs, Space
from rlmerge.kernels import load_kernels
from rlmerge.planner import make_plan
from rlmerge.verification import verify

KERNELS = pytest.mark.parametrize("kernels", ["numba", "numpy"])
NAME, OTHER = "model.layers.0.q_proj.weight", "model.norm.weight"
SHAPE = (12, 8)


def text(method: str, models: list[str], base: str | None = "origin", **top: Any) -> str:
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": m} for m in models], **top}
    recipe |= {"base_model": base} if base else {}
    recipe.setdefault("parameters", {} if method == "passthrough" else {"weight": 1.0})
    return json.dumps(recipe)


def recipe_in(folder: Path, *arguments: Any, **top: Any) -> rlmerge.Recipe:
    return rlmerge.parse_recipe(text(*arguments, **top), folder=folder)


def write_lora(folder: Path, seed: int = 1, size: float = 1.0, dtype: str = "F32", name: str = NAME) -> np.ndarray:
    """An adapter of rank 2 and scale 3/2 of one matrix; returns scale·B·A in fp64."""
    rng = np.random.default_rng(seed)
    a = representable(rng.standard_normal((2, SHAPE[1])), dtype)
    b = representable(size * rng.standard_normal((SHAPE[0], 2)), dtype)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    pair = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    write_tensors(folder / "adapter_model.safetensors", pair, dtype)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return 1.5 * (b.astype(np.float64) @ a.astype(np.float64))


def write_set(folder: Path, kinds: tuple[str, str] = ("BF16", "BF16")) -> dict[str, np.ndarray]:
    """'origin' and 'stage', trained from it, in dtypes of their own; values of both."""
    rng = np.random.default_rng(0)
    value = representable(rng.standard_normal(SHAPE), "BF16")
    moved = representable(representable(value * (1 + 2.0**-6 * rng.integers(-1, 2, SHAPE)), "BF16"), kinds[1])
    norm = np.ones(SHAPE[1], np.float32)
    write_model(folder / "origin", {NAME: value, OTHER: norm}, dtype=kinds[0])
    write_model(folder / "stage", {NAME: moved, OTHER: norm * 2}, dtype=kinds[1])
    return {"origin": value, "stage": moved}


@pytest.mark.parametrize("variety", VARIETIES)
def test_what_peft_merges(tmp_path, variety):
    """Alone, the merge is what PEFT's own merge gives: as an average without a base, and as a delta to another base."""
    make, config = VARIETIES[variety]
    stage, _, state = train(tmp_path, make(), **config)
    rng = np.random.default_rng(2)
    moved = {
        n: v + 0.01 * rng.standard_normal(v.shape).astype(np.float32) for n, v in read_values(stage.folder).items()
    }
    write_model(tmp_path / "origin", moved, stage.config)
    for recipe in (
        recipe_in(tmp_path, "linear", ["base+lora"], None),
        recipe_in(tmp_path, "task_arithmetic", ["base+lora"]),
        recipe_in(tmp_path, "passthrough", ["base+lora"], None),
    ):
        for name, array in merge_values(recipe).items():
            # PEFT multiplies and adds in fp32: a few ulp of values of order 10
            expected = state[name].double().numpy()
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=4e-6, err_msg=f"{name} {recipe.merge_method}")


@KERNELS
@pytest.mark.parametrize("kinds", [("BF16", "BF16"), ("F32", "F32"), ("F32", "BF16"), ("F16", "F32"), ("BF16", "F16")])
def test_deltas_keep_what_a_sum_would_round_away(tmp_path, kernels, kinds):
    """Updates of 1e-9 on weights of order 1, where fp32 ends at 1e-7: δ = (A − base) + scale·B·A to 2⁻²⁴ of either."""
    values = write_set(tmp_path, kinds)
    update = write_lora(tmp_path / "tiny", size=1e-9)
    with small_blocks(32):
        plan = make_plan(recipe_in(tmp_path, "task_arithmetic", ["stage+tiny"], out_dtype="float32"))
    place = next(t for t, tensor in enumerate(plan.tensors) if tensor.name == NAME)
    inputs, found = Inputs(plan, load_kernels(kernels)), np.zeros(values["stage"].size)
    try:
        for start in range(0, found.size, 32):
            for patch in inputs.block(place, start, start + 32, Space()).patches:
                found[start + patch.where] = patch.delta[0]
    finally:
        inputs.close()
    old = values["origin"]
    if kinds == ("BF16", "F16"):
        old = old.astype(np.float16)
    step = values["stage"].astype(np.float64) - old.astype(np.float64)
    bound = 2.0**-23 * (np.abs(step) + np.abs(update))
    assert (np.abs(found.reshape(SHAPE) - (step + update)) <= bound).all()
    assert (found != 0).all()


@KERNELS
def test_on_the_base_itself_it_is_the_adapter_alone(tmp_path, kernels):
    write_set(tmp_path)
    write_lora(tmp_path / "lora")
    alone = merge_values(
        recipe_in(tmp_path, "ties", ["lora"], parameters={"weight": 1, "density": 0.5}), kernels=kernels
    )
    both = recipe_in(tmp_path, "ties", ["origin+lora"], parameters={"weight": 1, "density": 0.5})
    assert same_bits(merge_values(both, kernels=kernels), alone)


@KERNELS
def test_two_of_them_and_a_full_model(tmp_path, kernels):
    """Mixed with other kinds of experts, in blocks smaller than a row; bytes of both files are in the provenance."""
    values = write_set(tmp_path)
    first, second = write_lora(tmp_path / "l1", 1, 0.1), write_lora(tmp_path / "l2", 2, 0.1, "BF16")
    models = ["stage+l1", "origin+l2", "stage"]
    recipe = recipe_in(tmp_path, "task_arithmetic", models, out_dtype="float32", parameters={"weight": 0.5})
    with small_blocks(8):
        outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)
    step = values["stage"].astype(np.float64) - values["origin"]
    expected = values["origin"] + 0.5 * (2 * step + first + second)
    # products of order 0.1 are rounded to fp32 before they are added
    np.testing.assert_allclose(read_values(tmp_path / "out")[NAME], expected, rtol=2.0**-23, atol=2.0**-26)
    assert verify(tmp_path / "out")
    assert outcome.report["total"]["support"]["stage+l1"]["count"] >= values["stage"].size
    said = json.loads((tmp_path / "out" / "rlmerge.json").read_text())
    role = next(entry for entry in said["inputs"] if entry["role"] == "stage+l1")
    assert [entry["file"] for entry in role["files"]] == ["model.safetensors", "adapter_model.safetensors"]
    digest = role["xxh3"]
    write_lora(tmp_path / "l1", 3, 0.1)  # the same header, other numbers
    rlmerge.merge_to_folder(recipe, tmp_path / "out2", kernels=kernels)
    said = json.loads((tmp_path / "out2" / "rlmerge.json").read_text())
    assert next(entry for entry in said["inputs"] if entry["role"] == "stage+l1")["xxh3"] != digest


def test_min_change_looks_at_the_whole_step(tmp_path):
    """A tiny step back of the adapter on a large one of the model is no change; its own size does not matter."""
    values = write_set(tmp_path, ("F32", "F32"))
    update = write_lora(tmp_path / "lora", size=0.01)
    changed = np.abs(values["stage"].astype(np.float64) - values["origin"] + update)
    size = np.maximum(np.abs(values["stage"] + update), np.abs(values["origin"]))
    recipe = recipe_in(tmp_path, "task_arithmetic", ["stage+lora"], min_change=0.02)
    merged = merge_values(recipe)[NAME]
    assert ((merged != values["origin"]) == (changed > 0.02 * size)).all()


def test_names_on_disk_win(tmp_path):
    write_set(tmp_path)
    write_lora(tmp_path / "lora")
    (tmp_path / "stage").rename(tmp_path / "stage+lora@v1")
    found = recipe_in(tmp_path, "task_arithmetic", ["stage+lora@v1"])
    assert list(found.model_paths.values()) == [tmp_path / "stage+lora@v1"]
    assert list(found.adapter_paths.values()) == [None]
    (tmp_path / "a+b").mkdir()
    found = recipe_in(tmp_path, "task_arithmetic", ["a+b+lora"])
    assert list(found.model_paths.values()) == [tmp_path / "a+b"]
    assert list(found.adapter_paths.values()) == [tmp_path / "lora"]


def test_what_cannot_be_one(tmp_path):
    write_set(tmp_path)
    write_lora(tmp_path / "lora")
    write_lora(tmp_path / "foreign", name="model.layers.7.q_proj.weight")
    for model, error, part in [
        ("lora+lora", MismatchError, "itself an adapter"),
        ("stage+foreign", AdapterError, r"layers\.7\.q_proj"),
        ("stage+origin", AdapterError, "must be a LoRA adapter"),
    ]:
        with pytest.raises(error, match=part):
            make_plan(recipe_in(tmp_path, "task_arithmetic", [model]))
    with pytest.raises(RecipeError, match="passthrough"):
        next(rlmerge.merge(recipe_in(tmp_path, "task_arithmetic", ["stage"], "origin+lora")))


@pytest.mark.parametrize("variety", VARIETIES)
def test_as_a_base_it_is_what_peft_stores(tmp_path, variety):
    """Made first, as a stage in the dtype of its model; the deltas of the others start there, PEFT's merge included."""
    make, config = VARIETIES[variety]
    _, _, state = train(tmp_path, make(), **config)
    rng = np.random.default_rng(2)
    expected = {name: value.double().numpy() for name, value in state.items()}
    step = {name: 0.01 * rng.standard_normal(value.shape).astype(np.float32) for name, value in expected.items()}
    names = read_values(tmp_path / "base")
    write_model(tmp_path / "tuned", {name: (expected[name] + step[name]).astype(np.float32) for name in names})
    recipe = recipe_in(tmp_path, "task_arithmetic", ["tuned"], "base+lora", parameters={"weight": 0.5})
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out")
    assert [str(stage.out) for stage in outcome.stages.values()] == [str(tmp_path / "out.stages/base-with-lora")]
    assert verify(tmp_path / "out")
    for name, array in read_values(tmp_path / "out").items():
        np.testing.assert_allclose(array, expected[name] + 0.5 * step[name], rtol=1e-6, atol=6e-6, err_msg=name)
    said = json.loads((tmp_path / "out" / "rlmerge.json").read_text())
    assert [stage["recipe"]["models"] for stage in said["stages"].values()] == [[{"model": "base+lora"}]]
    # by the command line, and from a recipe file
    found = rlmerge.check(recipe, out=tmp_path / "new")
    assert list(found.stages) == ["base-with-lora"]


def test_on_a_stage_and_on_the_base_that_is_one(tmp_path):
    """An adapter on a stage: exact as on any model, alone where the stage is the base."""
    write_set(tmp_path, ("F32", "F32"))
    update = write_lora(tmp_path / "lora", size=0.1)
    first = text("task_arithmetic", ["stage"], parameters={"weight": 0.5})[1:-1]
    for base, models in (("origin", ["made+lora"]), ("made", ["made+lora"]), ("made+lora", [])):
        last = text("task_arithmetic", [*models, "origin"], base)
        (tmp_path / "r.yml").write_text(f'{{"name": "made", {first}}}\n---\n{last}')
        rlmerge.merge_to_folder(tmp_path / "r.yml", tmp_path / "out", overwrite=True)
        values = {name: read_values(tmp_path / name)[NAME].astype(np.float64) for name in ("origin", "stage", "out")}
        made = (values["origin"] + values["stage"]) / 2
        at = {"origin": values["origin"], "made": made, "made+lora": made + update}
        expected = at[base] + sum(at["made+lora"] - at[base] for _ in models) + (values["origin"] - at[base])
        np.testing.assert_allclose(values["out"], expected, rtol=2.0**-21, atol=2.0**-23, err_msg=base)


def test_in_slices_layers_keep_their_own_update(tmp_path):
    """Two layers of a model with an adapter on the second, stacked the other way round and once more."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{number}.q_proj.weight" for number in (0, 1)]
    value = {name: representable(rng.standard_normal(SHAPE), "BF16") for name in names}
    write_model(tmp_path / "stage", {**value, OTHER: np.ones(8)}, {"num_hidden_layers": 2}, dtype="F32")
    update = write_lora(tmp_path / "lora", name=names[1])
    layers = [(1, 2), (0, 1), (1, 2)]
    slices = [{"sources": [{"model": "stage+lora", "layer_range": list(span)}]} for span in layers]
    recipe = json.dumps({"merge_method": "passthrough", "slices": slices})
    merged = merge_values(rlmerge.parse_recipe(recipe, folder=tmp_path))
    last = value[names[1]] + update
    for number, expected in enumerate([last, value[names[0]], last]):
        np.testing.assert_allclose(merged[f"model.layers.{number}.q_proj.weight"], expected, rtol=2.0**-23, atol=1e-7)


def test_a_tied_matrix_gets_the_update_in_both_copies(tmp_path):
    """A base and a model that store head and embedding, equal; an update of one copy alone would untie them."""
    rng = np.random.default_rng(0)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for folder in ("origin", "stage"):
        value = representable(rng.standard_normal(SHAPE), "BF16")
        write_model(tmp_path / folder, dict.fromkeys(names, value), {"tie_word_embeddings": True}, dtype="BF16")
    write_lora(tmp_path / "lora", name="lm_head.weight")
    recipe = recipe_in(tmp_path, "task_arithmetic", ["stage+lora"])
    merged = merge_values(recipe)
    assert same_bits({"": merged[names[0]]}, {"": merged[names[1]]})
    assert any("ties embedding and head" in note for note in rlmerge.check(recipe).notes)
    (tmp_path / "stage" / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(MismatchError, match="ties the two"):
        make_plan(recipe)


def test_alone_and_without_a_base_its_message_offers_both_ways(tmp_path):
    """In the first place, too, where the model lends names and files."""
    write_set(tmp_path)
    write_lora(tmp_path / "lora")
    for models in (["lora", "stage"], ["stage", "lora"]):
        with pytest.raises(
            RecipeError, match=r"lora: a LoRA adapter is an update.*`base_model:`, or .*'MODEL\+ADAPTER'"
        ):
            make_plan(recipe_in(tmp_path, "linear", models, base=None))
    with pytest.raises(MismatchError, match="lora: a LoRA adapter cannot be the base"):
        make_plan(recipe_in(tmp_path, "ties", ["stage"], base="lora"))
