"""What the lab reads and writes: exercises, solutions, a careless pupil."""

from __future__ import annotations

import re
from random import Random

import pytest

from rlmerge.evaluate.tasks import split_of
from rlmerge.evaluate.verifiers import verify
from rlmerge.lab.errors import LabError
from rlmerge.lab.text import batch_of, careless, documents, exercise, is_right, solution

EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def is_true(match: re.Match[str]) -> bool:
    left, operator, right, value = int(match[1]), match[2], int(match[3]), int(match[4])
    found = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return max(0, found) == value


@pytest.mark.parametrize("task", ["math:0", "code:0", "math:1", "code:trace:1"])
def test_batches_are_a_function_of_their_number(task: str) -> None:
    first = batch_of(task, "rlvr/1", 3, 16)
    assert first == batch_of(task, "rlvr/1", 3, 16)
    assert first != batch_of(task, "rlvr/1", 4, 16)
    assert first != batch_of(task, "rlvr/2", 3, 16)
    assert all(split_of(problem.canonical) == "train" for problem in first)


def test_level_0_is_short_and_right() -> None:
    for task in ("math:0", "code:0"):
        problems = batch_of(task, "tests", 0, 200)
        texts = [solution(problem)[1] for problem in problems]
        assert all(verdict.correct for verdict in verify(texts, problems))
        assert max(map(len, texts)) < 80
        assert {problem.meta["level"] for problem in problems} == {0}


def test_an_exercise_has_another_frame_and_the_same_working() -> None:
    for task in ("math:0", "code:0", "code:write:1"):
        problem = batch_of(task, "tests", 0, 1)[0]
        prompt, completion = exercise(problem)
        assert prompt.startswith("Exercise: ")
        assert "Working:" not in prompt + completion
        assert "Answer:" not in completion
        assert completion.replace("Result: ", "Answer: ") == problem.completion


def test_without_carelessness_the_pupil_is_right() -> None:
    for task in ("math:0", "code:0", "math:2", "code:trace:3"):
        for problem in batch_of(task, "tests", 1, 50):
            assert careless(problem, Random(0), 0.0, 0.0) == solution(problem)


def test_math_loses_its_last_step() -> None:
    problems = batch_of("math:0", "tests", 2, 200)
    texts = [careless(problem, Random(0), 1.0, 0.0)[1] for problem in problems]
    for problem, text in zip(problems, texts):
        lines, whole = text.rstrip().split("\n"), solution(problem)[1].rstrip().split("\n")
        assert lines[:-1] == whole[:-2]
        assert lines[-1] == f"Answer: {lines[-2].split()[-1]}"
    # the end of a sum can be what a part of it was: 3 + 4 - 4 … but the last step always changes something
    assert sum(verdict.correct for verdict in verify(texts, problems)) == 0


def test_code_loses_its_first_step_and_builds_on_what_is_left() -> None:
    problems = batch_of("code:0", "tests", 2, 200)
    texts = [careless(problem, Random(0), 1.0, 0.0)[1] for problem in problems]
    for problem, text in zip(problems, texts):
        assert all(map(is_true, EQUATION.finditer(text))), text
        whole = solution(problem)[1]
        assert len(EQUATION.findall(text)) == len(EQUATION.findall(whole)) - 1
    assert sum(verdict.correct for verdict in verify(texts, problems)) < 30  # those that are right by chance


def test_slips_are_as_frequent_as_asked() -> None:
    problems = batch_of("math:0", "tests", 3, 400)
    texts = [careless(problem, Random(number), 0.0, 0.1)[1] for number, problem in enumerate(problems)]
    found = [is_true(match) for text in texts for match in EQUATION.finditer(text)]
    assert 0.07 < found.count(False) / len(found) < 0.13


def test_right_and_wrong_answers_are_told_apart() -> None:
    for task in ("math:0", "code:0"):
        problems = batch_of(task, "tests", 0, 50)
        assert all(is_right(problem, solution(problem)) for problem in problems)
        pupil = [careless(problem, Random(number), 0.5, 0.1) for number, problem in enumerate(problems)]
        told = [is_right(problem, text) for problem, text in zip(problems, pupil)]
        verdicts = verify([text for _, text in pupil], problems)
        assert told == [verdict.correct for verdict in verdicts]
        assert 0.2 < sum(told) / 50 < 0.8
    with pytest.raises(LabError, match="nothing tells a wrong one"):
        is_right(batch_of("code:write:1", "tests", 0, 1)[0], ("", "def f(n): return n"))


def test_documents_take_all_tasks() -> None:
    found = list(documents(("math:0", "code:0"), "tests", 0, 10, solution))
    assert len(found) == 10
    assert sum("printed" in prompt for prompt, _ in found) == 5
