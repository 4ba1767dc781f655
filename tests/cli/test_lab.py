"""`rlmerge lab` and `rlmerge demo`: what they print and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.command_line import rlmerge

pytest.importorskip("torch")


def in_a_process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlmerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_the_plan_lists_cells_and_hours(tmp_path: Path) -> None:
    done = in_a_process("lab", "plan", "tiny", cwd=tmp_path)
    assert done.returncode == 0
    assert "rlvr-math-1" in done.stdout
    assert "hours on 2 processes" in done.stdout
    found = json.loads(in_a_process("lab", "plan", "tiny", "--json", cwd=tmp_path).stdout)
    assert found["cells"][0] == {"cell": "pretrain", "seconds": found["cells"][0]["seconds"], "done": False}
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_the_table_knows_every_method(tmp_path: Path) -> None:
    found = json.loads(in_a_process("lab", "plan", "methods", "--json", cwd=tmp_path).stdout)
    cells = [one["cell"] for one in found["cells"]]
    assert {"tune-tsv_m", "score-1-default-ties", "score-2-tuned-passthrough-code", "fisher-rlvr-code-2"} <= set(cells)
    assert 0 < found["seconds_left"] < 3600
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_the_study_counts_the_hours(tmp_path: Path) -> None:
    found = json.loads(in_a_process("lab", "plan", "confirmation", "--json", cwd=tmp_path).stdout)
    cells = {one["cell"] for one in found["cells"]}
    assert {
        "merge-fusion.rlvr.11-fp32-sar",
        "measure-sft-accuracy-code-16",
        "merge-fusion.other.22-fp32-sum",
        "joint-11",
    } <= cells
    other = json.loads(in_a_process("lab", "plan", "replication", "--json", cwd=tmp_path).stdout)
    assert {"merge-fusion.rlvr.28-fp32-sar", "rlvr-math-23"} <= {one["cell"] for one in other["cells"]}
    assert 3600 < found["seconds_left"] < other["seconds_left"]
    assert found["seconds_left"] + other["seconds_left"] < 12 * 3600, "both parts, on two cores without bf16 products"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan",), "of which preset"),
        (("methods", "tiny"), "leave 'tiny' out"),
        (("methods", "--steps", "5"), "--steps means nothing"),
        (("methods", "-o", "nothing/../file"), "cannot be a folder"),
        (("run", "methods"), "made by 'rlmerge lab methods'"),
        (("plan", "tinny"), "Did you mean 'tiny'?"),
        (("rlvr", "--task", "math:0"), "where to?"),
        (("rlvr", "-o", "out", "--task", "math:0"), "of which base?"),
        (("rlvr", "nothing", "-o", "out"), "Write one --task"),
        (("rlvr", "nothing", "-o", "out", "--task", "math:0"), "no config.json"),
        (("sft", "nothing", "-o", "out", "--task", "maths:0"), "Did you mean 'math'?"),
        (("sft", "nothing", "-o", "out", "--task", "gym:chain_sum"), "unknown"),
        (("sft", "nothing", "-o", "out", "--task", "math:0", "--lr", "0"), "is no rate"),
        (("sft", "nothing", "-o", "out", "--task", "math:0", "--lr", "nan"), "is no rate"),
        (("cold-start", "nothing", "-o", "out", "--slip", "-3"), "is no share"),
        (("sft", "nothing", "-o", "out", "--task", "math:0", "--group", "4"), "--group means nothing"),
        (("plan", "tiny", "--steps", "5"), "--steps means nothing"),
        (("run", "tiny", "-o", "nothing/../file"), "cannot be a folder"),
        (("pretrain", "base", "-o", "out"), "leave 'base' out"),
        (("fly",), "invalid choice"),
        (("study",), "which one?"),
        (("study", "confirmation"), "--seal TEXT is for the confirmation"),
        (("study", "rehearsal", "--seal", "0" * 128), "--seal TEXT is for the confirmation"),
        (("study", "confirmation", "--seal", "my favourite"), "128 hexadecimal digits"),
        (("pilot", "tiny"), "is no pilot"),
        (("run", "rehearsal"), "'rlmerge lab study rehearsal'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    done = rlmerge("lab", *arguments)
    assert (done.code, done.err.count("\n"), message in done.err) == (2, 1, True), done.err
    assert not (tmp_path / "out").exists()


def test_demo_copies_its_models(tmp_path: Path) -> None:
    done = in_a_process("demo", "--models", "-o", "play", cwd=tmp_path)
    assert done.returncode == 0
    assert "rlvr-code-2" in done.stdout
    assert (tmp_path / "play" / "models" / "base" / "bf16" / "model.safetensors").exists()
    assert (tmp_path / "play" / "models" / "rlvr-math-1" / "bf16" / "pack.json").exists()
    (tmp_path / "other" / "models" / "mine").mkdir(parents=True)
    done = in_a_process("demo", "--models", "-o", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "does not hold the demo's models" in done.stderr
    assert list((tmp_path / "other" / "models").iterdir()) == [tmp_path / "other" / "models" / "mine"]


def test_demo_leaves_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "one.txt").write_text("mine")
    done = in_a_process("demo", "-o", "thesis", cwd=tmp_path)
    assert done.returncode == 2
    assert "Name another folder" in done.stderr
