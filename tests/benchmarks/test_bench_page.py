"""docs/performance.md is what the program makes of the results, and its verdicts follow the numbers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import models
import targets
import write_page
from contenders import METHODS
from profile_merge import KINDS

REPORT: dict[str, Any] = json.loads(write_page.RESULTS.read_text())


def test_page_is_made_of_the_results() -> None:
    assert write_page.PAGE.read_text() == write_page.page(REPORT), "run: python benchmarks/write_page.py"
    if "methods" in REPORT["sections"]:
        assert REPORT["versions"]["commit"] in write_page.PICTURE.read_text()
    readme = write_page.README.read_text()
    assert readme == write_page.in_readme(readme, REPORT)
    assert all(readme.count(mark) == 1 for mark in write_page.README_MARKS)


def _row(rlmerge: float, other: float, **more: Any) -> dict[str, Any]:
    def one(wall: float) -> dict[str, Any]:
        return {"median": {"wall": wall, "user": wall, "system": 0.0, "anonymous": 100.0, "rss": 200.0}}

    return {"contenders": {"rlmerge": one(rlmerge), "mergekit": one(other), "floor": one(1.0)}, "stages": [], **more}


def _report(**sections: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | {"sections": sections}


def test_targets_turn_with_the_numbers() -> None:
    assert targets.against_mergekit(_report(methods={"ties": _row(2.0, 50.0)}), "ties", 25).holds is True
    assert targets.against_mergekit(_report(methods={"ties": _row(2.1, 50.0)}), "ties", 25).holds is False
    assert targets.against_mergekit(_report(), "ties", 25).holds is None
    fast, slow = _row(1.5, 1.0), _row(2.9, 9.0, stages=["coarse"])
    report = _report(methods={"linear": fast, "ties": slow})
    assert targets.against_floor(report, False, 1.5).holds is True
    assert targets.against_floor(report, True, 3.0).holds is True
    assert targets.against_floor(report, True, 2.5).holds is False
    assert targets.nothing_slower(report).holds is False


def test_memory_bound_grows_with_threads() -> None:
    def at(megabytes: float, threads: int) -> dict[str, Any]:
        row = _row(1.0, 1.0, label={"method": "ties", "size": "0.5B", "threads": threads})
        row["contenders"]["rlmerge"]["median"]["anonymous"] = megabytes
        return row

    assert targets.anonymous_memory(_report(memory={"a": at(464.0, 1), "b": at(600.0, 4)})).holds is True
    assert targets.anonymous_memory(_report(memory={"a": at(600.0, 1), "b": at(600.0, 4)})).holds is False


def test_cost_that_bends_is_not_linear() -> None:
    def costs(*seconds: float) -> dict[str, Any]:
        counts = zip((1, 2, 4, 8), seconds)
        return {f"ties-{k}": _row(s, 1.0, label={"method": "ties", "experts": k}) for k, s in counts}

    assert targets.linear_cost(_report(experts=costs(1.5, 2.0, 3.0, 5.0))).holds is True
    assert targets.linear_cost(_report(experts=costs(1.0, 2.0, 6.0, 30.0))).holds is False


def test_profile_adds_up(tmp_path: Path) -> None:
    data = models.ensure(tmp_path / "data", models.SIZES["tiny"])
    recipe = data / "sar.yml"
    recipe.write_text(METHODS["sar"].recipe("bfloat16"))
    program = Path(write_page.__file__).with_name("profile_merge.py")
    done = subprocess.run(
        [sys.executable, str(program), str(recipe), str(tmp_path), "numpy"], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert set(found["seconds"]) == set(KINDS) == set(write_page.KINDS)
    assert sum(found["seconds"].values()) == pytest.approx(found["total"], abs=0.01)
    assert all(found["seconds"][kind] > 0 for kind in ("start", "reading", "arithmetic", "encoding", "interpreter"))
    assert found["calls"]["reading"] >= 4 * len(models.SIZES["tiny"].tensors())
    assert not (tmp_path / "profiled").exists()
