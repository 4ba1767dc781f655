"""Geometry reports side by side: their key measures in one document, and what to mind when comparing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from rlmerge.figures import as_text
from rlmerge.geometry.document import schema_of
from rlmerge.in_json import Schema
from rlmerge.report.names import called
from rlmerge.version import VERSION

COMPARISON = "rlmerge.geometry-comparison/1"
Document = Mapping[str, Any]
Number = float | None


class ReportSeen(TypedDict):
    """One of the reports; `looks` is its verdict, null without one."""

    label: str
    base: dict[str, Any]
    experts: list[dict[str, Any]]
    settings: dict[str, Any]
    looks: str | None
    warnings: list[str]


class ExpertSeen(TypedDict):
    """One expert of one report. Measures are those of `inspect`, null where not taken; `null`: of the null model."""

    report: str
    expert: str
    looks: str | None
    measures: dict[str, Number]
    null: dict[str, Number]


class PairSeen(TypedDict):
    """Two experts of one report."""

    report: str
    a: str
    b: str
    measures: dict[str, Number]
    null: dict[str, Number]


class StoredSeen(TypedDict):
    """A merge of one report's experts, as predicted."""

    report: str
    merge: str
    measures: dict[str, Number]


class Comparison(TypedDict):
    """Several reports side by side. `notes` say what to mind. A layer is null outside of the layers."""

    schema: str
    rlmerge: str
    reports: list[ReportSeen]
    experts: list[ExpertSeen]
    pairs: list[PairSeen]
    storage: list[StoredSeen]
    layers: list[dict[str, Any]]
    notes: list[str]


EXPERT = {
    "support": "support",
    "support_bf16": "support of bf16 casts",
    "above_1e-5": "changes above 1e-5",
    "relative_norm": "norm, relative to the base",
    "one_step": "changes of one step",
    "unique": "unique to it",
    "nss": "spectral shift (NSS)",
    "stable_rank": "stable rank",
    "kl": "KL from the base, on its own set",
}
"""Measures of an expert, and what they are called."""
PAIR = {
    "cosine": "cosine",
    "overlap_cosine": "cosine inside the overlap",
    "jaccard": "Jaccard",
    "lift": "lift",
    "conflict_overlap": "conflict of the overlap",
    "conflict_union": "conflict of the union",
    "conflict_energy": "conflict of the energy",
}
STORED = {"survival": "survival", "cosine": "cosine", "norm_ratio": "norm ratio"}
SHARES = {
    "support",
    "support_bf16",
    "above_1e-5",
    "one_step",
    "unique",
    "jaccard",
    "conflict_overlap",
    "conflict_union",
    "conflict_energy",
    "survival",
}
"""Measures that are shares, and shown in percent."""


def comparison_schema() -> Schema:
    """The JSON schema (draft 2020-12) of what `compare_reports` makes; also docs/comparison.schema.json."""
    return schema_of(Comparison, "rlmerge compare, of geometry reports", COMPARISON)


def compare_reports(reports: Sequence[tuple[str, Document]]) -> Comparison:
    """The key measures of labelled documents of `inspect`, one document for all."""
    experts, pairs, storage, layers = [], [], [], []
    for label, document in reports:
        names = names_of(document)
        experts += [_expert(label, document, key, name) for key, name in names.items()]
        pairs += _pairs(label, document, names)
        for stored in document.get("storage", {}).get("merges", ()):
            storage.append(
                {"report": label, "merge": merge_name(stored), "measures": {key: stored[key] for key in STORED}}
            )
        for scope in document.get("coordinates", {}).get("layers", ()):
            for key, one in scope["experts"].items():
                measures = {part: one[part] for part in ("support", "relative_norm", "energy_share")}
                layers.append(
                    {"report": label, "expert": names[key], "layer": scope.get("layer"), "measures": measures}
                )
    seen: list[ReportSeen] = [
        {
            "label": label,
            "base": dict(document["base"]),
            "experts": list(document["experts"]),
            "settings": dict(document["settings"]),
            "looks": document.get("verdict", {}).get("looks"),
            "warnings": list(document.get("verdict", {}).get("warnings", ())),
        }
        for label, document in reports
    ]
    return {
        "schema": COMPARISON,
        "rlmerge": VERSION,
        "reports": seen,
        "experts": experts,
        "pairs": pairs,
        "storage": storage,
        "layers": layers,
        "notes": _notes(reports),
    }


