"""Text that the lab makes itself: exercises to read first, right solutions, and the working of a careless pupil.

A problem of `evaluate.tasks` becomes a document (prompt, completion). No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import problems
from rlmerge.evaluate.tasks.splits import END
from rlmerge.lab.errors import LabError

Document = tuple[str, str]
"""(prompt, completion); what the two have in common with training is decided by the trainer."""

_EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
_SLIPS = (-10, -2, -1, -1, 1, 1, 2, 10)
"""How far a slip is from the right result."""


def batch_of(spec: str, stage: str, step: int, count: int) -> list[Problem]:
    """Training problems of one step: a function of these alone, so that a run can be continued anywhere.

    Different within a step; a later step can bring one again.
    """
    return list(islice(problems(spec, "train", f"{stage}/{step}"), count))


def check_task(spec: str) -> None:
    """Raises TaskError, before anything is made, for a task that is none of the project's own domains."""
    batch_of(spec, "check", 0, 1)


def solution(problem: Problem) -> Document:
    """The problem with a right solution in the format that is asked for."""
    assert problem.completion is not None
    return problem.prompt, problem.completion


def exercise(problem: Problem) -> Document:
    """The problem with its solution in the words of another book: what a model reads before it knows our format."""
    prompt, completion = solution(problem)
    prompt = (
        prompt.replace("Question: ", "Exercise: ", 1)
        .replace("Working:\n", "Solution:\n")
        .replace("Code:\n", "Program:\n")
    )
    return prompt, completion.replace("Answer: ", "Result: ")


def careless(problem: Problem, random: Random, share: float, slip: float) -> Document:
    """The problem as a careless pupil answers it: a step left out with probability `share`, each result wrong with
    probability `slip`; what follows builds on it.

    Math loses its last step (the pupil stops early), code its first one (the pupil skips a line). A step is an
    equation; a problem without a second one keeps what it has. What would be negative is written as 0. Functions to
    write stay as they are.
    """
    prompt, completion = solution(problem)
    if not completion.rstrip().split("\n")[-1].startswith("Answer:"):
        return prompt, completion
    lines = completion.rstrip().split("\n")[:-1]
    equations = [place for place, line in enumerate(lines) if _EQUATION.search(line)]
    skipped = None
    if equations and len(lines) > 1 and random.random() < share:
        skipped = equations[-1] if problem.meta["domain"] == "math" else equations[0]
    lines = _rewritten(lines, skipped, random, slip)
    answer = re.findall(r"\d+", lines[-1])[-1]
    return prompt, "\n".join([*lines, f"Answer: {answer}"]) + END


def is_right(problem: Problem, written: Document) -> bool:
    """Whether the last line of an answer is that of the solution. LabError for functions to write, which have none."""
    ends = [text.rstrip().split("\n")[-1] for text in (written[1], solution(problem)[1])]
    if not ends[1].startswith("Answer:"):
        raise LabError(f"{problem.id}: ends with no answer, so nothing tells a wrong one.")
    return ends[0] == ends[1]


def _rewritten(lines: Sequence[str], skipped: int | None, random: Random, slip: float) -> list[str]:
    """The lines without the skipped one, with slips, each equation on what the one before it came to."""
    found, meant, reached = [], None, None
    for place, line in enumerate(lines):
        match = _EQUATION.search(line)
        if match is None:
            found.append(line)
            continue
        left, operator, right, value = int(match[1]), match[2], int(match[3]), int(match[4])
        if meant is not None and reached is not None and meant in (left, right):
            left, right = (reached, right) if left == meant else (left, reached)
        if place == skipped:
            meant, reached = value, left
            continue
        result = left + right if operator == "+" else left - right if operator == "-" else left * right
        if random.random() < slip:
            result += random.choice(_SLIPS)
        meant, reached = value, max(0, result)
        found.append(f"{line[: match.start()]}{left} {operator} {right} = {reached}{line[match.end() :]}")
    return found


def documents(
    specs: Sequence[str], stage: str, step: int, count: int, write: Callable[[Problem], Document]
) -> Iterator[Document]:
    """`count` documents of a step, the specs in turn."""
    each = -(-count // len(specs))
    mixed = [write(problem) for spec in specs for problem in batch_of(spec, stage, step, each)]
    return islice(mixed, count)
