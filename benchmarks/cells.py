"""What of the benchmark is measured: one cell a row, saved after every run, so that a killed benchmark goes on.

A cell holds turns; in a turn every contender runs once, one after the other. The rules of honesty:

- What is compared stands in one cell and was measured in turn. A cell is for one recipe, one rlmerge (a digest of its
  source), one set of contenders: when one of these changes, all of the cell is measured anew, mergekit and the floor
  included.
- A turn that was interrupted is continued within the hour; a later run starts it again.
- A contender that fails is marked and left out from then on.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure

TURN_SECONDS = 3600.0
"""Age at which half a turn is no longer side by side with its other half."""
BEFORE = ("first", "warm")
"""What runs once, before the turns."""

Cell = dict[str, Any]
"""{"identity": {...}, "before": {contender: measurement}, "turns": [{"began": s, "runs": {contender: measurement}}],
"errors": {contender: message}, and what else is known of the row}."""


class Store:
    """Cells as files `SECTION/NAME.json` of a folder."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, section: str, name: str, identity: dict[str, Any]) -> Cell:
        """The cell as far as it is measured, or an empty one if there is none, or one of another identity."""
        path = self.folder / section / f"{name}.json"
        if path.exists():
            cell = json.loads(path.read_text())
            if cell["identity"] == json.loads(json.dumps(identity)):
                return cell
        return {"identity": identity}

    def save(self, section: str, name: str, cell: Cell) -> None:
        """Writes a cell so that a half-written file never appears."""
        write_json(self.folder / section / f"{name}.json", cell)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a half-written file never appears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def next_run(cell: Cell, contenders: Sequence[str], runs: int, now: float) -> tuple[int, str] | None:
    """What is to be measured next, as (turn, contender), or None when the cell is whole. Turn -1 is before the turns.

    Drops half a turn that is too old.
    """
    for name in BEFORE:
        if name in contenders and name not in cell["before"] and name not in cell["errors"]:
            return -1, name
    alive = [name for name in contenders if name not in BEFORE and name not in cell["errors"]]
    turns = cell["turns"]
    if turns and now - turns[-1]["began"] > TURN_SECONDS and not set(alive) <= turns[-1]["runs"].keys():
        turns.pop()
    for number in range(runs):
        done = turns[number]["runs"] if number < len(turns) else {}
        for name in alive:
            if name not in done:
                return number, name
    return None


def begun(cell: Cell) -> Cell:
    """The cell with everything that a measured one has."""
    for key, empty in (("before", {}), ("turns", []), ("errors", {})):
        cell.setdefault(key, empty)
    return cell


def measure_cell(
    cell: Cell,
    contenders: Sequence[str],
    runs: int,
    once: Callable[[str], measure.Measurement],
    save: Callable[[Cell], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> Cell:
    """Measures what a cell lacks, saving it after every run."""
    begun(cell)
    while (step := next_run(cell, contenders, runs, clock())) is not None:
        turn, name = step
        try:
            one = once(name).as_dict()
        except measure.CommandError as error:
            cell["errors"][name] = str(error)
            say(f"{name} failed: {error}")
        else:
            if turn < 0:
                cell["before"][name] = one
            else:
                if turn == len(cell["turns"]):
                    cell["turns"].append({"began": clock(), "runs": {}})
                cell["turns"][turn]["runs"][name] = one
            label = "once" if turn < 0 else f"{turn + 1}/{runs}"
            say(f"{name:<14}{label:>9} {one['wall']:8.2f} s {one['anonymous']:7.0f} MB anonymous")
        save(cell)
    return cell


def summary(cell: Cell) -> dict[str, Any]:
    """A whole cell for the report: per contender the runs and the median of each field by itself; the loads."""
    known = ("identity", "turns", "before", "errors")
    found: dict[str, Any] = {key: value for key, value in cell.items() if key not in known}
    contenders: dict[str, Any] = {name: {"error": text} for name, text in cell["errors"].items()}
    for name in dict.fromkeys(name for turn in cell["turns"] for name in turn["runs"]):
        rows = [turn["runs"][name] for turn in cell["turns"] if name in turn["runs"]]
        if name not in contenders:
            middle = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
            contenders[name] = {"median": middle, "wall": [row["wall"] for row in rows]}
    if "first" in cell["before"]:
        contenders["first"] = {"median": cell["before"]["first"], "wall": [cell["before"]["first"]["wall"]]}
    loads = [one["load"] for turn in cell["turns"] for one in turn["runs"].values()]
    began = [turn["began"] for turn in cell["turns"]]
    return {
        "recipe": cell["identity"].get("recipe"),
        **found,
        "contenders": contenders,
        "load": [round(min(loads), 2), round(max(loads), 2)] if loads else None,
        "measured": time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(began))) if began else None,
    }


def ratio(row: dict[str, Any], over: str, under: str, field: str = "wall") -> float | None:
    """Quotient of two contenders' medians, or None if one has none. `field` may be 'cpu'."""
    sides = [row["contenders"].get(side, {}).get("median") for side in (over, under)]
    if not sides[0] or not sides[1]:
        return None
    values = [side["user"] + side["system"] if field == "cpu" else side[field] for side in sides]
    return round(values[0] / values[1], 3) if values[1] else None
