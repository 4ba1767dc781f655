"""`rlmerge compare` as a user calls it: four forms of output, and refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from tests.cli.command_line import refused, rlmerge, rlmerge_process, succeeded

from rlmerge.evaluate.results import Header, ResultsWriter, Sample


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tasks, a base, two experts and two merges with long names; the problems of one task have two samples."""
    folder, rng, paths = tmp_path_factory.mktemp("results"), np.random.default_rng(0), []
    for task, n, samples in (("math", 200, 2), ("code", 80, 1)):
        for name, role, chance in (
            ("base", "base", 0.2),
            ("models/qwen2.5-1.5b-grpo-math", "expert", 0.7 if task == "math" else 0.2),
            ("models/qwen2.5-1.5b-grpo-code", "expert", 0.7 if task == "code" else 0.25),
            ("out/sar-density-0.8-lambda-1.0-both", "merged", 0.65),
            ("out/ties", "merged", 0.5),
        ):
            path = folder / task / f"{Path(name).name}.jsonl"
            with ResultsWriter.open(path, Header(name, task, {"temperature": 1}, n, role)) as writer:
                for i, k in np.ndindex(n, samples):
                    writer.append(Sample(f"{task}/{i}", k, bool(rng.random() < chance)))
            paths.append(path)
    return paths


def test_the_terminal(files: list[Path]):
    out = succeeded(rlmerge("compare", *files)).out
    assert max(map(len, out.splitlines())) <= 100, out
    for text in ("math: 200 problems, 2 samples each", "code: 80 problems, 1 sample each", "pass@2", "less base"):
        assert text in out
    for text in ("lambda-1.0-both", "p Holm", "of the gain", "gain < 4 SE", "in all)"):
        assert text in out


def test_json(files: list[Path]):
    found = succeeded(rlmerge("compare", *files, "--json")).json
    assert [task["task"] for task in found["tasks"]] == ["code", "math"]
    sar = found["tasks"][1]["models"][3]
    assert sar["difference"]["reference"] == "base"
    assert [one["gain_retention"] is None for one in sar["retention"]] == [False, True]


def test_csv(files: list[Path]):
    out = succeeded(rlmerge("compare", *files, "--csv")).out
    rows = list(csv.DictReader(out.splitlines()))
    assert all(None not in row and None not in row.values() for row in rows)
    sar = [row for row in rows if row["model"].startswith("out/sar") and row["task"] == "math"]
    assert len(sar) == 2  # one for each expert
    assert 0.4 < float(sar[0]["gain_retention"]) < 1.4
    assert sar[1]["gain_retention"] == ""


def test_markdown(files: list[Path]):
    out = succeeded(rlmerge("compare", *files, "--markdown", "--reference", "out/ties")).out
    lines = out.splitlines()
    assert "### math: 200 problems, 2 samples each; in %, with 95 % intervals" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert any("less out/ties" in line for line in tables)
    assert len({line.count("|") for line in tables}) == 3  # math with pass@2, code without, retention


def test_quiet(files: list[Path]):
    assert succeeded(rlmerge("compare", *files, "--quiet")).out == ""


def test_refusals(files: list[Path], tmp_path: Path):
    assert "cannot be read" in refused(rlmerge("compare", tmp_path / "absent.jsonl"))
    assert "neither a results file" in refused(rlmerge("compare", files[0], "--base", "nobody"))
    wrong = rlmerge("compare", files[0], "--csv", "--json")
    assert wrong.code == 2
    assert "give one of them" in wrong.err


def test_force(files: list[Path], tmp_path: Path):
    with ResultsWriter.open(tmp_path / "r.jsonl", Header("hot", "code", {"temperature": 2}, 80)) as writer:
        for i in range(80):
            writer.append(Sample(f"code/{i}", 0, i % 2 == 0))
    message = refused(rlmerge("compare", files[5], tmp_path / "r.jsonl"))
    assert "settings.temperature: 1" in message
    assert "--force" in message
    assert "compared by force" in succeeded(rlmerge("compare", files[5], tmp_path / "r.jsonl", "--force")).out
    assert "compared by force" in succeeded(rlmerge("compare", files[5], tmp_path / "r.jsonl", "--force", "--json")).err


def test_the_same_bytes_twice(files: list[Path]):
    one, other = (succeeded(rlmerge_process("compare", *files, "--json")).out for _ in range(2))
    assert one == other
