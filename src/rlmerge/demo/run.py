"""Runs the demo: Fishers, merges and evaluations as cells of the lab, then one report of what came out."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlmerge.demo.assets import DATA, EXPERTS, models_digest
from rlmerge.errors import OutputError
from rlmerge.evaluate.compare import Interval, Model, compare
from rlmerge.execute.safe_files import write_inside
from rlmerge.figures import as_text, statistics_table
from rlmerge.lab.cells import Cell, Group, cells, groups, opened_root
from rlmerge.lab.contenders import INPUTS, contenders
from rlmerge.lab.errors import LabError
from rlmerge.lab.page import group_summary, merges_table, shown
from rlmerge.lab.presets import DOMAINS, TINY, Preset
from rlmerge.lab.schedule import Step, run

SHOWN = ("rlvr-fusion-1", "rlvr-seeds-math")
"""The merges of the demo: math and code in one model, and two seeds of math."""
METHODS = ("linear", "ram", "sar", "task_arithmetic", "ties", "sar-delta2")
"""What is compared in the demo: SAR, and those that people know; `rlmerge lab run tiny` takes every method."""
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
    preset = replace(TINY, name="demo", problems=problems, kinds=("rlvr",), methods=METHODS)
    with opened_root(out, preset, models_digest(), {"models"}):
        copy_models(out)
        run(out, preset, workers, tell, demo_cells(preset))
        report = make_report(out, preset)
        write_inside(out, "demo.json", json.dumps(report.data, indent=1).encode())
        write_inside(out, "demo.txt", ("\n".join(report.lines) + "\n").encode())
    return report


def copy_models(out: Path) -> None:
    """The base and the experts, as delta packs, to out/models; not again if they are there.

    Raises LabError for an out/models that is something else.
    """
    models = out / "models"
    try:
        if not models.exists():
            out.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=out, prefix=".models-") as part:
                shutil.copytree(DATA / "models", Path(part) / "models")
                os.rename(Path(part) / "models", models)
    except OSError as error:
        raise OutputError(f"{models}: cannot be made: {error.strerror}.") from None
    for file in (path for path in DATA.rglob("*.safetensors")):
        copied = models / file.relative_to(DATA / "models")
        if not copied.is_file() or copied.stat().st_size != file.stat().st_size:
            raise LabError(f"{models}: is there and does not hold the demo's models. Name another folder.")


def demo_cells(preset: Preset) -> list[Cell]:
    """The cells of the lab that need no training, of the demo's experts and groups."""
    models = {"base", *EXPERTS}
    found = []
    for cell in cells(preset):
        wanted = (
            cell.name.removeprefix("eval-") in models
            if cell.kind == "eval"
            else cell.name.removeprefix(f"{cell.kind}-") in models
            if cell.kind in INPUTS
            else any(cell.name.startswith(f"merge-{group}-") for group in SHOWN)
        )
        if wanted and cell.kind in ("eval", *INPUTS, "merge"):
            found.append(cell)
    names = {cell.name for cell in found}
    return [replace(cell, needs=tuple(need for need in cell.needs if need in names)) for cell in found]


def make_report(out: Path, preset: Preset) -> Report:
    """Tables with intervals, what SAR decided, and which differences are beyond noise."""
    lines = [
        f"Greedy accuracy on {preset.problems} held-out problems of each domain, in % with 95 % intervals.",
        "A base of a million parameters, and experts trained from it by RLVR: this shows how the parts work together,",
        "and supports no claim about methods. 'Within noise' below: a paired test over these problems has p ≥ 0.05",
        "after Holm's correction over the merges. What other training runs would bring, it cannot tell.",
        "",
    ]
    table, rows = _experts(out)
    lines += [as_text(table), ""]
    data: dict[str, Any] = {"problems": preset.problems, "models": rows, "groups": {}}
    for group in groups(preset):
        if group.name in SHOWN:
            more, found = _group(out, preset, group)
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


def _group(out: Path, preset: Preset, group: Group) -> tuple[list[str], dict[str, Any]]:
    found = group_summary(out, preset, group)
    total = found["merges"]["sar"]["statistics"]
    lines = [f"{TITLES[group.name]} ({', '.join(group.experts)})", ""]
    lines += [as_text(merges_table(found, group)), "", "What SAR decided:", "", as_text(statistics_table(total)), ""]
    found["beyond_noise"] = {}
    for domain in group.domains:
        merges = [
            _results(out, f"{group.name}-{one.label}", domain) for one in contenders(len(group.experts), preset.methods)
        ]
        own = [name for name in group.experts if name.split("-")[1] == domain]
        others = {"the base": _results(out, "base", domain)}
        others |= {f"the {domain} expert": _results(out, own[0], domain)} if len(own) == 1 else {}
        found["beyond_noise"][domain] = {}
        for name, reference in {**others, "sar": None}.items():
            files, label = (merges, "sar") if reference is None else ([*merges, reference], str(reference))
            models = [one for one in compare(files, reference=label).tasks[0].models if one.difference is not None]
            lines += _judged(domain, name, models)
            found["beyond_noise"][domain][name] = {
                model.label: {"difference": vars(model.difference.interval), "p_holm": model.difference.p_holm}
                for model in models
                if model.difference is not None
            }
    return [*lines, ""], found


def _judged(domain: str, reference: str, models: Sequence[Model]) -> list[str]:
    """Which merges differ from the reference by more than chance, after Holm's correction over the merges."""
    beyond: dict[str, list[str]] = {"better": [], "worse": []}
    alike = []
    for model in models:
        gap = model.difference
        assert gap is not None
        points = shown(Interval(abs(gap.interval.value), None, None, None))
        if gap.p_holm < 0.05:
            beyond["better" if gap.interval.value > 0 else "worse"].append(f"{model.label} by {points}")
        else:
            alike.append(model.label)
    parts = [f"{word} are {', '.join(found)}" for word, found in beyond.items() if found]
    parts += [f"within noise are {', '.join(alike)}"] if alike else []
    return textwrap.wrap(
        f"{domain}, against {reference}: {'; '.join(parts)}.", 118, subsequent_indent="    ", break_on_hyphens=False
    )


def _results(out: Path, name: str, domain: str) -> Path:
    return out / "results" / name / f"{domain}.jsonl"
