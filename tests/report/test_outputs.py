"""Where reports go: what is wrong there is said first, and figures are pictures."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
from pathlib import Path

import pytest
from tests.report.report_documents import small

import rlmerge
from rlmerge.errors import MissingExtraError, OutputError, ReportError, RlmergeError
from rlmerge.report.outputs import check_places

pytest.importorskip("altair")


@pytest.mark.parametrize(
    ("html", "figures", "message"),
    [
        ("report.json", None, "ends in .html"),
        ("no/report.html", None, "there is no folder no"),
        ("folder.html", None, "is a folder"),
        (None, "file", "is a file"),
        (None, "no/figures", "there is no folder no"),
    ],
)
def test_places_that_cannot_be(tmp_path, monkeypatch, html, figures, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("file").touch()
    with pytest.raises(OutputError, match=message):
        check_places(html and Path(html), figures and Path(figures))


def test_a_folder_that_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    for places in ((tmp_path / "r.html", None), (None, tmp_path / "figures"), (None, tmp_path)):
        with pytest.raises(OutputError, match="cannot be written to"):
            check_places(*places)


def test_without_the_extra(monkeypatch, tmp_path):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vl_convert" else there(name, *a))
    with pytest.raises(MissingExtraError, match=re.escape("pip install -e '.[report]'")):
        check_places(tmp_path / "report.html", None)
    check_places(None, None)


def test_a_page_and_its_figures(tmp_path):
    rlmerge.write_report(small(), html=tmp_path / "report.html", title="An earlier one")
    rlmerge.write_report(small(), html=tmp_path / "report.html", figures=tmp_path / "figures", title="Mine")
    assert "<title>Mine</title>" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert {"map.svg", "map.png", "storage.svg"} <= set(names)
    for name in names:
        data = (tmp_path / "figures" / name).read_bytes()
        if name.endswith(".png"):
            width, height = struct.unpack(">II", data[16:24])
            assert data.startswith(b"\x89PNG")
            assert min(width, height) > 80, name
        else:
            assert data.startswith(b"<svg")
            assert b"NaN" not in data, name


def test_several_documents_are_seen_side_by_side(tmp_path):
    rlmerge.write_report([small(), small()], html=tmp_path / "both.html")
    assert "Side by side: report 1, report 2" in (tmp_path / "both.html").read_text()


def test_what_is_no_report(tmp_path):
    with pytest.raises(ReportError, match="is neither a geometry report"):
        rlmerge.write_report({"a": 1}, html=tmp_path / "r.html")
    with pytest.raises(RlmergeError, match="give html"):
        rlmerge.write_report(small())
    assert list(tmp_path.iterdir()) == []
