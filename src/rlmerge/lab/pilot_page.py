"""The page of the pilot: what every regime's merges cost, with intervals, and whether the gate is met.

The gate: averaging loses 5 points of accuracy or more against the single experts on their own tasks, and the interval
leaves out 0. Intervals here are over problems; the experts of a set are taken as they are, so that a set says something
about itself, not about other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import paired_difference, ratio
from rlmerge.figures import as_markdown
from rlmerge.lab.cells import Cell, is_done, read_cell
from rlmerge.lab.measure import scores_of
from rlmerge.lab.pilot import DTYPES, PilotPreset, experts_of, pilot_cells, sets_of, tasks_of
from rlmerge.lab.power import detectable, parts_of, power

GATE = 0.05
"""Accuracy that averaging must lose."""
AVERAGES = ("mean",)
METRICS = ("greedy", "sampled", "trace")
INTEREST = {"greedy": 0.02, "sampled": 0.02, "trace": 0.01}
"""Effects of interest: points of accuracy, nats a token."""
Row = dict[str, Any]


def summary(root: Path, preset: PilotPreset) -> dict[str, Any]:
    """All numbers of the sets that are whole: {'experts': …, 'sets': {set: …}, 'gate': …, 'missing': cells}."""
    missing = [cell.name for cell in pilot_cells(preset) if not is_done(root, cell)]
    known = [name for name in experts_of(preset) if _done(root, "measure-base", f"measure-{name}")]
    experts = {name: _expert(root, preset, name) for name in known}
    sets = {}
    for name, members in sets_of(preset).items():
        merges = [f"merge-{name}-{dtype}-{one.label}" for dtype in DTYPES for one in preset.merges]
        if _done(root, f"geometry-{name}", "measure-base", *merges, *(f"measure-{member}" for member in members)):
            sets[name] = _set(root, preset, name, members)
    met = [
        {"set": name, "dtype": dtype, "metric": metric, **one}
        for name, found in sets.items()
        for dtype, rows in found["merges"].items()
        for label, row in rows.items()
        for metric, one in row["loss"].items()
        if label in AVERAGES and metric != "trace" and one["value"] >= GATE and one["low"] > 0.0
    ]
    return {"experts": experts, "sets": sets, "gate": met, "power": _power(root, preset, sets), "missing": missing}


def _done(root: Path, *names: str) -> bool:
    return all(is_done(root, Cell(name, "")) for name in names)


def _metrics(root: Path, *cells: str) -> list[str]:
    """What all of some models were asked."""
    tasks = [one for cell in cells for one in read_cell(root, cell)["tasks"].values()]
    asked = {"greedy": all(one["greedy"] for one in tasks), "sampled": all(one["right"] for one in tasks)}
    return [metric for metric in METRICS if asked.get(metric, True)]


def _table(root: Path, cell: str, task: str, metric: str) -> NDArray[np.float64]:
    """Scores of one model on a task, [problems]."""
    return scores_of([read_cell(root, cell)["tasks"][task]], metric)[0]


def _expert(root: Path, preset: PilotPreset, name: str) -> Row:
    expert, run = experts_of(preset)[name], read_cell(root, name)
    found: Row = {"task": expert.task, "curve": run["curve"], "step_seconds": run["step_seconds"]}
    for metric in _metrics(root, "measure-base", f"measure-{name}"):
        base, own = (_table(root, cell, expert.task, metric) for cell in ("measure-base", f"measure-{name}"))
        found[metric] = {"base": float(base.mean()), "expert": float(own.mean()), "gain": _estimate([own - base])}
    return found


def _set(root: Path, preset: PilotPreset, name: str, members: Sequence[str]) -> Row:
    geometry = read_cell(root, f"geometry-{name}")
    merges = {
        dtype: {one.label: _merge(root, preset, f"merge-{name}-{dtype}-{one.label}", members) for one in preset.merges}
        for dtype in DTYPES
    }
    return {"members": list(members), "geometry": _geometry(geometry["coordinates"]), "merges": merges}


def _merge(root: Path, preset: PilotPreset, cell: str, members: Sequence[str]) -> Row:
    """Accuracy by task; loss against the single experts and retained gain, means over the tasks."""
    experts = experts_of(preset)
    by_task: dict[str, list[str]] = {}
    for member in members:
        by_task.setdefault(experts[member].task, []).append(member)
    found: Row = {"score": {}, "loss": {}, "retained": {}}
    for metric in _metrics(root, cell):
        losses, above, below = [], [], []
        for task, own in by_task.items():
            base = _table(root, "measure-base", task, metric)
            single = np.mean([_table(root, f"measure-{member}", task, metric) for member in own], axis=0)
            merged = _table(root, cell, task, metric)
            found["score"].setdefault(task, {})[metric] = float(merged.mean())
            losses.append(single - merged)
            above.append(merged - base)
            below.append(single - base)
        found["loss"][metric] = _estimate(losses)
        kept = ratio(np.concatenate(above), np.concatenate(below))
        found["retained"][metric] = {"value": _number(kept.value), "low": _number(kept.low), "high": _number(kept.high)}
    return found


COMPARED = (("sar", "ties"), ("sar", "ram"), ("sar", "mean"), ("sum", "mean"))
"""Differences whose variances say what a study could see."""
PROBLEMS = (200, 300, 400, 800)


def _power(root: Path, preset: PilotPreset, sets: dict[str, Row]) -> list[Row]:
    """Variances of differences over disjoint pairs of experts (sets `REGIME.pair…`, fp32), and the effects that six
    pairs and some problems of each domain would find four times in five.
    """
    found = []
    pairs = [name for name in sets if name.split(".")[1].startswith("pair")]
    for one, other in COMPARED if len(pairs) > 1 else ():
        for metric in ("greedy", "trace"):
            tables = []
            for name in pairs:
                tasks = tasks_of(preset, tuple(sets[name]["members"]))
                parts = [
                    _table(root, f"merge-{name}-fp32-{one}", task, metric)
                    - _table(root, f"merge-{name}-fp32-{other}", task, metric)
                    for task in tasks
                ]
                tables.append(np.concatenate(parts))
            table = np.array(tables)
            parts_ = parts_of(table)
            row: Row = {"one": one, "other": other, "metric": metric, "pairs": len(pairs), "mean": float(table.mean())}
            row |= {key: getattr(parts_, key) for key in ("seeds", "problems", "rest")}
            row["detectable"] = {count: detectable(parts_, 6, 2 * count) for count in PROBLEMS}
            row["power"] = {count: power(INTEREST[metric], parts_, 6, 2 * count) for count in PROBLEMS}
            found.append(row)
    return found


def _estimate(differences: Sequence[NDArray[np.float64]]) -> Row:
    """The mean over tasks of mean differences, each task with problems of its own."""
    parts = [paired_difference(one) for one in differences]
    value = float(np.mean([part.value for part in parts]))
    half = [max(float(part.high - part.value), float(part.value - part.low)) for part in parts]
    width = float(np.sqrt(np.sum(np.square(half)))) / len(parts)
    return {"value": value, "low": value - width, "high": value + width}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _geometry(total: dict[str, Any]) -> Row:
    """Support of each expert; per pair cosine, Jaccard and conflict, each beside the null model."""
    null = {(pair["a"], pair["b"]): pair for pair in total["null"]["pairs"]}
    pairs = []
    for pair in total["pairs"]:
        other = null[pair["a"], pair["b"]]
        keys = ("cosine", "jaccard", "conflict_overlap")
        pairs.append({"a": pair["a"], "b": pair["b"]} | {key: [pair[key], other[key]] for key in keys})
    support = {key: [one["support"], one["support_bf16"]] for key, one in total["experts"].items()}
    return {"support": support, "pairs": pairs}


# -- the page ----------------------------------------------------------------------------------------------------------


def write_page(root: Path, preset: PilotPreset, page: Path) -> dict[str, Any]:
    """Writes the page, and its numbers beside it as JSON; returns them."""
    found = summary(root, preset)
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    parts = [f"# The pilot: {outcome(found)}", "", _about(preset), ""]
    for regime in preset.regimes:
        parts += [f"## {regime.name}", "", f"{regime.why[0].upper()}{regime.why[1:]}.", ""]
        names = [one.name for one in regime.experts if one.name in found["experts"]]
        rows = [_expert_row(name, found["experts"][name]) for name in names]
        if rows:
            head = ["expert", "task", "base", "greedy", "gain", "sampled", "gain", "trace", "gain", "last entropy"]
            parts += [*as_markdown([head, *rows]), ""]
        for name, _ in regime.sets:
            if (one := found["sets"].get(f"{regime.name}.{name}")) is not None:
                parts += _set_lines(f"{regime.name}.{name}", one)
    if found["power"]:
        parts += _power_lines(found["power"])
    if found["missing"]:
        parts += [f"Not done yet: {len(found['missing'])} cells.", ""]
    page.write_text("\n".join(parts))
    return found


def outcome(found: dict[str, Any]) -> str:
    """The gate's outcome, as a sentence."""
    if not found["sets"]:
        return "no set is whole yet"
    if not found["gate"]:
        return (
            f"averaging costs {100 * GATE:.0f} points in none of {len(found['sets'])} sets: no regime found in which "
            "the curse bites"
        )
    names = dict.fromkeys(one["set"] for one in found["gate"])
    share = f"{len(names)} of {len(found['sets'])} sets"
    return f"averaging costs {100 * GATE:.0f} points or more in {share}: {', '.join(names)}"


