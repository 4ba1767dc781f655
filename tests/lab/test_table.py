"""The table of all methods: what is tried, and its smallest run on the shipped experts, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlmerge.evaluate.results import Results, scores
from rlmerge.lab.cells import is_done, read_cell
from rlmerge.lab.contenders import required
from rlmerge.lab.errors import LabError
from rlmerge.lab.grids import GRIDS, MOST, at_end, entries, grid_said, said, settings_of
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.table import TABLE, Entry, chosen_results, run_table, table_cells, write_setting
from rlmerge.lab.table_page import _alike, _judged, _table
from rlmerge.lab.table_summary import _difference, table_summary
from rlmerge.methods import get_method, method_names
from rlmerge.recipe import load_recipe

SMALLEST = replace(TABLE, problems=30, tuning=10, fisher=8, eval_batch=30, repeats=1, methods=("model_stock", "sar"))
FEWER = {"karcher": 1, "model_stock": 2}
"""Methods without eight settings to tell apart."""


def test_every_method_gets_as_many_settings() -> None:
    assert set(GRIDS) == set(method_names()), "say in GRIDS what is tried of the method"
    assert {entry.method for entry in entries()} == set(method_names())
    for entry in entries():
        assert len(entry.settings) == FEWER.get(entry.method, MOST), entry.label
        assert len(set(map(repr, entry.settings))) == len(entry.settings)


@pytest.mark.parametrize("name", method_names())
def test_the_first_setting_is_the_methods_defaults_and_all_are_recipes(name: str, tmp_path: Path) -> None:
    method = get_method(name)
    for entry in (entry for entry in entries() if entry.method == name):
        first = {key: value for key, value in entry.settings[0].items() if key not in ("onto", "sensitivity")}
        assert first == required(method)
        for number, setting in enumerate(entry.settings):
            path = write_setting(tmp_path, entry, setting, 2, f"{entry.label}-{number}")
            found = load_recipe(path)  # parameters, their ranges and places
            assert found.method.name == name
            assert len(found.experts) == (1 if entry.only or "onto" in setting else 2)
            text = path.read_text()
            assert "-1/bf16" not in text
            assert ("fishers/" in text) == (name in ("fisher", "ota", "sar") and "delta2" not in text)


def test_a_recipe_gives_each_expert_its_own_and_begins_with_another_expert(tmp_path: Path) -> None:
    linear = next(entry for entry in entries() if entry.label == "linear")
    setting = next(one for one in linear.settings if one["weight"] == (0.3, 0.7))
    found = yaml.safe_load(write_setting(tmp_path, linear, setting, 1, "linear").read_text())
    assert {one["name"]: one["parameters"] for one in found["models"]} == {
        "rlvr-math-1": {"weight": 0.3},
        "rlvr-code-1": {"weight": 0.7},
    }
    assert found["base_model"] == "../models/base/bf16"
    nearswap = next(entry for entry in entries() if entry.label == "nearswap")
    found = yaml.safe_load(write_setting(tmp_path, nearswap, {"t": 0.1, "onto": "code"}, 1, "nearswap").read_text())
    assert found["base_model"] == "../models/rlvr-code-1/bf16"
    assert [one["name"] for one in found["models"]] == ["rlvr-math-1"]
    assert found["parameters"] == {"t": 0.1}


def test_settings_in_words() -> None:
    assert said({}) == "-"
    assert said({"weight": (0.3, 0.7), "filter_wise": True, "rank": 2}) == "weight 0.3 : 0.7, filter_wise true, rank 2"
    assert said({"t": 1e-3, "onto": "math"}) == "t 0.001, code onto math"
    assert grid_said("sar") == "density 0.8, 1, 0.5, 0.2 × lambda 1, 1.5"
    assert settings_of("sar")[:3] == ({}, {"lambda": 1.5}, {"density": 1.0})


def test_the_end_of_a_grid_is_told_where_a_parameter_could_go_on() -> None:
    rows = {entry.label: entry for entry in entries()}

    def ends(label: str) -> list[str]:
        entry = rows[label]
        return [said(setting) for number, setting in enumerate(entry.settings) if at_end(entry, number)]

    assert ends("iso_c") == ["scaling 0.5", "scaling 2.5"]
    assert ends("ties") == ["weight 1, density 0.2", "weight 1, density 0.2, lambda 1.5"]  # no density is above 1
    assert ends("karcher") == ends("linear") == ends("model_stock") == []


def test_cells_come_after_what_they_need_and_fishers_are_made_where_they_are_read() -> None:
    seen: set[str] = set()
    for cell in table_cells(TABLE):
        assert seen.issuperset(cell.needs), cell
        assert cell.kind in TABLE.seconds
        seen.add(cell.name)
    needs = {cell.name: cell.needs for cell in table_cells(TABLE)}
    assert needs["score-2-tuned-sar"] == ("models", "fisher-rlvr-math-2", "fisher-rlvr-code-2", "tune-sar")
    assert needs["score-2-default-sar-delta2"] == ("models",)
    assert needs["tune-sar"] == ("models", "fisher-rlvr-math-1", "fisher-rlvr-code-1")
    assert not any(cell.kind == "fisher" for cell in table_cells(replace(TABLE, methods=("linear", "sar-delta2"))))


def killed_run(root: Path) -> None:
    """Begins the table and kills it when some cells are done."""
    code = "import sys; from pathlib import Path; from tests.lab.test_table import SMALLEST, run_table; "
    code += "__name__ == '__main__' and run_table(Path(sys.argv[1]), SMALLEST, 2)"
    here = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=here, start_new_session=True)
    deadline = time.monotonic() + 120
    while not is_done(root, table_cells(SMALLEST)[9]) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def right(root: Path, name: str, domain: str) -> np.ndarray:
    """The problems that a model solved, in the order of their names."""
    found = scores(Results.load(root / "results" / name / f"{domain}.jsonl"))
    return np.array(found.c)[np.argsort(found.ids)]


@pytest.mark.long  # cells of a run that is killed are in test_cells
def test_a_table_that_is_killed_is_continued(tmp_path: Path) -> None:
    root = tmp_path / "table"
    killed_run(root)
    done = {cell.name: (root / "cells" / f"{cell.name}.json").stat().st_mtime_ns
            for cell in table_cells(SMALLEST) if is_done(root, cell)}  # fmt: skip
    assert 5 < len(done) < len(table_cells(SMALLEST))
    told = []
    page = run_table(root, SMALLEST, 2, told.append).read_text()
    assert len(told) == len(table_cells(SMALLEST)) - len(done)
    for name, stamp in done.items():
        assert (root / "cells" / f"{name}.json").stat().st_mtime_ns == stamp
    with pytest.raises(LabError, match="a run with another methods"):
        run_table(root, replace(SMALLEST, methods=("linear",)), 1)

    # tuned on validation problems of the first pair, measured on test problems; in memory as in a folder
    rows = {entry.label: entry for entry in entries(SMALLEST.methods)}
    for label, entry in rows.items():
        tuned = read_cell(root, f"tune-{label}")
        means = [one["math"] + one["code"] for one in tuned["tried"]]
        assert len(means) == len(entry.settings)
        assert means[tuned["chosen"]] == pytest.approx(max(means))
        first = read_cell(root, f"score-1-default-{label}")
        assert first["weights"] == tuned["tried"][0]["weights"]
        name = chosen_results(root, 1, "tuned", entry)
        assert read_cell(root, name)["weights"] == tuned["tried"][tuned["chosen"]]["weights"]
        assert read_cell(root, f"score-2-default-{label}")["weights"] != first["weights"]
        for folder, split, count in ((f"tune-{label}-0", "validation", 10), (name, "test", 30)):
            header = Results.load(root / "results" / folder / "math.jsonl").header
            assert (header.settings["task"]["split"], header.problems) == (split, count)
        assert not (root / "models" / f"score-1-default-{label}").exists()

    found = table_summary(root, SMALLEST)
    assert found == json.loads((root / "methods-table.json").read_text())
    for seed, variant in (("1", "default"), ("2", "tuned")):
        row = found["pairs"][seed][variant]["model_stock"]
        names = [chosen_results(root, int(seed), variant, rows[label]) for label in ("model_stock", "sar")]
        gap = np.mean([right(root, names[0], domain) - right(root, names[1], domain) for domain in DOMAINS])
        assert row["difference"]["value"] == pytest.approx(gap, rel=1e-5)
        assert row["difference"]["low"] < gap < row["difference"]["high"]
        assert row["difference"]["p"] <= row["difference"]["p_holm"] <= 1.0
        assert row["math"]["accuracy"]["value"] == pytest.approx(right(root, names[0], "math").mean(), rel=1e-5)
        assert row["survival"] > 0.5
        assert 0.0 < row["seconds"] < 20.0
        assert row["peak_mb"] >= row["anonymous_mb"] > 10.0
        assert row["peak_mb"] < 200.0  # nothing but the merge: torch alone takes more
    assert "difference" not in found["pairs"]["1"]["default"]["sar"]
    assert page.index("Pair 2") < page.index("Pair 1")  # the one that tuning never saw comes first
    assert page.count("| `model_stock` |") == 5
    assert "supports no scientific claim" in page
    assert "pair 2" in (root / "methods-table.svg").read_text()


def test_a_difference_is_paired_over_both_domains() -> None:
    reference, model = np.array([1.0] * 10 + [0.0] * 10), np.array([1.0] * 4 + [0.0] * 6 + [1.0] * 1 + [0.0] * 9)
    found = _difference(reference, model)
    assert (found["lost"], found["won"]) == (6, 1)
    assert found["value"] == pytest.approx(-0.25)
    assert found["low"] < -0.25 < found["high"]
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7 - 7 / 2**7)  # mid-p: half of the outcome itself


def test_stars_and_words_follow_the_corrected_p() -> None:
    def row(value: float | None, p_holm: float = 1.0, weights: str = "") -> dict:
        one = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "error": 0.1}, "retention": None}
        measured = {
            "setting": "-",
            "survival": None,
            "seconds": 0.1,
            "cpu_seconds": 0.1,
            "peak_mb": None,
            "weights": weights,
        }
        made = {"math": one, "code": one, **measured}
        judged = {"value": value, "low": -0.1, "high": 0.1, "p": 0.001, "p_holm": p_holm}
        return made if value is None else made | {"difference": judged}

    rows = {"a": row(-0.05, 0.01, "x"), "b": row(0.05, 0.2, "y"), "c": row(0.05, 0.04, "x"), "sar": row(None)}
    assert _judged(rows) == ["Against `sar`, better: `c`; worse: `a`; within noise: `b`."]
    assert _alike(rows)[0] == "One and the same model, bit for bit: `a`, `c`."
    cells = {line[0]: line[6] for line in _table(rows)[1:]}
    assert cells == {
        "`a`": "−5.0 [−10.0, 10.0] \\*",
        "`b`": "5.0 [−10.0, 10.0]",
        "`c`": "5.0 [−10.0, 10.0] \\*",
        "`sar`": "",
    }


def test_a_cell_without_a_merge_is_told(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "score-1-default-sar.json").write_text('{"setting": 0}')
    with pytest.raises(LabError, match=r"Remove cells/score-1-default-sar\.json"):
        chosen_results(tmp_path, 1, "default", Entry("sar", "sar", ({},)))
