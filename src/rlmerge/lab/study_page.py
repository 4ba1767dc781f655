"""The page of the study, and of its rehearsal: hypothesis by hypothesis, with every number as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlmerge.figures import as_markdown
from rlmerge.lab.cells import Cell, is_done, read_cell
from rlmerge.lab.curves import means, read_log
from rlmerge.lab.hypotheses import METRICS, SHOWN, Numbers, by_domain, controls, hypotheses, masters, matches, transfer
from rlmerge.lab.measure import FEW
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.study import OTHER_BASE, StudyPreset, expert, study_cells

COLOURS = {"rlvr": "#bb5566", "rft": "#ddaa33", "sft": "#004488", "sft-accuracy": "#4477aa", "sft-norm": "#66ccee",
           "other": "#aa4499"}  # fmt: skip
TITLE = {
    "greedy": "greedy accuracy", "sampled": "accuracy of samples", "mass": "probability of known right texts",
}  # fmt: skip
TRACE = "trace"
"""Mean log-probability of a token of the texts that are known to be right, in nats: shown, and judged by nowhere."""
Row = dict[str, Any]


def write_page(root: Path, preset: StudyPreset, page: Path) -> dict[str, Any]:
    """Writes page, numbers (JSON) and plot beside each other; returns the numbers."""
    numbers = Numbers(root, preset)
    found: dict[str, Any] = {
        "preset": preset.name,
        "seeds": list(preset.seeds),
        "split": preset.split,
        "half": preset.half,
        "seal": preset.seal,
        "frozen": read_cell(root, "frozen")["settings"],
        "tuning": {
            method: read_cell(root, f"tune-{method}")["tried"] for method in preset.methods if preset.frozen is None
        },
        "curves": _curves(root, preset),
        "experts": _experts(numbers),
        "matches": matches(numbers),
        "masters": masters(numbers),
        "transfer": transfer(numbers),
        "controls": controls(numbers),
        "domains": by_domain(numbers),
        **hypotheses(numbers),
    }
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    write_plot(found, page.with_suffix(".svg"))
    page.write_text("\n".join(_lines(preset, found, page)))
    return found


def _experts(numbers: Numbers) -> Row:
    """Scores of the base and of every expert on both domains."""
    names = ["base", OTHER_BASE]
    for seed in numbers.preset.seeds:
        names += [expert(arm, domain, seed) for arm in numbers.preset.arms for domain in DOMAINS]
    found: Row = {}
    for name in names:
        if is_done(numbers.root, Cell(f"measure-{name}", "")):
            tasks = read_cell(numbers.root, f"measure-{name}")["tasks"]
            found[name] = {
                domain: {
                    metric: float(numbers.score(f"measure-{name}", domain, metric).mean())
                    for metric in (*METRICS, TRACE)
                }
                for domain in DOMAINS
                if numbers.preset.tasks[domain] in tasks
            }
    return found


def _curves(root: Path, preset: StudyPreset) -> Row:
    """Means of ten steps of each RLVR run."""
    found = {}
    for cell in study_cells(preset):
        log = root / "models" / cell.name / "log.jsonl"
        if cell.kind in ("rlvr", "twice", "joint", "other") and log.exists():
            found[cell.name] = means(read_log(log), ("reward", "entropy", "kl", "length", "live_groups"))
    return found


def _samples(preset: StudyPreset) -> str:
    if not preset.deep:
        return f"{preset.samples} samples of the first {preset.sampled}"
    return f"{preset.samples} samples of the first {preset.deep} and {FEW} of the next {preset.sampled - preset.deep}"


def _lines(preset: StudyPreset, found: Row, page: Path) -> list[str]:
    rehearsal = len(preset.seeds) < 2
    title = "The study, rehearsed on the development pair" if rehearsal else "The study"
    lines = [f"# {title}", ""]
    if rehearsal:
        tuned = "the one that methods were tuned on, " if preset.frozen is None else ""
        lines += [
            f"**No result.** One pair of runs of {preset.steps} steps, {tuned}on validation problems; intervals are "
            "over problems alone. It shows what the pages of the confirmation will hold.",
            "",
        ]
    lines += [
        f"{preset.problems} problems of a domain ({preset.split}{f', half {preset.half}' if preset.half else ''}), "
        f"greedy; {_samples(preset)} at temperature 1, with the same random numbers for all models; *mass*: the "
        f"probability that the answer is one of the right texts that the base was seen to write ({preset.attempts} "
        f"samples of each of the first {preset.texts} problems), a bound of pass@1 from below, without noise of "
        "samples; *trace*: mean log-probability of a token of these, in nats. In points. Experts are bf16 "
        "checkpoints, merges are kept in fp32 but where it says bf16, all is computed in fp32. "
        "[ ] are 95 % intervals. docs/study/protocol.md says what is asked, and what would refute it.",
        "",
        f"![Share of the gain that merges keep]({page.with_suffix('.svg').name})",
        "",
    ]
    if not rehearsal:
        lines += ["## In words", "", *as_markdown([["claim", "is"], *map(list, found["words"].items())]), ""]
    if preset.seal:
        lines += [f"Seal: {preset.seal}", ""]
    lines += _experts_lines(found)
    for name, make in (("H1", _h1), ("H2", _h2), ("H3", _h3), ("H4", _h4), ("H5", _h5), ("H6", _h6)):
        if name in found:
            lines += [f"## {name}: {TITLES[name]}", "", *make(found[name]), ""]
        if name == "H3" and found["domains"]:
            lines += _domains_lines(found["domains"])
    return [*lines, *_tuning_lines(found), ""]


TITLES = {
    "H1": "RLVR's updates are sparser",
    "H2": "they are near-orthogonal",
    "H3": "standard merges lose more of RLVR's gains",
    "H4": "SAR is above every baseline",
    "H5": "the Fisher matters",
    "H6": "what costs the mean its gains",
}


def _experts_lines(found: Row) -> list[str]:
    head = ["model", *(f"{domain} {metric}" for domain in DOMAINS for metric in (*METRICS, TRACE))]
    rows = []
    for name, scores in found["experts"].items():
        row = [name]
        for one in (scores.get(domain, {}) for domain in DOMAINS):
            row += [_score(one.get(metric)) for metric in METRICS] + [_plain(one.get(TRACE))]
        rows.append(row)
    lines = ["## Experts", "", *as_markdown([head, *rows]), ""]
    for row in found["controls"]:
        names = list(row[DOMAINS[0]])
        head = [f"seed {row['seed']}", *names]
        rows = [[domain, *(_score(row[domain][name]["greedy"]) for name in names if name in row[domain])]
                for domain in DOMAINS]  # fmt: skip
        lines += ["Equal compute without merging, greedy:", "", *as_markdown([head, *rows]), ""]
    if found["matches"]:
        head = ["run", "steps by accuracy", "steps by norm", "RLVR's accuracy", "RLVR's norm", "matched", "matched"]
        rows = [
            [name.removeprefix("match-"), str(one["accuracy"]), str(one["norm"]),
             _score(one["aim"]["greedy"]), f"{one['aim']['norm']:.2f}",
             _score(one["seen"][str(one["accuracy"])]["greedy"]), f"{one['seen'][str(one['norm'])]['norm']:.2f}"]
            for name, one in found["matches"].items()
        ]  # fmt: skip
        lines += ["SFT, matched through its checkpoints:", "", *as_markdown([head, *rows]), ""]
    if found["masters"]:
        rows = [[arm, str(one["runs"]), f"{100 * one['mean']:.1f}", _interval(one["less"], 100)]
                for arm, one in found["masters"].items()]  # fmt: skip
        lines += ["Points of greedy accuracy that the fp32 masters lack beside the bf16 models that were trained:", "",
                  *as_markdown([["arm", "runs", "mean", "over runs"], *rows]), ""]  # fmt: skip
    if found["transfer"]:
        rows = [[arm, str(one["runs"]), f"{100 * one['mean']:.1f}", _interval(one["more"], 100)]
                for arm, one in found["transfer"].items()]  # fmt: skip
        lines += ["Points of greedy accuracy that experts gain on the other domain:", "",
                  *as_markdown([["arm", "runs", "mean", "over runs"], *rows]), ""]  # fmt: skip
    return lines


def _h1(found: Row) -> list[str]:
    rows = []
    for dtype, arms in found.items():
        for arm, one in arms.items():
            more = one["more"]
            rows.append(
                [arm, dtype, f"{100 * one['mean']:.1f} %", _interval(more, 100), more["verdict"] if more else ""]
            )
    return as_markdown([["arm", "stored", "weights changed", "more than RLVR, points", "verdict"], *rows])


def _h2(found: Row) -> list[str]:
    keys = ("cosine", "jaccard", "conflict_overlap")
    rows = [
        [one["set"], one["dtype"], *(_plain(value) for key in keys for value in one[key])] for one in found["pairs"]
    ]
    head = ["set", "stored", "cosine", "null", "Jaccard", "null", "conflict", "null"]
    claims = [[one["what"], one["claim"], _interval(one["row"], 1, 3), one["verdict"]] for one in found["claims"]]
    return [*as_markdown([head, *rows]), "", *as_markdown([["sets", "claim", "by", "verdict"], *claims])]


def _h3(found: list[Row]) -> list[str]:
    arms = list(found[0]["kept"]) if found else []
    head = ["set", "merge", "metric", *(f"{arm} keeps, %" for arm in arms)]
    head += [f"{arm} more, points" for arm in arms if arm != "rlvr"]
    rows = []
    for one in found:
        row = [one["what"], one["merge"], one["metric"], *(_interval(one["kept"].get(arm), 100, 0) for arm in arms)]
        rows.append([*row, *(_interval(one["more"].get(arm), 100, 0) for arm in arms if arm != "rlvr")])
    return as_markdown([head, *rows])


def _domains_lines(found: list[Row]) -> list[str]:
    rows = [[one["arm"], one["merge"], one["metric"], *(_interval(one[domain], 100) for domain in DOMAINS)]
            for one in found]  # fmt: skip
    said = "Points that a fusion has more than the expert of a domain there (below 0: lost):"
    return [said, "", *as_markdown([["arm", "merge", "metric", *DOMAINS], *rows]), ""]


def _h4(found: list[Row]) -> list[str]:
    rows = []
    for one in found:
        for label, row in one["less"].items():
            rows.append([one["what"], one["metric"], label, _interval(row, 100), row["verdict"]])
        rows.append([one["what"], one["metric"], "**all of them**", f"p = {one['p']:.3g}", one["verdict"]])
    return as_markdown([["set", "metric", "SAR less", "difference", "verdict"], *rows])


def _pairs(found: list[Row], first: str) -> list[str]:
    rows = [
        ["/".join(one["one"]), "/".join(one["other"])]
        + [text for m in SHOWN for text in (_interval(one[m], 100), one[m]["verdict"])]
        for one in found
    ]
    return as_markdown([[first, "less", *(head for m in SHOWN for head in (m, "verdict"))], *rows])


def _h5(found: list[Row]) -> list[str]:
    return _pairs(found, "settled by")


def _h6(found: list[Row]) -> list[str]:
    return _pairs(found, "merge")


def _tuning_lines(found: Row) -> list[str]:
    rows = []
    for method, tried in found["tuning"].items():
        for one in tried:
            setting = ", ".join(f"{key} {value}" for key, value in one["setting"].items()) or "defaults"
            chosen = "**chosen**" if {key: one[key] for key in ("setting", "scale")} == found["frozen"][method] else ""
            rows.append([method, setting, f"{one['scale']:g}", *(f"{100 * v:.1f}" for v in one["greedy"]), chosen])
    head = ["method", "setting", "scale", *(f"{domain} greedy" for domain in DOMAINS), ""]
    if not rows:
        return ["Settings were frozen before: the page of the rehearsal (docs/study/) has how they were chosen."]
    return ["## Tuning, on the development pair", "", *as_markdown([head, *rows])]


def _score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _interval(one: Row | None, scale: float = 1, digits: int = 1) -> str:
    if one is None or one["value"] is None:
        return "–"
    ends = [f"{scale * one[key]:.{digits}f}" if one[key] is not None else "?" for key in ("low", "high")]
    return f"{scale * one['value']:.{digits}f} [{ends[0]}, {ends[1]}]"


def write_plot(found: Row, out: Path) -> None:
    """Writes an SVG: the share of the gain that each merge keeps, by arm, with 95 % intervals; a panel a metric."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [one for one in found.get("H3", []) if one["what"] == "fusion"]
    labels = list(dict.fromkeys(one["merge"] for one in rows))
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, SHOWN):
        shown = {one["merge"]: one["kept"] for one in rows if one["metric"] == metric}
        arms = list(next(iter(shown.values()))) if shown else []
        for number, arm in enumerate(arms):
            shift = 0.14 * (number - (len(arms) - 1) / 2)
            for place, label in enumerate(labels):
                one = shown[label].get(arm)
                if one is None or one["value"] is None:
                    continue
                if one["low"] is not None and one["high"] is not None:
                    ends = [100 * one["low"], 100 * one["high"]]
                    axes.plot(ends, [place + shift] * 2, color=COLOURS[arm], linewidth=1.2)
                axes.plot([100 * one["value"]], [place + shift], "o", color=COLOURS[arm], markersize=4)
            axes.plot([], [], "o-", color=COLOURS[arm], markersize=4, label=arm)
        axes.axvline(100, color="#777777", linewidth=0.8)
        axes.set_title(TITLE[metric], fontsize=9)
        axes.set_xlabel("share of the single experts' gain that is kept, %", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    if rows:
        panels[-1].legend(fontsize=7)
    figure.patch.set_facecolor("white")
    with mpl.rc_context({"svg.hashsalt": "rlmerge", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})
