"""What the pilot's numbers say: what every set's merges lose and keep, whether the gate is met, what a study could see.

The gate: averaging loses 5 points of accuracy or more against the single experts on their own tasks, and the interval
leaves out 0; and again on other problems, as many sets are looked at. Accuracy is greedy, or of samples; where samples
are worth the time the mass says, which has no noise of its own. Intervals are over problems; the experts of a set
are taken as they are, so that a set says something about itself, not about other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import paired_difference, ratio
from rlmerge.lab.cells import Cell, is_done, read_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.measure import scores_of
from rlmerge.lab.pilot import (
    DTYPES,
    PilotPreset,
    again_cells,
    experts_of,
    merges_of,
    paired_merges,
    pilot_cells,
    sets_of,
)
from rlmerge.lab.power import Parts, all_found, bounds_of_one, detectable, parts_of, power, upper_parts

GATE = 0.05
"""Accuracy that averaging must lose."""
METRICS = ("greedy", "sampled", "mass", "trace")
"""As `measure.Measured` has them; `sampled` where there are samples."""
INTEREST = 0.02
"""The smallest effect of interest: points of accuracy, or of the probability of known right texts."""
Row = dict[str, Any]


def summary(root: Path, preset: PilotPreset) -> dict[str, Any]:
    """All numbers of the sets whose mean is measured: {'experts': …, 'sets': {set: …}, 'gate': …, 'missing': cells}."""
    wanted = [*pilot_cells(preset), *again_cells(preset, paired_merges(preset))]
    missing = [cell.name for cell in wanted if not is_done(root, cell)]
    known = [
        name
        for name, one in experts_of(preset).items()
        if one.kind != "cold" and _done(root, f"measure-{one.base}", name, f"measure-{name}")
    ]
    experts = {name: _expert(root, preset, name) for name in known}
    sets = {name: _set(root, preset, name, members) for name, members in sets_of(preset).items()
            if _judgeable(root, preset, name, members)}  # fmt: skip
    met = []
    for name, members, dtype, by in met_by(root, preset):
        measured = {experts_of(preset)[member].base for member in members} | set(members)
        cells = (f"again-merge-{name}-{dtype}-mean", *(f"again-{one}" for one in measured))
        first = sets[name]["merges"][dtype]["mean"]["loss"][by]
        second = _loss(root, preset, cells[0], members, LOOKS[by], "again") if _done(root, *cells) else None
        row: Row = {"set": name, "dtype": dtype, "by": by, "first": first, "then": LOOKS[by], "second": second}
        met.append(row | {"holds": second and _passes(second)})
    rows = _power(root, preset, sets)
    found: dict[str, Any] = {"experts": experts, "sets": sets, "gate": met}
    found["judged"] = [name for name in sets if of_rlvr(preset, name)]
    return found | {"power": rows, "together": together(rows, preset.pairs), "missing": missing}


LOOKS = {"greedy": "greedy", "mass": "sampled"}
"""What is looked at first, and what then, on other problems, to see whether accuracy is lost."""


def met_once(root: Path, preset: PilotPreset) -> list[tuple[str, str, str]]:
    """(set, dtype, 'mean') where that loses as much as the gate asks for, on the problems that were looked at."""
    return list(dict.fromkeys((name, dtype, "mean") for name, _, dtype, _ in met_by(root, preset)))


def met_by(root: Path, preset: PilotPreset) -> list[tuple[str, tuple[str, ...], str, str]]:
    """The same, and by which of LOOKS."""
    found = []
    for name, members in sets_of(preset).items():
        if not of_rlvr(preset, name) or not _judgeable(root, preset, name, members):
            continue
        for dtype in [
            dtype for dtype, label in _merges_done(root, preset, name) if label == "mean" and dtype in DTYPES
        ]:
            cell = f"merge-{name}-{dtype}-mean"
            asked = _metrics(root, cell, *(f"measure-{member}" for member in members))
            for by in LOOKS:
                if by in asked and _passes(_loss(root, preset, cell, members, by)):
                    found.append((name, members, dtype, by))
    return found


def of_rlvr(preset: PilotPreset, name: str) -> bool:
    """Whether a set is of RLVR's experts, onto the base that they have in common: what the gate is about."""
    regime = next(one for one in preset.regimes if one.name == name.split(".")[0])
    members = [experts_of(preset)[member] for member in sets_of(preset)[name]]
    return not regime.onto and all(one.kind == "rlvr" for one in members)