def _about(preset: PilotPreset) -> str:
    return (
        f"Exploratory: {preset.problems} validation problems a task, greedy, and the mean log-probability of a token "
        "of a right solution (trace, nats), all computed in fp32. "
        "Points of accuracy with 95 % intervals over problems. *Loss*: single experts on their own tasks less the "
        "merge. *Retained*: share of their gain. The null model is that of `rlmerge inspect`."
    )


def _expert_row(name: str, one: Row) -> list[str]:
    cells = [name, one["task"], f"{100 * one['greedy']['base']:.1f}"]
    for metric in METRICS:
        if metric not in one:
            cells += ["–"] * 2
            continue
        scale = 1 if metric == "trace" else 100
        digits = 3 if metric == "trace" else 1
        cells += [f"{scale * one[metric]['expert']:.{digits}f}", _interval(one[metric]["gain"], scale, digits)]
    return [*cells, f"{one['curve'][-1]['entropy']:.3f}"]


def _interval(one: Row, scale: float = 100, digits: int = 1) -> str:
    if one["value"] is None:
        return "–"
    ends = [f"{scale * one[key]:.{digits}f}" if one[key] is not None else "?" for key in ("low", "high")]
    return f"{scale * one['value']:.{digits}f} [{ends[0]}, {ends[1]}]"


