"""Merges in stages: the bytes of merging by hand; whatever is interrupted, changed or in the way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model
from tests.execute.test_resume import PROGRAM, Stop, digest, stop_after
from tests.execute.test_same_bytes import contents
from tests.methods.small_models import small_blocks, sparse_model, write_all

import rlmerge
from rlmerge.errors import OutputError, RlmergeError
from rlmerge.execute.folder import OutputFolder

# a diamond: two stages of one, and the output of all three, one of them its base
DOCUMENTS = {
    "root": "{merge_method: task_arithmetic, base_model: base, models: [{model: e0, parameters: {weight: 0.7}}]}",
    "left": "{merge_method: ties, base_model: root, parameters: {weight: 1, density: 0.5}, models: [{model: e1}, "
    "{model: e2}]}",
    "right": "{merge_method: dare_linear, base_model: root, parameters: {weight: 1, density: 0.5}, models: "
    "[{model: e2}]}",
    "": "{merge_method: sar, base_model: root, parameters: {sensitivity: delta2}, models: [{model: left}, "
    "{model: right}], out_dtype: float32}",
}


def recipe_of(documents: dict[str, str] = DOCUMENTS) -> str:
    named = [f"{{name: {name}, {text[1:]}" if name else text for name, text in documents.items()]
    return "\n---\n".join([named[-1], *named[:-1]])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    write_all(tmp_path / "in", base, experts, None, "BF16")
    (tmp_path / "in/base/config.json").write_text(json.dumps({"model_type": "none", "torch_dtype": "bfloat16"}))
    (tmp_path / "in/base/README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "in/recipe.yml").write_text(recipe_of())
    return tmp_path / "in"


def merge(models: Path, out: Path, **options):
    with small_blocks(8, 16):
        return rlmerge.merge_to_folder(
            models / "recipe.yml", out, **{"threads": 1, "kernels": "numpy"} | options
        )  # fmt: skip


def change(models: Path, name: str, old: str, new: str) -> None:
    """Changes one document."""
    assert old in DOCUMENTS[name]
    (models / "recipe.yml").write_text(recipe_of({**DOCUMENTS, name: DOCUMENTS[name].replace(old, new)}))


def by_hand(models: Path, folder: Path) -> None:
    """The same merges, one recipe after the other."""
    for name, text in DOCUMENTS.items():
        data = text
        for stage in ("root", "left", "right"):
            data = data.replace(f"base_model: {stage}", f"base_model: {folder / stage}")
            data = data.replace(f"model: {stage}}}", f"model: {folder / stage}, name: {stage}}}")
        recipe = rlmerge.parse_recipe(data, folder=models)
        with small_blocks(8, 16):
            rlmerge.merge_to_folder(recipe, folder / (name or "last"), kernels="numpy", threads=1)


def test_the_same_bytes_as_by_hand(models, tmp_path):
    by_hand(models, tmp_path / "hand")
    merge(models, tmp_path / "out", stages=tmp_path / "kept")
    for name in DOCUMENTS:
        made = contents(tmp_path / "kept" / name if name else tmp_path / "out")
        hand = contents(tmp_path / "hand" / (name or "last"))
        for file in ("model.safetensors", "config.json"):
            assert made[file] == hand[file]
        ours, theirs = json.loads(made["rlmerge.json"]), json.loads(hand["rlmerge.json"])
        for key in ("units", "weights", "statistics"):
            assert ours[key] == theirs[key]
        assert [entry["xxh3"] for entry in ours["inputs"]] == [entry["xxh3"] for entry in theirs["inputs"]]


def test_the_same_bytes_wherever_the_stages_are(models, tmp_path):
    first = merge(models, tmp_path / "out")
    assert merge(models, tmp_path / "out2", stages=tmp_path / "kept", threads=2).stages.keys() == first.stages.keys()
    assert contents(tmp_path / "out") == contents(tmp_path / "out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "kept", "out", "out2"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "left", "lock", "right", "root", "stages.json",
    ]  # fmt: skip


def test_the_output_says_what_it_is_made_of(models, tmp_path):
    merge(models, tmp_path / "out", stages=tmp_path / "kept")
    said = json.loads((tmp_path / "out/rlmerge.json").read_text())
    assert list(said["stages"]) == ["root", "left", "right"]
    for name, stage in said["stages"].items():
        whole = json.loads((tmp_path / "kept" / name / "rlmerge.json").read_text())
        for key in ("recipe", "inputs", "weights"):
            assert stage[key] == whole[key]
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # folders are no ids
    assert all(f"model: {name}\n" in card for name in ("e0", "e1", "e2"))
    assert "base_model: base\n" in card
    assert str(tmp_path) not in card + json.dumps(said)
    again = card.split("```yaml\n")[1].split("```")[0]  # the card's recipe is whole
    (models / "recipe.yml").write_text(again)
    merge(models, tmp_path / "out2")
    assert contents(tmp_path / "out2") == contents(tmp_path / "out")
    assert rlmerge.verify(tmp_path / "out")["tensors"] == 4


def test_a_single_recipe_says_nothing_of_stages(models, tmp_path):
    (models / "recipe.yml").write_text(DOCUMENTS["root"])
    assert merge(models, tmp_path / "out").stages == {}
    assert "stages" not in json.loads((tmp_path / "out/rlmerge.json").read_text())
    assert "base_model: base\n" in (tmp_path / "out/README.md").read_text()


def test_a_sweep_of_the_output(models, tmp_path):
    merge(models, tmp_path / "out", sweep=[{"lambda": 0.5}, {"lambda": 1.0}])
    merge(models, tmp_path / "one")
    swept = contents(tmp_path / "out/lambda=1.0")
    assert swept["model.safetensors"] == contents(tmp_path / "one")["model.safetensors"]
    assert "right" in json.loads(swept["rlmerge.json"])["stages"]


# ---- What is made again, and what is not ---------------------------------------------------------------------------


def made_again(models, tmp_path, number: int, **options) -> list[str]:
    """The stages that a merge with the same folder of stages makes."""
    outcome = merge(models, tmp_path / f"out{number}", stages=tmp_path / "kept", **options)
    return [name for name, stage in outcome.stages.items() if stage is not None]


def test_whole_and_unchanged_stages_are_kept(models, tmp_path):
    assert made_again(models, tmp_path, 1) == ["root", "left", "right"]
    before = digest(tmp_path / "kept")
    assert made_again(models, tmp_path, 2) == []
    change(models, "", "sensitivity: delta2", "sensitivity: delta2, density: 0.4")
    assert made_again(models, tmp_path, 3) == []
    after = digest(tmp_path / "kept")
    assert {name: after[name] for name in before if name != "stages.json"} == {
        name: before[name] for name in before if name != "stages.json"
    }


def test_a_changed_stage_is_made_again_with_all_that_follow(models, tmp_path):
    assert made_again(models, tmp_path, 1) == ["root", "left", "right"]
    change(models, "left", "density: 0.5", "density: 0.4")
    assert made_again(models, tmp_path, 2) == ["left"]
    (models / "recipe.yml").write_text(recipe_of())
    change(models, "root", "0.7", "0.6")  # left, too, is as it was at first
    assert made_again(models, tmp_path, 3) == ["root", "left", "right"]
    merge(models, tmp_path / "fresh")
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out3")


@pytest.mark.parametrize("touch", ["an input", "a time", "a stage", "a header", "a stage is cut", "a stage is gone"])
def test_changed_files_are_seen(models, tmp_path, touch):
    made_again(models, tmp_path, 1)
    weights = (models / "e1" if touch in ("an input", "a time") else tmp_path / "kept/left") / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    if touch == "a stage is gone":
        shutil.rmtree(weights.parent)
    elif touch == "a stage is cut":
        os.truncate(weights, 20)
    elif touch == "a time":
        os.utime(weights, ns=(0, 12345))
    else:
        raw[-1 if touch != "a header" else 20] ^= 1
        weights.write_bytes(raw)
    expected = made_again(models, tmp_path, 2)
    assert expected == ["left"]
    if touch != "an input":
        assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "chat_template.jinja"])
def test_changed_small_files_are_seen(models, tmp_path, name):
    """The base lends them to all that is made of it."""
    made_again(models, tmp_path, 1)
    text = json.dumps({"model_type": "none", "torch_dtype": "bfloat16", "rms_norm_eps": 0.5})
    (models / "base" / name).write_text(text)
    assert made_again(models, tmp_path, 2) == ["root", "left", "right"]
    assert json.loads((tmp_path / "out2" / name).read_text())["rms_norm_eps"] == 0.5
    if name != "config.json":
        (models / "base" / name).unlink()
        assert made_again(models, tmp_path, 3) == ["root", "left", "right"]
        assert contents(tmp_path / "out3") == contents(tmp_path / "out1")


@pytest.mark.parametrize("change", ["written", "gone"])
def test_small_files_of_a_stage_are_watched_as_its_weights_are(models, tmp_path, change):
    made_again(models, tmp_path, 1)
    file = tmp_path / "kept/left/config.json"
    file.unlink() if change == "gone" else file.write_text(file.read_text().replace("none", "some"))
    assert made_again(models, tmp_path, 2) == ["left"]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_a_stage_of_several_tokenizers_is_made_of_all_of_them(models, tmp_path):
    """With `tokenizer_source: union` the stage has what the expert's tokenizer.json says, too."""
    from tests.token_models import byte_bpe, tensors, with_tokens, write

    plain = byte_bpe()
    chat = with_tokens(plain, "<chat>")
    write(models / "base", plain, tensors(0, len(plain)))
    write(models / "e0", chat, tensors(1, len(chat)))
    root = DOCUMENTS["root"][:-1] + ", tokenizer_source: union}"
    (models / "recipe.yml").write_text(
        recipe_of({"root": root, "": "{merge_method: passthrough, models: [{model: root}]}"})
    )
    assert made_again(models, tmp_path, 1) == ["root"]
    file = models / "e0/tokenizer.json"
    said = json.loads(file.read_text())
    said["added_tokens"][-1]["lstrip"] = True
    file.write_text(json.dumps(said))
    assert made_again(models, tmp_path, 2) == ["root"]
    assert json.loads((tmp_path / "out2/tokenizer.json").read_text())["added_tokens"][-1]["lstrip"] is True


