"""The page of several geometry reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmerge.report.beside import EXPERT, PAIR, SHARES, STORED, Comparison, expert_name, pair_name, shown, tables
from rlmerge.report.figure import Figure, Page, Section, bars, lines, rows_of_table
from rlmerge.report.geometry_page import STORE_ADVICE

LAYERS = {"support": "weights changed", "relative_norm": "‖δ‖/‖θ0‖", "energy_share": "share of the expert's ‖δ‖²"}
GROUPS = {
    "changed": ("How much was changed", ("support", "support_bf16", "one_step", "unique")),
    "size": ("How large the updates are", ("relative_norm", "nss", "stable_rank", "kl")),
}
"""Figures of experts: those of shares and those of sizes, each measure on a scale of its own."""
NULL_TEXT = "The red tick is the null model of each report: what rounding alone would show."


def beside_page(found: Comparison, title: str = "") -> Page:
    """The page of a comparison. Needs the extra `report`."""
    labels = [report["label"] for report in found["reports"]]
    made = tables(found)
    experts = [*_expert_figures(found), _layers(found), _table("experts", "All measures of the experts", made[0])]
    sections = (
        [] if not any(report["looks"] for report in found["reports"]) else [Section("Verdicts", [_verdicts(found)])]
    )
    sections += [Section("Experts", [figure for figure in experts if figure is not None], NULL_TEXT)]
    if found["pairs"]:
        figures = [_pairs(found), _table("pairs-table", "All measures of the pairs", made[1])]
        sections.append(Section("Pairs of experts", figures, NULL_TEXT))
    if found["storage"]:
        sections.append(Section("What a stored merge keeps", [_storage(found)]))
    return Page(
        title or f"Side by side: {', '.join(labels)}", _summary(found), _facts(found), sections, found, found["notes"]
    )


def _summary(found: Comparison) -> list[str]:
    said = []
    looks = [f"{report['label']} {report['looks']}" for report in found["reports"] if report["looks"]]
    if looks:
        said.append(f"Verdicts: {', '.join(looks)}.")
    for key, entries, name in (
        ("support", found["experts"], expert_name),
        ("relative_norm", found["experts"], expert_name),
        ("cosine", found["pairs"], pair_name),
        ("conflict_overlap", found["pairs"], pair_name),
    ):
        said += _extremes(key, entries, name)
    return said


def _extremes(key: str, entries: Sequence[Any], name: Any) -> list[str]:
    """One sentence on the largest and the smallest value of a measure."""
    known = [entry for entry in entries if entry["measures"][key] is not None]
    if len(known) < 2:
        return []
    low, high = (pick(known, key=lambda entry: entry["measures"][key]) for pick in (min, max))
    label = {**EXPERT, **PAIR}[key]
    values = [shown(key, entry["measures"][key]) for entry in (low, high)]
    return [f"{label[0].upper()}{label[1:]}: from {values[0]} ({name(low)}) to {values[1]} ({name(high)})."]


def _facts(found: Comparison) -> list[tuple[str, str]]:
    facts = [
        (
            report["label"],
            f"{', '.join(expert['key'] for expert in report['experts'])}, of {report['base']['reference']}",
        )
        for report in found["reports"]
    ]
    return [*facts, ("rlmerge", found["rlmerge"])]


def _verdicts(found: Comparison) -> Figure:
    """Every verdict with its warnings: without these it would say too much."""
    table = [["report", "looks", "what to mind"]]
    for report in found["reports"]:
        for number, warning in enumerate(report["warnings"] or ["–"]):
            table.append([report["label"], (report["looks"] or "–") if number == 0 else "", warning])
    warned = sum(bool(report["warnings"]) for report in found["reports"])
    return Figure(
        "verdicts",
        "Verdicts and their warnings",
        f"{warned} of {len(found['reports'])} verdicts come with warnings.",
        "A verdict that rests on size and sparsity speaks of learning rate and rounding, not of the kind of training.",
        None,
        table,
    )


def _rows(measures: Mapping[str, str], entries: Sequence[Any], name: Any, keys: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"measure": measures[key], "of": name(entry), "value": value, "null": entry["null"].get(key)}
        for key in keys
        for entry in entries
        if (value := entry["measures"][key]) is not None
    ]


def _expert_figures(found: Comparison) -> list[Figure]:
    """Bars of the measures of experts, those of one unit together."""
    figures = []
    for name, (title, keys) in GROUPS.items():
        rows = _rows(EXPERT, found["experts"], expert_name, keys)
        if not rows:
            continue
        said = [sentence for key in keys for sentence in _extremes(key, found["experts"], expert_name)]
        percent = keys[0] in SHARES
        figures.append(
            Figure(
                name,
                title,
                " ".join(said),
                "Sparsity and size follow learning rate, steps and dtype as much as the kind of training: compare "
                "experts "
                "that were trained alike but for it.",
                bars(
                    rows,
                    f"Bars: {title}",
                    category="measure",
                    series="of",
                    percent=percent,
                    marks=True,
                    choices={} if percent else {"measure": "Show"},
                ),
                rows_of_table(rows, ["measure", "of", "value", "null"], percent=percent),
            )
        )
    return figures


def _layers(found: Comparison) -> Figure | None:
    rows = [
        {"measure": label, "layer": entry["layer"], "of": expert_name(entry), "value": value}
        for key, label in LAYERS.items()
        for entry in found["layers"]
        if entry["layer"] is not None and (value := entry["measures"][key]) is not None
    ]
    if not rows:
        return None
    first = [row for row in rows if row["measure"] == LAYERS["support"]] or rows
    most, least = (pick(first, key=lambda row: row["value"]) for pick in (max, min))
    return Figure(
        "layers",
        "Layer by layer",
        f"Most weights changed in layer {most['layer']} of {most['of']} ({shown('support', most['value'])}), fewest "
        f"in layer "
        f"{least['layer']} of {least['of']} ({shown('support', least['value'])}).",
        "Curves of one shape mean that the reports' experts were trained in the same places.",
        lines(
            rows, "Lines of measures over layers", x="layer", series="of", y_title="value", choices={"measure": "Show"}
        ),
        rows_of_table(rows, ["measure", "layer", "of", "value"], percent=False),
    )


def _pairs(found: Comparison) -> Figure:
    keys = ("cosine", "jaccard", "conflict_overlap", "conflict_energy")
    rows = _rows(PAIR, found["pairs"], pair_name, keys)
    said = [sentence for key in keys for sentence in _extremes(key, found["pairs"], pair_name)]
    return Figure(
        "pairs",
        "How much experts agree",
        " ".join(said) or _alone(found),
        "What lies on the tick is rounding; conflict below it, and cosine above it, is what experts learned in common.",
        bars(rows, "Bars of agreement of pairs", category="measure", series="of", percent=False, marks=True),
        rows_of_table(rows, ["measure", "of", "value", "null"], percent=False),
    )


def _alone(found: Comparison) -> str:
    pair = found["pairs"][0]
    return f"Only {pair_name(pair)} is a pair: cosine {shown('cosine', pair['measures']['cosine'])}."


def _storage(found: Comparison) -> Figure:
    rows = [
        {"merge": entry["merge"], "of": entry["report"], "measure": label, "value": value}
        for key, label in STORED.items()
        for entry in found["storage"]
        if (value := entry["measures"][key]) is not None
    ]
    survivals = [row for row in rows if row["measure"] == STORED["survival"]]
    low, high = (pick(survivals, key=lambda row: row["value"], default=None) for pick in (min, max))
    if low is None or high is None:
        return Figure("storage", "Predicted survival in bf16", "No expert changed anything.", "", None)
    least, most = (shown("survival", row["value"]) for row in (low, high))
    return Figure(
        "storage",
        "Predicted survival in bf16",
        f"Every merge keeps {least} of its updates."
        if least == most
        else f"Least is kept of {low['of']} by {low['merge']} ({least}), most of {high['of']} by {high['merge']} "
        f"({most}).",
        STORE_ADVICE if low["value"] < 0.99 else "Any of these merges can be stored.",
        bars(survivals, "Bars of survival of merges", category="merge", series="of"),
        rows_of_table(rows, ["measure", "merge", "of", "value"], percent=False),
    )


def _table(name: str, title: str, table: list[list[str]]) -> Figure:
    return Figure(name, title, "In parentheses: the null model.", "", None, [["measure", *table[0][1:]], *table[1:]])