def names_of(document: Document) -> dict[str, str]:
    """What the experts of a report are called, by key."""
    return called([expert["key"] for expert in document["experts"]])


def expert_name(entry: Mapping[str, Any]) -> str:
    """'rlvr: math', an expert of a report."""
    return f"{entry['report']}: {entry['expert']}"


def pair_name(entry: Mapping[str, Any]) -> str:
    """'rlvr: math × code', two of its experts."""
    return f"{entry['report']}: {entry['a']} × {entry['b']}"


def merge_name(stored: Mapping[str, Any]) -> str:
    """'ties (density 0.2)': a method with its settings, numbers with four digits."""
    settings = ", ".join(
        f"{key} {value if isinstance(value, str) else f'{value:.4g}'}" for key, value in stored["settings"].items()
    )
    return f"{stored['method']} ({settings})" if settings else stored["method"]


def _expert(label: str, document: Document, key: str, name: str) -> ExpertSeen:
    measures: dict[str, Number] = dict.fromkeys(EXPERT)
    null: dict[str, Number] = {}
    if (total := document.get("coordinates", {}).get("total")) is not None:
        one = total["experts"][key]
        steps, sweep = one["steps"], one["sweep"]["absolute"]
        measures |= {part: one[part] for part in ("support", "support_bf16", "relative_norm")}
        measures["above_1e-5"] = next((point["share"] for point in sweep if point["above"] == 1e-5), None)
        measures["one_step"] = dict(zip(steps["at_least"], steps["share"])).get(1)
        measures["unique"] = total["regions"]["unique"].get(key)
        if (known := total.get("null")) is not None:
            null["support"] = known["experts"][key]["support"]
    spectra = document.get("spectra", {}).get("total", {})
    found = spectra.get("experts", {}).get(key, {})
    measures["nss"] = found.get("shift", {}).get("nss")
    measures["stable_rank"] = found.get("delta", {}).get("stable_rank")
    shuffled = spectra.get("null", {}).get("experts", {}).get(key, {}).get("shift") or {}
    if shuffled.get("nss") is not None:
        null["nss"] = shuffled["nss"]
    function = document.get("function", {})
    own = {one["name"] for one in function.get("sets", ()) if key in one["experts"]}
    for divergence in function.get("divergence", ()):
        if divergence["expert"] == key and divergence["set"] in own:
            measures["kl"] = divergence["kl_expert_base"]["value"]
    judged = document.get("verdict", {}).get("experts", {}).get(key, {})
    return {"report": label, "expert": name, "looks": judged.get("looks"), "measures": measures, "null": null}


def _pairs(label: str, document: Document, names: Mapping[str, str]) -> list[PairSeen]:
    if (total := document.get("coordinates", {}).get("total")) is None:
        return []
    nulls = {(pair["a"], pair["b"]): pair for pair in total.get("null", {}).get("pairs", ())}
    return [
        {
            "report": label,
            "a": names[pair["a"]],
            "b": names[pair["b"]],
            "measures": {key: pair[key] for key in PAIR},
            "null": {key: null[key] for key in PAIR} if (null := nulls.get((pair["a"], pair["b"]))) else {},
        }
        for pair in total["pairs"]
    ]