def _passes(loss: Row) -> bool:
    return loss["value"] >= GATE and loss["low"] > 0.0


def _judgeable(root: Path, preset: PilotPreset, name: str, members: Sequence[str]) -> bool:
    """Whether bases, experts and the mean in fp32 are measured. Other merges are shown as far as they are."""
    bases = {experts_of(preset)[member].base for member in members}
    return _done(root, f"merge-{name}-fp32-mean", *(f"measure-{one}" for one in (*bases, *members)))


def _merges_done(root: Path, preset: PilotPreset, name: str) -> list[tuple[str, str]]:
    return [one for one in merges_of(preset, name) if _done(root, f"merge-{name}-{'-'.join(one)}")]


def _done(root: Path, *names: str) -> bool:
    return all(is_done(root, Cell(name, "")) for name in names)


def _metrics(root: Path, *cells: str) -> list[str]:
    """What all of some models were asked."""
    tasks = [one for cell in cells for one in read_cell(root, cell)["tasks"].values()]
    keys = {"greedy": "greedy", "sampled": "right", "mass": "mass", "trace": "trace"}
    return [metric for metric in METRICS if all(one[keys[metric]] for one in tasks)]


def _table(root: Path, cell: str, task: str, metric: str) -> NDArray[np.float64]:
    """Scores of one model on a task, [problems]."""
    return scores_of([read_cell(root, cell)["tasks"][task]], metric)[0]


def _expert(root: Path, preset: PilotPreset, name: str) -> Row:
    expert, run, cell = experts_of(preset)[name], read_cell(root, name), f"measure-{name}"
    if run.get("expert", json.loads(json.dumps(asdict(expert)))) != json.loads(json.dumps(asdict(expert))):
        raise LabError(f"{name}: was trained with other settings than it has now. Give the new run another name.")
    before = f"measure-{expert.base}"
    found: Row = {"task": expert.task, "curve": run["curve"], "step_seconds": run["step_seconds"]}
    for metric in _metrics(root, before, cell):
        base, own = (_table(root, one, expert.task, metric) for one in (before, cell))
        found[metric] = {"base": float(base.mean()), "expert": float(own.mean()), "gain": _estimate([own - base])}
    elsewhere = [task for task in read_cell(root, cell)["tasks"] if task != expert.task]
    found["elsewhere"] = {}
    for task in elsewhere:
        base, own = (_table(root, one, task, "greedy") for one in (before, cell))
        found["elsewhere"][task] = _estimate([own - base])
    other = read_cell(root, cell)["other"]
    theirs = scores_of([other["tasks"][expert.task]], "greedy")[0]
    less = _estimate([theirs - _table(root, cell, expert.task, "greedy")])
    found["other"] = {"dtype": other["dtype"], "greedy": float(theirs.mean()), "less": less}
    return found


def _set(root: Path, preset: PilotPreset, name: str, members: Sequence[str]) -> Row:
    cell = f"geometry-{name}"
    geometry = _geometry(read_cell(root, cell)["coordinates"]) if _done(root, cell) else {"support": {}, "pairs": []}
    merges: Row = {}
    for dtype, label in _merges_done(root, preset, name):
        merges.setdefault(dtype, {})[label] = _merge(root, preset, f"merge-{name}-{dtype}-{label}", members)
    return {"members": list(members), "geometry": geometry, "merges": merges}


def _by_task(preset: PilotPreset, members: Sequence[str]) -> dict[str, list[str]]:
    experts, found = experts_of(preset), {}
    for member in members:
        found.setdefault(experts[member].task, []).append(member)
    return found


