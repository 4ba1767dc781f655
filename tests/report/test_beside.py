"""Reports side by side: the numbers of each, and what they differ in."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from tests.report.report_documents import small

from rlmerge.report.beside import compare_reports, comparison_schema, on_terminal, tables


@pytest.fixture
def two():
    return [("first", small()), ("second", small(("a", "b"), null=False, storage=False))]


def test_numbers_are_those_of_the_reports(two):
    found = compare_reports(two)
    assert [(one["report"], one["expert"]) for one in found["experts"]] == [
        ("first", "a"), ("first", "b"), ("second", "a"), ("second", "b")
    ]  # fmt: skip
    total = two[0][1]["coordinates"]["total"]
    one, pair = found["experts"][1], found["pairs"][0]
    expert = total["experts"]["b"]
    assert one["measures"]["support"] == expert["support"]
    assert one["measures"]["one_step"] == expert["steps"]["share"][expert["steps"]["at_least"].index(1)]
    assert one["measures"]["unique"] == total["regions"]["unique"]["b"]
    assert one["measures"]["nss"] is None
    assert pair["measures"]["conflict_overlap"] == total["pairs"][0]["conflict_overlap"]
    assert pair["null"]["conflict_overlap"] == total["null"]["pairs"][0]["conflict_overlap"]
    assert found["pairs"][1]["null"] == {}
    assert {one["report"] for one in found["storage"]} == {"first"}
    assert found["reports"][0]["warnings"] == two[0][1]["verdict"]["warnings"]


def test_the_schema(two):
    """Committed as it is, and every comparison keeps to it; one that does not is noticed."""
    schema = comparison_schema()
    committed = Path(__file__).parents[2] / "docs" / "comparison.schema.json"
    assert json.loads(committed.read_text()) == schema
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    found = json.loads(json.dumps(compare_reports([*two, ("third", small(spectra=True))])))
    validator.validate(found)
    found["pairs"][0]["measures"]["cosine"] = "small"
    assert not validator.is_valid(found)


def test_spectra_and_divergence_come_with_their_experts():
    document = small(spectra=True)
    document["function"] = {
        "sets": [{"name": "s", "experts": ["a"]}, {"name": "t", "experts": ["b"]}],
        "divergence": [
            {"expert": "b", "set": "t", "kl_expert_base": {"value": 0.5}},
            {"expert": "b", "set": "s", "kl_expert_base": {"value": 0.25}},
        ],
    }
    found = compare_reports([("r", document)])["experts"]
    shifts = document["spectra"]["total"]["experts"]
    assert [one["measures"]["nss"] for one in found] == [shifts[key]["shift"]["nss"] for key in ("a", "b")]
    assert [one["measures"]["kl"] for one in found] == [None, 0.5]


def test_notes_name_what_differs(two):
    two[1][1]["base"]["dtype"] = "F32"
    two[1][1]["experts"][0]["dtype"] = "F32"
    two[1][1]["rlmerge"] = "9"
    notes = "\n".join(compare_reports(two)["notes"])
    assert "different dtypes of the base: first BF16, second F32" in notes
    assert "stored in different dtypes" in notes
    assert "Without a null model: second" in notes
    assert "different versions of rlmerge" in notes
    assert compare_reports(two[:1] * 2)["notes"] == []


def test_the_terminal_has_every_column_once(two):
    reports = [(f"report-number-{n}", two[0][1]) for n in range(5)]
    text = on_terminal(compare_reports(reports))
    assert max(map(len, text.splitlines())) <= 100
    for n in range(5):
        assert text.count(f"report-number-{n}: a × b") == 1
        assert text.count(f"report-number-{n}: a ") >= 1
    assert text.startswith("(in parentheses: the null model)")


def test_what_no_report_measured_is_no_row(two):
    names = [row[0] for row in tables(compare_reports(two))[0]]
    assert "support" in names
    assert "spectral shift (NSS)" not in names


def test_the_page(two):
    pytest.importorskip("altair")
    from rlmerge.report.beside_page import beside_page
    from rlmerge.report.page import embedded, render

    found = compare_reports(two)
    page = beside_page(found)
    text = render(page)
    assert embedded(text, "numbers") == found
    assert page.title == "Side by side: first, second"
    supports = [one["measures"]["support"] for one in found["experts"]]
    assert f"Support: from {100 * min(supports):.1f} %" in " ".join(page.summary)
    shown = next(one for one in page.figures if one.id == "verdicts").table
    assert [row[2] for row in shown if row[0] == "first"] == two[0][1]["verdict"]["warnings"]
    assert "Without a null model: second" in text


def test_the_page_of_single_experts():
    pytest.importorskip("altair")
    from rlmerge.report.beside_page import beside_page

    reports = [("one", small(("a",), storage=False)), ("two", small(("a",), storage=False))]
    titles = [section.title for section in beside_page(compare_reports(reports)).sections]
    assert titles == ["Verdicts", "Experts"]
