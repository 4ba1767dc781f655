"""A killed merge is continued by the same command: inputs untouched, no finished unit done again, the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
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
from tests.execute.test_same_bytes import METHODS, SAR, contents, recipe_of
from tests.methods.small_models import make_recipe, small_blocks, some_fishers, sparse_model, write_all

import rlmerge
from rlmerge.errors import OutputError
from rlmerge.execute.folder import OutputFolder
from rlmerge.execute.work import Worker

# the command line in a process of its own, with units small enough that kills land between many of them
PROGRAM = """
import sys
import rlmerge.planner
rlmerge.planner.BLOCK, rlmerge.planner.UNIT = 8192, 16384
from rlmerge.cli.main import main
sys.argv[0] = "rlmerge"
main()
"""


def command(folder: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "merge", str(folder / "recipe.yml"), str(out), "--kernels", "numpy",
            "--threads", "2", "--quiet", "--json", *options]  # fmt: skip


def digest(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    """2 M parameters and two experts; the bytes that an undisturbed merge makes of them, and its number of units."""
    folder = tmp_path_factory.mktemp("killable")
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.weight": (512, 500) for i in range(8)} | {"norm.weight": (777,)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    experts = {}
    for key in ("a", "b"):
        experts[key] = {
            name: np.where(rng.random(value.shape) < 0.2, value + np.float32(0.125), value).astype(np.float32)
            for name, value in base.items()
        }
    write_all(folder / "in", base, experts)
    recipe = make_recipe(folder / "in", "sar", ["a", "b"], {"sensitivity": "delta2", "density": 0.5})
    (folder / "in" / "recipe.yml").write_text(recipe.to_yaml())
    done = subprocess.run(command(folder / "in", folder / "whole"), check=True, capture_output=True, text=True)
    return folder, contents(folder / "whole"), json.loads(done.stdout)["units"]


def lines_of(journal: Path) -> list[bytes]:
    try:
        return [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []


def kill_once(folder: Path, out: Path, chance: random.Random, units: int) -> bool:
    """Starts the merge and kills it at a random moment; whether it was alive then."""
    journal = out.with_name(out.name + ".unfinished") / "journal.jsonl"
    # a random journal length (stages write lines too), or a random time, which lands in the start as well
    wanted = chance.randrange(0, units + 30) if chance.random() < 0.75 else None
    deadline = time.monotonic() + (60 if wanted is not None else chance.uniform(0.05, 2.0))
    process = subprocess.Popen(
        command(folder / "in", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and time.monotonic() < deadline:
        if wanted is not None and len(lines_of(journal)) > wanted:
            time.sleep(chance.uniform(0, 0.004))
            break
        time.sleep(0.0005)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def check_kill(killable, tmp_path, seed: int) -> None:
    folder, expected, units = killable
    chance = random.Random(seed)
    out = tmp_path / "out"
    before = digest(folder / "in")
    alive = kill_once(folder, out, chance, units)
    assert digest(folder / "in") == before
    unfinished = tmp_path / "out.unfinished"
    if out.exists():  # the kill came when everything was done
        assert contents(out, but=("run.log", "journal.jsonl", "lock")) == expected
        return
    assert alive
    assert {path.name for path in tmp_path.iterdir()} <= {"out.unfinished"}
    finished = [line for line in lines_of(unfinished / "journal.jsonl") if line.startswith(b'{"unit"')]
    done = subprocess.run(command(folder / "in", out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)
    assert result["resumed_units"] == len(finished)  # none is done again
    assert result["units"] == units
    assert contents(out) == expected
    assert digest(folder / "in") == before
    assert not unfinished.exists()


@pytest.mark.parametrize("seed", [pytest.param(k, marks=() if k < 8 else pytest.mark.long) for k in range(20)])
def test_kill_and_continue(killable, tmp_path, seed):
    check_kill(killable, tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_kill_and_continue_often(killable, tmp_path, seed):
    check_kill(killable, tmp_path, seed)


def test_killed_again_and_again(killable, tmp_path):
    """Kills in a row only ever move it forward."""
    folder, expected, units = killable
    out, chance, seen = tmp_path / "out", random.Random(1), 0
    for _ in range(4):
        if kill_once(folder, out, chance, units // 2):
            journal = lines_of(tmp_path / "out.unfinished" / "journal.jsonl")
            count = sum(line.startswith(b'{"unit"') for line in journal)
            assert count >= seen
            seen = count
    if not out.exists():
        done = subprocess.run(command(folder / "in", out), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["resumed_units"] == seen
    assert contents(out) == expected


# -- interruptions without a process: an exception in the middle -----------------------------------------------------


class Stop(Exception):
    pass


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 3, "BF16")
    write_all(tmp_path / "in", base, experts, some_fishers(rng, list(experts)), "BF16")
    return tmp_path / "in"


def stop_after(monkeypatch, units: int) -> None:
    """Lets the merge of the next run fail when so many units are written."""
    merge, left = Worker.merge, [units]

    def stopping(self, *arguments):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return merge(self, *arguments)

    monkeypatch.setattr(Worker, "merge", stopping)


def interrupted(monkeypatch, recipe, out, units=4, **options) -> Path:
    """An unfinished folder with `units` written units."""
    with monkeypatch.context() as patch, small_blocks(8, 16):
        stop_after(patch, units)
        with pytest.raises(Stop):
            rlmerge.merge_to_folder(recipe, out, threads=1, **options)
    return out.with_name(out.name + ".unfinished")


def finish(recipe, out, **options):
    with small_blocks(8, 16):
        return rlmerge.merge_to_folder(recipe, out, **options)


@pytest.mark.parametrize("name", list(SAR))
@pytest.mark.parametrize("units", [0, 1, 5])
def test_resume_makes_the_same_bytes_with_any_threads_and_kernels(models, tmp_path, monkeypatch, name, units):
    recipe = recipe_of(models, "sar", SAR[name])
    expected = contents(finish(recipe, tmp_path / "whole").out)
    interrupted(monkeypatch, recipe, tmp_path / "out", units, kernels="numpy")
    assert not (tmp_path / "out").exists()
    outcome = finish(recipe, tmp_path / "out", threads=2)
    assert (outcome.resumed_units, contents(outcome.out)) == (units, expected)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "sar"])
def test_every_method_is_continued_to_the_same_bytes(models, tmp_path, monkeypatch, method):
    """Matrices that are made whole, stages over the model, random ones: after three units, with more threads."""
    recipe = recipe_of(models, method, {})
    expected = contents(finish(recipe, tmp_path / "whole").out)
    interrupted(monkeypatch, recipe, tmp_path / "out", 3)
    outcome = finish(recipe, tmp_path / "out", threads=2)
    assert (outcome.resumed_units, contents(outcome.out)) == (3, expected)


def test_finished_stages_are_not_measured_again(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "sar", SAR["model"])
    interrupted(monkeypatch, recipe, tmp_path / "out", 2)
    calls = []
    measure = Worker.measure
    monkeypatch.setattr(Worker, "measure", lambda self, *a: calls.append(a) or measure(self, *a))
    finish(recipe, tmp_path / "out")
    assert calls == []


def test_finished_units_are_not_read_again(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "ram", {})
    whole = finish(recipe, tmp_path / "whole")
    interrupted(monkeypatch, recipe, tmp_path / "out", 6)
    assert finish(recipe, tmp_path / "out").bytes_read < whole.bytes_read


@pytest.mark.parametrize("cut", [1, 2, 30, "line"])
def test_a_journal_line_cut_in_half(models, tmp_path, monkeypatch, cut):
    recipe = recipe_of(models, "ram", {})  # has no stages, so the last line is a unit's
    expected = contents(finish(recipe, tmp_path / "whole").out)
    journal = interrupted(monkeypatch, recipe, tmp_path / "out", 4) / "journal.jsonl"
    data = journal.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    journal.write_bytes(data[: last + 1 if cut == "line" else len(data) - cut])
    outcome = finish(recipe, tmp_path / "out")
    assert (outcome.resumed_units, contents(outcome.out)) == (3, expected)


@pytest.mark.parametrize("garbage", [b"\0\0\0\0", b"[1, 2]\n", b'{"unit": ', b"nonsense\n"])
def test_garbage_behind_the_journal(models, tmp_path, monkeypatch, garbage):
    recipe = recipe_of(models, "ties", {"density": 0.5})
    expected = contents(finish(recipe, tmp_path / "whole").out)
    journal = interrupted(monkeypatch, recipe, tmp_path / "out", 4) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + garbage)
    outcome = finish(recipe, tmp_path / "out")
    assert (outcome.resumed_units, contents(outcome.out)) == (4, expected)


@pytest.mark.parametrize("line", [0, 1, 2, -1])
def test_another_number_in_the_journal(models, tmp_path, monkeypatch, line):
    """A flipped bit of a digit is JSON, too: that line and what follows it are done again."""
    recipe = recipe_of(models, "sar", SAR["model"])
    expected = contents(finish(recipe, tmp_path / "whole").out)
    journal = interrupted(monkeypatch, recipe, tmp_path / "out", 4) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    body, key, signature = lines[line].rpartition(b', "xxh3": "')
    place = max(n for n, c in enumerate(body) if chr(c).isdigit() and (line != 0 or n > body.index(b"started")))
    lines[line] = (
        body[:place] + (b"1" if body[place : place + 1] == b"0" else b"0") + body[place + 1 :] + key + signature
    )
    json.loads(lines[line])
    journal.write_bytes(b"".join(lines))
    outcome = finish(recipe, tmp_path / "out")
    assert (outcome.resumed_units, contents(outcome.out)) == (3 if line == -1 else 0, expected)


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_journal_without_its_first_line(models, tmp_path, monkeypatch, length):
    """Killed while the journal was being begun."""
    recipe = recipe_of(models, "ram", {})
    expected = contents(finish(recipe, tmp_path / "whole").out)
    journal = interrupted(monkeypatch, recipe, tmp_path / "out", 3) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:length])
    outcome = finish(recipe, tmp_path / "out")
    assert (outcome.resumed_units, contents(outcome.out)) == (0, expected)


def test_corrupted_units_are_done_again(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "sar", SAR["default"])
    expected = contents(finish(recipe, tmp_path / "whole").out)
    unfinished = interrupted(monkeypatch, recipe, tmp_path / "out", 4)
    with (unfinished / "model.safetensors").open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length)
        byte = file.read(1)
        file.seek(8 + length)
        file.write(bytes([byte[0] ^ 1]))
    outcome = finish(recipe, tmp_path / "out")
    assert (outcome.resumed_units, contents(outcome.out)) == (3, expected)


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_shard_of_another_length_is_mended(models, tmp_path, monkeypatch, size):
    recipe = recipe_of(models, "ram", {})
    expected = contents(finish(recipe, tmp_path / "whole").out)
    unfinished = interrupted(monkeypatch, recipe, tmp_path / "out", 4)
    os.truncate(unfinished / "model.safetensors", size)
    assert contents(finish(recipe, tmp_path / "out").out) == expected


@pytest.mark.parametrize("change", ["parameter", "seed", "method", "header", "mtime", "unit"])
def test_only_its_own_merge_is_continued(models, tmp_path, monkeypatch, change):
    """Refused, naming the folder and the way out; --overwrite then starts again."""
    recipe = recipe_of(models, "sar", SAR["default"])
    interrupted(monkeypatch, recipe, tmp_path / "out", 4)
    other = recipe
    if change == "parameter":
        other = recipe.with_settings({"lambda": 0.5})
    elif change == "seed":
        other = recipe.with_settings({"seed": 1})
    elif change == "method":
        other = recipe_of(models, "ram", {})
    elif change == "mtime":
        os.utime(models / "e1" / "model.safetensors", ns=(0, 12345))
    elif change == "header":
        base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
        write_model(models / "e1", experts["e1"] | {"b.bias": (base["b.bias"], "F32")}, dtype="BF16")
    with pytest.raises(OutputError, match="--overwrite") as caught, small_blocks(8, 24 if change == "unit" else 16):
        rlmerge.merge_to_folder(other, tmp_path / "out")
    assert "out.unfinished" in str(caught.value)
    if change == "unit":
        return
    expected = contents(finish(other, tmp_path / "whole").out)
    # the refusal gave the folder free again
    outcome = finish(other, tmp_path / "out", overwrite=True)
    assert (outcome.resumed_units, contents(outcome.out)) == (0, expected)


def test_another_version_is_refused(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "ram", {})
    interrupted(monkeypatch, recipe, tmp_path / "out", 4)
    monkeypatch.setattr("rlmerge.plan.VERSION", "99.0")
    with pytest.raises(OutputError, match="version"):
        finish(recipe, tmp_path / "out")


def test_overwrite_continues_its_own_unfinished_merge(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "ram", {})
    interrupted(monkeypatch, recipe, tmp_path / "out", 4)
    assert finish(recipe, tmp_path / "out", overwrite=True).resumed_units == 4


def test_an_unfinished_sweep_is_continued(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "sar", SAR["default"])
    sweep = [{"lambda": 0.5, "density": 0.5}, {"lambda": 1.0, "density": 0.9}]
    expected = contents(finish(recipe, tmp_path / "whole", sweep=sweep).out)
    interrupted(monkeypatch, recipe, tmp_path / "out", 5, sweep=sweep)
    outcome = finish(recipe, tmp_path / "out", sweep=sweep)
    assert (outcome.resumed_units, contents(outcome.out)) == (5, expected)


# -- the last moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", range(9))
def test_stopped_at_the_end(models, tmp_path, monkeypatch, overwrite, moment):
    """Every rename, unlink and removal of the last moments, stopped before it happens: the same command finishes."""
    recipe = recipe_of(models, "ram", {})
    expected = contents(finish(recipe, tmp_path / "whole").out)
    if overwrite:
        finish(recipe_of(models, "linear", {}), tmp_path / "out")
    with monkeypatch.context() as patch:
        left = [moment]

        def guard(name, owner):
            original = getattr(owner, name)

            def stopping(*arguments, **options):
                if started:
                    if left[0] == 0:
                        raise Stop
                    left[0] -= 1
                return original(*arguments, **options)

            patch.setattr(owner, name, stopping)

        started: list[bool] = []
        for name in ("rename", "unlink", "rmdir"):
            guard(name, Path)
        guard("rmtree", shutil)
        guard("rename", os)
        guard("replace", os)
        last = OutputFolder.finish
        patch.setattr(OutputFolder, "finish", lambda self: started.append(True) or last(self))
        with contextlib.suppress(Stop):
            finish(recipe, tmp_path / "out", overwrite=overwrite)
    out = tmp_path / "out"
    if out.exists() and (out / "model.safetensors").read_bytes() == expected["model.safetensors"]:
        rlmerge.verify(out)  # it is whole: at most something to tidy away
    else:
        if overwrite:
            assert out.exists() or (tmp_path / "out.unfinished").exists()
        finish(recipe, out, overwrite=overwrite)
    assert contents(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
    assert not {".replaced", "journal.jsonl", "lock"} & {path.name for path in out.iterdir()}
