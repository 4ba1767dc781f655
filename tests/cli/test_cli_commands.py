"""Every command: what it prints with and without --json and --quiet, and its exit codes 0, 2 and 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_tensors
from tests.cli.command_line import (
    INDEX,
    SHAPES,
    Done,
    good_set,
    refused,
    rlmerge,
    rlmerge_process,
    snapshot,
    succeeded,
)

from rlmerge.version import VERSION

COMMANDS = ("pack", "unpack", "merge", "check", "explain", "convert", "verify", "methods", "schema")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good set and a finished merge of it, `merged`; nobody writes here."""
    folder = tmp_path_factory.mktemp("good")
    good_set(folder)
    succeeded(rlmerge("merge", folder / "ties.yml", folder / "merged", "--kernels", "numpy", "--quiet"))
    return folder


Command = Callable[[Path, Path], list[Any]]
RUNS: dict[str, Command] = {
    "merge": lambda good, tmp: ["merge", good / "ties.yml", tmp / "out", "--kernels", "numpy"],
    "dry run": lambda good, tmp: ["merge", good / "ties.yml", tmp / "out", "--dry-run"],
    "check": lambda good, tmp: ["check", good / "recipe.yml"],
    "explain": lambda good, tmp: ["explain", good / "recipe.yml"],
    "verify": lambda good, tmp: ["verify", good / "merged"],
    "methods": lambda good, tmp: ["methods"],
    "schema": lambda good, tmp: ["schema"],
    "method": lambda good, tmp: ["methods", "ties"],
}
WRONG: dict[str, Command] = {
    "merge": lambda good, tmp: ["merge", good / "absent.yml", tmp / "out"],
    "dry run": lambda good, tmp: ["merge", good / "absent.yml", tmp / "out", "--dry-run"],
    "check": lambda good, tmp: ["check", good / "absent.yml"],
    "explain": lambda good, tmp: ["explain", good / "absent.yml"],
    "verify": lambda good, tmp: ["verify", good / "e0"],
    "methods": lambda good, tmp: ["methods", "absent"],
    "convert": lambda good, tmp: ["convert", good / "absent.bin", tmp / "out"],
}


# ---- Every command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_says_something(name: str, good: Path, tmp_path: Path) -> None:
    done = succeeded(rlmerge(*RUNS[name](good, tmp_path)))
    assert done.out.strip()
    assert "Traceback" not in done.err
    assert all(line.startswith(("warning: ", "compiling ")) for line in done.err.splitlines()), done.err


@pytest.mark.parametrize("name", RUNS)
def test_quiet_prints_nothing(name: str, good: Path, tmp_path: Path) -> None:
    done = succeeded(rlmerge(*RUNS[name](good, tmp_path), "--quiet"))
    assert (done.out, done.err) == ("", "")


@pytest.mark.parametrize("name", RUNS)
def test_json_is_one_document(name: str, good: Path, tmp_path: Path) -> None:
    done = succeeded(rlmerge(*RUNS[name](good, tmp_path), "--json"))
    assert done.json
    quiet = succeeded(rlmerge(*RUNS[name](good, tmp_path / "quiet"), "--json", "--quiet"))
    assert quiet.json, "--quiet keeps the JSON that was asked for"
    assert quiet.err == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_message_and_code_2(name: str, good: Path, tmp_path: Path) -> None:
    message = refused(rlmerge(*WRONG[name](good, tmp_path)))
    assert ("e0" if name == "verify" else "absent") in message
    assert refused(rlmerge(*WRONG[name](good, tmp_path), "--quiet")) == message
    done = rlmerge(*WRONG[name](good, tmp_path), "--json")
    assert refused(done) == message
    assert done.json["message"] + "\n" in (message, message + "\n")
    assert done.json["error"].endswith("Error")
    assert list(tmp_path.iterdir()) == []


DEFECTS = {
    "merge": "rlmerge.api.merge_to_folder",
    "dry run": "rlmerge.preflight.check",
    "check": "rlmerge.preflight.check",
    "explain": "rlmerge.preflight.explain",
    "verify": "rlmerge.verification.verify",
    "methods": "rlmerge.methods.method_names",
    "schema": "rlmerge.schema.recipe_schema",
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_ours_is_code_1(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("thing")

    monkeypatch.setattr(DEFECTS[name], fail)
    done = rlmerge(*RUNS[name](good, tmp_path))
    assert done.code == 1
    assert done.out == ""
    assert "ZeroDivisionError: thing" in done.err
    last = done.err.splitlines()[-1]
    assert VERSION in last
    assert "defect of rlmerge" in last


@pytest.mark.parametrize("name", DEFECTS)
def test_an_interrupt_is_code_130_and_one_line(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DEFECTS[name], interrupt)
    done = rlmerge(*RUNS[name](good, tmp_path))
    assert done.code == 130
    assert done.out == ""
    assert done.err.startswith("rlmerge: interrupted")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "--nonsense",
        "merge",
        "merge a b --nonsense",
        "merge a b --seed x",
        "check a --threads 0",
        "convert a",
    ],
)
def test_wrong_usage_is_code_2(arguments: str) -> None:
    done = rlmerge(*arguments.split())
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.count("Error") == 1
    assert "--help" in done.err
    told = rlmerge(*arguments.split(), "--json")
    assert (told.code, told.err) == (2, done.err)
    assert told.json == {"error": "usage", "message": done.err.removeprefix("Error: ").rstrip("\n")}


