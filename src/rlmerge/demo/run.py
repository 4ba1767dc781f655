"""Runs the demo: Fishers, merges and evaluations as cells of the lab, then one report of what came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlmerge.demo.assets import DATA, EXPERTS
from rlmerge.evaluate.compare import Interval, Model, compare
from rlmerge.figures import as_text, statistics_table
from rlmerge.lab.cells import Cell, Group, cells, groups, open_root
from rlmerge.lab.contenders import contenders
from rlmerge.lab.page import group_summary, merges_table, shown
from rlmerge.lab.presets import DOMAINS, TINY, Preset
from rlmerge.lab.schedule import Step, run

SHOWN = ("rlvr-fusion-1", "rlvr-seeds-math")
"""The merges of the demo: math and code in one model, and two seeds of math."""
TITLES = {
    "rlvr-fusion-1": "Math and code in one model",
    "rlvr-seeds-math": "Two runs of one task (math) in one model",
}


@dataclass(frozen=True)
class Report:
    """What the demo found. lines: for a terminal; data: the same for machines."""

    lines: tuple[str, ...]
    data: dict[str, Any]


def run_demo(
    out: Path, problems: int = 400, workers: int = 2, tell: Callable[[Step], None] = lambda step: None
) -> Report:
    """Merges and evaluates in `out`; what is there already is not done again.

    problems   of each domain. Raises LabError if `out` holds something else.
    """
    preset = replace(TINY, name="demo", problems=problems, kinds=("rlvr",))
    open_root(out, preset)
    copy_models(out)
    run(out, preset, workers, tell, demo_cells(preset))
    report = make_report(out, preset)
    (out / "demo.json").write_text(json.dumps(report.data, indent=1) + "\n")
    (out / "demo.txt").write_text("\n".join(report.lines) + "\n")
    return report


def copy_models(out: Path) -> None:
    """The base and the experts, as delta packs, to out/models; not again if they are there."""
    if not (out / "models").exists():
        part = out / "models.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(DATA / "models", part)
        part.rename(out / "models")


def demo_cells(preset: Preset) -> list[Cell]:
    """The cells of the lab that need no training, of the demo's experts and groups."""
    models = {"base", *EXPERTS}
    found = []
    for cell in cells(preset):
        wanted = (
            cell.name.removeprefix("eval-") in models
            if cell.kind == "eval"
            else cell.name.removeprefix("fisher-") in models
            if cell.kind == "fisher"
            else any(cell.name.startswith(f"merge-{group}-") for group in SHOWN)
        )
        if wanted and cell.kind in ("eval", "fisher", "merge"):
            found.append(cell)
    names = {cell.name for cell in found}
    return [replace(cell, needs=tuple(need for need in cell.needs if need in names)) for cell in found]


def make_report(out: Path, preset: Preset) -> Report:
    """Tables with intervals, what SAR decided, and which differences are beyond noise."""
    lines = [
        f"Greedy accuracy on {preset.problems} held-out problems of each domain, in % with 95 % intervals.",
        "A base of a million parameters, and experts trained from it by RLVR: this shows how the parts work together,",
        "and supports no claim about methods.",
        "",
    ]
    table, rows = _experts(out)
    lines += [as_text(table), ""]
    data: dict[str, Any] = {"problems": preset.problems, "models": rows, "groups": {}}
    for group in groups(preset):
        if group.name in SHOWN:
            more, found = _group(out, group)
            lines += more
            data["groups"][group.name] = found
    return Report(tuple(lines), data)


def _experts(out: Path) -> tuple[list[list[str]], list[dict[str, Any]]]:
    table, rows = [["", *DOMAINS]], []
    for name in ("base", *EXPERTS):
        found = {domain: compare([_results(out, name, domain)]).tasks[0].models[0].accuracy for domain in DOMAINS}
        table.append([name, *(shown(found[domain]) for domain in DOMAINS)])
        rows.append({"model": name, **{domain: vars(found[domain]) for domain in DOMAINS}})
    return table, rows


def _group(out: Path, group: Group) -> tuple[list[str], dict[str, Any]]:
    found = group_summary(out, group)
    total = found["merges"]["sar"]["statistics"]
    lines = [f"{TITLES[group.name]} ({', '.join(group.experts)})", ""]
    lines += [as_text(merges_table(found, group)), "", "What SAR decided:", "", as_text(statistics_table(total)), ""]
    found["beyond_noise"] = {}
    for domain in group.domains:
        files = [_results(out, f"{group.name}-{one.label}", domain) for one in contenders(len(group.experts))]
        models = compare(files, reference="sar").tasks[0].models
        lines += _judged(domain, [model for model in models if model.difference is not None])
        found["beyond_noise"][domain] = {
            model.label: {"difference": vars(model.difference.interval), "p_holm": model.difference.p_holm}
            for model in models
            if model.difference is not None
        }
    return [*lines, ""], found


def _judged(domain: str, others: list[Model]) -> list[str]:
    """Which merges differ from SAR's by more than chance, after Holm's correction."""
    lines, alike = [], []
    for model in others:
        gap = model.difference
        assert gap is not None
        if gap.p_holm < 0.05:
            word = "above" if gap.interval.value > 0 else "below"
            points = shown(Interval(abs(gap.interval.value), None, None, None))
            lines.append(f"{domain}: {model.label} is {points} points {word} sar, beyond noise (p = {gap.p_holm:.2g}).")
        else:
            alike.append(model.label)
    if alike:
        lines.append(f"{domain}: no difference from sar beyond noise for {', '.join(alike)}.")
    return lines


def _results(out: Path, name: str, domain: str) -> Path:
    return out / "results" / name / f"{domain}.jsonl"
