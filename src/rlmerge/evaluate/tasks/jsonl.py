"""Problems from JSONL files: one object a line, with 'prompt' or 'messages', and what is needed to verify.

Keys are strict, sizes are bounded, and every complaint names file and line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlmerge.errors import did_you_mean
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks.splits import TaskError, digest

KEYS = ("prompt", "messages", "completion", "answer", "tests", "verifier", "id", "meta")
"""Keys that a line may have."""

ROLES = ("system", "user", "assistant", "tool")

MAX_FILE = 1 << 30
MAX_LINE = 1 << 20
MAX_LINES = 1_000_000


def read_problems(path: Path, verifiers: tuple[str, ...]) -> list[Problem]:
    """Every problem of the file, in order; empty lines are skipped.

    verifiers   names that 'verifier' may have
    Raises TaskError for what cannot be read, is not UTF-8, too large, or is no problem.
    """
    found: list[Problem] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        problem = _problem(_object(line, f"{path}:{number}"), f"{path}:{number}", verifiers)
        if problem.id in lines:
            raise TaskError(
                f"{path}:{number}: id {problem.id!r} is line {lines[problem.id]}'s already: remove the line or "
                "give it an 'id' of its own."
            )
        lines[problem.id] = number
        found.append(problem)
    if not found:
        raise TaskError(
            f'{path}: no problems. Write one JSON object a line, as {{"prompt": "2 + 2 =", "answer": "4"}}.'
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        if path.is_dir():
            raise TaskError(f"{path}: a folder; name a JSONL file.")
        size = path.stat().st_size
        if size > MAX_FILE:
            raise TaskError(f"{path}: {size:,} bytes, more than {MAX_FILE:,}: split the file.")
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}.") from None
    rows = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if len(rows) > MAX_LINES:
        raise TaskError(f"{path}: more than {MAX_LINES:,} lines: split the file.")
    return [_text(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]


def _text(row: bytes, where: str) -> str:
    if len(row) > MAX_LINE:
        raise TaskError(f"{where}: a line of {len(row):,} bytes, more than {MAX_LINE:,}.")
    try:
        return row.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from None


def _object(line: str, where: str) -> dict[str, Any]:
    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise TaskError(f"{where}: key {repeated!r} twice in one object.")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=strict)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: no JSON: {str(error) or 'nested too deep'}. Each line must be one object.") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where}: {_kind(row)}, not an object. Each line must be one object, in braces.")
    return row


def _problem(row: dict[str, Any], where: str, verifiers: tuple[str, ...]) -> Problem:
    for key in row:
        if key not in KEYS:
            raise TaskError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, KEYS)} A line may have: {', '.join(KEYS)}."
            )
    if ("prompt" in row) == ("messages" in row):
        state = "both 'prompt' and" if "prompt" in row else "neither 'prompt' nor"
        raise TaskError(f"{where}: {state} 'messages': give one of them, raw text or chat messages.")
    for key in ("prompt", "completion", "verifier", "id"):
        if key in row and not isinstance(row[key], str):
            raise TaskError(f"{where}: {key!r} is {_kind(row[key])}, not text: put it in quotes.")
    answer = _answer(row.get("answer"), where)
    verifier = _verifier(row, answer, where, verifiers)
    if "meta" in row and not isinstance(row["meta"], dict):
        raise TaskError(f"{where}: 'meta' is {_kind(row['meta'])}, not an object.")
    content = json.dumps(row, sort_keys=True, ensure_ascii=True)
    asked = json.dumps([row.get("prompt"), row.get("messages")], sort_keys=True, ensure_ascii=True)
    return Problem(
        id=row.get("id") or digest(content),
        prompt=row.get("prompt", ""),
        messages=_messages(row["messages"], where) if "messages" in row else (),
        completion=row.get("completion"),
        answer=answer,
        tests=row.get("tests"),
        verifier=verifier,
        canonical=f"file:{digest(asked, 16)}",
        meta=dict(row.get("meta", {})),
    )


def _answer(answer: Any, where: str) -> str | None:
    """The answer as text: numbers may be written without quotes."""
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise TaskError(f"{where}: 'answer' is {_kind(answer)}, not text or a number.")
    return repr(answer)


def _verifier(row: dict[str, Any], answer: str | None, where: str, known: tuple[str, ...]) -> str:
    name = row.get("verifier", "")
    if not name:
        return ""
    if name not in known:
        raise TaskError(
            f"{where}: verifier {name!r}: unknown.{did_you_mean(name, known)} There are: {', '.join(known)}."
        )
    if name in ("exact", "math") and not (answer or "").strip():
        raise TaskError(f"{where}: verifier {name!r} compares with an 'answer', and there is none.")
    if name == "python" and not _runnable(row.get("tests")):
        raise TaskError(
            f"{where}: verifier 'python' runs 'tests': an object with 'cases', with 'entry' and 'calls', or 'program'."
        )
    if name == "gym":
        raise TaskError(f"{where}: verifier 'gym' works only in tasks gym:…; use 'exact' or 'math' here.")
    return name


def _runnable(tests: Any) -> bool:
    """Whether the tests have one of the forms that the `python` verifier knows; each with something in it."""
    if not isinstance(tests, dict):
        return False
    lists = [key for key in ("cases", "calls") if isinstance(tests.get(key), list) and tests[key]]
    return "cases" in lists or ("calls" in lists and bool(tests.get("entry"))) or isinstance(tests.get("program"), str)


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"{where}: 'messages' is {_kind(messages)}; write a list of {{'role': …, 'content': …}}.")
    for place, message in enumerate(messages):
        here = f"{where}: messages[{place}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise TaskError(f"{here}: must be an object with 'role' and 'content', and nothing else.")
        if message["role"] not in ROLES:
            raise TaskError(f"{here}: role {message['role']!r}: unknown. There are: {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise TaskError(f"{here}: 'content' is {_kind(message['content'])}, not text.")
    return tuple(messages)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list" if value else "an empty list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