def _set_lines(name: str, one: Row) -> list[str]:
    geometry = one["geometry"]
    support = ", ".join(f"{key} {100 * value[0]:.1f} %" for key, value in geometry["support"].items())
    lines = [f"### {name}: {', '.join(one['members'])}", "", f"Changed in bf16: {support}.", ""]
    head = ["pair", "cosine", "null", "Jaccard", "null", "conflict", "null"]
    keys = ("cosine", "jaccard", "conflict_overlap")
    rows = [
        [f"{pair['a']}, {pair['b']}", *(_three(value) for key in keys for value in pair[key])]
        for pair in geometry["pairs"]
    ]
    lines += [*as_markdown([head, *rows]), ""]
    head = ["merge", "stored", "greedy", "loss", "retained", "sampled", "loss", "retained", "trace", "loss"]
    rows = []
    for dtype, merges in one["merges"].items():
        for label, row in merges.items():
            cells = [label, dtype]
            for metric in METRICS:
                scale, digits = (1, 3) if metric == "trace" else (100, 1)
                if metric not in row["loss"]:
                    cells += ["–"] * (2 if metric == "trace" else 3)
                    continue
                score = np.mean([scores[metric] for scores in row["score"].values()])
                cells += [f"{scale * score:.{digits}f}", _interval(row["loss"][metric], scale, digits)]
                cells += [_interval(row["retained"][metric], 100, 0)] if metric != "trace" else []
            rows.append(cells)
    return [*lines, *as_markdown([head, *rows]), ""]


def _power_lines(rows: list[Row]) -> list[str]:
    """The table of variances and detectable effects."""
    head = ["difference", "metric", "here", "sd of pairs", "of problems", "of what is left"]
    head += [f"found with {count}" for count in PROBLEMS]
    lines = []
    for row in rows:
        scale, digits = (1, 4) if row["metric"] == "trace" else (100, 2)
        spread = [f"{scale * np.sqrt(row[key]):.{digits}f}" for key in ("seeds", "problems", "rest")]
        effects = [f"{scale * row['detectable'][count]:.{digits}f}" for count in PROBLEMS]
        here = f"{scale * row['mean']:.{digits}f}"
        lines.append([f"{row['one']} − {row['other']}", row["metric"], here, *spread, *effects])
    about = (
        f"From {rows[0]['pairs']} disjoint pairs of experts, fp32 (`rlmerge.lab.power`): standard deviations of a "
        "difference, in points or nats, and the effects that six pairs would find four times in five with so many "
        "problems of each domain."
    )
    return ["## What a study could see", "", about, "", *as_markdown([head, *lines]), ""]


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
