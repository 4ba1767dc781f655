"""The page of a run of the lab: accuracies, learning curves, and what every merge kept, as Markdown with plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlmerge.evaluate.compare import Interval, Model, compare
from rlmerge.figures import as_markdown, percent
from rlmerge.lab.cells import Group, groups
from rlmerge.lab.contenders import contenders
from rlmerge.lab.curves import write_curve
from rlmerge.lab.presets import DOMAINS, Preset


def write_page(root: Path, preset: Preset) -> Path:
    """Writes ROOT/page.md, its plots and ROOT/summary.json, from what the cells left."""
    found = summary(root, preset)
    (root / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    runs = {kind: [f"{kind}-{domain}-{seed}" for domain in DOMAINS for seed in preset.seeds] for kind in preset.kinds}
    for kind, names in runs.items():
        write_curve([root / "models" / name / "log.jsonl" for name in names], root / f"curves-{kind}.svg", names)
    parts = [
        f"# The lab's run `{preset.name}`",
        "",
        f"Made by `rlmerge lab run {preset.name}`. Greedy accuracy on {preset.problems} held-out problems of each "
        "domain, in percent with 95 % intervals over problems; two seeds say nothing about the spread between seeds.",
    ]
    if preset.name == "tiny":
        parts += [
            "",
            "**This run supports no scientific claim.** A model of a million parameters, trained for minutes on "
            "one-digit arithmetic, shows that the parts work together, and no more.",
        ]
    parts += ["", "## Base and experts", "", *as_markdown(_experts_table(found)), "", "## Learning curves", ""]
    parts += [f"![{kind}: reward, loss, KL, entropy, length by step](curves-{kind}.svg)\n" for kind in preset.kinds]
    for group in groups(preset):
        parts += [f"## {_title(group)}", "", *as_markdown(merges_table(found["groups"][group.name], group)), ""]
    parts += [
        "*Retained*: (merge − base) / (expert − base); of two seeds, their mean is the expert. *Conflict*: share of "
        "the overlap in which the experts' signs differ. *Survival*: share of the intended updates that the cast to "
        "bf16 leaves. Intervals: docs/compare.md.",
        "",
    ]
    page = root / "page.md"
    page.write_text("\n".join(parts))
    return page


def summary(root: Path, preset: Preset) -> dict[str, Any]:
    """All numbers of the page: {'experts': {domain: [row, …]}, 'groups': {group: {domain: [row, …]}}}."""
    experts = {}
    for domain in DOMAINS:
        names = ["base", *(f"{kind}-{one}-{seed}" for kind in preset.kinds for one in DOMAINS for seed in preset.seeds)]
        experts[domain] = [_plain(root / "results" / name / f"{domain}.jsonl", name) for name in names]
    found = {group.name: group_summary(root, preset, group) for group in groups(preset)}
    return {"preset": preset.name, "experts": experts, "groups": found}


def _plain(path: Path, name: str) -> dict[str, Any]:
    model = compare([path], force=True).tasks[0].models[0]
    return {"model": name, "accuracy": asdict(model.accuracy)}


def group_summary(root: Path, preset: Preset, group: Group) -> dict[str, Any]:
    """Accuracies and retention of base, experts and merges of a group, and what each merge did."""
    labels = [one.label for one in contenders(len(group.experts), preset.methods)]
    found: dict[str, Any] = {"merges": {}}
    for domain in group.domains:
        own = [name for name in group.experts if name.split("-")[1] == domain]
        files = [root / "results" / name / f"{domain}.jsonl" for name in ("base", *own)]
        files += [root / "results" / f"{group.name}-{label}" / f"{domain}.jsonl" for label in labels]
        found[domain] = [_row(model) for model in compare(files).tasks[0].models]
    for label in labels:
        note = json.loads((root / "cells" / f"merge-{group.name}-{label}.json").read_text())
        found["merges"][label] = {"statistics": note["merge"], "seconds": note["seconds"]}
    return found


def _row(model: Model) -> dict[str, Any]:
    kept = model.retention[0] if model.retention else None
    return {
        "model": model.label,
        "role": model.role,
        "accuracy": asdict(model.accuracy),
        "retention": asdict(kept.gain_retention) if kept and kept.gain_retention else None,
    }


def _title(group: Group) -> str:
    kind, what, which = group.name.split("-")
    if what == "fusion":
        return f"{kind.upper()}: math and code in one model, seed {which}"
    return f"{kind.upper()}: two seeds of {which}"


def _experts_table(found: dict[str, Any]) -> list[list[str]]:
    rows = [["model", *DOMAINS]]
    for together in zip(*(found["experts"][domain] for domain in DOMAINS)):
        rows.append([together[0]["model"], *(shown(Interval(**row["accuracy"])) for row in together)])
    return rows


def merges_table(found: dict[str, Any], group: Group) -> list[list[str]]:
    """The same as cells under a header."""
    head = [text for domain in group.domains for text in (domain, "retained")]
    table = [["model", *head, "conflict", "survival"]]
    merged = {domain: {row["model"]: row for row in found[domain]} for domain in group.domains}
    rows = [row for domain in group.domains for row in found[domain]]
    labels = list(dict.fromkeys(row["model"] for row in rows if row["role"] != "merged"))
    labels += list(dict.fromkeys(row["model"] for row in rows if row["role"] == "merged"))
    for label in labels:
        cells = []
        for domain in group.domains:
            row = merged[domain].get(label)
            kept = row["retention"] if row else None
            cells += [shown(Interval(**row["accuracy"])) if row else "", shown(Interval(**kept)) if kept else ""]
        done = found["merges"].get(label, {}).get("statistics", {})
        cells += [percent(done[key]) if key in done else "" for key in ("conflict", "survival")]
        table.append([label, *cells])
    return table


def shown(interval: Interval) -> str:
    """'83.5 [79.6, 86.8]', in percent; an interval without bounds is left out."""
    if interval.low is None or interval.high is None:
        return f"{100 * interval.value:.1f}"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
