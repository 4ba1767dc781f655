"""Coordinate-wise measures against plain loops; the same bits for any threads and kernels; whatever stores it."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.geometry.geometry_models import NAMES, Tensors, document, make_base, nearest, train, write
from tests.methods.small_models import read_values
from tests.reference import geometry as plain

import rlmerge
from rlmerge.errors import NonFiniteError, RecipeError
from rlmerge.geometry import coordinates
from rlmerge.geometry.coordinates import CoordinateSettings, measure_coordinates
from rlmerge.geometry.document import geometry_schema
from rlmerge.geometry.scopes import place_of
from rlmerge.planner import make_plan
from rlmerge.recipe_flags import recipe_from_parts

ROOT = Path(__file__).resolve().parent.parent.parent
CLOSE = {"rel": 1e-12, "abs": 1e-15}
"""Both are fp64 sums of the same numbers in another order."""


def three(folder: Path) -> tuple[list[Path], Tensors, dict[str, Tensors]]:
    """A base and three experts in bf16; two of them share part of their noise."""
    base = make_base()
    experts = {key: train(base, seed) for seed, key in enumerate(("b", "a", "c"), 1)}
    for name in NAMES[:3]:
        experts["c"][name][::2] = experts["a"][name][::2]
    return write(folder, base, experts), base, experts


def wide(tensors: Tensors, names: Any = NAMES) -> list[np.ndarray]:
    return [tensors[name].astype(np.float64) for name in names]


def check_scope(scope: Any, base: Tensors, experts: dict[str, Tensors], names: list[str]) -> None:
    for key, tensors in experts.items():
        found, wanted = scope["experts"][key], plain.of_expert(wide(base, names), wide(tensors, names))
        sweep = {
            kind: {one["above"]: one["share"] for one in found["sweep"][kind]} for kind in ("absolute", "relative")
        }
        flat = found | {"above_1e-5": sweep["absolute"][1e-5], "above_relative_1e-3": sweep["relative"][1e-3]}
        for name, value in wanted.items():
            assert flat[name] == pytest.approx(value, **CLOSE), (key, name)
    keys = plain.pairs_of(list(experts))
    assert [(pair["a"], pair["b"]) for pair in scope["pairs"]] == keys
    for pair, (a, b) in zip(scope["pairs"], keys):
        for name, value in plain.of_pair(wide(base, names), wide(experts[a], names), wide(experts[b], names)).items():
            assert pair[name] == (None if value is None else pytest.approx(value, **CLOSE)), (a, b, name)
    wanted = plain.of_regions(wide(base, names), {key: wide(experts[key], names) for key in sorted(experts)})
    for name, value in wanted.items():
        assert scope["regions"][name] == pytest.approx(value, **CLOSE), name


def test_every_measure_in_every_scope(tmp_path):
    folders, base, experts = three(tmp_path)
    found = document(folders)["coordinates"]
    check_scope(found["total"], base, experts, list(NAMES))
    assert [scope["layer"] for scope in found["layers"]] == [None, 0, 1]
    for scope in found["layers"]:
        check_scope(scope, base, experts, [name for name in NAMES if place_of(name)[0] == scope["layer"]])
    assert [scope["kind"] for scope in found["kinds"]] == [
        "embed_tokens.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight"
    ]  # fmt: skip
    for scope in found["kinds"]:
        check_scope(scope, base, experts, [name for name in NAMES if place_of(name)[1] == scope["kind"]])
    for scope in found["tensors"]:
        check_scope(scope, base, experts, [scope["name"]])
    for key in experts:
        assert math.fsum(scope["experts"][key]["energy_share"] for scope in found["layers"]) == pytest.approx(1.0)


def test_identities(tmp_path):
    """cosine = overlap cosine · √(energies); regions make one; sweeps fall; steps make one."""
    folders, _, _ = three(tmp_path)
    found = document(folders)["coordinates"]
    for scope in [found["total"], *found["layers"], *found["tensors"]]:
        for pair in scope["pairs"]:
            if pair["overlap_cosine"] is not None:
                made = pair["overlap_cosine"] * math.sqrt(pair["energy_a"] * pair["energy_b"])
                assert pair["cosine"] == pytest.approx(made, abs=1e-12)
        regions = scope["regions"]
        shares = [regions["inactive"], *regions["unique"].values(), regions["agreement"], regions["conflict"]]
        assert math.fsum(shares) == pytest.approx(1.0)
        assert math.fsum(regions["changers"]) == pytest.approx(1.0)
        for expert in scope["experts"].values():
            for sweep in expert["sweep"].values():
                falling = [one["share"] for one in sweep]
                assert falling == sorted(falling, reverse=True)
            assert math.fsum(expert["steps"]["share"]) == pytest.approx(1.0)


def test_the_same_bits_for_any_threads_and_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(CoordinateSettings, "__init__", _small_runs(CoordinateSettings.__init__))
    folders, _, _ = three(tmp_path)
    found = [document(folders, threads=t, kernels=k) for t, k in ((1, "numpy"), (3, "numpy"), (3, "numba"))]
    assert found[0]["settings"]["run"] == 100
    assert json.dumps(found[0]) == json.dumps(found[1]) == json.dumps(found[2])


def _small_runs(made):
    def init(self, *arguments, **named):
        made(self, *arguments, **{**named, "run": 100})

    return init


def test_runs_add_up(tmp_path):
    """Cut into pieces, counts stay and sums keep all but their last digits."""
    folders, base, experts = three(tmp_path)
    recipe = recipe_from_parts(str(folders[0]), [str(f) for f in folders[1:]], "task_arithmetic", {"weight": 1.0},
                               names=["b", "a", "c"])  # fmt: skip
    found, _ = measure_coordinates(make_plan(recipe), CoordinateSettings(run=64), 2, "numpy")
    check_scope(found["total"], base, experts, list(NAMES))


def test_planted_values(tmp_path):
    """Disjoint, equal and opposite experts: every measure of pairs at its ends; steps as planted."""
    base = {name: np.full(shape, 1.25, np.float32) for name, shape in zip(NAMES[1:3], ((16, 16), (24, 16)))}
    one, other, far = ({name: values.copy() for name, values in base.items()} for _ in range(3))
    for name in base:
        one[name][:8] += 2.0**-7
        other[name][:8] -= 2.0**-7
        far[name][8:16] += 5 * 2.0**-7
    folders = write(tmp_path, base, {"one": one, "same": one, "opposite": other, "far": far})
    total = document(folders)["coordinates"]["total"]
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in total["pairs"]}
    same, opposite, apart = (pairs[frozenset(("one", key))] for key in ("same", "opposite", "far"))
    assert (same["cosine"], same["jaccard"], same["conflict_overlap"]) == (pytest.approx(1.0), 1.0, 0.0)
    assert (opposite["cosine"], opposite["conflict_union"]) == (pytest.approx(-1.0), 1.0)
    assert opposite["conflict_norm"] == pytest.approx(2.0**-14 * math.sqrt(256))
    assert opposite["conflict_norm_relative"] == pytest.approx(1.0)
    assert (apart["cosine"], apart["overlap"], apart["lift"]) == (0.0, 0.0, 0.0)
    assert apart["overlap_cosine"] is apart["conflict_overlap"] is None
    assert total["experts"]["far"]["steps"] == {"dtype": "BF16", "at_least": [0, 1, 2, 4], "share": [0, 0, 0, 1.0]}
    assert total["regions"]["changers"] == pytest.approx([128 / 640, 256 / 640, 0.0, 256 / 640, 0.0])
    assert total["regions"]["conflict"] == pytest.approx(256 / 640)
    assert total["regions"]["unique"]["far"] == pytest.approx(256 / 640)


def test_an_expert_that_is_the_base(tmp_path):
    """Nothing is not a number: undefined figures are null, and the verdict says what is wrong."""
    base = make_base()
    folders = write(tmp_path, base, {"a": train(base, 1), "same": base})
    found = document(folders)
    json.dumps(found, allow_nan=False)
    [pair] = found["coordinates"]["total"]["pairs"]
    assert pair["cosine"] is pair["lift"] is None
    assert found["coordinates"]["total"]["experts"]["same"]["support"] == 0.0
    assert any(text.startswith("same: equals the base") for text in found["verdict"]["warnings"])


@pytest.mark.parametrize(("of_base", "of_expert"), [("F32", "F32"), ("F32", "BF16"), ("F16", "F16"), ("BF16", "F32")])
def test_other_dtypes(tmp_path, of_base, of_expert):
    """An expert narrower than the base is compared with the base as its dtype has it."""
    base = make_base(dtype=of_base)
    experts = {key: train(base, seed, of_expert) for seed, key in enumerate("ab", 1)}
    kinds = {"base": of_base, "a": of_expert, "b": of_expert}
    folders = write(tmp_path, base, experts, kinds)
    found = document(folders)
    compared = {name: nearest(values, of_expert) if of_base == "F32" else values for name, values in base.items()}
    total = found["coordinates"]["total"]
    for key, tensors in experts.items():
        wanted = plain.of_expert(wide(compared), wide(tensors))
        for name in ("support", "support_bf16", "norm"):
            assert total["experts"][key][name] == pytest.approx(wanted[name], **CLOSE), name
        assert total["experts"][key]["steps"]["dtype"] == of_expert
    assert [expert["dtype"] for expert in found["experts"]] == [of_expert] * 2
    for name, value in plain.of_pair(wide(compared), wide(experts["a"]), wide(experts["b"])).items():
        assert total["pairs"][0][name] == pytest.approx(value, **CLOSE), name
    assert json.dumps(found) == json.dumps(document(folders, kernels="numba"))


def test_stored_averages_and_sums(tmp_path):
    """Predicted in the same reading as the plain loop has them, and as the merge itself reports them."""
    folders, base, experts = three(tmp_path)
    merges = document(folders)["storage"]["merges"]
    for one, scale in zip(merges, (1 / 3, 1.0)):
        for name, value in plain.of_storage(wide(base), [wide(t) for t in experts.values()], scale).items():
            assert one[name] == pytest.approx(value, rel=1e-9), (one["method"], name)
    methods = {
        "average": ("task_arithmetic", {"weight": 1.0, "lambda": 1 / 3}),
        "sum": ("task_arithmetic", {"weight": 1.0, "lambda": 1.0}),
        "ties": ("ties", {"weight": 1.0}),
        "sar": ("sar", {}),
    }
    assert [one["method"] for one in merges] == ["average", "sum", "ties", "ties", "sar"]
    for number, one in enumerate(merges):
        method, settings = methods[one["method"]]
        extra = one["settings"] if number > 1 else {}
        recipe = recipe_from_parts(
            str(folders[0]), [str(f) for f in folders[1:]], method, {**settings, **extra, "out_dtype": "bfloat16"}
        )
        total = rlmerge.merge_to_folder(recipe, tmp_path / f"out{number}", threads=1, kernels="numpy").report["total"]
        assert one["survival"] == total["survival"]["share"]
        assert one["cosine"] == pytest.approx(total["realised_cosine"], rel=1e-12)
        assert one["norm_ratio"] == pytest.approx(total["realised_norm"] / total["intended_norm"], rel=1e-12)


def test_packs_and_adapters(tmp_path):
    """A delta pack says what the expert says; a LoRA's deltas are not rounded."""
    folders, base, _ = three(tmp_path)
    rlmerge.pack(folders[1], folders[0], tmp_path / "pack")
    options = {"storage": False, "threads": 1, "kernels": "numpy"}
    found = rlmerge.inspect(folders[0], [folders[1]], names=["x"], **options)
    packed = rlmerge.inspect(folders[0], [tmp_path / "pack"], names=["x"], **options)
    assert found["coordinates"] == packed["coordinates"]
    a, b = np.ones((2, 16), np.float32), np.full((16, 2), 2.0**-20, np.float32)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    module = f"base_model.model.{NAMES[1].removesuffix('.weight')}"
    write_tensors(lora / "adapter_model.safetensors", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    found = rlmerge.inspect(folders[0], [lora], names=["x"], **options)
    expert = found["coordinates"]["total"]["experts"]["x"]
    assert found["experts"][0]["dtype"] == "delta"
    assert expert["norm"] == pytest.approx(2.0**-19 * 16)
    assert expert["support"] == pytest.approx(256 / sum(t.size for t in base.values()))
    moved = nearest(base[NAMES[1]].astype(float) + 2.0**-19, "BF16") != base[NAMES[1]]
    assert expert["support_bf16"] == pytest.approx(moved.sum() / sum(t.size for t in base.values()))
    assert expert["steps"]["share"][0] == pytest.approx(1 - moved.mean())


def test_a_trajectory(tmp_path):
    """Shares by what the last checkpoint, in the order given and not of the names, says."""
    base = {NAMES[1]: np.full((10, 10), 1.0, np.float32)}
    early, late = {NAMES[1]: base[NAMES[1]].copy()}, {NAMES[1]: base[NAMES[1]].copy()}
    early[NAMES[1]][:3] += 2.0**-7
    late[NAMES[1]][2:4] += 2.0**-7
    folders = write(tmp_path, base, {"z": early, "a": late})
    found = document(folders, trajectory=True)["coordinates"]["total"]["trajectory"]
    assert found == {"never": 0.6, "consistently": pytest.approx(0.2), "cancelled": pytest.approx(0.2)}
    with pytest.raises(RecipeError, match="one checkpoint is no trajectory"):
        document(folders[:2], trajectory=True)


def test_a_tied_tensor_counts_once_and_numbers_must_be(tmp_path):
    base = make_base()
    expert = train(base, 1)
    broken = {name: values.copy() for name, values in expert.items()}
    broken[NAMES[2]][1, 1] = np.nan
    folders = write(tmp_path, base, {"a": broken})
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp"):
        document(folders)
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    for folder, tensors in (("tied", base), ("expert", expert)):
        write_model(tmp_path / folder, {**tensors, "lm_head.weight": tensors[NAMES[0]]}, config, "BF16")
    found = document([tmp_path / "tied", tmp_path / "expert"])
    assert found["base"]["coordinates"] == sum(values.size for values in base.values())


def test_names_and_memory(tmp_path):
    folders, _, _ = three(tmp_path)
    with pytest.raises(RecipeError, match="--name is given 1 times for 3 experts"):
        rlmerge.inspect(folders[0], folders[1:], names=["x"])
    with pytest.raises(RecipeError, match=r"--memory 100 MB is less than one thread needs"):
        rlmerge.inspect(folders[0], folders[1:], memory=10**8)
    with pytest.raises(RecipeError, match="no expert is given"):
        rlmerge.inspect(folders[0], [])
    assert (
        rlmerge.inspect(folders[0], folders[1:2], memory=10**9, storage=False, null=False)["settings"]["null"] is False
    )


def test_places():
    assert place_of("model.layers.3.self_attn.q_proj.weight") == (3, "self_attn.q_proj.weight")
    assert place_of("model.layers.3.mlp.experts.7.up.weight") == (3, "mlp.experts.*.up.weight")
    assert place_of("transformer.h.0.ln_1.bias") == (0, "ln_1.bias")
    assert place_of("model.embed_tokens.weight") == (None, "embed_tokens.weight")
    assert place_of("model") == (None, "model")


def test_the_schema(tmp_path):
    """Committed as it is, and every document keeps to it; a document that does not is noticed."""
    schema = geometry_schema()
    committed = ROOT / "docs" / "inspect.schema.json"
    assert json.loads(committed.read_text()) == schema
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    folders, _, _ = three(tmp_path)
    found = document(folders, trajectory=True)
    validator.validate(found)
    validator.validate(document(folders[:2], null=False, storage=False))
    del found["coordinates"]["layers"][0]["pairs"][0]["cosine"]
    assert not validator.is_valid(found)


def test_memory_is_foreseen(tmp_path):
    """A thread takes no more than is promised, for a tensor of several runs."""
    rng = np.random.default_rng(0)
    base = {NAMES[1]: nearest(0.02 * rng.standard_normal((800, 600)), "BF16")}
    folders = write(tmp_path, base, {key: train(base, seed) for seed, key in enumerate("ab", 1)})
    recipe = recipe_from_parts(str(folders[0]), [str(f) for f in folders[1:]], "task_arithmetic", {"weight": 1.0})
    plan = make_plan(recipe)
    measure_coordinates(plan, CoordinateSettings(), 1, "numba")
    tracemalloc.start()
    measure_coordinates(plan, CoordinateSettings(), 1, "numba")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < coordinates.piece_bytes(plan) < 2 * peak


def test_outputs_agree_with_what_is_read_back(tmp_path):
    """The recommended recipe merges."""
    folders, _, _ = three(tmp_path)
    found = document(folders, recipe=tmp_path / "recipe.yml")
    outcome = rlmerge.merge_to_folder(tmp_path / "recipe.yml", tmp_path / "out", threads=1, kernels="numpy")
    assert set(read_values(tmp_path / "out")) == set(NAMES)
    method = found["verdict"]["recommended"]["recipe"].split()[1]
    assert method == "sar"
    predicted = next(one for one in found["storage"]["merges"] if one["method"] == "sar")
    assert outcome.report["total"]["survival"]["share"] == predicted["survival"]
