"""What a plan says of its output is what lies there when it is made; so all stages are planned before the first."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.methods.small_models import representable, sparse_model, write_all

import rlmerge
from rlmerge.checkpoint.folder import open_checkpoint
from rlmerge.errors import FisherError, MismatchError, OutputError, RecipeError
from rlmerge.planned import plan_stages, planned_checkpoint
from rlmerge.planner import make_plan

CONFIG = {"model_type": "none", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
SUM = """\
name: sum
merge_method: task_arithmetic
base_model: base
models:
  - {model: e0, parameters: {weight: 1}}
  - {model: e1, parameters: {weight: 0.5}}
"""
MEAN = """\
name: mean
merge_method: linear
models:
  - {model: sum, parameters: {weight: 1}}
  - {model: e2, parameters: {weight: 1}}
"""
LAST = """\
merge_method: ties
base_model: sum
models:
  - {model: mean, parameters: {weight: 1}}
  - {model: e2, parameters: {weight: 1}}
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    write_all(tmp_path / "in", base, experts, None, "BF16")
    (tmp_path / "in/base/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "in"


def write(folder: Path, *documents: str) -> Path:
    (folder / "recipe.yml").write_text("---\n".join(documents))
    return folder / "recipe.yml"


def add_to(folder: Path, tensors: dict) -> None:
    """Rewrites a model with more tensors."""
    old = open_checkpoint(folder).tensors
    words = {n: np.frombuffer(i.file.read_bytes(), "<u2", i.size, i.start).reshape(i.shape) for n, i in old.items()}
    values = {n: ((w.astype(np.uint32) << 16).view(np.float32), "BF16") for n, w in words.items()}
    write_model(folder, values | tensors)


def check_against_reality(recipe: Path, out: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Plans of all documents, then the same from folders that were merged one after the other."""
    stages = rlmerge.load_stages(recipe).at(out)
    found = plan_stages(stages, (), shard_bytes)
    assert [planned.name for planned in found] == [*stages.names, ""]
    for planned, document in zip(found, stages.recipes, strict=True):
        real = make_plan(document, (), shard_bytes)
        assert planned.plan.to_dict() == real.to_dict()
        assert planned.plan.notes == real.notes
        if document is stages.final:
            return
        rlmerge.merge_to_folder(document, out / planned.name, kernels="numpy", shard_bytes=max(shard_bytes, 10**6))
        opened = open_checkpoint(out / planned.name, planned.name)
        foreseen = planned_checkpoint(planned.plan, planned.name, out / planned.name)
        assert [header.digest for header in foreseen.headers] == [header.digest for header in opened.headers]
        assert list(foreseen.tensors) == list(opened.tensors)
        assert foreseen.config == opened.config


@pytest.mark.parametrize("change", ["", "out_dtype: float32\n", "dtype: float16\n"])
def test_plans_of_what_is_not_made_yet_are_those_of_what_is_made(models, tmp_path, change):
    check_against_reality(write(models, LAST, MEAN, SUM + change), tmp_path / "out")


def test_carried_tensors_and_loras(models, tmp_path):
    rng = np.random.default_rng(1)
    more = {"steps": (np.arange(4), "I64"), "rotary_emb.inv_freq": (rng.random(4).astype(np.float32), "F32")}
    for name in ("base", "e0", "e1", "e2"):
        add_to(models / name, more)
    b, a = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 8)).astype(np.float32)
    stem = "base_model.model.a"
    write_tensors(
        models / "lora/adapter_model.safetensors", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, "F32"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"], "bias": "none"}
    (models / "lora/adapter_config.json").write_text(json.dumps(config))
    lora = LAST.replace("model: e2", "model: lora").replace("mean", "e2")
    check_against_reality(write(models, SUM + "out_dtype: float32\n", lora), tmp_path / "out")


def test_a_stage_that_stores_tied_weights_twice(models, tmp_path):
    """Whether embedding and head are one is known without their bytes: a later expert may store them once."""
    rng = np.random.default_rng(2)
    for name in ("base", "e0", "e1", "e2"):
        matrix = representable(rng.standard_normal((16, 8)), "BF16")
        twice = {"embed_tokens.weight": (matrix, "BF16"), "lm_head.weight": (matrix.copy(), "BF16")}
        add_to(models / name, dict(list(twice.items())[: 1 if name == "e2" else 2]))
        (models / name / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    last = LAST.replace("mean", "e2").replace("- {model: e2, parameters: {weight: 1}}\n", "", 1)
    check_against_reality(write(models, SUM, last), tmp_path / "out")
    # excluded in the stage, so copied from a base that has one matrix twice
    excluded = SUM + "exclude: [embed_tokens, lm_head]\n"
    check_against_reality(write(models, excluded, last), tmp_path / "again")


def test_slices_of_stages_and_stages_of_slices(models, tmp_path):
    """A stage of other depth: names, config.json and the copies of carried tensors are foreseen, too."""
    rng = np.random.default_rng(3)
    for name in ("base", "e0", "e1", "e2"):
        layers = {f"layers.{k}.weight": (representable(rng.standard_normal((4, 6)), "BF16"), "BF16") for k in range(3)}
        steps = {f"layers.{k}.steps": (np.arange(4) + k, "I64") for k in range(3)}
        ends = {"embed_tokens.weight": np.ones((8, 6), np.float32), "norm.weight": np.ones(6, np.float32)}
        write_model(models / name, {**layers, **steps, **ends}, {"num_hidden_layers": 3, "model_type": "none"})
    deep = """\
name: deep
merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: e0, layer_range: [0, 2]}]
  - sources: [{model: base, layer_range: [1, 3]}, {model: e1, layer_range: [1, 3]}]
