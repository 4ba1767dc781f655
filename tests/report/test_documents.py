"""Files tell what they are, and reports are looked at before they are believed."""

from __future__ import annotations

import json

import pytest
from tests.report.report_documents import small

from rlmerge.errors import ReportError
from rlmerge.evaluate.results import Header, ResultsWriter, Sample
from rlmerge.geometry.document import geometry_schema
from rlmerge.report.documents import mismatch, read_documents

MERGE = {"rlmerge": "0", "recipe": {"merge_method": "sar"}, "statistics": {"total": {}, "tensors": {}}}


@pytest.fixture
def files(tmp_path):
    """One of each kind; the report also in one line, as --json prints it."""
    (tmp_path / "report.json").write_text(json.dumps(small(), indent=1))
    (tmp_path / "line.json").write_text(json.dumps(small()) + "\n")
    (tmp_path / "rlmerge.json").write_text(json.dumps(MERGE, indent=1))
    with ResultsWriter.open(tmp_path / "math.jsonl", Header("m", "math", {}, 1)) as writer:
        writer.append(Sample("math/0", 0, True))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("report.json", "geometry"), ("line.json", "geometry"), ("rlmerge.json", "merge"), ("math.jsonl", "results"),
     ("missing.json", "results")],
)  # fmt: skip
def test_kinds(files, name, kind):
    found, documents = read_documents([files / name])
    assert found == kind
    assert len(documents) == (kind != "results")


def test_labels_tell_files_apart(files):
    (files / "sub").mkdir()
    (files / "sub" / "report.json").write_text((files / "report.json").read_text())
    _, documents = read_documents([files / "report.json", files / "line.json"])
    assert [label for label, _ in documents] == ["report", "line"]
    _, documents = read_documents([files / "report.json", files / "sub" / "report.json", files / "report.json"])
    assert len({label for label, _ in documents}) == 3


def test_kinds_are_not_mixed(files):
    with pytest.raises(ReportError) as error:
        read_documents([files / "report.json", files / "math.jsonl"])
    for text in (
        "report.json is a geometry report (rlmerge inspect -o)",
        "math.jsonl is results of an evaluation",
        "one kind",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="rlmerge.geometry/2"), "this rlmerge reads rlmerge.geometry/1"),
        (lambda d: d.pop("base"), "has no 'base'"),
        (
            lambda d: d["coordinates"]["total"]["pairs"][0].update(cosine="x"),
            "total.pairs[0].cosine is str, not number",
        ),
        (lambda d: d["coordinates"]["total"]["experts"]["a"].pop("steps"), "experts.a has no 'steps'"),
        (lambda d: d.update(spectra={}), "spectra has no 'settings'"),
        (lambda d: d["verdict"].update(looks="fine"), "looks is 'fine', not one of"),
        (lambda d: d["base"].update(coordinates=True), "coordinates is bool, not integer"),
    ],
)
def test_damaged_reports_are_refused(tmp_path, change, message):
    document = small()
    change(document)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(ReportError) as error:
        read_documents([tmp_path / "r.json"])
    assert message in str(error.value)


def test_a_damaged_merge_is_refused(tmp_path):
    (tmp_path / "rlmerge.json").write_text(json.dumps({**MERGE, "statistics": {"total": {}}}))
    with pytest.raises(ReportError, match="statistics has no 'tensors'"):
        read_documents([tmp_path / "rlmerge.json"])


def test_what_inspect_writes_is_as_its_schema_has_it():
    schema = geometry_schema()
    for options in ({}, {"null": False}, {"trajectory": True}, {"spectra": True}):
        assert mismatch(small(**options), schema, schema["$defs"]) == ""
