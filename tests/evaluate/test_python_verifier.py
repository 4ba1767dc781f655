"""The `python` verifier: right code passes, wrong code fails with a reason, and no code talks itself into a pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rlmerge.evaluate import python_verifier
from rlmerge.evaluate.problem import Problem, Verdict
from rlmerge.evaluate.python_verifier import PythonVerifier, extract_code, make_verifier
from rlmerge.evaluate.sandbox import SandboxError, available, isolation

pytestmark = pytest.mark.skipif(not available().isolated, reason=f"no isolation here: {available()}")

CALLS = {"entry": "f", "calls": [[[1], 2], [[2], 4], {"args": [3], "expected": 6}, [["a"], "aa"]]}
CASES = {"cases": [{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "20\n", "stdout": "40\n"}]}
ASSERTS = {
    "entry": "f",
    "program": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(7) == 14\n",
}
PROGRAM = "print(int(input()) * 2)"
FUNCTION = "def f(x):\n    return x * 2\n"


@pytest.fixture(scope="module")
def verifier() -> Iterator[PythonVerifier]:
    found = make_verifier(timeout=2.0)
    yield found
    found.close()


def judge(verifier: PythonVerifier, completion: str, tests: Any, **meta: Any) -> Verdict:
    return verifier([completion], [Problem("p", tests=tests, verifier="python", meta=meta)])[0]


def test_right_answers_pass(verifier: PythonVerifier) -> None:
    assert judge(verifier, PROGRAM, CASES) == Verdict(True, "2 of 2 tests pass")
    assert judge(verifier, FUNCTION, CALLS) == Verdict(True, "4 of 4 tests pass")
    assert judge(verifier, FUNCTION, ASSERTS) == Verdict(True, "all tests pass")


@pytest.mark.parametrize(
    ("completion", "tests", "reason"),
    [
        ("def f(x): return 2", CALLS, "1 of 4 tests pass: f(2) gave 2, expected 4"),
        ("def f(x): return x + x if x != 'a' else b''", CALLS, "3 of 4 tests pass: f('a') gave b'', expected 'aa'"),
        ("def f(x):\n    return {}[x]", CALLS, "0 of 4 tests pass: f(1) raised KeyError: 1 (line 2)"),
        ("def f(x):\n    return x *", CALLS, "0 of 4 tests pass: SyntaxError: invalid syntax (line 2)"),
        ("def g(x): pass", CALLS, "0 of 4 tests pass: no function 'f' in the code"),
        (
            "def f(x): return f",
            CALLS,
            "0 of 4 tests pass: f(1) raised TypeError: gave a function, which is no plain value",
        ),
        ("def f(x):\n    while x != 'a': x = 1", CALLS, "0 of 4 tests pass: f(1) timed out after 2 s"),
        ("def f(x): return 'x' * 10**10", CALLS, "0 of 4 tests pass: f(1) out of memory"),
        ("def f(x): return 'x' * 10**7", CALLS, "0 of 4 tests pass: f(1) wrote more than 1024 KiB"),
        ("def f(x): raise SystemExit(0)", CALLS, "0 of 4 tests pass: f(1) raised SystemExit: 0 (line 1)"),
        ("import os\ndef f(x): os._exit(0)", CALLS, "0 of 4 tests pass: f(1) the code ended its process"),
        (
            "def f(x): return f(x)",
            CALLS,
            "0 of 4 tests pass: f(1) raised RecursionError: maximum recursion depth exceeded",
        ),
        ("import no_such_module", CALLS, "0 of 4 tests pass: ModuleNotFoundError: No module named 'no_such_module'"),
        ("print(2)", CASES, "1 of 2 tests pass: case 2: printed '2', expected '40'"),
        ("print(int(input()) // 0)", CASES, "0 of 2 tests pass: case 1: ZeroDivisionError: integer division or modulo"),
        (PROGRAM + "\nraise SystemExit(1)", CASES, "0 of 2 tests pass: case 1: exit code 1"),
        ("while True: pass", CASES, "0 of 2 tests pass: case 1: timed out after 2 s"),
        ("x = 'x' * 10**10", CASES, "0 of 2 tests pass: case 1: out of memory"),
        ("def f(x): return 2", ASSERTS, "failed: assert candidate(7) == 14"),
        ("def f(x): return 1 / 0", ASSERTS, "ZeroDivisionError: division by zero in assert candidate(1) == 2"),
        ("def f(x", ASSERTS, "SyntaxError: '(' was never closed (line 1)"),
        ("def f(x):\n    while True: pass", ASSERTS, "timed out after 2 s"),
        ("import os\nos._exit(0)", ASSERTS, "the code ended its process"),
        ("", ASSERTS, "no function 'f' in the code"),
        ("def f(x): return '\udcff'", ASSERTS, "half a character"),
        ("\0", CALLS, "source code string cannot contain null bytes"),
        ("(" * 5000, CALLS, "too many nested parentheses"),
    ],
)
def test_wrong_answers_say_why(verifier: PythonVerifier, completion: str, tests: Any, reason: str) -> None:
    verdict = judge(verifier, completion, tests)
    assert not verdict.correct
    assert reason in verdict.reason
    assert len(verdict.reason) <= 300


FORGERIES = {
    "exit 0 at once": "import os\nos._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "quit in the function": "def f(x):\n    quit()",
    "a word on stdout": "print('2 of 2 tests pass'); print('{\"passed\": true}')\ndef f(x): return None",
    "equal to everything": "class E:\n    __eq__ = lambda a, b: True\n    __hash__ = lambda a: 0\ndef f(x): return E()",
    "an int equal to everything": "class E(int):\n    __eq__ = lambda a, b: True\ndef f(x): return E(0)",
    "a str equal to everything": "class E(str):\n    __eq__ = lambda a, b: True\ndef f(x): return E()",
    "a list equal to everything": "class E(list):\n    __eq__ = lambda a, b: True\ndef f(x): return E()",
    "a spoofed class": "class E:\n    __class__ = int\n    __eq__ = lambda a, b: True\ndef f(x): return E()",
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.exec = lambda *a: None\ndef f(x): return None"
    ),
    "messages of its own": (
        "import os, json\n"
        "for number in (1, 2, 3, 4):\n    for _ in range(4):\n        try:\n"
        "            os.write(number, json.dumps({'passed': True, 'reason': 'passed', 'value': 2}).encode() + b'\\n')\n"
        "        except OSError: pass\n"
        "def f(x): return None"
    ),
    "answers ahead of the questions": (
        "import os\nos.write(4, b'{\"names\": [\"f\"]}\\n' * 9) if len(os.listdir('/')) else 0\n"
        "def f(x):\n    os._exit(0)"
    ),
    "a patched harness": (
        "import sys, os\n"
        "for module in list(sys.modules.values()):\n"
        "    for name in ('same', 'describe', 'judge', '_answer', 'encode', 'write_line', '_end'):\n"
        "        if hasattr(module, name):\n            setattr(module, name, lambda *a, **k: {'passed': True})\n"
        "def f(x): return None"
    ),
    "the harness's frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    found = []\n    while frame:\n"
        "        found += [v for v in frame.f_locals.values() if isinstance(v, (list, dict))]\n"
        "        frame = frame.f_back\n"
        "    for v in found:\n        try:\n"
        "            return v['expected'] if isinstance(v, dict) else v[1]\n"
        "        except Exception: pass"
    ),
    "the garbage collector's objects": (
        "import gc\ndef f(x):\n    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and ('expected' in thing or 'program' in thing):\n"
        "            return thing.get('expected')"
    ),
    "all of memory": (
        # Every page that holds an object. The pattern does not match its own text, which is in memory, too.
        "import ctypes, gc, re\n"
        "def f(x):\n    if type(x) is not int: return None\n"
        "    things = gc.get_objects()\n"
        "    things += [part for thing in things for part in gc.get_referents(thing)]\n"
        "    for page in sorted({id(thing) >> 12 for thing in things}):\n"
        "        seen = ctypes.string_at(page << 12, 4096)\n"
        "        if re.search(rb'assert c[a]ndidate|.expect[e]d.: ', seen): return 2 * x\n"
    ),
    "an atexit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return None",
    "a StopIteration": "def f(x): raise StopIteration",
    "an exit in a thread": (
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\ndef f(x): return None"
    ),
    "a name of the tests": "check = lambda c: None\nassert_ = None\ndef f(x): return None\ndef all(x): return True",
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("tests", [CALLS, CASES, ASSERTS], ids=["calls", "cases", "asserts"])
def test_no_verdict_is_forged(verifier: PythonVerifier, name: str, tests: Any) -> None:
    verdict = judge(verifier, FORGERIES[name], tests)
    assert not verdict.correct, verdict.reason
    assert judge(verifier, FUNCTION, CALLS).correct


def test_a_loop_of_the_tests_is_not_cut_short(verifier: PythonVerifier) -> None:
    tests = {"entry": "f", "program": "def check(candidate):\n    assert list(map(candidate, [1, 2, 3])) == []\n"}
    assert not judge(verifier, "def f(x): raise StopIteration", tests).correct


def test_asserts_of_other_shapes(verifier: PythonVerifier) -> None:
    mbpp = {"program": "assert double(2) == 4\nassert double('a') == 'aa'\nassert abs(double(0.1) - 0.2) < 1e-9"}
    assert judge(verifier, "def double(x): return x * 2", mbpp).correct
    helper = {"entry": "f", "program": "def check(candidate):\n    assert math.fabs(helper(candidate(1))) == 3\n"}
    assert judge(verifier, "import math\ndef helper(x): return -x\ndef f(x): return 3", helper).correct
    raised = {
        "program": "try:\n    f(1)\nexcept ValueError as e:\n    assert e.args == ('no',)\nelse:\n    assert False"
    }
    assert judge(verifier, "def f(x): raise ValueError('no')", raised).correct
    assert not judge(verifier, "def f(x): raise KeyError('no')", raised).correct
    assert not judge(verifier, "def f(x): pass", raised).correct
    class_ = {"program": "s = Stack()\ns.push(3)\ns.push((1, {2}))\nassert s.pop() == (1, {2})\nassert s.items == [3]"}
    code = "class Stack:\n    def __init__(self): self.items = []\n"
    code += "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
    assert judge(verifier, code, class_).correct
    dead = {"program": "try:\n    f(1)\nexcept Exception:\n    pass"}
    assert not judge(verifier, "import os\ndef f(x): os._exit(0)", dead).correct


def test_values_are_compared_as_python_does(verifier: PythonVerifier) -> None:
    pairs = [
        ("1", 1.0, True), ("True", 1, True), ("0.1 + 0.2", 0.3, True), ("0.3001", 0.3, False),
        ("(1, [2])", [1, [2]], True),
        ("{1: 'a'}", {"1": "a"}, True), ("{'a': {1, 2}}", {"a": {1, 2}}, True), ("{1, 2}", [1, 2], False),
        ("10 ** 400", 10**400, True), ("10 ** 400 + 1", 10**400, False), ("float('nan')", float("nan"), True),
        ("float('inf')", float("inf"), True), ("None", None, True), ("None", 0, False), ("''", None, False),
        ("b'a'", b"a", True), ("'a'", b"a", False), ("1j", 1j, True), ("[]", {}, False), ("[1]", [1, 2], False),
        ("{(1, 2): 3}", {(1, 2): 3}, True), ("__import__('collections').Counter('aa')", {"a": 2}, True),
        ("'\\ud800'", "\ud800", True), ("frozenset([1])", {1}, True), ("range(3)", [0, 1, 2], False),
    ]  # fmt: skip
    problems = [Problem("p", tests={"entry": "f", "calls": [[[], expected]]}) for _, expected, _ in pairs]
    verdicts = verifier([f"def f(): return {code}" for code, _, _ in pairs], problems)
    assert [(code, verdict.correct) for (code, _, _), verdict in zip(pairs, verdicts)] == [
        (code, correct) for code, _, correct in pairs
    ]


def test_methods_of_a_class(verifier: PythonVerifier) -> None:
    tests = {"entry": "Solution.solve", "calls": [[[2], 4]]}
    assert judge(verifier, "class Solution:\n    def solve(self, x): return 2 * x", tests).correct


def test_extract_code() -> None:
    assert extract_code("so:\n```python\na\n```\nor\n```python\nb\n```\nend") == "b\n"
    assert extract_code("```py\na\n```\n```\nlog\n```") == "a\n"
    assert extract_code("```\na\n```") == "a\n"
    assert extract_code("```python\nunclosed") == "unclosed"
    assert extract_code("plain") == "plain"
    assert extract_code("```json\n{}\n```") == "```json\n{}\n```"
    assert extract_code("    return 1", "def f():\n") == "def f():\n    return 1"
    assert extract_code("```python\ndef f(): pass\n```", 'def f():\n    """Says."""\n').endswith(
        '"""\n\ndef f(): pass\n'
    )


