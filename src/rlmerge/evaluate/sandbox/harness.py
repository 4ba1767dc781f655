"""What runs inside a room: the tested code in one of three ways, or the asserts that ask it from a room next door.

program   the code is `__main__`, reads stdin, writes stdout
calls     a function of it is called, its values are written to the channel; nobody here knows what is expected
serve     the code answers questions of a `judge` (see `judge`) over a socket

Whatever this module says about tested code can be forged by that code, for they share an interpreter: so it says
values and errors, never whether something is right.
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .values import decode, encode

SOURCE = "<solution>"
_TEXT = 200  # characters of a message


def run(channel: int, link: int | None) -> None:
    """Reads what to do from the channel (a descriptor, as the link is), does it and ends the process."""
    payload = json.loads(_read_all(channel))
    report = Report(channel)
    status = 1
    try:
        match payload["mode"]:
            case "program":
                status = _run_program(payload, report)
            case "calls":
                status = _run_calls(payload, report)
            case "serve":
                assert link is not None
                status = _serve(payload["code"], link)
            case "judge":
                from .judge import judge

                assert link is not None
                status = judge(payload, report, link)
    except MemoryError as error:
        report({"error": describe(error)})
    except (BrokenPipeError, ConnectionError):
        pass  # whoever asked is gone
    finally:
        _end(status)


class Report:
    """One JSON line a message to the process that started the check."""

    def __init__(self, channel: int) -> None:
        self._channel = channel

    def __call__(self, message: dict[str, Any]) -> None:
        write_line(self._channel, message)


def write_line(descriptor: int, message: dict[str, Any]) -> None:
    """A message as one line of JSON, whole."""
    rest = json.dumps(message).encode() + b"\n"
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_all(channel: int) -> bytes:
    parts = []
    while part := os.read(channel, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _end(status: int) -> None:
    """Ends as an interpreter would, without its finalisation: that would end what the worker holds, too."""
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        status = status or 1
    finally:
        os._exit(status)


def _run_program(payload: dict[str, Any], report: Report) -> int:
    if payload["stdin"]:
        _feed(payload["stdin"])
    try:
        load(payload["code"], "__main__")
        if threading := sys.modules.get("threading"):
            threading._shutdown()  # waits for threads, as the end of a program does
        sys.stdout.flush()
    except SystemExit as error:
        return _exit_status(error)
    except BaseException as error:
        report({"error": describe(error)})
        return 1
    return 0


def _feed(text: str) -> None:
    """Standard input, as a file without a name, so that every way of reading it works."""
    given = os.open(".stdin", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(".stdin")
    rest = text.encode("utf-8", "surrogateescape")
    while rest:
        rest = rest[os.write(given, rest) :]
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.close(given)


def _exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def load(code: str, name: str) -> dict[str, Any]:
    """Runs the code as a module of this name and returns its names."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    exec(compile(code, SOURCE, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _run_calls(payload: dict[str, Any], report: Report) -> int:
    try:
        function = find(load(payload["code"], "solution"), payload["entry"])
    except BaseException as error:
        report({"error": describe(error)})
        return 0
    for call in payload["calls"]:
        try:
            arguments = [decode(item) for item in call]
            answer = {"value": encode(function(*arguments), _no_value)}
        except BaseException as error:
            answer = {"error": describe(error)}
        report(answer)
    return 0


def _no_value(value: Any) -> list[Any]:
    raise TypeError(f"gave a {type(value).__name__}, which is no plain value")


class Missing(Exception):
    """The code does not define what the tests call."""


def find(names: dict[str, Any], entry: str) -> Any:
    """The function `entry`; 'Solution.solve' makes an object of the class first."""
    first, *rest = entry.split(".")
    if first not in names:
        raise Missing(f"no function {first!r} in the code")
    found = names[first]
    for part in rest:
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def _serve(code: str, link: int) -> int:
    """Answers questions, one JSON line each, until the other side hangs up."""
    objects: list[Any] = []
    failure: str | None = None
    names: dict[str, Any] = {}
    try:
        names = load(code, "solution")
    except BaseException as error:
        failure = describe(error)

    def keep(value: Any) -> list[Any]:
        objects.append(value)
        return [len(objects) - 1, type(value).__name__]

    for line in os.fdopen(link, "rb", closefd=False):
        try:
            answer = _answer(json.loads(line), names, failure, objects, keep)
        except BaseException as error:
            kind = type(error).__name__
            answer = {"raised": [kind, describe(error).removeprefix(f"{kind}: "), _arguments(error)]}
        write_line(link, answer)
    return 0


def _answer(
    question: dict[str, Any],
    names: dict[str, Any],
    failure: str | None,
    objects: list[Any],
    keep: Callable[[Any], list[Any]],
) -> dict[str, Any]:
    if question["ask"] == "load":
        return {"error": failure} if failure else {"names": [name for name in question["names"] if name in names]}
    target = question["on"]
    thing = find(names, target) if isinstance(target, str) else objects[target]

    def here(number: int, _: str) -> Any:
        return objects[number]

    match question["ask"]:
        case "value":
            found = thing
        case "call":
            arguments = [decode(item, here) for item in question["args"]]
            found = thing(*arguments, **{name: decode(item, here) for name, item in question["kwargs"].items()})
        case "attribute":
            found = getattr(thing, question["name"])
        case "list":
            found = list(thing)
        case "length":
            found = len(thing)
        case "item":
            found = thing[decode(question["key"], here)]
        case other:
            raise ValueError(f"unknown question {other!r}")
    return {"value": encode(found, keep)}


def _arguments(error: BaseException) -> list[Any]:
    try:
        return [encode(item) for item in error.args]
    except Exception:
        return []


def describe(error: BaseException) -> str:
    """'ValueError: what it says (line 3)', one line, short."""
    try:
        if isinstance(error, MemoryError):
            return "out of memory"
        if isinstance(error, Missing):
            return str(error)
        if isinstance(error, SyntaxError):
            said, line = error.msg, error.lineno
        else:
            said, line = str(error), _line_of(error)
        first = said.strip().splitlines()[0][:_TEXT] if said.strip() else ""
        place = f" (line {line})" if line else ""
        return f"{type(error).__name__}{': ' if first else ''}{first}{place}"
    except BaseException:
        return "an error that cannot be described"


def _line_of(error: BaseException, source: str = SOURCE) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
