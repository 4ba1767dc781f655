"""Reports on the command line: pages of inspect and merge, compare of reports, and what is refused before the work."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest
from tests.cli.command_line import good_set, refused, rlmerge, succeeded
from tests.geometry.geometry_models import make_base, train, write

pytest.importorskip("altair")

from rlmerge.report.page import embedded


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models base, a, b; reports of them."""
    folder = tmp_path_factory.mktemp("reports")
    base = make_base()
    write(folder, base, {"a": train(base, 1), "b": train(base, 2)})
    (folder / "recipe").mkdir()
    good_set(folder / "recipe")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inspect_writes_the_page_of_its_document(here):
    done = succeeded(rlmerge("inspect", "base", "a", "b", "--html", "r.html", "--figures", "f", "-o", "r.json"))
    assert "r.html: the page" in done.out
    assert embedded((here / "r.html").read_text(), "numbers") == json.loads((here / "r.json").read_text())
    assert (here / "f" / "pairs.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "no/r.html"], "there is no folder no"),
        (["--html", "r.json"], "ends in .html"),
        (["--figures", "base/config.json"], "is a file"),
    ],
)
def test_a_page_that_cannot_be_written_costs_nothing(here, monkeypatch, arguments, message):
    """Said before a weight is read: measuring and merging are not even there."""
    monkeypatch.setattr("rlmerge.geometry.inspect.measure_coordinates", None)
    monkeypatch.setattr("rlmerge.api.merge_to_folder", None)
    assert message in refused(rlmerge("inspect", "base", "a", *arguments))
    assert message in refused(rlmerge("merge", "recipe/recipe.yml", "out", *arguments))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "base/config.json"], "lies in the model folder base"),
        (["-o", "linked/report.json"], "lies in the model folder base"),
        (["-o", "recipe/recipe.yml"], "no report of rlmerge inspect"),
        (["--html", "base/model.html"], "lies in the model folder base"),
        (["--html", "own.html"], "no page of rlmerge"),
        (["--figures", "a/figures"], "lies in the model folder a"),
    ],
)
def test_inspect_writes_over_nothing(here, monkeypatch, arguments, message):
    """No model, recipe or page of somebody else."""
    monkeypatch.setattr("rlmerge.geometry.inspect.measure_coordinates", None)
    (here / "own.html").write_text("<h1>mine</h1>")
    (here / "linked").symlink_to("base", target_is_directory=True)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    if arguments[1] in ("base/config.json", "recipe/recipe.yml"):
        assert "no report of rlmerge inspect" in refused(rlmerge("inspect", "base", "a", *arguments))
    else:
        assert message in refused(rlmerge("inspect", "base", "a", *arguments))
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_a_page_does_not_lie_in_what_is_merged(here):
    (here / "out").mkdir()
    message = refused(rlmerge("merge", "recipe/recipe.yml", "out", "--html", "out/page.html"))
    assert "lies in out" in message
    assert "out.html" in message
    message = refused(rlmerge("merge", "recipe/recipe.yml", "out", "--html", "recipe/base/page.html"))
    assert "only read" in message


def test_an_earlier_report_is_replaced(here):
    for _ in range(2):
        succeeded(rlmerge("inspect", "base", "a", "-o", "r.json", "--html", "r.html", "-q"))
    assert json.loads((here / "r.json").read_text())["schema"].startswith("rlmerge.geometry/")


def test_compare_says_which_file_is_missing_or_cut_off(here):
    succeeded(rlmerge("inspect", "base", "a", "-o", "report.json", "-q"))
    assert "Did you mean" in refused(rlmerge("compare", "report.json", "reprot.json"))
    (here / "half.json").write_text((here / "report.json").read_text()[:500])
    assert "cut off" in refused(rlmerge("compare", "report.json", "half.json"))


def test_without_the_extra_nothing_begins(here, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "altair" else there(name, *a))
    for command in (["inspect", "base", "a"], ["merge", "recipe/recipe.yml", "out"]):
        message = refused(rlmerge(*command, "--html", "r.html"))
        assert "--html needs altair" in message
        assert ".[report]" in message
    assert not (here / "out").exists()


def test_merge_writes_the_page_of_its_provenance(here):
    succeeded(rlmerge("merge", "recipe/recipe.yml", "out", "--html", "m.html", "-q"))
    text = (here / "m.html").read_text()
    assert embedded(text, "numbers") == json.loads((here / "out" / "rlmerge.json").read_text())
    assert "<h1>What the merge did: out</h1>" in text
    succeeded(rlmerge("verify", "out"))
    done = succeeded(rlmerge("compare", "out/rlmerge.json", "--html", "again.html"))
    assert "survival after the cast" in done.out
    assert embedded((here / "again.html").read_text(), "numbers") == embedded(text, "numbers")


def test_a_sweep_has_no_single_page(here):
    message = refused(rlmerge("merge", "recipe/recipe.yml", "out", "--set", "lambda=0.5,1", "--html", "m.html"))
    assert "rlmerge compare OUT/NAME/rlmerge.json --html page.html" in message
    assert not (here / "out").exists()


def test_compare_shows_reports_side_by_side(here):
    for name, options in (("one", ["--no-storage"]), ("two", ["--no-null"])):
        succeeded(rlmerge("inspect", "base", "a", "b", "-o", f"{name}.json", "-q", *options))
    one = json.loads((here / "one.json").read_text())
    cosine = one["coordinates"]["total"]["pairs"][0]["cosine"]
    done = succeeded(rlmerge("compare", "one.json", "two.json", "--html", "both.html", "--figures", "f"))
    assert re.search(rf"^ cosine +{cosine:.3g} \(.*\) +{cosine:.3g}$", done.out, re.MULTILINE)
    assert "note: Without a null model: two" in done.out
    found = succeeded(rlmerge("compare", "one.json", "two.json", "--json")).json
    assert found["schema"] == "rlmerge.geometry-comparison/1"
    assert embedded((here / "both.html").read_text(), "numbers") == found
    markdown = succeeded(rlmerge("compare", "one.json", "two.json", "--markdown")).out
    assert "|  | one: a | one: b | two: a | two: b |" in markdown
    assert "- note: Without a null model: two" in markdown
    assert succeeded(rlmerge("compare", "one.json", "-q")).out == ""
    succeeded(rlmerge("compare", "one.json", "--html", "one.html", "-q"))
    assert embedded((here / "one.html").read_text(), "numbers") == one
    assert "leave it out" in refused(rlmerge("compare", "one.json", "two.json", "--csv")).lower()


def test_compare_refuses_what_does_not_belong_together(here):
    succeeded(rlmerge("inspect", "base", "a", "--no-storage", "--no-null", "-o", "one.json", "-q"))
    (here / "math.jsonl").write_text(
        '{"format": 1, "kind": "rlmerge results", "model": "m", "task": "t", "settings": {}}\n'
    )
    assert "one.json is a geometry report" in refused(rlmerge("compare", "math.jsonl", "one.json"))
    assert "Print them with --markdown" in refused(rlmerge("compare", "math.jsonl", "--html", "r.html"))
    assert "gone.json: cannot be read" in refused(rlmerge("compare", "gone.json"))
    (here / "one.json").write_text('{"schema": "rlmerge.geometry/1"}')
    assert "is not as rlmerge writes it" in refused(rlmerge("compare", "one.json", "--html", "r.html"))
    assert not (here / "r.html").exists()