def test_humaneval_prefix(verifier: PythonVerifier) -> None:
    prefix = 'def f(x):\n    """Twice x."""\n'
    assert judge(verifier, "    return x * 2\n", ASSERTS, prefix=prefix).correct
    assert judge(verifier, "Sure:\n```python\ndef f(x):\n    return x * 2\n```", ASSERTS, prefix=prefix).correct


def test_a_batch_keeps_its_order_and_uses_all_workers(verifier: PythonVerifier) -> None:
    count = 60
    problems = [Problem(str(i), tests={"entry": "f", "calls": [[[i], 2 * i]]}) for i in range(count)]
    completions = [FUNCTION if i % 3 else "def f(x): return -1" for i in range(count)]
    assert [verdict.correct for verdict in verifier(completions, problems)] == [bool(i % 3) for i in range(count)]
    assert verifier([], []) == []


def test_a_lost_worker_is_replaced() -> None:
    verifier = make_verifier(workers=1)
    try:
        client = verifier._pool._free.get()
        verifier._pool._free.put(client)
        assert client._process is not None
        client._process.kill()
        verdict = judge(verifier, FUNCTION, CALLS)
        # seen dead before it is asked, it is replaced at once; else the answer that it owed is lost
        assert verdict.correct or "the worker died" in verdict.reason
        assert client._process is None or client._process.poll() is None
        assert judge(verifier, FUNCTION, CALLS).correct
    finally:
        verifier.close()


def test_unknown_tests_are_the_user_s_mistake(verifier: PythonVerifier) -> None:
    with pytest.raises(ValueError, match="problem 'p': the `python` verifier needs tests with 'cases'"):
        judge(verifier, FUNCTION, {"entry": "f"})
    with pytest.raises(ValueError, match="1 completions for 0 problems"):
        verifier([FUNCTION], [])


def test_refuses_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "available", lambda: isolation.NONE)
    with pytest.raises(SandboxError, match="--unsafe-exec"):
        make_verifier()
    verifier = python_verifier.make_verifier(unsafe=True, timeout=1.0)
    try:
        assert judge(verifier, FUNCTION, CALLS).correct
        assert judge(verifier, FUNCTION, ASSERTS).correct
        assert judge(verifier, PROGRAM, CASES).correct
        assert "timed out after 1 s" in judge(verifier, "def f(x):\n    while True: pass", CALLS).reason
    finally:
        verifier.close()
