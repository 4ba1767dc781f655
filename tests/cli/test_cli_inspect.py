"""`rlmerge inspect` as a user runs it: the screen, the document, the recipe, and mistakes."""

from __future__ import annotations

import json

import jsonschema
import pytest
from tests.cli.command_line import rlmerge as run
from tests.geometry.geometry_models import make_base, train, write

import rlmerge
from rlmerge.demo.assets import DATA
from rlmerge.errors import RecipeError
from rlmerge.geometry.matrix_figures import SpectraSettings


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
    assert "warning: x, y: only" in done.err
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


def test_spectra_as_asked(models):
    """Settings of spectra ask for them; a bound on memory is theirs, too, and is looked at first."""
    done = run("inspect", "base", "a", "--no-storage", "--spectra-null", "all", "--spectra-exact", "--json")
    found = json.loads(done.out)
    jsonschema.Draft202012Validator(rlmerge.geometry_schema()).validate(found)
    assert found["spectra"]["settings"]["null"] == "all"
    assert found["spectra"]["settings"]["exact"]
    assert "shift" in found["spectra"]["total"]["null"]["experts"]["a"]
    assert "spectra" not in json.loads(run("inspect", "base", "a", "--no-storage", "--json").out)
    with pytest.raises(RecipeError, match="MB of memory for matrices"):
        rlmerge.inspect("base", "a", spectra=SpectraSettings(memory=100), progress=lambda step: pytest.fail(str(step)))


def test_function_space_of_trained_experts(tmp_path, monkeypatch):
    """On the demo's packs, with a task each; the whole document is what its schema says."""
    pytest.importorskip("torch")
    monkeypatch.chdir(DATA / "models")
    done = run(
        "inspect", "base/bf16", "rlvr-math-1/bf16", "rlvr-code-1/bf16", "--name", "math", "--name", "code",
        "--data", "math=math:0", "--data", "code=code:0", "--source", "gold", "--sequences", "3", "--points", "2",
        "--max-new-tokens", "48", "--no-storage", "--no-null", "-o", str(tmp_path / "report.json"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "passes over 3 sequences follow" in done.err
    found = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(found, rlmerge.geometry_schema())
    assert found["function"]["settings"]["choice"]["source"] == "gold"
    assert [len(path["alphas"]) for path in found["function"]["paths"]] == [2, 2, 2]
    losses = {
        one["model"]: {each["set"]: each["value"] for each in one["losses"]} for one in found["function"]["models"]
    }
    assert losses["math"]["math:0"] < losses["code"]["math:0"]


def test_wrong_data_are_told_before_a_weight_is_read(models, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("rlmerge.geometry.inspect.measure_coordinates", None)
    for arguments, message in (
        (["--data", "maths:1"], "task 'maths:1': unknown"),
        (["--data", "math:1", "--source", "golden"], "Did you mean 'gold'?"),
        (["--data", "math:1", "--points", "1"], "it has two ends"),
        (["--data", "a=math:1"], "give one file or task for all, or one for each expert"),
    ):
        done = run("inspect", "base", "a", "b", *arguments)
        assert (done.code, message in done.err) == (2, True), done.err


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
        (["base", "a", "a"], "a is given twice"),
        (["base", "base"], "base is the base itself"),
    ],
)
def test_mistakes(models, arguments, message):
    done = run("inspect", *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(models.glob("*.json"))
