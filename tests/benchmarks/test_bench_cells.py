"""A benchmark that was killed goes on, and nothing is compared that was not measured side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cells
import measure
from cells import Store, begun, measure_cell, next_run, ratio, summary
from measure import CommandError, Measurement

CONTENDERS = ("first", "warm", "rlmerge", "mergekit", "floor")


class Machine:
    """Measures nothing: notes who ran, and is killed or fails when told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.now = 0.0
        self.killed_before: int | None = None
        self.failing: str | None = None

    def once(self, name: str) -> Measurement:
        if len(self.ran) == self.killed_before:
            raise KeyboardInterrupt
        self.ran.append(name)
        if name == self.failing:
            raise CommandError("it failed")
        self.now += 100
        return Measurement(len(self.ran), 1, 1, 10, 5, 0, 1, 0.25)

    def measure(self, store: Store, identity: dict[str, Any], runs: int = 3) -> cells.Cell:
        save: Callable[[cells.Cell], None] = lambda cell: store.save("methods", "ties", cell)  # noqa: E731
        cell = store.load("methods", "ties", identity)
        return measure_cell(cell, CONTENDERS, runs, self.once, save, lambda _: None, lambda: self.now)


def test_killed_at_any_run_every_run_is_made_once(tmp_path: Path) -> None:
    whole = Machine()
    whole.measure(Store(tmp_path / "whole"), {"recipe": "a"})
    assert whole.ran == ["first", "warm"] + ["rlmerge", "mergekit", "floor"] * 3
    for killed in range(len(whole.ran)):
        machine, store = Machine(), Store(tmp_path / str(killed))
        machine.killed_before = killed
        with pytest.raises(KeyboardInterrupt):
            machine.measure(store, {"recipe": "a"})
        machine.killed_before = None
        cell = machine.measure(store, {"recipe": "a"})
        assert machine.ran == whole.ran
        assert next_run(cell, CONTENDERS, 3, machine.now) is None


def test_half_a_turn_is_dropped_after_an_hour(tmp_path: Path) -> None:
    machine, store = Machine(), Store(tmp_path)
    machine.killed_before = 6  # first, warm, a turn, and rlmerge of the second
    with pytest.raises(KeyboardInterrupt):
        machine.measure(store, {})
    machine.killed_before, machine.now = None, machine.now + cells.TURN_SECONDS + 1
    machine.measure(store, {})
    assert machine.ran[5:8] == ["rlmerge", "rlmerge", "mergekit"]
    assert len(machine.ran) == 12


def test_another_rlmerge_is_measured_anew_with_all_others(tmp_path: Path) -> None:
    machine, store = Machine(), Store(tmp_path)
    machine.measure(store, {"source": "a"})
    machine.ran.clear()
    machine.measure(store, {"source": "a"})
    assert machine.ran == []
    machine.measure(store, {"source": "b"})
    assert machine.ran.count("mergekit") == machine.ran.count("floor") == machine.ran.count("rlmerge") == 3


def test_more_runs_are_added_and_fresh_forgets(tmp_path: Path) -> None:
    machine = Machine()
    machine.measure(Store(tmp_path), {}, runs=1)
    machine.measure(Store(tmp_path), {}, runs=3)
    assert machine.ran.count("rlmerge") == 3
    assert machine.ran.count("first") == 1
    assert Store(tmp_path, fresh=True).load("methods", "ties", {}) == {"identity": {}}


def test_who_fails_is_left_out(tmp_path: Path) -> None:
    machine = Machine()
    machine.failing = "mergekit"
    found = summary(machine.measure(Store(tmp_path), {}))
    assert machine.ran.count("mergekit") == 1
    assert found["contenders"]["mergekit"] == {"error": "it failed"}
    assert ratio(found, "mergekit", "rlmerge") is None
    assert ratio(found, "floor", "rlmerge") is not None


def test_summary_is_the_median_and_the_first_run_is_not_in_it() -> None:
    one = Measurement(1, 1, 1, 10, 5, 0, 1, 0.25).as_dict()
    walls = (7.0, 1.0, 3.0)
    turns = [{"began": 0, "runs": {"rlmerge": one | {"wall": wall, "load": wall}}} for wall in walls]
    cell = begun({"identity": {"recipe": "r"}, "before": {"first": one | {"wall": 100.0}}, "turns": turns})
    found = summary(json.loads(json.dumps(cell)))
    assert found["contenders"]["rlmerge"]["median"]["wall"] == 3.0
    assert found["contenders"]["first"]["median"]["wall"] == 100.0
    assert found["load"] == [1.0, 7.0]
    assert ratio(found, "first", "rlmerge") == pytest.approx(33.333)


def test_commands_take_as_many_threads_as_they_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['HF_HUB_OFFLINE'])"
    measure.run([sys.executable, "-c", code], tmp_path, tmp_path / "log", {"HF_HUB_OFFLINE": "1"})
    assert (tmp_path / "log").read_text().split() == ["None", "1"]
    with pytest.raises(CommandError, match="exit code 3"):
        measure.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, tmp_path / "log")