"""
    last = """\
merge_method: passthrough
slices:
  - sources: [{model: deep, layer_range: [0, 3]}]
  - sources: [{model: e2, layer_range: [1, 3]}]
"""
    recipe = write(models, last, deep)
    check_against_reality(recipe, tmp_path / "out")
    rlmerge.merge_to_folder(recipe, tmp_path / "whole", kernels="numpy")
    assert json.loads((tmp_path / "whole/config.json").read_text())["num_hidden_layers"] == 5
    card = (tmp_path / "whole/README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # folders are no ids
    assert all(f"model: {name}\n" in card for name in ("base", "e0", "e1", "e2", "deep"))
    groups = rlmerge.explain(recipe)
    assert [(group["stage"], group.get("slice")) for group in groups if "slice" in group] == [
        ("deep", 0), ("deep", 1), ("", 0), ("", 1),
    ]  # fmt: skip


# ---- What the headers of stages show, before any stage is made -----------------------------------------------------


def refused(recipe: Path, out: Path, error: type[Exception], match: str, **options) -> None:
    """`check` and the merge refuse it alike, and nothing is written."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=match):
        rlmerge.check(recipe, out=out, **options)
    with pytest.raises(error, match=match):
        rlmerge.merge_to_folder(recipe, out, kernels="numpy", **options)
    assert sorted(out.parent.rglob("*")) == before


def test_models_that_do_not_fit_a_stage(models, tmp_path):
    write_model(models / "odd", {"a.weight": np.ones((3, 3), np.float32)})
    recipe = write(models, SUM, LAST.replace("mean", "odd"))
    refused(recipe, tmp_path / "out", MismatchError, r"a.weight: \[6, 8\] in .*out.stages.sum")
    with pytest.raises(MismatchError, match=r"OUT\.stages"):
        rlmerge.check(recipe)


def test_tokenizers_that_do_not_fit_a_stages(models, tmp_path):
    """The stage will have its base's tokenizer."""
    for name, token in (("base", "a"), ("e2", "z")):
        (models / name / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "BPE", "vocab": {token: 0}, "merges": []}})
        )
    recipe = write(models, SUM, LAST.replace("mean", "e2").replace("- {model: e2, parameters: {weight: 1}}\n", "", 1))
    refused(recipe, tmp_path / "out", MismatchError, "not the same tokenizer")
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels="numpy", accept_tokenizers=True)
    assert outcome.notes


