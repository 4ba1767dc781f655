"""JSONL files of problems: what is read, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmerge.evaluate.tasks import TaskError, jsonl, load_task


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "problems.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_what_a_file_can_say(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '\ufeff{"prompt": "2 + 2 =", "answer": 4, "verifier": "math"}\r\n'
        "\n"
        '{"messages": [{"role": "user", "content": "Hi"}], "completion": "Hello"}\n'
        '{"prompt": "def f(", "tests": {"entry": "f", "calls": [[[1], 2]]}, "verifier": "python", '
        '"id": "f", "meta": {"a": 1}}\n',
    )
    task = load_task(str(path))
    first, second, third = task.problems
    assert (first.prompt, first.answer, first.verifier) == ("2 + 2 =", "4", "math")
    assert (second.messages, second.verifier) == (({"role": "user", "content": "Hi"},), "")
    assert (third.id, third.meta, third.tests) == ("f", {"a": 1}, {"entry": "f", "calls": [[[1], 2]]})
    assert task.verifiers == ("math", "python")
    assert load_task(f"file:{path}", count=2).problems == task.problems[:2]
    assert task.settings["count"] == 3


def test_ids_come_from_the_content(tmp_path: Path) -> None:
    one = load_task(str(write(tmp_path, '{"prompt": "a", "answer": "1"}'))).problems[0]
    same = load_task(str(write(tmp_path, '\n{"answer":   "1", "prompt": "a"}\n'))).problems[0]
    other = load_task(str(write(tmp_path, '{"prompt": "a", "answer": "2"}'))).problems[0]
    assert one.id == same.id != other.id
    assert one.canonical == other.canonical  # one question is one problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no problems"),
        ("\n{", ":2: no JSON"),
        ("[1]", ":1: a list, not an object"),
        ('{"promt": "a"}', "Did you mean 'prompt'"),
        ('{"answer": "a"}', "neither 'prompt' nor 'messages'"),
        ('{"prompt": "a", "messages": []}', "both 'prompt' and 'messages'"),
        ('{"prompt": 3}', "'prompt' is a number"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        ('{"prompt": "a", "answer": true}', "'answer' is true or false"),
        ('{"prompt": "a", "answer": [1]}', "'answer' is a list"),
        ('{"prompt": "a", "verifier": "mth"}', "Did you mean 'math'"),
        ('{"prompt": "a", "verifier": "math"}', "there is none"),
        ('{"prompt": "a", "verifier": "python"}', "an object with 'cases'"),
        ('{"prompt": "a", "answer": "1", "verifier": "gym"}', "only in tasks gym:"),
        ('{"prompt": "a", "meta": 1}', "'meta' is a number"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: must be an object"),
        ('{"messages": [{"role": "me", "content": "a"}]}', "role 'me': unknown"),
        ('{"messages": [{"role": "user", "content": null}]}', "'content' is null"),
        ('{"prompt": "a"}\n{"prompt": "a"}', ":2: id"),
        (b'\n{"prompt": "\xff"}', ":2: not UTF-8 (byte 13)"),
        ('{"prompt": ' + "[" * 100_000, ":1: no JSON"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TaskError) as error:
        load_task(str(path))
    assert told in str(error.value)
    assert str(error.value).startswith(str(path))


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, '{"prompt": "aaaaaaaa"}\n' * 3)
    for name in ("MAX_LINE", "MAX_FILE", "MAX_LINES"):
        with monkeypatch.context() as patch:
            patch.setattr(jsonl, name, 2)
            with pytest.raises(TaskError, match="more than 2"):
                load_task(str(path))
    with pytest.raises(TaskError, match="a folder"):
        load_task(f"file:{tmp_path}")
