"""What a file of numbers is, by its own words: results of an evaluation, a geometry report, a merge's rlmerge.json.

Reports are looked at before they are believed: their structure is compared with the schema that `inspect` writes by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlmerge.errors import ReportError, did_you_mean
from rlmerge.geometry.document import SCHEMA, geometry_schema

if TYPE_CHECKING:
    from rlmerge.report.figure import Page

Kind = Literal["results", "geometry", "merge"]
NAMES: dict[Kind, str] = {
    "results": "results of an evaluation (rlmerge eval)",
    "geometry": "a geometry report (rlmerge inspect -o)",
    "merge": "what a merge did (rlmerge.json)",
}
MOST = 2 * 10**9
"""Bytes of a report, at most."""


def read_documents(paths: Sequence[Path | str]) -> tuple[Kind, list[tuple[str, dict[str, Any]]]]:
    """What all of these files are, with the contents and a short name of each; results are not read.

    Whatever is none of ours counts as results, whose reader says what is wrong with it. Raises ReportError for files of
    different kinds, and for reports that are not as rlmerge writes them.
    """
    found = [(path, *_read(path)) for path in map(Path, paths)]
    kinds: dict[Kind, Path] = {kind: path for path, kind, _ in reversed(found)}
    if len(kinds) > 1:
        for path, kind, _ in found:
            if kind == "results":
                _check_results(path)
        said = "; ".join(f"{path} is {NAMES[kind]}" for kind, path in sorted(kinds.items()))
        raise ReportError(f"these cannot be compared with each other: {said}. Compare files of one kind at a time.")
    kind = found[0][1]
    if kind == "results":
        return kind, []
    for path, _, document in found:
        _check(str(path), document)
    return kind, list(zip(_labels([path for path, _, _ in found]), (document for _, _, document in found)))


def page_of(documents: Sequence[tuple[str, Mapping[str, Any]]], title: str = "") -> Page:
    """The page of one report, or of several side by side. Raises ReportError for what is none."""
    for label, document in documents:
        _check(label, document)
    label, first = documents[0]
    if _kind(first) == "merge":
        if len(documents) > 1:
            raise ReportError("a page shows one merge: give one rlmerge.json at a time.")
        from rlmerge.report.merge_page import merge_page

        return merge_page(first, title or f"What the merge did: {first['recipe']['merge_method']}")
    if len(documents) == 1:
        from rlmerge.report.geometry_page import geometry_page

        return geometry_page(first, title)
    from rlmerge.report.beside import compare_reports
    from rlmerge.report.beside_page import beside_page

    return beside_page(compare_reports(documents), title)


def _read(path: Path) -> tuple[Kind, dict[str, Any]]:
    """The kind of a file, and what it holds unless it is results."""
    try:
        with path.open("rb") as file:
            first = file.readline(MOST)
            known = _kind(_parsed(first))
            if known == "results" and first.strip() not in (b"{", b""):
                return known, {}
            document = _parsed(first + file.read(MOST))
    except OSError:
        return "results", {}
    kind = _kind(document)
    return kind, document if kind != "results" else {}


def _check_results(path: Path) -> None:
    """Raises ReportError for what counts as results among reports, and is none."""
    if not path.exists():
        there = [str(path.with_name(other.name)) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ReportError(f"{path}: there is no such file.{did_you_mean(str(path), there)}")
    if path.is_file():
        with path.open("rb") as file:
            if not isinstance(_parsed(file.readline(MOST)), Mapping):
                raise ReportError(
                    f"{path}: is no JSON, or cut off: neither a report nor results. Write it again, or name another."
                )


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _kind(document: Any) -> Kind:
    if isinstance(document, Mapping):
        if str(document.get("schema", "")).startswith("rlmerge.geometry/"):
            return "geometry"
        if {"recipe", "statistics", "rlmerge"} <= document.keys():
            return "merge"
    return "results"


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names without their ending where these tell the files apart, else paths."""
    stems = [path.stem for path in paths]
    labels = stems if len(set(stems)) == len(paths) else [str(path.with_suffix("")) for path in paths]
    return labels if len(set(labels)) == len(paths) else [f"{label} ({n})" for n, label in enumerate(labels, 1)]


# -- whether it is as rlmerge writes it --------------------------------------------------------------------------------


def _check(name: str, document: Mapping[str, Any]) -> None:
    """Raises ReportError where a report lacks what its pages rest on."""
    kind = _kind(document)
    if kind == "geometry":
        if document["schema"] != SCHEMA:
            raise ReportError(
                f"{name}: is of {document['schema']}; this rlmerge reads {SCHEMA}. Inspect the models again."
            )
        schema = geometry_schema()
        problem = mismatch(document, schema, schema["$defs"])
    elif kind == "merge":
        problem = mismatch(document, MERGE, {})
    else:
        problem = f"is neither {NAMES['geometry']} nor {NAMES['merge']}"
    if problem:
        raise ReportError(f"{name}: is not as rlmerge writes it: {problem}. Write it again.")


MERGE: dict[str, Any] = {
    "type": "object",
    "required": ["rlmerge", "recipe", "statistics"],
    "properties": {
        "rlmerge": {"type": "string"},
        "recipe": {"type": "object", "required": ["merge_method"], "properties": {"merge_method": {"type": "string"}}},
        "statistics": {
            "type": "object",
            "required": ["total", "tensors"],
            "properties": {
                "total": {"type": "object"},
                "tensors": {"type": "object", "additionalProperties": {"type": "object"}},
            },
        },
    },
}
"""What the page of a merge needs of its rlmerge.json."""
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def mismatch(value: Any, schema: Mapping[str, Any], kinds: Mapping[str, Any], at: str = "") -> str:
    """Where a value is not as a schema has it, and why; '' if it is. Knows the words that our own schemas use."""
    if (reference := schema.get("$ref")) is not None:
        schema = kinds[reference.rsplit("/", 1)[-1]]
    place = at or "the document"
    if "const" in schema and value != schema["const"]:
        return f"{place} is {value!r}, not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place} is {value!r}, not one of {schema['enum']}"
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not (isinstance(value, tuple(t for name in names for t in TYPES[name])) and _is_of(value, names)):
        return f"{place} is {type(value).__name__}, not {' or '.join(names)}"
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f"{place} has no {name!r}"
        parts = schema.get("properties", {})
        rest = schema.get("additionalProperties", {})
        for name, part in value.items():
            inner = parts.get(name, rest if isinstance(rest, dict) else {})
            if problem := mismatch(part, inner, kinds, f"{at}.{name}".lstrip(".")):
                return problem
    elif isinstance(value, list):
        for number, part in enumerate(value):
            if problem := mismatch(part, schema.get("items", {}), kinds, f"{at}[{number}]"):
                return problem
    return ""


def _is_of(value: Any, names: Sequence[str]) -> bool:
    """A truth value is no number, although Python has it so."""
    return not isinstance(value, bool) or "boolean" in names
