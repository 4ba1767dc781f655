"""The pages in the documentation say what today's code says of the numbers that they carry."""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("altair")

from rlmerge.report.page import embedded

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "reports"


def test_every_example_is_up_to_date():
    made = runpy.run_path(str(DOCS / "generate_reports.py"))
    pages = made["pages"](made["numbers"]())
    assert {path.stem for path in FOLDER.glob("*.html")} == set(pages)
    for name, page in pages.items():
        text = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
        for sentence in [*page.summary, *page.warnings, *(one.says for one in page.figures)]:
            assert html.escape(sentence) in text, f"{name}: {sentence}\nrun: python docs/generate_reports.py"
        assert embedded(text, "numbers") == page.numbers


def test_examples_are_small_and_load_what_lies_beside_them():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3e6
    for path in FOLDER.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r'src="([^"]*)"', text) == ["vega.js"]
        assert not re.search(r"(?<![\w.])/(?:work|root|tmp|home)\b", str(embedded(text, "numbers")))


def test_the_documentation_links_every_example():
    linked = set(re.findall(r"\(reports/([\w-]+)\.html\)", (DOCS / "report.md").read_text(encoding="utf-8")))
    assert linked == {path.stem for path in FOLDER.glob("*.html")}
