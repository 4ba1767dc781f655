"""Several documents in one recipe file on the command line: merge, check, explain, `--set NAME.KEY`, `--stages`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.command_line import good_set, refused, rlmerge, snapshot, succeeded

NUMPY = ("--kernels", "numpy")
RECIPE = """\
merge_method: ties
base_model: inner
models: [{model: e1}]
parameters: {weight: 1, density: 0.5}
---
name: inner
merge_method: task_arithmetic
base_model: base
models: [{model: e0, parameters: {weight: 1}}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    good_set(tmp_path / "in")
    (tmp_path / "in/stages.yml").write_text(RECIPE)
    return tmp_path / "in/stages.yml"


def test_merge_says_what_it_will_make_and_shows_each(recipe: Path, tmp_path: Path) -> None:
    done = succeeded(rlmerge("merge", recipe, tmp_path / "out", *NUMPY))
    assert "1 stage(s) in " in done.err
    assert "removed when the output is whole: to merge: inner (1.46 kB); then " in done.err
    assert done.out.index("inner: task_arithmetic") < done.out.index("ties\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert succeeded(rlmerge("verify", tmp_path / "out", "--json")).json["tensors"] == 6


def test_merge_as_json_and_stages_that_stay(recipe: Path, tmp_path: Path) -> None:
    command = ("--stages", tmp_path / "kept", *NUMPY, "--json", "--quiet")
    first = succeeded(rlmerge("merge", recipe, tmp_path / "one", *command)).json
    assert first["stages"]["inner"]["out"] == str(tmp_path / "kept/inner")
    assert first["stages"]["inner"]["merges"][0]["statistics"]["support"].keys() == {"e0"}
    second = succeeded(rlmerge("merge", recipe, tmp_path / "two", *command))
    assert second.json["stages"] == {"inner": None}
    assert second.err == ""
    assert succeeded(rlmerge("verify", tmp_path / "kept/inner", "--json")).json["tensors"] == 6
    done = succeeded(rlmerge("merge", recipe, tmp_path / "three", "--stages", tmp_path / "kept", *NUMPY))
    assert "kept: there already: inner; then" in done.err
    alone = succeeded(rlmerge("merge", recipe.with_name("ties.yml"), tmp_path / "four", *NUMPY, "--json")).json
    assert alone["stages"] == {}


def test_dry_run_knows_what_is_there(recipe: Path, tmp_path: Path) -> None:
    command = ("merge", recipe, tmp_path / "out", "--stages", tmp_path / "kept", *NUMPY)
    before = snapshot(tmp_path)
    report = succeeded(rlmerge(*command, "--dry-run", "--json")).json
    assert snapshot(tmp_path) == before
    assert report["sample"] == {}
    one = report["estimate"]["disk_bytes"]
    assert report["total"]["disk_bytes"] == 2 * one
    succeeded(rlmerge("merge", recipe, tmp_path / "other", *command[3:]))
    before = snapshot(tmp_path)
    report = succeeded(rlmerge(*command, "--dry-run", "--json")).json
    assert snapshot(tmp_path) == before
    assert report["sample"]["experts"].keys() == {"e1"}
    assert report["total"]["disk_bytes"] == one


def test_check_shows_every_document(recipe: Path) -> None:
    before = snapshot(recipe.parent)
    done = succeeded(rlmerge("check", recipe))
    order = [
        "--- inner",
        "task_arithmetic of 1 model: e0",
        "e0: support",
        "--- the output",
        "ties of 1",
        "--- all that",
    ]
    places = [done.out.index(text) for text in order]
    assert places == sorted(places)
    assert "warning: no sample was taken: the weights of inner are not there yet" in done.err
    assert snapshot(recipe.parent) == before
    report = succeeded(rlmerge("check", recipe, "--json")).json
    assert report["stages"]["inner"]["summary"]["method"] == "task_arithmetic"


def test_explain_shows_every_document(recipe: Path) -> None:
    shown = succeeded(rlmerge("explain", recipe)).out
    places = [shown.index(text) for text in ("--- inner", "e0: weight 1", "--- the output", "e1: weight 1")]
    assert places == sorted(places)
    groups = succeeded(rlmerge("explain", recipe, "--json")).json
    assert [group["stage"] for group in groups] == ["inner", ""]
    assert "stage" not in succeeded(rlmerge("explain", recipe.with_name("ties.yml"), "--json")).json[0]


def test_set_is_of_the_output_or_of_a_named_document(recipe: Path, tmp_path: Path) -> None:
    flags = ("--set", "inner.lambda=0", "--set", "lambda=0", "--seed", 5)
    succeeded(rlmerge("merge", recipe, tmp_path / "out", *flags, *NUMPY))
    said = json.loads((tmp_path / "out/rlmerge.json").read_text())
    assert said["recipe"]["parameters"]["lambda"] == said["stages"]["inner"]["recipe"]["parameters"]["lambda"] == 0
    assert (said["recipe"]["seed"], said["stages"]["inner"]["recipe"]["seed"]) == (5, 0)
    succeeded(rlmerge("merge", recipe, tmp_path / "sweep", "--set", "lambda=0,1", *NUMPY))
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["lambda=0", "lambda=1"]
    assert "only the output can be swept" in refused(
        rlmerge("merge", recipe, tmp_path / "no", "--set", "inner.lambda=0,1", *NUMPY)
    )
    assert "no document is called 'x'" in refused(rlmerge("check", recipe, "--set", "x.lambda=0"))
    assert "works with 'rlmerge merge' only" in refused(rlmerge("check", recipe, "--set", "lambda=0,1"))


def test_flags_of_a_single_recipe_have_no_names(recipe: Path) -> None:
    message = refused(rlmerge("check", recipe.with_name("ties.yml"), "--set", "inner.lambda=0"))
    assert "unknown parameter" in message


def test_a_single_recipe_has_no_stages(recipe: Path, tmp_path: Path) -> None:
    for more in ((), ("--dry-run",)):
        command = ("merge", recipe.with_name("ties.yml"), tmp_path / "out", "--stages", tmp_path / "kept", *more)
        assert "ties.yml is one document" in refused(rlmerge(*command, *NUMPY))
    assert not (tmp_path / "out").exists()


def test_commands_that_need_one_recipe_say_so(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    message = refused(rlmerge("eval", recipe, "--task", "math", "-o", tmp_path / "results", "--quiet"))
    assert "a second document starts here" in message
