"""The small files of an output: every role with its files, every small file of the donor, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import yaml
from tests.execute.test_same_bytes import contents
from tests.methods.small_models import make_recipe, some_fishers, sparse_model, write_all

import rlmerge


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 2, "BF16")
    write_all(tmp_path, base, experts, some_fishers(rng, list(experts)), "BF16")
    return tmp_path


def provenance(out):
    return json.loads((out / "rlmerge.json").read_text())


@pytest.mark.parametrize("sha256", [False, True])
def test_a_file_of_two_roles_is_listed_with_both(models, sha256):
    """One model under two names, and one Fisher for both."""
    text = """
merge_method: sar
base_model: base
models:
- {model: e0, name: a, fisher: fisher_e0}
- {model: e0, name: b, fisher: fisher_e0}
"""
    recipe = rlmerge.parse_recipe(text, folder=models)
    out = rlmerge.merge_to_folder(recipe, models / "out", kernels="numpy", sha256=sha256).out
    inputs = provenance(out)["inputs"]
    assert [entry["role"] for entry in inputs] == ["base", "a", "b", "fisher of a", "fisher of b"]
    assert all(len(entry["files"]) == 1 for entry in inputs)
    assert inputs[1]["files"] == inputs[2]["files"]
    assert inputs[3]["files"] == inputs[4]["files"]
    names = ("base/model", "e0/model", "e0/model", "fisher_e0/fisher", "fisher_e0/fisher")
    for entry, name in zip(inputs, names):
        digest = hashlib.sha256((models / f"{name}.safetensors").read_bytes()).hexdigest()
        assert entry["files"][0].get("sha256") == (digest if sha256 else None)


def test_folders_of_chat_templates_are_copied_and_verified(models):
    folder = models / "base" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ x }}")
    for name in ("e0", "e1"):
        shutil.copytree(folder, models / name / folder.name)
    (models / "base" / "checkpoint-5").mkdir()
    (models / "base" / "checkpoint-5" / "config.json").write_text("{}")
    recipe = make_recipe(models, "ram", ["e0", "e1"])
    out = rlmerge.merge_to_folder(recipe, models / "out", kernels="numpy").out
    first = contents(out)
    assert first["additional_chat_templates/tool_use.jinja"] == b"{{ x }}"
    assert not (out / "checkpoint-5").exists()
    assert "additional_chat_templates/tool_use.jinja" in provenance(out)["files"]
    rlmerge.verify(out)
    rlmerge.merge_to_folder(recipe, out, kernels="numpy", overwrite=True)  # nothing in it is foreign
    assert contents(out) == first
    (out / "additional_chat_templates" / "mine.jinja").write_text("x")
    with pytest.raises(rlmerge.RlmergeError, match=r"additional_chat_templates/mine\.jinja"):
        rlmerge.merge_to_folder(recipe, out, kernels="numpy", overwrite=True)
    (out / "additional_chat_templates" / "tool_use.jinja").unlink()
    with pytest.raises(rlmerge.RlmergeError, match=r"tool_use\.jinja: is missing"):
        rlmerge.verify(out)


def test_a_card_names_as_base_model_what_came_from_the_hub(models, monkeypatch):
    """Folders, even such as look like ids, are no ids, and the Hub refuses a card that says so."""
    monkeypatch.setenv("HF_HUB_CACHE", str(models / "cache"))
    commit = "0123456789" * 4
    snapshot = models / "cache" / "models--lab--e1" / "snapshots" / commit
    shutil.copytree(models / "e1", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    shutil.copytree(models / "e0", models / "lab" / "e0")
    for experts, listed in ((["lab/e0", "lab/e1"], ["lab/e1"]), (["lab/e0", str(snapshot)], ["lab/e1"])):
        recipe = make_recipe(models, "ram", experts)
        out = rlmerge.merge_to_folder(recipe, models / "out", kernels="numpy", overwrite=True).out
        front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
        assert (front["base_model"], front["base_model_relation"]) == (listed, "merge")
    out = rlmerge.merge_to_folder(make_recipe(models, "ram", ["lab/e0"]), models / "local", kernels="numpy").out
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert set(front) == {"library_name", "tags"}
    assert "model: lab/e0\n" in (out / "README.md").read_text()
