"""Assert-style tests in a room of their own: the tested code is next door, behind a socket, and never sees them.

To the tests, what the code defines looks like functions and objects. A call travels as plain values and comes back as
plain values, so an overridden `__eq__`, a patched builtin or a search through memory reaches nothing here. What is no
plain value stays next door and is represented by a `Remote`, which can be called, asked for attributes and listed, but
not compared.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

from .harness import Report, describe, write_line
from .values import decode, encode

SOURCE = "<tests>"


class Gone(BaseException):
    """The tested process ended while it was asked. No `except Exception` in a test may swallow that."""


class RemoteError(Exception):
    """An exception of the tested code that is none of Python's own."""


class Link:
    """Questions to the tested code, one at a time."""

    def __init__(self, link: int) -> None:
        self._descriptor = link
        self._answers = os.fdopen(link, "rb", closefd=False)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer, as it wrote it."""
        try:
            write_line(self._descriptor, question)
            line = self._answers.readline()
        except OSError as error:
            raise Gone from error
        if not line.endswith(b"\n"):
            raise Gone
        answer = json.loads(line)
        return answer if isinstance(answer, dict) else {}

    def value(self, question: dict[str, Any]) -> Any:
        """The value in its answer, or the exception."""
        answer = self.ask(question)
        if "raised" in answer:
            _raise(*answer["raised"])
        return decode(answer["value"], lambda number, kind: Remote(self, number, kind))


def _raise(kind: str, said: str, arguments: list[Any]) -> NoReturn:
    found = getattr(builtins, str(kind), None)
    # StopIteration would end a loop of the tests early: tests that never ran would count as passed.
    if isinstance(found, type) and issubclass(found, Exception) and kind not in ("StopIteration", "StopAsyncIteration"):
        try:
            raise found(*[decode(item) for item in arguments])
        except TypeError as error:
            if found is not TypeError:
                raise RemoteError(f"{kind}: {said}") from error
            raise
    raise RemoteError(f"{kind}: {said}")


def _refuse(self: Remote, *_: Any) -> NoReturn:
    raise TypeError(f"{self!r} is no plain value and cannot be compared")


class Remote:
    """A function or an object of the tested code."""

    def __init__(self, link: Link, on: str | int, kind: str) -> None:
        self._link, self._on, self._kind = link, on, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {name: encode(item, _number) for name, item in kwargs.items()}
        given = [encode(item, _number) for item in args]
        return self._link.value({"ask": "call", "on": self._on, "args": given, "kwargs": named})

    def __getattr__(self, name: str) -> Any:
        return self._link.value({"ask": "attribute", "on": self._on, "name": name})

    def __iter__(self) -> Iterator[Any]:
        items = self._link.value({"ask": "list", "on": self._on})
        return iter(items if isinstance(items, list) else [])

    def __len__(self) -> int:
        return self._link.value({"ask": "length", "on": self._on})

    def __getitem__(self, key: Any) -> Any:
        return self._link.value({"ask": "item", "on": self._on, "key": encode(key, _number)})

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{self._kind} of the solution>"

    __hash__ = object.__hash__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse  # type: ignore[assignment]


def _number(value: Any) -> list[Any]:
    if isinstance(value, Remote) and isinstance(value._on, int):
        return [value._on, value._kind]
    raise TypeError(f"the test passes a {type(value).__name__}, which cannot cross to the tested process")


def judge(payload: dict[str, Any], report: Report, descriptor: int) -> int:
    """Runs the tests and reports {'passed': …, 'reason': …}. Exit status 0 only with such a report."""
    link = Link(descriptor)
    program, entry = payload["program"], payload["entry"]
    try:
        tree = ast.parse(program, SOURCE)
        used = _free_names(tree)
        if entry:
            used.add(entry.split(".")[0])
        answer = link.ask({"ask": "load", "names": sorted(used)})
        if "error" in answer:
            report({"passed": False, "reason": str(answer["error"])[:300]})
            return 0
        names = _names(link, used, answer.get("names", []), entry, _module_names(tree))
        exec(compile(tree, SOURCE, "exec"), names)
        if entry and callable(names.get("check")):
            names["check"](names["candidate"])
    except Gone:
        report({"passed": False, "reason": "the code ended its process"})
    except BaseException as error:
        report({"passed": False, "reason": _why(error, program)})
    else:
        report({"passed": True, "reason": "all tests pass"})
    return 0


def _free_names(tree: ast.AST) -> set[str]:
    """Names that the tests read and that are none of Python's own."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {name for name in read if not hasattr(builtins, name) and not name.startswith("__")}


def _module_names(tree: ast.AST) -> set[str]:
    """Standard modules that the tests use without importing them, as `math` in `math.fabs`."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    asked = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_name(node.value)}
    return (asked & sys.stdlib_module_names) - stored


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def _names(link: Link, used: set[str], defined: list[str], entry: str | None, modules: set[str]) -> dict[str, Any]:
    """What the tests can see before their own first line: the solution's names and the standard modules they use."""
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    for name in used:
        if name in modules and name != entry:
            names[name] = importlib.import_module(name)  # tests lean on imports of the prompt; never on the code's
        elif name in defined:
            names[name] = link.value({"ask": "value", "on": name})
    if entry:
        names["candidate"] = link.value({"ask": "value", "on": entry})
        if "." not in entry:
            names[entry] = names["candidate"]
    return names


def _why(error: BaseException, program: str) -> str:
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SOURCE:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = program.splitlines()[line - 1].strip()[:160] if 0 < line <= len(program.splitlines()) else ""
    if isinstance(error, AssertionError):
        return f"failed: {text}" if text else "an assertion failed"
    said = str(error)[:200] if isinstance(error, RemoteError) else describe(error)
    return f"{said} in {text}" if text else said
