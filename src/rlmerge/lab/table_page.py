"""The page of the table of all methods: Markdown, a plot, and the numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlmerge.evaluate.compare import Interval
from rlmerge.figures import as_markdown
from rlmerge.lab.page import shown
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.table import VARIANTS, TablePreset, experts_of
from rlmerge.lab.table_plot import write_plot
from rlmerge.lab.table_summary import REFERENCE, table_summary

LEVEL = 0.05
NAME = "methods-table"

HEAD = """\
# All methods on tiny experts

Made by `rlmerge lab methods`: {methods} methods in {rows} rows, {settings} settings, each row at the method's own
defaults and tuned, with the RLVR experts of math and code that come with rlmerge. Greedy accuracy on {problems}
held-out problems of each domain, in percent with 95 % intervals over problems.

**This table supports no scientific claim, and is no ranking.** A model of 1.1 million parameters, two pairs of
experts of one base, one-digit tasks: it shows that every method runs, what its defaults do, and how differences are
judged. Rows are in the order of their names. Intervals are those of problems; what other training runs would bring,
two pairs cannot tell. All numbers, every setting's among them: [methods-table.json](methods-table.json).
"""
TUNING = """\
## Tuning

On {tuning} validation problems of each domain, with pair {first}. *Models*: how many of the settings gave different
weights. Accuracies are means of both domains in percent. The best of several noisy ones reads too high: the tables
above are of other problems. †: the least or largest number that was tried of a parameter which could go on there, so a
wider grid might have found better.
"""
HOW = """\
## How

- **Defaults**: what a user gets who writes no parameter. A parameter without default is 1: the `weight` that many
  methods require, as in mergekit, and the `t` of `nearswap`. So `dare_linear` and others, whose default density is 1,
  cut nothing here, and are the same model as methods that never cut.
- **Tuned**: of at most eight settings, the defaults among them, the one with the highest mean accuracy of both
  domains on validation problems; of equal ones the first. All rows get eight evaluations but two: `karcher` has
  parameters only for how exactly it computes, `model_stock` has one choice. Only pair {first} was tuned on. Random
  methods draw once, seed 0.
- **Rows**: `passthrough` and `subspace_rewiring` take one model, and have a row for each expert; `passthrough` is the
  expert itself. `nearswap` and `arcee_fusion` take one model, too, and merge two where one expert is the base: `code
  onto math` has the math expert as `base_model` and the code expert as the model; its survival counts changes of that
  base. `sar-delta2` is `sar` without Fishers. `linear` and `karcher` average the two experts; the base, which they
  can take as one more model, is left out (for `karcher` altogether, so nothing counts its survival).
- **Retained**: (merge − base) / (expert − base) in percent, with Fieller's interval.
- **Less {reference}**: the mean accuracy of both domains less that of `{reference}` in the same table, in points, on
  the same problems, with the paired interval of [Comparing models](compare.md). A star: McNemar's mid-p over the
  problems of both domains is below {level} after Holm's correction over all rows of the table. Where there is no
  star, the sign means nothing.