def test_a_killed_stage_goes_on_when_only_small_files_change(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stop):
            merge(models, tmp_path / "out")
    (models / "base/generation_config.json").write_text('{"top_k": 7}')
    outcome = merge(models, tmp_path / "out")
    assert outcome.stages["root"].resumed_units > 0
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"top_k": 7}


def test_another_shard_size_is_another_stage(models, tmp_path):
    for name in ("base", "e0", "e1", "e2"):
        write_model(models / name, {f"t{k}": np.ones((600, 512), np.float32) for k in range(2)})
    for number, shard_bytes in enumerate((10**9, 10**9, 10**6)):
        outcome = rlmerge.merge_to_folder(
            models / "recipe.yml", tmp_path / f"out{number}", stages=tmp_path / "kept", shard_bytes=shard_bytes,
            kernels="numpy",
        )  # fmt: skip
        assert all((stage is None) == (number == 1) for stage in outcome.stages.values())


def test_stages_of_other_names_go_at_the_end(models, tmp_path, monkeypatch):
    """Begun, killed, renamed in the recipe: nothing is left of it."""
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(Stop):
            merge(models, tmp_path / "out")
    assert (tmp_path / "out.stages/root").exists()
    (models / "recipe.yml").write_text(recipe_of().replace("root", "trunk"))
    merge(models, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# ---- Interruptions -------------------------------------------------------------------------------------------------


def units_of(models, tmp_path) -> tuple[dict[str, bytes], int]:
    outcome = merge(models, tmp_path / "whole")
    stages = [stage for stage in outcome.stages.values() if stage is not None]
    return contents(tmp_path / "whole"), outcome.total_units + sum(stage.total_units for stage in stages)


def test_stopped_at_any_unit(models, tmp_path, monkeypatch):
    expected, units = units_of(models, tmp_path)
    for stop in range(0, units, 5):
        out = tmp_path / f"out{stop}"
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Stop):
                merge(models, out)
        assert not out.exists()
        outcome = merge(models, out, threads=2)
        stages = [stage for stage in outcome.stages.values() if stage is not None]
        done = outcome.total_units + sum(stage.total_units for stage in stages)
        done -= outcome.resumed_units + sum(stage.resumed_units for stage in stages)
        assert done == units - stop  # none is done again
        assert contents(out) == expected
        assert not (tmp_path / f"{out.name}.stages").exists()