def _parts(root: Path, preset: PilotPreset, cell: str, members: Sequence[str], metric: str, how: str) -> list[Row]:
    """By task: scores of base, single experts (their mean) and merge, problem by problem."""
    found = []
    for task, own in _by_task(preset, members).items():
        single = np.mean([_table(root, f"{how}-{member}", task, metric) for member in own], axis=0)
        bases = [experts_of(preset)[member].base for member in own]
        base = np.mean([_table(root, f"{how}-{one}", task, metric) for one in bases], axis=0)
        merged = _table(root, cell, task, metric)
        found.append({"task": task, "base": base, "single": single, "merged": merged})
    return found


def _loss(root: Path, preset: PilotPreset, cell: str, members: Sequence[str], metric: str, how: str = "measure") -> Row:
    """Single experts on their own tasks less the merge, the mean over tasks."""
    return _estimate([part["single"] - part["merged"] for part in _parts(root, preset, cell, members, metric, how)])


def _merge(root: Path, preset: PilotPreset, cell: str, members: Sequence[str]) -> Row:
    """Accuracy by task; loss against the single experts and retained gain, means over the tasks."""
    found: Row = {"score": {}, "loss": {}, "retained": {}}
    for metric in _metrics(root, cell):
        parts = _parts(root, preset, cell, members, metric, "measure")
        for part in parts:
            found["score"].setdefault(part["task"], {})[metric] = float(part["merged"].mean())
        found["loss"][metric] = _loss(root, preset, cell, members, metric)
        if metric == "trace":  # it falls while experts learn: there is no gain to keep
            continue
        above, below = _gains(parts)
        kept = ratio(above, below)
        found["retained"][metric] = {"value": _number(kept.value), "low": _number(kept.low), "high": _number(kept.high)}
    return found


