"""All numbers of the table of all methods, from what its cells left: as JSON, so that page and plot only show them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate import statistics
from rlmerge.evaluate.compare import Interval, Model, compare
from rlmerge.evaluate.results import Results, scores
from rlmerge.lab.cells import read_cell
from rlmerge.lab.grids import Entry, at_end, entries, grid_said, said
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.table import VARIANTS, TablePreset, chosen_results, experts_of

REFERENCE = "sar"
"""The row from which all others are judged."""


def table_summary(root: Path, preset: TablePreset) -> dict[str, Any]:
    """{'models': {name: {domain: accuracy}}, 'tuning': {label: …}, 'pairs': {seed: {variant: {label: row}}}}."""
    models = {}
    for name in ("base", *(expert for seed in preset.seeds for expert in experts_of(seed).values())):
        models[name] = {domain: _accuracy(root / "results" / name / f"{domain}.jsonl") for domain in DOMAINS}
    rows = entries(preset.methods)
    found = {
        "tasks": preset.tasks,
        "problems": {"test": preset.problems, "validation": preset.tuning},
        "models": models,
        "tuning": {entry.label: _tuning(root, entry) for entry in rows},
        "pairs": {
            str(seed): {variant: _rows(root, seed, variant, rows) for variant in VARIANTS} for seed in preset.seeds
        },
    }
    return _short(found)


def _short(found: Any) -> Any:
    """The same with six digits of each number."""
    if isinstance(found, dict):
        return {key: _short(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_short(value) for value in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


def _accuracy(path: Path) -> dict[str, Any]:
    return asdict(compare([path], force=True).tasks[0].models[0].accuracy)


def _tuning(root: Path, entry: Entry) -> dict[str, Any]:
    found = read_cell(root, f"tune-{entry.label}")
    tried = [
        {"setting": said(setting), **{domain: one[domain] for domain in DOMAINS}, "weights": one["weights"]}
        for setting, one in zip(entry.settings, found["tried"], strict=True)
    ]
    different = len({one["weights"] for one in tried})
    return {
        "method": entry.method,
        "grid": grid_said(entry.method),
        "tried": tried,
        "chosen": found["chosen"],
        "at_end": at_end(entry, found["chosen"]),
        "different": different,
    }


def _rows(root: Path, seed: int, variant: str, rows: list[Entry]) -> dict[str, dict[str, Any]]:
    """Every row of a pair at its defaults or tuned, judged against REFERENCE, with Holm's correction over all."""
    cells = {entry.label: chosen_results(root, seed, variant, entry) for entry in rows}
    compared = _compared(root, seed, list(cells.values()))
    right = {label: _right(root, name) for label, name in cells.items()}
    found = {}
    for entry in rows:
        note = read_cell(root, cells[entry.label])
        found[entry.label] = {
            "setting": said(entry.settings[note["setting"]]),
            "weights": note["weights"],
            **{domain: _domain(compared[domain][entry.label]) for domain in DOMAINS},
            "survival": note["merge"]["statistics"].get("survival", {}).get("share"),
            **{key: value for key, value in note["merge"].items() if key != "statistics"},
        }
    if REFERENCE in right:
        others = [label for label in found if label != REFERENCE]
        judged = [_difference(right[REFERENCE], right[label]) for label in others]
        for label, one, p in zip(others, judged, statistics.holm([one["p"] for one in judged])):
            found[label]["difference"] = one | {"p_holm": p}
    return found


def _compared(root: Path, seed: int, names: list[str]) -> dict[str, dict[str, Model]]:
    """Accuracy and retention of merges, by domain and label."""
    found = {}
    for domain in DOMAINS:
        files = [root / "results" / name / f"{domain}.jsonl" for name in ("base", experts_of(seed)[domain], *names)]
        found[domain] = {model.label: model for model in compare(files).tasks[0].models}
    return found


def _domain(model: Model) -> dict[str, Any]:
    kept: Interval | None = model.retention[0].gain_retention if model.retention else None
    return {"accuracy": asdict(model.accuracy), "retention": asdict(kept) if kept else None}


def _right(root: Path, name: str) -> NDArray[np.float64]:
    """1 for every problem that was solved, of both domains, in one order for all models."""
    parts = []
    for domain in DOMAINS:
        read = scores(Results.load(root / "results" / name / f"{domain}.jsonl"))
        order = np.argsort(np.array(read.ids))
        parts.append((np.array(read.c) / np.array(read.n))[order])
    return np.concatenate(parts)


def _difference(reference: NDArray[np.float64], model: NDArray[np.float64]) -> dict[str, Any]:
    """The model's mean accuracy over both domains less the reference's, on the same problems, as many of each domain.

    The interval is `statistics.paired_difference`, p McNemar's mid-p over the problems of both domains.
    """
    difference = model - reference
    estimate = statistics.paired_difference(difference)
    lost, won = int((difference < 0).sum()), int((difference > 0).sum())
    value, low, high = (float(number) for number in estimate[:3])
    return {"value": value, "low": low, "high": high, "lost": lost, "won": won, "p": statistics.mcnemar(lost, won)[1]}