def test_stopped_at_any_step_on_the_disk(models, tmp_path, monkeypatch):
    """Every rename, unlink and removal, stopped before it happens: the same command goes on, and leaves nothing."""
    expected, _ = units_of(models, tmp_path)
    step, finished = 0, False
    while not finished:
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            left = [step]
            for owner, names in ((Path, ("rename", "unlink", "rmdir", "mkdir")), (shutil, ("rmtree",)),
                                 (os, ("rename", "replace"))):  # fmt: skip
                for name in names:
                    patch.setattr(owner, name, stopping(getattr(owner, name), left))
            try:
                merge(models, out)
                finished = True
            except Stop:
                pass
        whole = out.exists()
        with pytest.raises(OutputError, match="exists and is not empty") if whole else contextlib.nullcontext():
            merge(models, out)
        assert contents(out) == expected
        assert [path.name for path in tmp_path.glob(f"out{step}*")] == [out.name]
        step += 3
    assert step > 20


def stopping(original, left):
    def stop_or_go(*arguments, **options):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return original(*arguments, **options)

    return stop_or_go


def test_an_unfinished_output_of_other_stages(models, tmp_path, monkeypatch):
    """Refused before a stage is made again; --overwrite then starts it again."""
    _, units = units_of(models, tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, units - 2)
        with pytest.raises(Stop):
            merge(models, tmp_path / "out")
    change(models, "root", "0.7", "0.6")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=r"was begun with stages that .* root, left, right. .*--overwrite"):
        merge(models, tmp_path / "out")
    assert digest(tmp_path) == before
    outcome = merge(models, tmp_path / "out", overwrite=True)
    assert outcome.resumed_units == 0
    merge(models, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_overwrite_replaces_the_output_when_all_is_made(models, tmp_path):
    merge(models, tmp_path / "out")
    change(models, "root", "0.7", "0.6")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(models, tmp_path / "out")
    old = contents(tmp_path / "out")
    merge(models, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_others_put_beside_the_stages_stays(models, tmp_path, monkeypatch):
    said: list[str] = []
    finish = OutputFolder.finish

    def put(self):
        finish(self)
        if self.out == tmp_path / "out":
            (tmp_path / "out.stages/mine").touch()
            (tmp_path / "out.stages/left/mine").touch()

    monkeypatch.setattr(OutputFolder, "finish", put)
    merge(models, tmp_path / "out", progress=lambda step: said.append(step.message))
    assert (tmp_path / "out.stages/mine").exists()
    assert (tmp_path / "out.stages/left/mine").exists()
    assert not (tmp_path / "out.stages/root").exists()
    assert any("stays, as it holds" in text for text in said)


def test_one_merge_at_a_time(models, tmp_path):
    (tmp_path / "out.stages").mkdir()
    with (tmp_path / "out.stages/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another rlmerge"):
            merge(models, tmp_path / "out")


def test_a_mistake_of_the_weights_keeps_what_is_made(models, tmp_path):
    """NaN in an expert of the output: found when it is read; the stages stay for the next attempt."""
    values = np.ones((6, 8), np.float32)
    values[0, 0] = np.nan
    write_model(models / "nan", {"a.weight": values})
    good = (models / "recipe.yml").read_text()
    documents = {**DOCUMENTS, "": DOCUMENTS[""].replace("{model: left}", "{model: nan}, {model: left}")}
    (models / "recipe.yml").write_text(recipe_of(documents).replace("float32", "float32, on_mismatch: base"))
    with pytest.raises(RlmergeError, match="nan"):
        merge(models, tmp_path / "out")
    (models / "recipe.yml").write_text(good)
    assert set(merge(models, tmp_path / "out").stages.values()) == {None}


# ---- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    """A diamond of half a million parameters; the bytes that undisturbed merges make."""
    folder = tmp_path_factory.mktemp("killable")
    rng = np.random.default_rng(0)
    base = {f"layers.{i}.weight": rng.standard_normal((256, 250)).astype(np.float32) for i in range(8)}
    experts = {
        f"e{k}": {name: np.where(rng.random(v.shape) < 0.2, v + np.float32(0.125), v) for name, v in base.items()}
        for k in range(3)
    }
    write_all(folder / "in", base, experts)
    (folder / "in/recipe.yml").write_text(recipe_of())
    subprocess.run(command(folder, folder / "whole"), check=True, capture_output=True)
    return folder, contents(folder / "whole")


def command(folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "merge", str(folder / "in/recipe.yml"), str(out), "--kernels", "numpy",
            "--threads", "2", "--quiet", "--json"]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.long) for k in (2, 3))])
def test_killed_again_and_again(killable, tmp_path, seed):
    folder, expected = killable
    chance, out, inputs = random.Random(seed), tmp_path / "out", digest(folder / "in")
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # until a stage has begun, then a random time on
        wanted = tmp_path / "out.stages" / chance.choice(["root", "left", "right"])
        deadline = time.monotonic() + 20
        while process.poll() is None and not wanted.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
    assert killed
    done = subprocess.run(command(folder, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "exists and is not empty" in done.stderr, done.stderr
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digest(folder / "in") == inputs