def _gains(parts: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(merge − base, single experts − base) of all problems."""
    above = np.concatenate([part["merged"] - part["base"] for part in parts])
    return above, np.concatenate([part["single"] - part["base"] for part in parts])


COMPARED = (("sar", "ties"), ("sar", "ram"), ("sar", "mean"), ("sar", "sum"), ("sum", "mean"))
"""Differences whose variances say what a study could see."""
PROBLEMS = {"greedy": (160, 400), "mass": (60, 200), "sampled": (40, 140)}
"""Problems of a domain that the study's parts ask for, the second and the first (docs/study/protocol.md)."""


def _power(root: Path, preset: PilotPreset, sets: dict[str, Row]) -> list[Row]:
    """Variances of differences over disjoint pairs of experts, merged in fp32, and the effects that the study's pairs
    and some problems of each domain would find four times in five: of scores of two merges, and of the share of its
    gain that an arm keeps less that which RLVR keeps. Samples are those of the second look.
    """
    found: list[Row] = []
    labels = {one.label for one in preset.merges}
    compared = [pair for pair in COMPARED if set(pair) <= labels]

    def whole(name: str, look: str) -> bool:
        """Whether all that is compared has been looked at."""
        merges = [f"merge-{one}-{dtype}-{label}" for one, dtype, label in paired_merges(preset) if one == name]
        if not look:
            return _done(root, *merges)
        models = [*sets[name]["members"], *(experts_of(preset)[one].base for one in sets[name]["members"])]
        return _done(root, *(f"again-{one}" for one in (*merges, *models)))

    def parts(name: str, label: str, metric: str) -> list[Row]:
        how, prefix = ("again", "again-") if metric == "sampled" else ("measure", "")
        return _parts(root, preset, f"{prefix}merge-{name}-fp32-{label}", sets[name]["members"], metric, how)

    for metric in ("greedy", "mass", "sampled"):
        look = "again" if metric == "sampled" else ""
        pairs = {
            arm: [name for name in sets if name.startswith(prefix) and whole(name, look)]
            for arm, prefix in preset.paired
        }
        for arm, names in pairs.items():
            made = [{label for dtype, label in merges_of(preset, name) if dtype == "fp32"} for name in names]
            for one, other in [pair for pair in compared if all(set(pair) <= some for some in made)]:
                if not names or arm in SUPERVISED:
                    continue
                rows = []
                for name in names:
                    both = zip(parts(name, one, metric), parts(name, other, metric), strict=True)
                    rows.append(np.concatenate([left["merged"] - right["merged"] for left, right in both]))
                name, table = f"{one} − {other}", np.array(rows)
                if len(names) > 1:
                    found.append(_foreseen(name, metric, table, INTEREST, preset.pairs) | {"arm": arm})
                else:
                    found.append(_foreseen_of_one(name, metric, table[0], preset.pairs) | {"arm": arm})
        for label in sorted(labels & {"mean", "sum"}):
            shares = {}
            for arm, names in pairs.items():
                if len(names) > 1:
                    tables = [_gains(parts(name, label, metric)) for name in names]
                    above, below = (np.array([table[place] for table in tables]) for place in (0, 1))
                    if not below.mean():  # no gain to keep
                        continue
                    kept = above.mean() / below.mean()
                    shares[arm] = (kept, (above - kept * below) / below.mean())
            for arm in SUPERVISED:
                if {arm, "rlvr"} <= set(shares):
                    count = min(len(shares[arm][1]), len(shares["rlvr"][1]))
                    table = shares[arm][1][:count] - shares["rlvr"][1][:count]
                    table += shares[arm][0] - shares["rlvr"][0]
                    name = f"kept by {arm} − rlvr, {label}"
                    found.append(_foreseen(name, metric, table, 5 * INTEREST, preset.pairs) | {"arm": arm})
    return found


SUPERVISED = ("sft", "rft")
"""Arms whose retention is compared with RLVR's."""
EFFECTS = (0.02, 0.05)
"""True differences for which the chance is foreseen that all of several are found."""


def together(rows: Sequence[Row], pairs: int) -> list[Row]:
    """Bounds of the chance that SAR is found above every merge that it is compared with here, if it is better than each
    by the same; between pairs as found, and at their upper limit.
    """
    found = []
    keys = dict.fromkeys((row["arm"], row["metric"]) for row in rows if row["difference"].startswith("sar − "))
    for arm, metric in keys:
        own = [row for row in rows if (row["arm"], row["metric"]) == (arm, metric)]
        own = [row for row in own if row["difference"].startswith("sar − ") and row["pairs"] > 1]
        for effect in EFFECTS if own else ():
            for count in PROBLEMS[metric]:
                row: Row = {"arm": arm, "metric": metric, "effect": effect, "problems": count, "merges": len(own)}
                for key, seeds in (("bounds", "seeds"), ("bounds_upper", "seeds_upper")):
                    parts = [Parts(one[seeds], one["problems"], one["rest"]) for one in own]
                    row[key] = all_found([power(effect, one, pairs, 2 * count) for one in parts])
                found.append(row)
    return found


def _foreseen(name: str, metric: str, table: NDArray[np.float64], interest: float, pairs: int) -> Row:
    parts, upper = parts_of(table), upper_parts(table)
    row: Row = {"difference": name, "metric": metric, "pairs": len(table), "mean": float(table.mean())}
    row |= {key: getattr(parts, key) for key in ("seeds", "problems", "rest")} | {"seeds_upper": upper.seeds}
    for key, one in (("", parts), ("_upper", upper)):
        row[f"detectable{key}"] = {str(count): detectable(one, pairs, 2 * count) for count in PROBLEMS[metric]}
        row[f"power{key}"] = {str(count): power(interest, one, pairs, 2 * count) for count in PROBLEMS[metric]}
    return row | {"interest": interest}


def _foreseen_of_one(name: str, metric: str, differences: NDArray[np.float64], pairs: int) -> Row:
    """Of a single pair, with nothing said of how pairs differ: from below."""
    alike, apart = (
        {str(count): detectable(parts, pairs, 2 * count) for count in PROBLEMS[metric]}
        for parts in bounds_of_one(differences)
    )
    return {
        "difference": name, "metric": metric, "pairs": 1, "mean": float(differences.mean()), "apart": apart,
        "alike": alike,
    }  # fmt: skip


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
