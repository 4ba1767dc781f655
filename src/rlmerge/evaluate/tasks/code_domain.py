"""The domain `code`: trace a short program to its output, or write a short function that passes tests.

Programs and functions are drawn as specs in canonical form (see `code_programs` and `code_functions`): names, the order
of commuting operands and the spelling of statements make no new problem.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import code_functions, code_programs, code_solutions, code_traces
from rlmerge.evaluate.tasks.splits import END, Draft, digest

KINDS = ("trace", "write")

LEVELS = tuple(code_programs.LEVELS)


def draw(random: Random, level: int, kind: str | None = None) -> Draft:
    """Draws a problem of one kind, or of either: two traces for each function to write; at level 0 traces only."""
    kind = kind or (random.choice(("trace", "trace", "write")) if level else "trace")
    families = code_programs if kind == "trace" else code_functions
    spec = families.draw(random, level, random.choice(families.FAMILIES))
    build = _build_trace if kind == "trace" else _build_write
    return Draft(canonical_of(kind, spec), partial(build, spec, level))


def canonical_of(kind: str, spec: list[Any]) -> str:
    """'code:' with the kind and the spec."""
    return f"code:{kind}:{spec!r}".replace(" ", "")


def traces(problem: Problem, random: Random) -> str:
    """One of many right completions: working and the final line, or a function; a blank line ends it."""
    meta = problem.meta
    if meta["kind"] == "write":
        return code_solutions.solution(meta["spec"], meta["names"][0], random)
    wording = random if meta["level"] else _Plain()
    return "\n".join([*code_traces.working(meta["spec"], meta["names"], wording), f"Answer: {problem.answer}"]) + END


def answer_only(problem: Problem) -> Problem:
    """The control: the output without working, or the function as one expression without comments."""
    meta = {**problem.meta, "form": "answer-only"}
    if meta["kind"] == "write":
        prompt, completion = problem.prompt, code_solutions.shortest(meta["spec"], meta["names"][0])
    else:
        prompt, completion = problem.prompt.replace("Working:\n", "Answer:"), f" {problem.answer}{END}"
    return _problem(problem, completion, f"{problem.id}-a", prompt, meta)


def count(level: int, kind: str | None = None) -> int:
    """How many canonical forms the level has, exactly."""
    programs = 0 if kind == "write" else code_programs.count(level)
    return programs + (0 if kind == "trace" or level == 0 else code_functions.count(level))


class _Plain(Random):
    """Always the first wording and the order as it is: what a tiny model reads."""

    def random(self) -> float:
        return 0.99

    def randrange(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def shuffle(self, x: Any) -> None:
        pass

    def choice(self, seq: Any) -> Any:
        return seq[0]


def _problem(problem: Problem, completion: str, name: str = "", prompt: str = "", meta: Any = None) -> Problem:
    """The problem with a completion, and perhaps another name, prompt or meta."""
    return Problem(
        name or problem.id,
        prompt or problem.prompt,
        (),
        completion,
        problem.answer,
        problem.tests,
        problem.verifier,
        problem.canonical,
        meta or problem.meta,
    )


def _build_trace(spec: list[Any], level: int, random: Random) -> Problem:
    text, names = code_traces.source(spec, random)
    asked = ("What does this program print?", "What is printed?", "What is the output?")
    question = random.choice(asked if level else asked[1:2])
    canonical = canonical_of("trace", spec)
    meta = {"domain": "code", "level": level, "kind": "trace", "spec": spec, "names": names}
    meta |= {"source": text, "marker": "Answer:", "end": END}
    prompt = f"Question: {question}\n{text}Working:\n"
    answer = str(code_traces.output(spec))
    problem = Problem(f"code-{digest(canonical)}", prompt, (), None, answer, None, "exact", canonical, meta)
    return _problem(problem, traces(problem, random))


def _build_write(spec: list[Any], level: int, random: Random) -> Problem:
    name = random.choice(code_functions.ARGUMENTS[spec[0]])
    canonical = canonical_of("write", spec)
    meta = {"domain": "code", "level": level, "kind": "write", "spec": spec, "names": [name]}
    meta["end"] = END
    prompt = f"Question: {code_solutions.asked(spec, name, random)}\nCode:\n"
    tests = {"entry": "f", "calls": code_functions.calls(spec)}
    problem = Problem(f"code-{digest(canonical)}", prompt, (), None, None, tests, "python", canonical, meta)
    return _problem(problem, traces(problem, random))
