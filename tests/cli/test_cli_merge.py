"""`rlmerge merge`: flags instead of a recipe, sweeps, dry runs, its options, and an interrupt that is continued."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_tensors
from tests.cli.command_line import CONFIG, good_set, refused, rlmerge, rlmerge_process, snapshot, succeeded, weights

from rlmerge.checkpoint.header import read_header

NUMPY = ("--kernels", "numpy")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    good_set(folder)
    return folder


@pytest.fixture(autouse=True)
def untouched(good: Path) -> Any:
    """No merge changes its inputs."""
    before = snapshot(good)
    yield
    assert snapshot(good) == before


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but the one that tells of its run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.log"
    }


def weight_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_options_stand_anywhere(good: Path, tmp_path: Path) -> None:
    found = [
        succeeded(rlmerge("merge", *arguments, "--dry-run", "--json")).json["summary"]
        for arguments in (
            (good / "ties.yml", tmp_path / "o", "--threads", 2),
            ("--threads=2", good / "ties.yml", tmp_path / "o"),
            (good / "ties.yml", "--set", "lambda=0.5", tmp_path / "o"),
            (good / "ties.yml", "-o", tmp_path / "o"),
            ("--base", good / "base", "--expert", good / "e0", "--expert", good / "e1", "--out", tmp_path / "o",
             "--method", "ties", "--set", "weight=1"),
            (tmp_path / "o", "--base", good / "base", "--expert", good / "e0", "--expert", good / "e1",
             "--method", "ties", "--set", "weight=1"),
        )
    ]  # fmt: skip
    assert [summary["coordinates"] for summary in found] == [found[0]["coordinates"]] * 6


def test_an_output_folder_is_named_once(good: Path, tmp_path: Path) -> None:
    for arguments in ((good / "ties.yml",), ("-o", tmp_path / "o")):
        assert "give a recipe and one output folder" in refused(rlmerge("merge", *arguments))
    twice = refused(rlmerge("merge", good / "ties.yml", tmp_path / "o", "-o", tmp_path / "p"))
    assert "the output folder is given twice" in twice
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--over", "--thread=2", "--no-json"])
def test_options_are_never_guessed(good: Path, tmp_path: Path, option: str) -> None:
    done = rlmerge("merge", good / "ties.yml", tmp_path / "out", option)
    assert done.code == 2
    assert option in done.err
    assert list(tmp_path.iterdir()) == []


# ---- Recipes, flags, sweeps ----------------------------------------------------------------------------------------


def test_recipe_and_flags_write_the_same_weights(good: Path, tmp_path: Path) -> None:
    succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "a", *NUMPY))
    flags = ["--base", good / "base", "--expert", good / "e0", "--expert", good / "e1", "--method", "ties"]
    done = succeeded(
        rlmerge("merge", tmp_path / "b", *flags, "--set", "weight=1", "--set", "density=0.5", *NUMPY, "--json")
    )
    assert done.json["out"] == str(tmp_path / "b")
    assert done.json["merges"][0]["folder"] == "."
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


def test_flags_with_fishers_and_the_default_method(good: Path, tmp_path: Path) -> None:
    flags = ["--base", good / "base", "--expert", good / "e0", "--expert", good / "e1"]
    fishers = ["--fisher", good / "f0", "--fisher", good / "f1"]
    succeeded(rlmerge("merge", tmp_path / "a", *flags, *fishers, *NUMPY))
    assert json.loads((tmp_path / "a/rlmerge.json").read_text())["recipe"]["merge_method"] == "sar"
    message = refused(rlmerge("merge", tmp_path / "b", *flags, *fishers[:2], *NUMPY))
    assert "--fisher" in message
    assert "--expert" in message
    assert "sensitivity" in refused(rlmerge("merge", tmp_path / "b", *flags, *NUMPY))
    assert "--base" in refused(rlmerge("merge", tmp_path / "b", *flags[2:], "--method", "ties", "--set", "weight=1"))
    absent = refused(rlmerge("merge", tmp_path / "b", *flags[:4], "--expert", good / "absent", *fishers))
    assert "--expert" in absent
    assert "absent" in absent
    assert not (tmp_path / "b").exists()


def test_a_single_set_changes_the_recipe(good: Path, tmp_path: Path) -> None:
    succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "a", "--set", "lambda=0", *NUMPY))
    base = {
        name: info
        for shard in (good / "base").glob("*.safetensors")
        for name, info in read_header(shard).tensors.items()
    }
    out = read_header(tmp_path / "a/model.safetensors").tensors
    for name, info in base.items():
        one, two = (item.file.read_bytes()[item.start : item.start + item.nbytes] for item in (info, out[name]))
        assert one == two


def test_a_value_that_is_given_twice(good: Path, tmp_path: Path) -> None:
    merge = ("merge", good / "ties.yml", tmp_path / "out", *NUMPY)
    assert "the sweep has lambda=0.1 twice" in refused(rlmerge(*merge, "--set", "lambda=0.1,0.10"))
    both = ("--set", "density=0.5,0.7", "--set", "lambda=1,1")
    assert "the sweep has density=0.5, lambda=1 twice" in refused(rlmerge(*merge, *both))


def test_a_sweep_writes_a_folder_for_each_value(good: Path, tmp_path: Path) -> None:
    values = ["--set", "lambda=0.5,1", "--set", "density=0.25,1"]
    done = succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "sweep", *values, *NUMPY, "--json"))
    names = [entry["folder"] for entry in done.json["merges"]]
    assert names == [f"lambda={a},density={b}" for a in (0.5, 1) for b in (0.25, 1)]
    for name in names:
        settings = [part for pair in name.split(",") for part in ("--set", pair)]
        succeeded(rlmerge("merge", good / "ties.yml", tmp_path / name, *settings, *NUMPY, "--quiet"))
        alone, swept = contents(tmp_path / name), contents(tmp_path / "sweep" / name)
        assert alone.keys() == swept.keys()
        assert {key for key in alone if alone[key] != swept[key]} == set()
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(names)
    text = succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "again", "--set", "lambda=0.5,1", *NUMPY)).out
    assert "ties lambda=0.5" in text
    assert "ties lambda=1" in text


# ---- Messages --------------------------------------------------------------------------------------------------------


def test_memory_is_said_in_units_in_which_it_is_a_number(good: Path, tmp_path: Path) -> None:
    said = refused(rlmerge("merge", good / "ties.yml", tmp_path / "out", "--memory", "1kb"))
    assert "--memory 1 kB is less than one thread needs: 2" in said


def test_without_a_recipe_no_message_speaks_of_one(good: Path, tmp_path: Path) -> None:
    flags = ["merge", tmp_path / "out", "--base", good / "base", "--expert", good / "e0", "--method", "ties", *NUMPY]
    said = refused(rlmerge(*flags))
    assert said.rstrip().endswith("parameter 'weight' is missing: method 'ties' needs a number. Add '--set weight=1', "
                                  "or another value.")  # fmt: skip
    succeeded(rlmerge(*flags, "--set", "weight=1"))


# ---- Dry runs ------------------------------------------------------------------------------------------------------


def test_a_dry_run_looks_at_the_free_disk(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    out = tmp_path / "deep" / "out"
    dry = refused(rlmerge("merge", good / "ties.yml", out, "--dry-run"))
    assert " 100 B are free" in dry
    assert refused(rlmerge("merge", good / "ties.yml", out, *NUMPY)) == dry
    assert list(tmp_path.iterdir()) == []
    succeeded(rlmerge("check", good / "ties.yml"))


def test_a_dry_run_writes_nothing(good: Path, tmp_path: Path) -> None:
    done = succeeded(rlmerge("merge", good / "recipe.yml", tmp_path / "deep/out", "--dry-run", "--json"))
    assert done.json["summary"]["method"] == "sar"
    assert list(tmp_path.iterdir()) == []
    sweep = succeeded(
        rlmerge("merge", good / "ties.yml", tmp_path / "out", "--set", "lambda=0.5,1,2", "--dry-run", "--json")
    )
    one = succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "out", "--dry-run", "--json"))
    assert sweep.json["estimate"]["disk_bytes"] == 3 * one.json["estimate"]["disk_bytes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ("/out", "--overwrite")),
        (["--overwrite"], ("/out", "notes.txt")),
        (["--overwrite", "--memory", "10MB"], ("--memory", "MB")),
        (["--overwrite", "--shard-size", "5"], ("shard", "1MB")),
        (["--overwrite", "--kernels", "cuda"], ("kernels", "'cuda'")),
        (["--overwrite", "--set", "lambda=1,1,2"], ("lambda=1", "twice")),
    ],
)
def test_a_dry_run_refuses_what_merge_refuses(
    options: list[str], words: tuple[str, ...], good: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if options[1:]:  # an output that may be replaced, so that the other mistake is found
        (out / "rlmerge.json").write_text('{"files": {"notes.txt": ""}, "weights": []}')
    before = snapshot(tmp_path)
    real = refused(rlmerge("merge", good / "ties.yml", out, *options))
    dry = refused(rlmerge("merge", good / "ties.yml", out, "--dry-run", *options))
    assert all(word in real for word in words), real
    assert dry == real
    assert snapshot(tmp_path) == before


# ---- Options -------------------------------------------------------------------------------------------------------


def test_threads_memory_and_kernels_change_no_bit(good: Path, tmp_path: Path) -> None:
    runs = {
        "a": ["--kernels", "numpy", "--threads", "1"],
        "b": ["--kernels", "numpy", "--threads", "3", "--memory", "2GB"],
        "c": ["--kernels", "numpy", "--memory", "600MB", "--fsync"],
        "d": ["--kernels", "numba", "--threads", "2"],
    }
    for name, options in runs.items():
        succeeded(rlmerge("merge", good / "recipe.yml", tmp_path / name, *options, "--quiet"))
    assert all(contents(tmp_path / name) == contents(tmp_path / "a") for name in runs)


def test_memory_takes_sizes_in_words(good: Path, tmp_path: Path) -> None:
    for number, text in enumerate(("0.6GB", "600 MB", "1GiB", "700000k", "650000000")):
        succeeded(rlmerge("merge", good / "ties.yml", tmp_path / str(number), "--memory", text, "--dry-run", "--quiet"))
    for text in ("-1GB", "600 apples", "", "1e9", "inf"):
        assert f"--memory {text}" in refused(rlmerge("merge", good / "ties.yml", tmp_path / "o", f"--memory={text}"))
    assert "--memory" in refused(rlmerge("merge", good / "ties.yml", tmp_path / "o", "--memory", "0"))


def test_shard_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed, name in enumerate(("base", "e0", "e1")):
        values = {f"w{k}": rng.standard_normal((300, 500)).astype(np.float32) * (1 + seed) for k in range(5)}
        write_tensors(tmp_path / name / "model.safetensors", values)
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    flags = [
        "--base",
        tmp_path / "base",
        "--expert",
        tmp_path / "e0",
        "--expert",
        tmp_path / "e1",
        "--method",
        "linear",
    ]
    out = tmp_path / "out"
    succeeded(rlmerge("merge", out, *flags, "--set", "weight=1", "--shard-size", "1.3MB", *NUMPY, "--quiet"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
    assert all((out / name).stat().st_size <= 1.3e6 for name in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 300 * 500 * 4
    assert sorted(index["weight_map"]) == [f"w{k}" for k in range(5)]
    succeeded(rlmerge("verify", out, "--quiet"))


def test_sha256_is_of_the_input_files(good: Path, tmp_path: Path) -> None:
    succeeded(rlmerge("merge", good / "recipe.yml", tmp_path / "out", "--sha256", *NUMPY, "--quiet"))
    inputs = json.loads((tmp_path / "out/rlmerge.json").read_text())["inputs"]
    folders = {"base": "base", "e0": "e0", "e1": "e1", "fisher of e0": "f0", "fisher of e1": "f1"}
    assert [entry["role"] for entry in inputs] == list(folders)
    for entry in inputs:
        assert entry["files"]
        for file in entry["files"]:
            data = (good / folders[entry["role"]] / file["file"]).read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
    succeeded(rlmerge("merge", good / "recipe.yml", tmp_path / "plain", *NUMPY, "--quiet"))
    assert "sha256" not in (tmp_path / "plain/rlmerge.json").read_text()


def test_seed_matters_where_something_is_random(good: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--set", "arbitration=random", "--seed", str(seed), *NUMPY, "--quiet"]
        succeeded(rlmerge("merge", good / "recipe.yml", tmp_path / name, *options))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert weight_bytes(tmp_path / "a") != weight_bytes(tmp_path / "c")
    assert json.loads((tmp_path / "c/rlmerge.json").read_text())["recipe"]["seed"] == 2


def test_overwrite_replaces_only_an_earlier_output(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeded(rlmerge("merge", good / "ties.yml", out, *NUMPY, "--quiet"))
    first = contents(out)
    assert "--overwrite" in refused(rlmerge("merge", good / "ties.yml", out, "--set", "lambda=0.5", *NUMPY))
    assert contents(out) == first
    succeeded(rlmerge("merge", good / "ties.yml", out, "--set", "lambda=0.5", *NUMPY, "--quiet", "--overwrite"))
    assert weight_bytes(out) != first["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_accept_tokenizers(good: Path, tmp_path: Path) -> None:
    copied = tmp_path / "set"
    recipe = good_set(copied)
    (copied / "e1/chat_template.jinja").write_text("{{ other }}")
    for command in (["merge", recipe, tmp_path / "out", *NUMPY], ["check", recipe]):
        message = refused(rlmerge(*command))
        assert "chat template" in message
        done = succeeded(rlmerge(*command, "--accept-tokenizers"))
        assert "warning: " in done.err
        assert "chat template" in done.err
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (copied / "base/chat_template.jinja").read_bytes()


def test_paths_are_relative_to_the_recipe_and_stay_as_written(good: Path, tmp_path: Path) -> None:
    """Run from elsewhere, by the installed script; OUT is relative to where it was run."""
    succeeded(rlmerge_process("merge", good / "ties.yml", "here", *NUMPY, "--quiet", script=True, cwd=tmp_path))
    for name in ("rlmerge.json", "README.md"):
        assert str(good) not in (tmp_path / "here" / name).read_text()


# ---- Interrupts ----------------------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
import rlmerge.planner
rlmerge.planner.BLOCK, rlmerge.planner.UNIT = 32, 64
from rlmerge.execute.work import Worker
merge = Worker.merge
def slow(self, *arguments):
    time.sleep(0.5)
    return merge(self, *arguments)
if "--slow" in sys.argv:
    sys.argv.remove("--slow")
    Worker.merge = slow
from rlmerge.cli.main import main
main()
"""


