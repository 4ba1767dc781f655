"""The page of the pilot: the gate's outcome first, then every regime that was tried, and what a study could see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlmerge.figures import as_markdown
from rlmerge.lab.pilot import AGAIN, PilotPreset
from rlmerge.lab.pilot_summary import GATE, Row, summary


def write_page(root: Path, preset: PilotPreset, page: Path) -> dict[str, Any]:
    """Writes the page, and its numbers (JSON) and figures beside it; returns the numbers."""
    from rlmerge.lab.pilot_plot import write_curves, write_losses

    found = summary(root, preset)
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    curves, losses = (page.with_name(f"{page.stem}-{name}.svg") for name in ("curves", "losses"))
    regimes = {regime.name: [one.name for one in regime.experts] for regime in preset.regimes}
    write_curves({name: found["experts"][name]["curve"] for name in found["experts"]}, regimes, curves)
    write_losses(found["sets"], losses)
    parts = [f"# The pilot: {outcome(found)}", ""]
    parts += [part for line in (preset.note, _about(preset)) if line for part in (line, "")]
    parts += _gate_lines(found["gate"])
    parts += [f"![What merges lose, by set]({losses.name})", "", f"![Learning curves]({curves.name})", ""]
    for regime in preset.regimes:
        parts += [f"## {regime.name}", "", f"{regime.why[0].upper()}{regime.why[1:]}.", ""]
        names = [one.name for one in regime.experts if one.name in found["experts"]]
        rows = [_expert_row(name, found["experts"][name]) for name in names]
        if rows:
            head = ["expert", "task", "base", "greedy", "gain", "mass", "gain", "elsewhere", "other dtype, less",
                    "last entropy", "answers, tokens"]  # fmt: skip
            parts += [*as_markdown([head, *rows]), ""]
        for name, _ in regime.sets:
            if (one := found["sets"].get(f"{regime.name}.{name}")) is not None:
                parts += _set_lines(f"{regime.name}.{name}", one)
    if found["power"]:
        parts += _power_lines(found["power"], preset.pairs, dict(preset.paired))
        parts += _together_lines(found["together"], preset.pairs, dict(preset.paired))
    if found["missing"]:
        parts += [f"Not done yet: {len(found['missing'])} cells.", ""]
    page.write_text("\n".join(parts))
    return found


def outcome(found: dict[str, Any]) -> str:
    """The gate's outcome, as a sentence: of sets of RLVR's experts."""
    if not found["judged"]:
        return "no set is measured yet"
    held = dict.fromkeys(one["set"] for one in found["gate"] if one["holds"])
    greedy = {one["set"] for one in found["gate"] if one["holds"] and one["by"] == "greedy"}
    share = f"{len(held) or 'none'} of {len(found['judged'])} sets{' so far' if found['missing'] else ''}"
    pending = any(one["second"] is None for one in found["gate"])
    looked = ", the second look at some of which is open" if pending else ""
    if held:
        how = f" (of greedy answers in {len(greedy)}, of samples in the others)" if greedy != set(held) else ""
        return f"averaging costs {100 * GATE:.0f} points of accuracy or more in {share}{how}{looked}: {', '.join(held)}"
    most = max(found["sets"][name]["merges"]["fp32"]["mean"]["loss"]["greedy"]["high"] for name in found["judged"])
    return (
        f"averaging was seen to cost {100 * GATE:.0f} points in {share}{looked}; intervals leave open a loss of up to "
        f"{100 * most:.1f} points"
    )


def _gate_lines(gate: list[Row]) -> list[str]:
    if not gate:
        return []
    rows = [
        [one["set"], one["dtype"], one["by"], _interval(one["first"]), one["then"],
         _interval(one["second"]) if one["second"] else "not yet",
         {True: "yes", False: "no", None: "not yet"}[one["holds"]]]
        for one in gate
    ]  # fmt: skip
    about = (
        "Sets whose mean lost as much as the gate asks for, by greedy answers or by mass, and what it loses on other "
        f"problems, as many, that nobody had looked at, by greedy answers or by {AGAIN} samples at temperature 1:"
    )
    return [about, "", *as_markdown([["set", "kept in", "by", "loss", "again by", "loss", "holds"], *rows]), ""]


def _about(preset: PilotPreset) -> str:
    return (
        f"Exploratory: {preset.problems} validation problems a task, greedy, and *mass*: the probability that the "
        f"answer is one of the right texts that the base was seen to write ({preset.attempts} samples of each of the "
        f"first {preset.texts} problems, beside the solution it comes with). All computed in fp32. Points with 95 % "
        "intervals over problems; the experts of a set are taken as they are. *Loss*: single experts on their own "
        "tasks less the merge. *Retained*: share of their gain. *Traces*: mean log-probability of a token of these "
        "texts, less too (below 0: the merge finds them likelier). Experts are the bf16 checkpoints, which earned the "
        "rewards; *masters*: their fp32 masters instead (of a LoRA the other way round). The null model is that of "
        "`rlmerge inspect`."
    )


def _expert_row(name: str, one: Row) -> list[str]:
    cells = [name, one["task"], f"{100 * one['greedy']['base']:.1f}"]
    for metric in ("greedy", "mass"):
        if metric not in one:
            cells += ["–"] * 2
        else:
            cells += [f"{100 * one[metric]['expert']:.1f}", _interval(one[metric]["gain"])]
    last = one["curve"][-1]
    elsewhere = "; ".join(f"{task} {_interval(gain)}" for task, gain in one["elsewhere"].items()) or "–"
    cells += [elsewhere, f"{one['other']['dtype']} {_interval(one['other']['less'])}"]
    cells.append(f"{last['entropy']:.3f}" if "entropy" in last else "–")
    cells.append(f"{last['length']:.0f}" if "length" in last else "–")
    return cells


def _interval(one: Row, scale: float = 100, digits: int = 1) -> str:
    if one["value"] is None:
        return "–"
    ends = [f"{scale * one[key]:.{digits}f}" if one[key] is not None else "?" for key in ("low", "high")]
    return f"{scale * one['value']:.{digits}f} [{ends[0]}, {ends[1]}]"


def _set_lines(name: str, one: Row) -> list[str]:
    geometry = one["geometry"]
    support = ", ".join(f"{key} {100 * value[0]:.1f} %" for key, value in geometry["support"].items())
    lines = [f"### {name}: {', '.join(one['members'])}", ""]
    lines += [f"Changed in bf16: {support}.", ""] if support else []
    head = ["pair", "cosine", "null", "Jaccard", "null", "conflict", "null"]
    keys = ("cosine", "jaccard", "conflict_overlap")
    rows = [
        [f"{pair['a']}, {pair['b']}", *(_three(value) for key in keys for value in pair[key])]
        for pair in geometry["pairs"]
    ]
    lines += [*as_markdown([head, *rows]), ""] if rows else []
    head = ["merge", "kept in", "greedy", "loss", "retained, %", "mass", "loss", "retained, %", "traces, nats"]
    rows = []
    for dtype, merges in one["merges"].items():
        for label, row in merges.items():
            cells = [label, dtype]
            for metric in ("greedy", "mass"):
                if metric not in row["loss"]:
                    cells += ["–"] * 3
                    continue
                score = np.mean([scores[metric] for scores in row["score"].values()])
                cells += [f"{100 * score:.1f}", _interval(row["loss"][metric])]
                cells += [_interval(row["retained"][metric], 100, 0)]
            traces = row["loss"].get("trace")
            rows.append([*cells, _interval(traces, 1, 3) if traces else "–"])
    return [*lines, *as_markdown([head, *rows]), ""]


def _power_lines(rows: list[Row], pairs: int, names: dict[str, str]) -> list[str]:
    """The tables of variances and detectable effects: of several pairs, and of one."""
    several, alone = ([row for row in rows if (row["pairs"] > 1) == want] for want in (True, False))
    parts = ["## What a study could see", ""]
    if several:
        parts += _of_several(several, pairs, names)
    if alone:
        parts += _of_one(alone, pairs, names)
    return parts


FOUND = "found four times in five, with so many problems"
SAMPLED = f"*Sampled*: {AGAIN} samples of each problem of the second look; "


def _of_one(rows: list[Row], pairs: int, names: dict[str, str]) -> list[str]:
    head = ["difference", "sets", "metric", "here", FOUND]
    lines = []
    for row in rows:
        effects = [f"{count}: {100 * low:.1f}, {100 * row['alike'][count]:.1f}" for count, low in row["apart"].items()]
        first = [row["difference"], names[row["arm"]], row["metric"], f"{100 * row['mean']:.2f}"]
        lines.append([*first, "; ".join(effects)])
    about = (
        f"From one pair of experts, merges in fp32 (`rlmerge.lab.power`): effects, in points, that {pairs} pairs would "
        "find, the first if problems differ from pair to pair by chance, the second if they differ in all pairs alike. "
        "The truth is between the two, or above: pairs differ, too, by how much one pair cannot say. "
        f"{SAMPLED}part 2 of the study draws as many."
    )
    return [about, "", *as_markdown([head, *lines]), ""]


def _of_several(rows: list[Row], pairs: int, names: dict[str, str]) -> list[str]:
    head = ["difference", "sets", "metric", "pairs", "here", "sd of pairs", "at most", "of problems", "of what is left"]
    lines = []
    for row in rows:
        keys = ("seeds", "seeds_upper", "problems", "rest")
        spread = [f"{100 * np.sqrt(row[key]):.2f}" for key in keys]
        effects = [
            f"{count}: {100 * effect:.1f} ({100 * row['detectable_upper'][count]:.1f})"
            for count, effect in row["detectable"].items()
        ]
        first = [row["difference"], names[row["arm"]], row["metric"], str(row["pairs"])]
        lines.append([*first, f"{100 * row['mean']:.2f}", *spread, "; ".join(effects)])
    about = (
        "From disjoint pairs of experts, merges in fp32 (`rlmerge.lab.power`): standard deviations of a difference, in "
        f"points, and the effects that {pairs} pairs would find with so many problems of each domain; in brackets, if "
        "pairs differ as much as their upper limit (80 %) has it. Shares that are kept are points of the gain. "
        f"{SAMPLED}part 1 of the study draws more of some, so these are from above."
    )
    return [about, "", *as_markdown([[*head, FOUND], *lines]), ""]


def _together_lines(rows: list[Row], pairs: int, names: dict[str, str]) -> list[str]:
    if not rows:
        return []
    head = ["sets", "metric", "SAR better by", "problems", "chance, %"]
    lines = []
    for row in rows:
        low, high = (" to ".join(f"{100 * end:.0f}" for end in row[key]) for key in ("bounds", "bounds_upper"))
        effect = f"{100 * row['effect']:.0f} points"
        lines.append([names[row["arm"]], row["metric"], effect, str(row["problems"]), f"{low} ({high})"])
    about = (
        f"The chance that {pairs} pairs show SAR above all of the {rows[0]['merges']} merges that it is "
        "compared with here, if it is better than each by so much: bounds, whatever the comparisons have in common. "
        "(The study asks for more of them at once, so its chance is below the upper bound.)"
    )
    return [about, "", *as_markdown([head, *lines]), ""]


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
