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
from rlmerge.lab.cells import cells, groups, is_done, model_of, opened_root
from rlmerge.lab.errors import LabError
from rlmerge.lab.page import summary, write_page
from rlmerge.lab.presets import PRESETS, SMALL, TINY
from rlmerge.lab.schedule import plan, run, seconds_left

SMOKE = replace(
    TINY,
    name="smoke",
    seeds=(1,),
    kinds=("rlvr",),
    steps=3,
    prompts=4,
    group=4,
    fisher=8,
    problems=20,
    eval_batch=20,
    methods=("linear", "ram", "sar", "ties"),
)


def children_of(pid: int) -> list[int]:
    """Processes whose parent it is (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether it runs; one that only waits to be read does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begin(root: Path) -> None:
    """A root whose base is there already."""
    with opened_root(root, SMOKE):
        pass
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


def test_a_plan_makes_nothing(tmp_path: Path) -> None:
    assert all(not one.done for one in plan(tmp_path / "nothing", SMALL))
    assert not (tmp_path / "nothing").exists()
    whole = seconds_left(plan(tmp_path, TINY), 1)
    assert whole > seconds_left(plan(tmp_path, TINY), 2) > whole / 2  # pre-training is not shared


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LabError, match="no run of the lab"), opened_root(tmp_path, TINY):
        pass
    held, second = opened_root(tmp_path / "mine", SMOKE), opened_root(tmp_path / "mine", SMOKE)
    with held, pytest.raises(LabError, match="another process"), second:
        pass
    with pytest.raises(LabError, match="a run with another"), opened_root(tmp_path / "mine", TINY):
        pass
    (tmp_path / "mine" / "lab.json").write_text("")
    with pytest.raises(LabError, match="no JSON object"), opened_root(tmp_path / "mine", SMOKE):
        pass


@pytest.mark.long  # what trains, estimates and evaluates is killed in tests of its own
def test_a_run_that_is_killed_is_continued(tmp_path: Path) -> None:
    root = tmp_path / "root"
    begin(root)
    code = "import sys; from pathlib import Path; from tests.lab.test_cells import SMOKE, run; "
    code += "__name__ == '__main__' and run(Path(sys.argv[1]), SMOKE, 2)"
    threads = os.environ.get("OMP_NUM_THREADS")
    here = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=here, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(is_done(root, cell) for cell in cells(SMOKE)[2:]) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))  # they go when who began them has gone
    done = {cell.name: (root / "cells" / f"{cell.name}.json").stat().st_mtime_ns
            for cell in cells(SMOKE) if is_done(root, cell)}  # fmt: skip
    assert 2 < len(done) < len(cells(SMOKE))
    told = []
    with opened_root(root, SMOKE):
        run(root, SMOKE, 2, told.append)
    assert all(is_done(root, cell) for cell in cells(SMOKE))
    assert len(told) == len(cells(SMOKE)) - len(done)
    assert os.environ.get("OMP_NUM_THREADS") == threads
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