def test_an_interrupted_merge_is_continued_by_the_same_command(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOWLY, "merge", str(good / "ties.yml"), str(out), *NUMPY, "--threads", "1"]
    running = subprocess.Popen(
        [*command, "--slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that was started in the background ignores the keyboard, and its children would, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    journal = tmp_path / "out.unfinished/journal.jsonl"
    until = time.monotonic() + 30
    while not (journal.exists() and journal.read_text().count('{"unit"') >= 2) and time.monotonic() < until:
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    printed, said = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert printed == ""
    assert said.splitlines() == [f"rlmerge: interrupted. The same command continues {out}."]
    assert not out.exists()
    assert journal.exists()
    message = refused(rlmerge("verify", out))
    assert "unfinished" in message
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 2 <= report["resumed_units"] < report["units"]
    assert "continuing: " in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["out"]
    succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "whole", *NUMPY, "--quiet"))
    assert weight_bytes(out) == weight_bytes(tmp_path / "whole")
    succeeded(rlmerge("verify", out, "--quiet"))


# ---- convert -------------------------------------------------------------------------------------------------------


def test_a_torch_folder_is_converted_and_merged(good: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = tmp_path / "e1"
    source.mkdir()
    values = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in weights(2).items()}
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    torch.save(values, source / "pytorch_model.bin")
    for path in (good / "e1").iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    flags = [
        "--base",
        good / "base",
        "--expert",
        good / "e0",
        "--method",
        "ties",
        "--set",
        "weight=1",
        "--set",
        "density=0.5",
    ]
    message = refused(rlmerge("merge", tmp_path / "out", *flags, "--expert", source, *NUMPY))
    assert f"rlmerge convert {source}" in message
    done = succeeded(rlmerge_process("convert", source, tmp_path / "made", "--quiet"))
    assert (done.out, done.err) == ("", "")
    message = refused(rlmerge("convert", source, tmp_path / "made"))
    assert "made" in message
    assert "exists" in message
    succeeded(rlmerge("merge", tmp_path / "out", *flags, "--expert", tmp_path / "made", *NUMPY, "--quiet"))
    succeeded(rlmerge("merge", good / "ties.yml", tmp_path / "twin", *NUMPY, "--quiet"))
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "twin")


def test_convert_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [tmp_path / "a/config.json", tmp_path / "a/model.safetensors"]
    monkeypatch.setattr("rlmerge.checkpoint.convert.convert", lambda *arguments, **options: made)
    command = ["convert", tmp_path / "one.pt", tmp_path / "a"]
    assert succeeded(rlmerge(*command)).out == f"{tmp_path}/a: config.json, model.safetensors\n"
    assert succeeded(rlmerge(*command, "--quiet")).out == ""
    done = succeeded(rlmerge(*command, "--json"))
    assert done.json == {"out": str(tmp_path / "a"), "files": ["config.json", "model.safetensors"]}
