"""`rlmerge inspect` as a user runs it: the screen, the document, the recipe, and mistakes."""

from __future__ import annotations

import json

import pytest
from tests.cli.command_line import rlmerge as run
from tests.geometry.geometry_models import make_base, train, write


@pytest.fixture
def models(tmp_path, monkeypatch):
    base = make_base()
    write(tmp_path, base, {"a": train(base, 1), "b": train(base, 2)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_summary_document_and_recipe(models):
    done = run("inspect", "base", "a", "b", "--name", "x", "--name", "y", "-o", "report.json", "--recipe", "r.yml")
    assert done.code == 0
    for text in ("support of bf16 casts", "x, y", "(null model)", "ties density 0.2", "RLVR", "merge_method: sar"):
        assert text in done.out, text
    assert "report.json: the whole document" in done.out
    assert "warning: x: only" in done.err
    found = json.loads((models / "report.json").read_text())
    assert found["schema"] == "rlmerge.geometry/1"
    again = run("inspect", "base", "a", "b", "--name", "x", "--name", "y", "--json")
    assert json.loads(again.out)["coordinates"] == found["coordinates"]
    assert run("merge", "r.yml", "out", "-q").code == 0


def test_parts_can_be_left_out(models):
    done = run("inspect", "base", "a", "b", "--no-null", "--no-storage", "--trajectory", "--json", "-q")
    found = json.loads(done.out)
    assert "storage" not in found
    assert "null" not in found["coordinates"]["total"]
    assert found["settings"] == {"null": False, "seed": 0, "run": 2**18, "trajectory": True}
    done = run("inspect", "base", "a", "b", "--no-storage", "--trajectory")
    assert "trajectory: never" in done.out
    assert run("inspect", "base", "a", "--no-storage", "-q").out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "missing"], "missing"),
        (["base", "a", "-o", "no/report.json"], "there is no folder no"),
        (["base", "a", "--memory", "100MB"], "less than one thread needs"),
        (["base", "a", "b", "--name", "x"], "--name is given 1 times for 2 experts"),
        (["base", "a", "b", "--data", "x=f.jsonl", "--data", "g.jsonl"], "NAME=FILE for each"),
        (["base", "a", "b", "--data", "f.jsonl", "--data", "g.jsonl"], "several times without names"),
        (["base", "a", "--recipe", "r.json"], "ends in .yml"),
        (["base", "a", "a"], "a"),
    ],
)
def test_mistakes(models, arguments, message):
    done = run("inspect", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(models.glob("*.json"))
