"""Verifiers by name, and the simplest of them: `exact`, which compares final answers as text.

    exact    the final answer is the text of `Problem.answer`
    math     it means the same number, set, interval or expression (math-verify)
    python   the code passes `Problem.tests` (in a sandbox)
    gym      reasoning-gym's own scorer gives it full points

A completion is judged by its final answer alone; working is never graded. What is cut off or missing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from rlmerge.errors import RlmergeError, did_you_mean
from rlmerge.evaluate.problem import Problem, Verdict, Verifier

VERIFIERS = {
    "exact": "rlmerge.evaluate.verifiers:make_exact",
    "gym": "rlmerge.evaluate.math_verifier:make_gym_verifier",
    "math": "rlmerge.evaluate.math_verifier:make_verifier",
    "python": "rlmerge.evaluate.python_verifier:make_verifier",
}
"""Where each verifier is made; imported when it is asked for."""


class VerifierError(RlmergeError):
    """A verifier that does not exist, or problems that it cannot verify."""


class NoAnswer(Exception):
    """A completion without a final answer; the message says in a few words what is missing."""


def get_verifier(name: str, **options: Any) -> Verifier:
    """The verifier of that name. Raises VerifierError if there is none, or if it takes no such option."""
    if name not in VERIFIERS:
        raise VerifierError(
            f"verifier {name!r}: unknown.{did_you_mean(name, VERIFIERS)} There are: {', '.join(VERIFIERS)}."
        )
    module, _, maker = VERIFIERS[name].partition(":")
    try:
        make: Callable[..., Verifier] = getattr(import_module(module), maker)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise VerifierError(f"verifier {name!r} is not part of this version of rlmerge.") from None
    known = signature(make).parameters
    for option in options:
        if option not in known:
            takes = f"It takes: {', '.join(known)}." if known else "It takes none."
            raise VerifierError(f"verifier {name!r}: no option {option!r}.{did_you_mean(option, known)} {takes}")
    return make(**options)


def verify(completions: Sequence[str], problems: Sequence[Problem], **options: dict[str, Any]) -> list[Verdict]:
    """Verdicts by each problem's own verifier, a batch for each.

    options   by verifier: `python={'wall': 5}`
    Raises VerifierError for a problem that names no verifier.
    """
    _check_lengths(completions, problems)
    verdicts: list[Verdict | None] = [None] * len(problems)
    for name in dict.fromkeys(problem.verifier for problem in problems):
        if not name:
            missing = next(problem.id for problem in problems if not problem.verifier)
            raise VerifierError(f"problem {missing}: nothing says how to verify it; give it a 'verifier'.")
        places = [place for place, problem in enumerate(problems) if problem.verifier == name]
        verifier = get_verifier(name, **options.get(name, {}))
        found = verifier([completions[place] for place in places], [problems[place] for place in places])
        for place, verdict in zip(places, found, strict=True):
            verdicts[place] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def answer_of(completion: str, problem: Problem) -> str:
    """The final answer in a completion. Raises NoAnswer if it is missing, empty or cut off.

    `meta['marker']` names what begins the final line (the first such line counts: generation should have ended there);
    in the answer-only form the first line is the answer. `meta['end']` means that the line must be ended: a sampler
    that runs out of tokens after 'Answer: 4' may have been about to write 42.
    `meta['lines']` means that an answer may have several lines: all from the marker on.
    Without a marker, a line that begins with 'Answer:' is the answer, or else the whole text is.
    """
    marker = problem.meta.get("marker")
    if problem.meta.get("form") == "answer-only":
        line, ended, _ = completion.partition("\n")
    else:
        marked = marker or "Answer:"
        lines = completion.splitlines(keepends=True)
        line = next((line for line in lines if line.startswith(marked)), None)
        if line is None and marker:
            raise NoAnswer(f"no line begins with {marker!r}" if completion.strip() else "empty completion")
        ended = (line or "").endswith("\n")
        if line is not None and problem.meta.get("lines"):
            line = "".join(lines[lines.index(line) :])
        line = completion if line is None else line.removeprefix(marked)
    if not line.strip():
        raise NoAnswer("the answer is empty")
    if problem.meta.get("end") and not ended:
        raise NoAnswer("cut off: the line of the answer does not end")
    return line.strip()


def completed(text: str, finish: str, problem: Problem) -> str:
    """What a sampler wrote, with the end that it cut off put back: `generate.Sample` has it as text and finish."""
    end = problem.meta.get("end", "")
    return text + end if finish == "stop" and end and not text.endswith(end) else text


def make_exact() -> Verifier:
    """A verifier that compares final answers as text, without outer white space."""

    def exact(completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        _check_lengths(completions, problems)
        return [_same(completion, problem) for completion, problem in zip(completions, problems)]

    return exact


def wanted(problem: Problem) -> str:
    """The answer that the problem wants. Raises VerifierError if it has none."""
    if not (problem.answer or "").strip():
        raise VerifierError(f"problem {problem.id}: no 'answer' to compare with.")
    return (problem.answer or "").strip()


def shown(text: str) -> str:
    """A text in quotes, short enough for a reason."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _same(completion: str, problem: Problem) -> Verdict:
    right = wanted(problem)
    try:
        answer = answer_of(completion, problem)
    except NoAnswer as reason:
        return Verdict(False, str(reason))
    if answer == right:
        return Verdict(True, "the same text")
    return Verdict(False, f"{shown(answer)} is not {shown(right)}")


def _check_lengths(completions: Sequence[str], problems: Sequence[Problem]) -> None:
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions for {len(problems)} problems: there must be one for each.")
