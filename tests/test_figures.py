"""One list of rows for the terminal, the model card and the demo."""

from __future__ import annotations

from typing import Any

import pytest

from rlmerge.figures import (
    ORDER,
    as_markdown,
    as_text,
    gathered,
    percent,
    short_names,
    statistics_rows,
    statistics_table,
)

TOTAL: dict[str, Any] = {
    "support": {"m/a": {"count": 1, "share": 0.25}, "m/b": {"count": 2, "share": 0.5}},
    "changed": {"count": 3, "share": 0.75},
    "overlap": {"count": 0, "share": 0.0},
    "conflict": {"count": 0},
    "kept": {"m/a": {"count": 1, "share": 1.0}, "m/b": {"count": 0}},
    "realised_cosine": 0.99994,
    "rescale": {"min": 1.0, "mean": 1.25, "max": 1.5},
}


def test_rows():
    rows = statistics_rows(TOTAL)
    assert [row.name for row in rows] == sorted((row.name for row in rows), key=ORDER.index)
    found = {row.name: (row.whole, *row.each) for row in rows}
    assert found == {
        "support (of coordinates)": ("75.0 %", "25.0 %", "50.0 %"),
        "overlap (of changed)": ("0.0 %",),
        "conflict (of overlap)": ("-",),
        "kept (of non-zero)": ("", "100.0 %", "-"),
        "cosine intended / stored": ("0.9999",),
        "rescale factor, mean": ("1.2500",),
    }
    assert statistics_rows({"size": 3}) == []
    merged = {"merged": {"count": 16384, "of": 180800, "share": 16384 / 180800}}
    first, *rest = statistics_rows({**TOTAL, **merged})
    assert (first.name, first.whole, first.each) == (ORDER[0], "16,384 of 180,800 weights (9.1 %)", ())
    assert rest == rows


def test_the_same_table_in_text_and_markdown():
    table = statistics_table(TOTAL)
    assert table[0] == ["", "all", "a", "b"]
    assert {len(row) for row in table} == {4}
    lines = as_text(table).splitlines()
    assert lines[2] == " support (of coordinates)   75.0 %    25.0 %   50.0 %"
    assert all(line == line.rstrip() for line in lines)
    assert len(set(map(len, (lines[1], lines[2])))) == 1
    marked = as_markdown(table)
    assert marked[2] == "| support (of coordinates) | 75.0 % | 25.0 % | 50.0 % |"
    assert len(marked) == len(lines) == len(table) + 1
    assert as_markdown([["", "a|b"], ["x", "1"]])[0] == "|  | a\\|b |"


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["m/a", "m/b/"], ["a", "b"]),
        (["x/a", "y/a"], ["x", "y"]),
        (["runs/x/bf16", "runs/y/z/bf16"], ["x", "y/z"]),
        (["x/a", "x/a/"], ["x/a", "x/a/"]),
        (["/", "a"], ["/", "a"]),
        (["only/bf16"], ["bf16"]),
        ([], []),
    ],
)
def test_short_names(keys, short):
    assert short_names(keys) == short


def test_percent():
    assert [percent(share) for share in ({"share": 0.1234}, {"count": 0}, {}, None)] == ["12.3 %", "-", "-", "-"]


def test_what_is_said_of_several_is_said_once():
    lines = ["a: small", "the base is odd", "b: small", "a: large", "b: small: but why"]
    assert gathered(lines, {}) == ["a, b: small", "the base is odd", "a: large", "b: small: but why"]
    lines = ["r/x/bf16: small", "r/y/bf16: small", "r/x/bf16 and r/y/bf16: alike"]
    assert gathered(lines, {"r/x/bf16": "x", "r/y/bf16": "y"}) == ["x, y: small", "x and y: alike"]
    assert gathered([], {}) == []
