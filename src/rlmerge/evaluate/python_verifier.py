"""The `python` verifier: runs what a model wrote against tests, in the sandbox, and compares outside of it.

`Problem.tests` is a mapping of one of three forms; `docs/sandbox.md` has an example of each:

    {"cases": [{"stdin": "...", "stdout": "..."}, ...]}                a program, fed and read
    {"entry": "f", "calls": [{"args": [...], "expected": ...}, ...]}   a function, called; also [[args], expected] pairs
    {"program": "def check(candidate): ...", "entry": "f"}             asserts, run next door to the function

The first two never let what is expected into the sandbox. In the third it is in a process of its own there.
`tolerance` (1e-6, relative and absolute) beside `calls` is for floats. `Problem.meta["prefix"]` (HumanEval's prompt) is
put before the code.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from .problem import Problem, Verdict
from .sandbox import Client, Limits, Outcome, Pool, require
from .sandbox.values import encode, same, show

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(\S*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
_LANGUAGES = {"python", "py", "python3"}
_REASON = 300  # characters


def extract_code(completion: str, prefix: str = "") -> str:
    """The program in a completion: its last block fenced as Python, else its last block fenced as nothing, else all.

    `prefix` is what the model continued. A fenced block stands after it on lines of its own: it defines anew what the
    prefix left open. A completion without fence is glued to it.
    """
    blocks = [(found.group(1).lower(), found.group(2)) for found in _FENCE.finditer(completion)]
    python = [code for language, code in blocks if language in _LANGUAGES] or [
        code for language, code in blocks if not language
    ]
    if not python:
        return prefix + completion
    return f"{prefix.rstrip()}\n\n{python[-1]}" if prefix else python[-1]


class PythonVerifier:
    """Verdicts by running. Holds its workers until `close`, or until nobody holds it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        """completions[i] answers problems[i]. ValueError for tests of no known form, never for a completion."""
        if len(completions) != len(problems):
            raise ValueError(f"{len(completions)} completions for {len(problems)} problems")
        checks = [_check(completion, problem) for completion, problem in zip(completions, problems)]
        return self._pool.map(lambda client, check: check.verdict(client), checks)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()


def make_verifier(unsafe: bool = False, timeout: float = 5.0, memory_mb: int = 256, workers: int = 2) -> PythonVerifier:
    """A verifier with `workers` prepared workers. SandboxError where nothing isolates, unless `unsafe`.

    timeout    seconds for each run of a program, or for all calls and asserts of a function
    memory_mb  address space of each process
    """
    isolation = require(unsafe)
    return PythonVerifier(Pool(isolation, Limits(wall=timeout, memory_mb=memory_mb), workers))


class _Check(ABC):
    """One completion with its tests."""

    def __init__(self, code: str, tests: Mapping[str, Any]) -> None:
        self.code, self.tests = code, tests

    def verdict(self, client: Client) -> Verdict:
        try:
            self.code.encode()
        except UnicodeEncodeError:
            return Verdict(False, "the completion holds half a character (a lone surrogate)")
        correct, reason = self.run(client)
        return Verdict(correct, " ".join(reason.split())[:_REASON])

    @abstractmethod
    def run(self, client: Client) -> tuple[bool, str]:
        """Whether the tests pass, and what happened."""


class _Cases(_Check):
    """A program: its input on stdin, what it prints compared here."""

    def run(self, client: Client) -> tuple[bool, str]:
        cases = self.tests["cases"]
        passed, first = 0, ""
        for place, case in enumerate(cases, 1):
            outcome = client.run([{"mode": "program", "code": self.code, "stdin": str(case.get("stdin", ""))}])
            problem = self._problem(outcome, str(case["stdout"]))
            passed += not problem
            if problem and not first:
                first = problem if len(cases) == 1 else f"case {place}: {problem}"
            if outcome.trouble:
                break  # a program that hangs once is not run again and again
        return passed == len(cases), _count(passed, len(cases), first)

    def _problem(self, outcome: Outcome, expected: str) -> str:
        if why := outcome.describe():
            return why
        printed = outcome.processes[0].output.decode(errors="replace")
        if _lines(printed) == _lines(expected):
            return ""
        return f"printed {_short(printed)}, expected {_short(expected)}"


