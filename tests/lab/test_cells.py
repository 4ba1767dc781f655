"""The smoke cell: training, Fisher, merge and evaluation of the shipped base, in processes; killed and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlmerge.demo.assets import DATA
from rlmerge.lab.cells import cells, groups, is_done, model_of, open_root
from rlmerge.lab.errors import LabError
from rlmerge.lab.page import summary, write_page
from rlmerge.lab.presets import PRESETS, SMALL, TINY
from rlmerge.lab.schedule import plan, run, seconds_left

SMOKE = replace(
    TINY, name="smoke", seeds=(1,), kinds=("rlvr",), steps=3, prompts=4, group=4, fisher=8, problems=20, eval_batch=20
)


def begin(root: Path) -> None:
    """A root whose base is there already."""
    open_root(root, SMOKE)
    shutil.copytree(model_of(DATA, "base"), model_of(root, "base"))
    (root / "cells").mkdir()
    for name in ("pretrain", "base"):
        (root / "cells" / f"{name}.json").write_text("{}")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_cell_comes_after_what_it_needs(preset) -> None:
    found = cells(preset)
    assert len({cell.name for cell in found}) == len(found)
    seen: set[str] = set()
    for cell in found:
        assert seen.issuperset(cell.needs), cell
        assert cell.kind in preset.seconds
        seen.add(cell.name)
    assert {group.name for group in groups(preset)} >= {"rlvr-fusion-1", "rft-seeds-code"}


def test_the_plan_of_tiny_fits_25_minutes(tmp_path: Path) -> None:
    planned = plan(tmp_path / "nothing", TINY)
    assert 300 < seconds_left(planned, 2) < 25 * 60
    assert not (tmp_path / "nothing").exists()  # a plan makes nothing
    assert seconds_left(plan(tmp_path, SMALL), 2) > 3600


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LabError, match="no run of the lab"):
        open_root(tmp_path, TINY)
    open_root(tmp_path / "mine", SMOKE)
    with pytest.raises(LabError, match="another preset"):
        open_root(tmp_path / "mine", TINY)


def test_a_run_that_is_killed_is_continued(tmp_path: Path) -> None:
    root = tmp_path / "root"
    begin(root)
    code = "import sys; from pathlib import Path; from tests.lab.test_cells import SMOKE, run; "
    code += "__name__ == '__main__' and run(Path(sys.argv[1]), SMOKE, 2)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(is_done(root, cell) for cell in cells(SMOKE)[2:]) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {cell.name: (root / "cells" / f"{cell.name}.json").stat().st_mtime_ns
            for cell in cells(SMOKE) if is_done(root, cell)}  # fmt: skip
    assert 2 < len(done) < len(cells(SMOKE))
    time.sleep(2)  # its workers notice that it is gone
    told = []
    run(root, SMOKE, 2, told.append)
    assert all(is_done(root, cell) for cell in cells(SMOKE))
    assert len(told) == len(cells(SMOKE)) - len({cell for cell in done if cell})
    for name, stamp in done.items():
        assert (root / "cells" / f"{name}.json").stat().st_mtime_ns == stamp

    found = summary(root, SMOKE)
    merges = found["groups"]["rlvr-fusion-1"]
    assert {row["model"] for row in merges["math"]} >= {"base", "rlvr-math", "sar", "ties", "linear", "ram"}
    for row in [*found["experts"]["math"], *merges["code"]]:
        assert 0.0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"] <= 1.0
    statistics = merges["merges"]["sar"]["statistics"]
    assert 0.0 < statistics["conflict"]["share"] < 1.0
    log = [json.loads(line) for line in (root / "models" / "rlvr-math-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2]
    assert any(line["loss"] != 0.0 for line in log)
    page = write_page(root, SMOKE).read_text()
    assert "math and code in one model" in page
    assert (root / "curves-rlvr.svg").exists()
