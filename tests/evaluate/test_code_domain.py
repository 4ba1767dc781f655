"""The domain `code`: programs print what is claimed, solutions pass their tests, wrong ones fail, counts are honest."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from random import Random
from typing import Any

import pytest

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import code_domain, code_functions, code_programs, code_solutions, code_traces
from rlmerge.evaluate.tasks.code_domain import LEVELS, answer_only, canonical_of, count, draw, traces

EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def drawn(level: int, kind: str, number: int = 200) -> list[Problem]:
    random = Random(f"test/{level}")
    return [draw(random, level, kind).build(random) for _ in range(number)]


def printed(program: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


def passes(completion: str, tests: dict[str, Any]) -> bool:
    space: dict[str, Any] = {}
    exec(completion, space)
    function: Callable[..., Any] = space[tests["entry"]]
    return all(function(*arguments) == expected for arguments, expected in tests["calls"])


@pytest.mark.parametrize("level", LEVELS)
def test_programs_print_the_answer(level: int) -> None:
    for problem in drawn(level, "trace"):
        program = problem.prompt.split("\n", 1)[1].removesuffix("Working:\n")
        assert program == problem.meta["source"]
        assert printed(program) == problem.answer, program
        assert int(problem.answer or "") >= 0


@pytest.mark.parametrize("level", LEVELS)
def test_working_is_true_and_leads_to_the_answer(level: int) -> None:
    random = Random(1)
    for problem in drawn(level, "trace", 120):
        texts = {traces(problem, random) for _ in range(15)} | {problem.completion or ""}
        assert len(texts) >= 3
        for text in texts:
            equations = EQUATION.findall(text)
            for left, operator, right, value in equations:
                assert eval(f"{left} {operator} {right}") == int(value), text
            assert text.endswith(f"\nAnswer: {problem.answer}\n\n")
            assert equations[-1][3] == problem.answer


@pytest.mark.parametrize("level", LEVELS)
def test_solutions_pass_and_differ(level: int) -> None:
    random = Random(2)
    for problem in drawn(level, "write", 120):
        texts = {traces(problem, random) for _ in range(15)} | {
            problem.completion or "",
            answer_only(problem).completion,
        }
        assert len(texts) >= 3
        for text in texts:
            assert text
            assert passes(text, problem.tests), text
            assert text.endswith("\n\n")
            assert "\n\n" not in text.removesuffix("\n\n")


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_constants_fail(level: int) -> None:
    """Any number of a solution changed by one is noticed by the tests."""
    for problem in drawn(level, "write", 120):
        text = code_solutions.shortest(problem.meta["spec"], problem.meta["names"][0])
        for found in re.finditer(r"\b\d+\b", text):
            if problem.meta["spec"][1] == "count" and text[found.start() - 4 : found.start()] == "sum(":
                continue
            wrong = f"{text[: found.start()]}{int(found[0]) + 1}{text[found.end() :]}"
            assert not passes(wrong, problem.tests), wrong


def test_tests_come_from_the_spec_alone() -> None:
    spec = ["condition", 7, ["+", 3], ["*", 2]]
    random = Random(0)
    problems = [code_domain._build_write(spec, 1, random) for _ in range(5)]
    assert len({repr(problem.tests) for problem in problems}) == len({problem.id for problem in problems}) == 1
    assert len({problem.prompt for problem in problems}) > 1


def test_names_order_and_spelling_make_no_new_problem() -> None:
    spec = ["chain", 3, ["+", 9], ["*", 2]]
    random = Random(0)
    programs = {code_traces.source(spec, random)[0] for _ in range(200)}
    assert len(programs) > 100
    assert {printed(program) for program in programs} == {"24"}
    for level in LEVELS:
        for problem in drawn(level, "trace", 200):
            shape = problem.meta["spec"]
            if shape[0] == "chain" and shape[2][0] in "+*":
                assert shape[1] <= shape[2][1]
            if shape[0] == "branch":
                assert shape[2] in (">", ">=")
            assert problem.canonical == canonical_of("trace", shape)


@pytest.mark.parametrize("family", code_programs.FAMILIES)
def test_every_form_of_a_small_space_is_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_programs.LEVELS, 9, code_programs.Level(3, 3, ("+*-", "-*", "*+"), 3, "+i*m", 2))
    random = Random(0)
    forms = {f: {repr(code_programs.draw(random, 9, f)) for _ in range(9000)} for f in code_programs.FAMILIES}
    assert forms[family]
    assert sum(map(len, forms.values())) == code_programs.count(9)


@pytest.mark.parametrize("edits", [1, 2])
def test_every_function_of_a_small_space_is_counted(edits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_functions.LEVELS, 9, code_functions.Level(2, 3, 3, edits == 2, edits == 2, 1, edits))
    random = Random(0)
    small = ("condition", "number", "over")
    found = sum(len({repr(code_functions.draw(random, 9, f)) for _ in range(6000)}) for f in small)
    replaced = 26 * 25
    strings = 2 * 26 + replaced if edits == 1 else 26**2 + 2 * 27 * replaced
    assert found == code_functions.count(9) - strings


def test_edits_that_commute_are_one_function() -> None:
    settled = code_functions._settled
    assert settled([["front", "b"], ["end", "a"]]) == settled([["end", "a"], ["front", "b"]])
    assert settled([["end", "b"], ["replace", "c", "d"]]) == [["replace", "c", "d"], ["end", "b"]]
    assert settled([["end", "c"], ["replace", "c", "d"]]) == [["end", "c"], ["replace", "c", "d"]]


def test_counts_are_what_the_docs_say() -> None:
    assert [count(level, "trace") for level in LEVELS] == [1_093_978, 15_775_767, 123_522_860, 200_203_584_306]
    assert [count(level, "write") for level in LEVELS] == [48_142, 299_714, 3_924_854, 1_360_487_798]
    assert all(count(level) == count(level, "trace") + count(level, "write") for level in LEVELS)
    assert count(0) == count(0, "trace") == 50_850


def test_level_0_has_traces_in_one_wording() -> None:
    random = Random(0)
    for _ in range(500):
        problem = draw(random, 0).build(random)
        assert problem.meta["kind"] == "trace"
        assert problem.prompt.startswith("Question: What is printed?\n")
        assert traces(problem, random) == problem.completion
        assert printed(problem.meta["source"]) == problem.answer


def test_few_draws_repeat() -> None:
    random = Random(0)
    assert len({draw(random, 1 + turn % 4).canonical for turn in range(40_000)}) > 36_000


@pytest.mark.long
def test_200_000_distinct_problems() -> None:
    random = Random(0)
    assert len({draw(random, 1 + turn % 4).canonical for turn in range(300_000)}) >= 200_000


def test_answer_only_has_no_working() -> None:
    for problem in drawn(2, "trace", 30):
        bare = answer_only(problem)
        assert bare.prompt == problem.prompt.removesuffix("Working:\n") + "Answer:"
        assert bare.completion == f" {problem.answer}\n\n"
    for problem in drawn(2, "write", 30):
        bare = answer_only(problem)
        assert "#" not in (bare.completion or "")
        assert bare.tests == problem.tests
