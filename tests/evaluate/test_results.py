"""Results files: written, continued after a kill at any byte, refused when they belong to another run, counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmerge.errors import RlmergeError
from rlmerge.evaluate.results import Header, Results, ResultsError, ResultsWriter, Sample, scores

HEADER = Header("models/merged", "math", {"temperature": 0.7, "stop": ["\n"]}, problems=2, role="merged", seed=1)
SAMPLES = [
    Sample("b", 0, True, "equal", "4\n\u2028", 3, {"answer": "4"}),
    Sample("b", 1, False, "not 4", "5 \ud800", 2),
    Sample("a", 0, True),
]


def written(path: Path, samples: list[Sample] = SAMPLES, header: Header = HEADER) -> Path:
    with ResultsWriter.open(path, header) as writer:
        for sample in samples:
            writer.append(sample)
    return path


def test_what_is_written_is_read(tmp_path: Path):
    found = Results.load(written(tmp_path / "new" / "r.jsonl"))
    assert found.header == HEADER
    assert list(found) == SAMPLES
    assert list(found) == SAMPLES  # again
    counted = scores(found)
    assert (counted.ids, counted.n, counted.c) == (("a", "b"), (1, 2), (1, 1))


@given(
    st.text(), st.text(), st.booleans(), st.dictionaries(st.sampled_from(["answer", "x"]), st.integers() | st.text())
)
def test_any_text_survives(tmp_path_factory: Any, name: str, text: str, right: bool, more: dict[str, Any]):
    sample = Sample(name, 3, right, text, text, 9, more)
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    assert list(Results.load(written(path, [sample]))) == [sample]


def test_a_run_cut_at_any_byte_continues_to_the_same_file(tmp_path: Path):
    whole = written(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        if b"\n" in whole[:length]:
            complete = whole[:length].count(b"\n") - 1
            assert list(Results.load(path)) == SAMPLES[:complete]
        with ResultsWriter.open(path, HEADER) as writer:
            for sample in SAMPLES:
                if (sample.id, sample.sample) not in writer.done:
                    writer.append(sample)
        assert path.read_bytes() == whole


def test_another_run_is_refused_with_what_differs(tmp_path: Path):
    path = written(tmp_path / "r.jsonl")
    before = path.read_bytes()
    other = replace(HEADER, settings={"temperature": 1.0, "stop": ["\n"], "top_p": 0.9}, seed=2)
    with pytest.raises(ResultsError) as refusal:
        ResultsWriter.open(path, other)
    for text in ("settings.temperature: 0.7 (there), 1.0 (this run)", "settings.top_p: nothing (there)", "seed: 1 (th"):
        assert text in str(refusal.value)
    assert "stop" not in str(refusal.value)
    assert path.read_bytes() == before
    assert isinstance(refusal.value, RlmergeError)


def test_a_stranger_is_not_overwritten(tmp_path: Path):
    for text in ("notes", "notes\n", '{"kind": "other"}\n', "[]\n"):
        path = tmp_path / "r.jsonl"
        path.write_text(text)
        with pytest.raises(ResultsError, match="is no results file"):
            ResultsWriter.open(path, HEADER)
        assert path.read_text() == text


def test_two_writers_and_two_samples(tmp_path: Path):
    with ResultsWriter.open(tmp_path / "r.jsonl", HEADER) as writer:
        writer.append(SAMPLES[0])
        with pytest.raises(ResultsError, match="another run is writing"):
            ResultsWriter.open(tmp_path / "r.jsonl", HEADER)
        with pytest.raises(ResultsError, match="there already"):
            writer.append(SAMPLES[0])
    assert len(list(Results.load(tmp_path / "r.jsonl"))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: is not an object"),
        ('{"id": "a", "sample": 0}', "'correct' is missing"),
        ('{"id": "a", "sample": 0, "correct": 1}', "'correct' is missing or is no bool"),
        ('{"id": "a", "sample": true, "correct": true}', "'sample'"),
        ('{"id": 3, "sample": 0, "correct": true}', "'id'"),
        ('{"id": "a", "sample": 0, "correct": true, "tokens": "3"}', "'tokens'"),
        ('{"id": "a", "sample": 0, "correct": true}\n{"id": "a", "sample": 0, "correct": true}', "line 3: .* twice"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, message: str):
    path = written(tmp_path / "r.jsonl", [])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ResultsError, match=message):
        scores(Results.load(path))
    with pytest.raises(ResultsError, match=message):
        ResultsWriter.open(path, HEADER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"model": ""}, "'model'"),
        ({"task": 3}, "'task'"),
        ({"seed": "x"}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"role": "teacher"}, "'role'"),
        ({"kind": "other"}, "no results file"),
    ],
)
def test_broken_headers(tmp_path: Path, change: dict[str, Any], message: str):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(HEADER.as_dict() | change) + "\n")
    with pytest.raises(ResultsError, match=message):
        Results.load(path)


def test_nothing_to_read(tmp_path: Path):
    with pytest.raises(ResultsError, match="cannot be read: No such file"):
        Results.load(tmp_path / "absent.jsonl")
    with pytest.raises(ResultsError, match="no samples yet"):
        scores(Results.load(written(tmp_path / "r.jsonl", [])))