def test_parameters_of_the_last_document(models, tmp_path):
    last = LAST + "parameters: {density: [{filter: a.weight, value: 0.5}, {value: 0.2}], scope: model}\n"
    refused(write(models, MEAN, SUM, last), tmp_path / "out", RecipeError, "scope: model")
    refused(write(models, MEAN, SUM, LAST + "exclude: [nothing]\n"), tmp_path / "out", RecipeError, r"yml:19: exclude")


def test_fishers_that_the_last_document_lacks(models, tmp_path):
    last = LAST.replace("ties", "sar")
    refused(write(models, MEAN, SUM, last), tmp_path / "out", FisherError, "no model has a")


def test_fishers_to_be_estimated_of_a_stage(models, tmp_path):
    (models / "problems.jsonl").write_text(
        "".join(json.dumps({"prompt": f"1+{n}?", "completion": str(1 + n)}) + "\n" for n in range(3))
    )
    fisher = "fisher: {data: problems.jsonl, source: gold, sequences: 2}"
    last = LAST.replace("ties", "sar").replace("{model: mean,", f"{{model: mean, {fisher},")
    last = last.replace("{model: e2,", f"{{model: e2, {fisher},")
    report = rlmerge.check(write(models, MEAN, SUM, last))
    assert "the Fisher of mean will be estimated" in " ".join(report.notes)


def test_the_disk_must_hold_stages_and_output(models, tmp_path, monkeypatch):
    recipe = write(models, MEAN, SUM, LAST)
    (size,) = {file["bytes"] for file in rlmerge.check(recipe).summary["files"]}
    usage = namedtuple("usage", "total used free")
    for free, enough in ((3 * size - 1, False), (3 * size, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage(10**9, 0, free))
        if enough:
            rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels="numpy")
        else:
            refused(recipe, tmp_path / "out", OutputError, "out and the stages sum, mean need")


def test_an_output_that_is_there(models, tmp_path):
    recipe = write(models, MEAN, SUM, LAST)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    refused(recipe, tmp_path / "out", OutputError, "exists and is not empty")
    refused(recipe, tmp_path / "out", OutputError, "rlmerge did not write", overwrite=True)


@pytest.mark.parametrize("what", ["a file", "foreign", "a link", "a stage", "a link for a stage"])
def test_what_is_in_the_way_of_stages(models, tmp_path, what):
    recipe, place = write(models, MEAN, SUM, LAST), tmp_path / "out.stages"
    if what == "a file":
        place.touch()
    elif what == "a link":
        place.symlink_to(models)
    else:
        place.mkdir()
        (place / ("x" if what == "foreign" else "stages.json")).write_text('{"finishing": false, "stages": {}}')
        if what == "a stage":
            write_model(place / "sum", {"x": np.ones(2)})
        if what == "a link for a stage":
            (place / "sum").symlink_to(models / "base")
    refused(recipe, tmp_path / "out", OutputError, "out.stages")


@pytest.mark.parametrize("place", ["out", "out/stages", "out.unfinished/stages", "."])
def test_stages_lie_beside_the_output(models, tmp_path, place):
    recipe = write(models, MEAN, SUM, LAST)
    refused(recipe, tmp_path / "out", OutputError, "--stages", stages=tmp_path / place)


def test_check_reports_every_document(models):
    report = rlmerge.check(write(models, MEAN, SUM, LAST))
    assert list(report.stages) == ["sum", "mean"]
    assert report.summary["method"] == "ties"
    assert report.stages["sum"].sample["experts"].keys() == {"e0", "e1"}
    assert report.stages["mean"].sample == report.sample == {}
    assert "the weights of sum, mean are not there yet" in " ".join(report.notes).replace("mean, sum", "sum, mean")
    parts = [*report.stages.values(), report]
    for key in ("bytes_read", "bytes_written", "disk_bytes", "hours"):
        assert report.total[key] == pytest.approx(sum(part.estimate[key] for part in parts))


def test_explain_tells_of_every_document(models):
    groups = rlmerge.explain(write(models, MEAN, SUM, LAST))
    assert [group["stage"] for group in groups] == ["sum", "mean", ""]
    assert groups[0]["models"]["e1"] == {"weight": 0.5}
    assert groups[2]["values"]["lambda"] == 1.0