def test_what_is_needed_and_not_given(good: Path) -> None:
    assert "--expert" in refused(rlmerge("check"))
    assert "OUT" in refused(rlmerge("merge", good / "ties.yml"))
    sweep = refused(rlmerge("check", good / "ties.yml", "--set", "lambda=0.5,1"))
    assert "'rlmerge merge'" in sweep


# ---- The program itself --------------------------------------------------------------------------------------------


def test_help_lists_all_commands_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from rlmerge.cli.main import main; sys.argv = ['rlmerge', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "print(sorted({'numpy', 'numba', 'torch', 'argparse', 'yaml', 'xxhash'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    listed = {words[0] for line in text if len(words := line.split()) > 1}
    assert listed >= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_two_flags(command: str) -> None:
    text = succeeded(rlmerge(command, "--help")).out
    assert "--json" in text
    assert "--quiet" in text


def test_a_misspelt_command_gets_a_suggestion() -> None:
    assert "Did you mean 'check'?" in rlmerge("chek").err
    assert "--version" in rlmerge("--help").out
    assert rlmerge().code == 2


def test_checking_loads_no_compiler(good: Path) -> None:
    """The budget of `check` is a second, most of it for the sample."""
    program = (
        "import sys; from rlmerge.cli.main import main; sys.argv = ['rlmerge', 'check', sys.argv[1], '--quiet']\n"
        "main(); print(sorted({'numba', 'torch', 'pydantic', 'typer', 'rich', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(good / "recipe.yml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version_from_the_script_and_the_module() -> None:
    for script in (True, False):
        assert succeeded(rlmerge_process("--version", script=script)).out == f"rlmerge {VERSION}\n"


def test_a_reader_that_goes_away_is_no_defect() -> None:
    """As in `rlmerge methods | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "rlmerge.cli.main", "methods"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 1 would be a defect of ours


# ---- check, explain, methods, verify -------------------------------------------------------------------------------


def test_check_reports_and_writes_nothing(good: Path) -> None:
    before = snapshot(good)
    report = succeeded(rlmerge("check", good / "recipe.yml", "--json")).json
    assert report["summary"]["experts"] == ["e0", "e1"]
    assert report["summary"]["merged_tensors"] == len(SHAPES)
    assert report["estimate"]["bytes_written"] == 2 * report["summary"]["coordinates"]
    assert 0.2 < report["sample"]["experts"]["e0"]["support"] < 0.5
    assert report["alarms"] == []
    assert snapshot(good) == before


def test_alarms_are_warnings_on_stderr(good: Path, tmp_path: Path) -> None:
    """Fishers that the method does not read, an expert that equals the base: said, and code 0."""
    flags = ["--base", good / "base", "--expert", good / "base", "--expert", good / "e0"]
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: ties\nbase_model: {good}/base\nmodels:\n- model: {good}/base/../base/.\n"
        f"- {{model: {good}/e0, name: same}}\n- {{model: {good}/e0, name: again, fisher: {good}/f0}}\n"
        "parameters: {weight: 1}\n"
    )
    done = succeeded(rlmerge("check", tmp_path / "recipe.yml"))
    lines = done.err.splitlines()
    assert lines
    assert all(line.startswith("warning: ") for line in lines)
    assert any("the entry is ignored" in line for line in lines)
    done = succeeded(rlmerge("check", *flags, "--method", "linear", "--set", "weight=1"))
    assert "warning" not in done.out


def test_explain_resolves_filters(good: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {good}/base\nmodels:\n"
        f"- {{model: {good}/e0, parameters: {{weight: [{{filter: q_proj, value: 0.25}}, {{value: 1}}]}}}}\n"
        f"- {{model: {good}/e1, parameters: {{weight: 1, density: 0.5}}}}\nexclude: norm\n"
    )
    groups = succeeded(rlmerge("explain", recipe, "--json")).json
    assert sum(group["count"] for group in groups) == len(SHAPES)
    merged = {group["models"][f"{good}/e0"]["weight"]: group for group in groups if group["models"]}
    assert merged.keys() == {0.25, 1.0}
    assert merged[0.25]["count"] == 2
    assert all("q_proj" in pattern for pattern in merged[0.25]["tensors"])
    assert merged[1.0]["models"][f"{good}/e1"] == {"weight": 1.0, "density": 0.5}
    carried = {group["carried"]: group["tensors"] for group in groups if "carried" in group}
    assert carried == {"excluded": ["model.norm.weight"]}
    text = succeeded(rlmerge("explain", recipe)).out
    assert "0.25" in text
    assert "excluded" in text
    one = succeeded(rlmerge("explain", recipe, "--set", "lambda=0.125", "--json")).json
    assert one[0]["values"]["lambda"] == 0.125


def test_methods_describe_themselves() -> None:
    every = succeeded(rlmerge("methods", "--json")).json
    assert {"sar", "ties", "linear", "task_arithmetic", "ram"} <= {entry["name"] for entry in every}
    text = succeeded(rlmerge("methods")).out
    assert len(text.splitlines()) == len(every)
    for entry in every:
        alone = succeeded(rlmerge("methods", entry["name"])).out
        assert succeeded(rlmerge("methods", entry["name"], "--json")).json == entry
        for part in (
            entry["summary"],
            entry["formula"],
            entry["source"],
            *(spec["doc"] for spec in entry["parameters"]),
        ):
            assert part in alone
    assert "'ties'" in refused(rlmerge("methods", "tis"))


def test_verify_names_what_changed(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeded(rlmerge("merge", good / "ties.yml", out, "--kernels", "numpy", "--quiet"))
    found = succeeded(rlmerge("verify", out, "--json")).json
    assert found["tensors"] == len(SHAPES)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    (out / "tokenizer.json").unlink()
    message = refused(rlmerge("verify", out))
    assert "model.norm.weight" in message
    assert "tokenizer.json: is missing" in message
    (tmp_path / "gone.unfinished").mkdir()
    assert "again" in refused(rlmerge("verify", tmp_path / "gone"))


# ---- A large model -------------------------------------------------------------------------------------------------


def test_check_of_a_large_pair_is_quick(tmp_path: Path) -> None:
    """Qwen2.5-1.5B's shapes in three shards, twice, of files without content: 6 GB that take no disk."""
    shapes = {"model.embed_tokens.weight": (151936, 1536), "model.norm.weight": (1536,)}
    attention = {"q_proj": 1536, "k_proj": 256, "v_proj": 256, "o_proj": 1536}
    for name in (f"model.layers.{layer}" for layer in range(28)):
        for part, rows in attention.items():
            shapes[f"{name}.self_attn.{part}.weight"] = (rows, 1536)
            if part != "o_proj":
                shapes[f"{name}.self_attn.{part}.bias"] = (rows,)
        for part in ("gate_proj", "up_proj"):
            shapes[f"{name}.mlp.{part}.weight"] = (8960, 1536)
        shapes[f"{name}.mlp.down_proj.weight"] = (1536, 8960)
        shapes |= {f"{name}.{norm}_layernorm.weight": (1536,) for norm in ("input", "post_attention")}
    for model in ("base", "a", "b"):
        sparse_model(tmp_path / model, shapes, 3)
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    apparent = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert apparent > 9e9
    assert on_disk < 5e6
    started = time.monotonic()
    done: Done = succeeded(
        rlmerge_process("check", "--base", tmp_path / "base", "--expert", tmp_path / "a", "--expert", tmp_path / "b",
                        "--method", "ties", "--set", "weight=1", "--json")
    )  # fmt: skip
    seconds = time.monotonic() - started
    print(f"rlmerge check of two experts of 1.5B: {seconds:.2f} s with the start of Python, "
          f"{done.json['seconds']:.2f} s of check")  # fmt: skip
    assert done.json["summary"]["coordinates"] > 1.5e9
    assert any("equals the base" in text for text in done.json["alarms"])
    assert seconds < 10


def sparse_model(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int) -> None:
    """bf16 zeros in files that are nothing but their headers on disk."""
    folder.mkdir()
    names = list(shapes)
    step = -(-len(names) // shards)
    placed = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[k * step : (k + 1) * step]:
            size = 2
            for extent in shapes[name]:
                size *= extent
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
            offset += size
            placed[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "num_hidden_layers": 28}))


def test_explain_says_what_it_cuts_and_json_has_it_whole(tmp_path: Path) -> None:
    names = [f"{letter}.weight" for letter in "abcdefghi"]
    for model in ("base", "e0"):
        write_tensors(tmp_path / model / "model.safetensors", {name: np.ones((2, 2)) for name in names}, "F32")
    for excluded, said in (("[a-f]", "f.weight\n"), ("[a-h]", "f.weight, and 2 more (--json lists all)\n")):
        (tmp_path / "r.yml").write_text(
            "merge_method: ties\nbase_model: base\nmodels: [{model: e0}]\nparameters: {weight: 1}\n"
            f"exclude: '^{excluded}'\n"
        )
        assert said in succeeded(rlmerge("explain", tmp_path / "r.yml")).out
        (carried,) = [g for g in succeeded(rlmerge("explain", tmp_path / "r.yml", "--json")).json if "carried" in g]
        assert carried["tensors"] == names[: carried["count"]]
    assert carried["count"] == 8