class _Calls(_Check):
    """A function: called inside, its values compared here."""

    def run(self, client: Client) -> tuple[bool, str]:
        calls = [_call(call) for call in self.tests["calls"]]
        entry, tolerance = self.tests["entry"], float(self.tests.get("tolerance", 1e-6))
        given = [[encode(item) for item in arguments] for arguments, _ in calls]
        outcome = client.run([{"mode": "calls", "code": self.code, "entry": entry, "calls": given}])
        answers = outcome.processes[0].messages
        passed, first = 0, ""
        if len(answers) > len(calls):
            return False, "the code wrote to the channel of its answers"
        if len(calls) > 1 and len(answers) == 1 and "error" in answers[0] and not outcome.trouble:
            return False, _count(0, len(calls), str(answers[0]["error"]))  # the code does not even load
        passed, first = 0, ""
        for place, (arguments, expected) in enumerate(calls):
            # Values that came before a process was killed are values all the same.
            answer = answers[place] if place < len(answers) else {"ended": outcome.describe()}
            wanted = encode(expected)
            if "value" in answer and _equal(wanted, answer["value"], tolerance):
                passed += 1
            elif not first:
                first = f"{entry}({', '.join(show(encode(item), 30) for item in arguments)}) {_what(answer, wanted)}"
        return passed == len(calls), _count(passed, len(calls), first)


class _Asserts(_Check):
    """Asserts: in one process, with the function in another."""

    def run(self, client: Client) -> tuple[bool, str]:
        judge = {"mode": "judge", "program": self.tests["program"], "entry": self.tests.get("entry")}
        outcome = client.run([judge, {"mode": "serve", "code": self.code}])
        if outcome.trouble:
            return False, outcome.trouble
        for process in outcome.processes:
            for message in process.messages:
                if "setup" in message:
                    return False, str(message["setup"])
        answers = outcome.processes[0].messages
        if len(answers) != 1 or outcome.processes[0].status != 0:
            return False, outcome.describe() or "the tests ended their process"
        return answers[0].get("passed") is True, str(answers[0].get("reason", ""))


def _check(completion: str, problem: Problem) -> _Check:
    code = extract_code(completion, str(problem.meta.get("prefix", "")))
    tests = problem.tests
    if isinstance(tests, Mapping):
        if tests.get("cases"):
            return _Cases(code, tests)
        if tests.get("calls") and tests.get("entry"):
            return _Calls(code, tests)
        if isinstance(tests.get("program"), str):
            return _Asserts(code, tests)
    raise ValueError(
        f"problem {problem.id!r}: the `python` verifier needs tests with 'cases', with 'entry' and 'calls', or with "
        f"'program', found {show(tests) if not isinstance(tests, Mapping) else sorted(map(str, tests))}"
    )


def _call(call: Any) -> tuple[list[Any], Any]:
    if isinstance(call, Mapping):
        return list(call["args"]), call["expected"]
    arguments, expected = call
    return list(arguments), expected


def _what(answer: dict[str, Any], expected: Any) -> str:
    if "value" in answer:
        return f"gave {show(answer['value'])}, expected {show(expected)}"
    if "error" in answer:
        error = str(answer["error"])
        return error if error == "out of memory" else f"raised {error}"
    return answer.get("ended") or "the code ended its process"


def _equal(expected: Any, found: Any, tolerance: float) -> bool:
    try:
        return same(expected, found, tolerance)
    except Exception:  # whatever tested code wrote instead of a value
        return False


def _count(passed: int, total: int, first: str) -> str:
    if total == 1:
        return first or "the test passes"
    return f"{passed} of {total} tests pass" + (f": {first}" if first else "")


def _lines(text: str) -> list[str]:
    """As judges of programs compare: ends of lines and of the text do not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _short(text: str, width: int = 60) -> str:
    text = repr(text.rstrip())
    return text if len(text) <= width else text[: width - 1] + "…"
