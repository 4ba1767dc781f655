"""Writes docs/reports/: example pages, which share one copy of the plotting library (vega.js).

python docs/generate_reports.py NAME=REPORT.json…    makes pages of reports, as --html does but for the library
python docs/generate_reports.py                      makes all pages again, from the numbers that they carry

A page whose name ends in '-beside' shows the others of its preset side by side.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlmerge.report.beside import compare_reports
from rlmerge.report.beside_page import beside_page
from rlmerge.report.geometry_page import geometry_page
from rlmerge.report.page import embedded, library_file, write_page

FOLDER = Path(__file__).resolve().parent / "reports"
LIBRARY = "vega.js"
KINDS = ("rlvr", "sft", "rft")
PRESETS = {"tiny": "a million parameters", "small": "SmolLM2-135M"}
TITLES = {"rlvr": "RLVR", "sft": "SFT", "rft": "RFT"}


def numbers() -> dict[str, Any]:
    """The document of every page but those that compare, by name, out of the pages."""
    files = [path for path in sorted(FOLDER.glob("*.html")) if not path.stem.endswith("-beside")]
    return {path.stem: embedded(path.read_text(encoding="utf-8"), "numbers") for path in files}


def pages(documents: dict[str, Any]) -> dict[str, Any]:
    """The pages of these documents, and one a preset that shows its kinds of training side by side."""
    made = {}
    for name, document in documents.items():
        preset, kind = name.split("-")
        made[name] = geometry_page(document, f"{TITLES[kind]}: experts of {PRESETS[preset]}")
    for preset, size in PRESETS.items():
        found = [(TITLES[kind], documents[f"{preset}-{kind}"]) for kind in KINDS if f"{preset}-{kind}" in documents]
        if len(found) > 1:
            made[f"{preset}-beside"] = beside_page(compare_reports(found), f"Side by side: experts of {size}")
    return made


def main() -> None:
    """As the module says."""
    FOLDER.mkdir(exist_ok=True)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    documents = numbers() | {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in given.items()}
    (FOLDER / LIBRARY).write_text(library_file(), encoding="utf-8")
    for name, page in pages(documents).items():
        write_page(page, FOLDER / f"{name}.html", LIBRARY)


if __name__ == "__main__":
    main()