def _notes(reports: Sequence[tuple[str, Document]]) -> list[str]:
    """What the reports differ in, so that their numbers should be compared with care."""
    notes = []
    for part, name in (("reference", "bases"), ("dtype", "dtypes of the base"), ("coordinates", "numbers of weights")):
        values = {label: document["base"].get(part) for label, document in reports}
        if len(set(values.values())) > 1:
            said = ", ".join(
                f"{label} {f'{value:,}' if isinstance(value, int) else value}" for label, value in values.items()
            )
            notes.append(f"The reports have different {name}: {said}.")
    kinds = {label: sorted({expert["dtype"] for expert in document["experts"]}) for label, document in reports}
    if len({tuple(found) for found in kinds.values()}) > 1:
        said = ", ".join(f"{label} {' and '.join(found)}" for label, found in kinds.items())
        notes.append(f"Experts are stored in different dtypes, which decides much of the support: {said}.")
    without = [label for label, document in reports if not document["settings"]["null"]]
    if 0 < len(without) < len(reports):
        notes.append(f"Without a null model: {', '.join(without)}. Their figures cannot be told from rounding.")
    counts = {label: len(document["experts"]) for label, document in reports}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{label} {count}" for label, count in counts.items())
        notes.append(f"Different numbers of experts, on which 'unique to it' depends: {said}.")
    for section in ("spectra", "function"):
        there = [label for label, document in reports if section in document]
        if 0 < len(there) < len(reports):
            notes.append(f"Only {', '.join(there)} measured {section}.")
    versions = {label: document["rlmerge"] for label, document in reports}
    if len(set(versions.values())) > 1:
        notes.append(
            "Made by different versions of rlmerge: " + ", ".join(f"{a} {b}" for a, b in versions.items()) + "."
        )
    return notes


# -- as tables ---------------------------------------------------------------------------------------------------------


def tables(found: Comparison) -> list[list[list[str]]]:
    """Experts, pairs and merges, of those that there are: a row a measure, a column for each."""
    made = []
    if found["experts"]:
        looks = ["looks", *(one["looks"] or "–" for one in found["experts"])]
        made.append([["", *map(expert_name, found["experts"])], looks, *_rows(EXPERT, found["experts"])])
    if found["pairs"]:
        made.append([["", *map(pair_name, found["pairs"])], *_rows(PAIR, found["pairs"])])
    if found["storage"]:
        merges = list(dict.fromkeys(one["merge"] for one in found["storage"]))
        labels = [report["label"] for report in found["reports"]]
        known = {(one["report"], one["merge"]): one["measures"]["survival"] for one in found["storage"]}
        rows = [[merge, *(shown("survival", known.get((label, merge))) for label in labels)] for merge in merges]
        made.append([["survival in bf16", *labels], *rows])
    return made


def _rows(measures: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for key, name in measures.items():
        if all(entry["measures"][key] is None for entry in entries):
            continue
        cells = []
        for entry in entries:
            null = entry["null"].get(key)
            cells.append(shown(key, entry["measures"][key]) + (f" ({shown(key, null)})" if null is not None else ""))
        rows.append([name, *cells])
    return rows


def shown(key: str, value: Number) -> str:
    """A measure as a reader wants it: shares in percent, others with three digits."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if key in SHARES else f"{value:.3g}"


def on_terminal(found: Comparison, width: int = 100) -> str:
    """The tables, in parts that fit, and the notes."""
    parts = (
        ["(in parentheses: the null model)"]
        if any(entry["null"] for entry in [*found["experts"], *found["pairs"]])
        else []
    )
    for table in tables(found):
        parts += [as_text(part) for part in _folded(table, width)]
    parts += [f"note: {note}" for note in found["notes"]]
    return "\n\n".join(parts)


def _folded(table: list[list[str]], width: int) -> list[list[list[str]]]:
    """The table in parts of as many columns as fit, each with the names of the measures."""
    widths = [3 + max(map(len, column)) for column in zip(*table)]
    parts, columns, used = [], [], widths[0]
    for number in range(1, len(widths)):
        if columns and used + widths[number] > width:
            parts.append(columns)
            columns, used = [], widths[0]
        columns.append(number)
        used += widths[number]
    parts.append(columns)
    return [[[row[0], *(row[n] for n in columns)] for row in table] for columns in parts]