- **Survival**: share of the intended updates that the cast to bf16 leaves.
- **Seconds, CPU, MB**: of the merge to a folder, on one thread, in a process of its own, by NumPy's kernels, which
  rlmerge chooses for models of this size. Seconds: wall time of the fastest of {repeats} merges after a first one,
  without the start of the process. Other processes work at the same time, so the processor's seconds of that merge
  say more. MB: the most resident memory of that process, most of it Python, NumPy and our modules. At a million
  parameters these are fixed costs, and say nothing about large models."""


def write_table(root: Path, preset: TablePreset) -> Path:
    """Writes ROOT/methods-table.md, .svg and .json from what the cells left; returns the page."""
    found = table_summary(root, preset)
    (root / f"{NAME}.json").write_text(json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n")
    write_plot(found, root / f"{NAME}.svg")
    lines = [*_head(preset, found), *_models(found)]
    clean = [seed for seed in preset.seeds if seed != preset.seeds[0]]
    for seed in (*clean, preset.seeds[0]):
        lines += _pair(seed, seed == preset.seeds[0], found)
    lines += [*_tuning(preset, found), *_how(preset)]
    page = root / f"{NAME}.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _head(preset: TablePreset, found: dict[str, Any]) -> list[str]:
    tuning = found["tuning"].values()
    settings = sum(len(one["tried"]) for one in tuning)
    methods = len({one["method"] for one in tuning})
    return [HEAD.format(methods=methods, rows=len(tuning), settings=settings, problems=preset.problems)]


def _models(found: dict[str, Any]) -> list[str]:
    table = [["model", *DOMAINS]]
    for name, accuracy in found["models"].items():
        table.append([name, *(shown(Interval(**accuracy[domain])) for domain in DOMAINS)])
    return ["## Base and experts", "", *as_markdown(table), ""]


def _pair(seed: int, tuned_on: bool, found: dict[str, Any]) -> list[str]:
    """The tables of a pair, at the defaults and tuned, with what is beyond noise."""
    names = " and ".join(f"`{name}`" for name in experts_of(seed).values())
    role = "The pair that was tuned on, on other problems" if tuned_on else "Tuning never saw this pair: the clean one"
    lines = [f"## Pair {seed}: {names}", "", f"{role}.", ""]
    if not tuned_on:
        lines += [f"![Each row's mean accuracy less that of {REFERENCE}, with intervals]({NAME}.svg)", ""]
    for variant in VARIANTS:
        rows = found["pairs"][str(seed)][variant]
        title = "At the methods' own defaults" if variant == "default" else "Tuned"
        lines += [f"### Pair {seed}: {title.lower()}", "", *as_markdown(_table(rows)), "", *_judged(rows), ""]
        if variant == "default":
            lines += _alike(rows)
    return lines


def _table(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    head = [text for domain in DOMAINS for text in (domain, "retained")]
    table = [["method", "setting", *head, f"less {REFERENCE}", "survival", "seconds", "CPU", "MB"]]
    for label, row in rows.items():
        cells = []
        for domain in DOMAINS:
            kept = row[domain]["retention"]
            cells += [shown(Interval(**row[domain]["accuracy"])), shown(Interval(**kept)) if kept else "-"]
        survival = "-" if row["survival"] is None else f"{100 * row['survival']:.1f} %"
        memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        cells += [_less(row.get("difference")), survival, f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", memory]
        table.append([f"`{label}`", row["setting"], *cells])
    return table


def _less(difference: dict[str, Any] | None) -> str:
    """'−1.2 [−2.5, 0.1]' in points, with a star where it is beyond noise."""
    if difference is None:
        return ""
    rounded = (round(100 * difference[key], 1) + 0.0 for key in ("value", "low", "high"))  # no −0.0
    value, low, high = (f"{points:.1f}".replace("-", "−") for points in rounded)
    star = " \\*" if difference["p_holm"] < LEVEL else ""
    return f"{value} [{low}, {high}]{star}"


def _judged(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Which rows differ from the reference by more than chance."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "within noise": []}
    for label, row in rows.items():
        if (difference := row.get("difference")) is not None:
            beyond = "better" if difference["value"] > 0 else "worse"
            groups[beyond if difference["p_holm"] < LEVEL else "within noise"].append(f"`{label}`")
    parts = [f"{word}: {', '.join(labels) or 'none'}" for word, labels in groups.items()]
    return [f"Against `{REFERENCE}`, {'; '.join(parts)}."] if any(groups.values()) else []


def _alike(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Which rows are one model, bit for bit."""
    same: dict[str, list[str]] = {}
    for label, row in rows.items():
        same.setdefault(row["weights"], []).append(f"`{label}`")
    found = [", ".join(labels) for labels in same.values() if len(labels) > 1]
    return [f"One and the same model, bit for bit: {'; '.join(found)}.", ""] if found else []


def _tuning(preset: TablePreset, found: dict[str, Any]) -> list[str]:
    table = [["method", "tried beside the defaults", "settings", "models", "defaults", "chosen", "at it"]]
    for label, one in found["tuning"].items():
        means = [sum(tried[domain] for domain in DOMAINS) / len(DOMAINS) for tried in one["tried"]]
        chosen = one["chosen"]
        name = "the defaults" if chosen == 0 else one["tried"][chosen]["setting"] + (" †" if one["at_end"] else "")
        cells = [str(len(means)), str(one["different"]), f"{100 * means[0]:.1f}", name, f"{100 * means[chosen]:.1f}"]
        table.append([f"`{label}`", one["grid"], *cells])
    return [TUNING.format(tuning=preset.tuning, first=preset.seeds[0]), *as_markdown(table), ""]


def _how(preset: TablePreset) -> list[str]:
    return [HOW.format(first=preset.seeds[0], reference=REFERENCE, level=LEVEL, repeats=preset.repeats)]
