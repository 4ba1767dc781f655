"""The verifiers `math` (math-verify: the same number, set, interval or expression) and `gym` (reasoning-gym's scorers).

Both run on other people's parsers, so both run in killable processes with a deadline of our own: math-verify's alarms
work in main threads only and are switched off here. Text is made regular first (`regular`), for what math-verify does
not read: 1.2e3, 1 1/2, sqrt(2), −3, 0.\\overline{3}, plain intervals and sets.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rlmerge.errors import MissingExtraError
from rlmerge.evaluate.killable import WorkerDied, Workers
from rlmerge.evaluate.problem import Problem, Verdict, Verifier
from rlmerge.evaluate.verifiers import NoAnswer, VerifierError, answer_of, shown, wanted

DEADLINE = 5.0
"""Seconds for one answer."""

_FIRST_SCORE = ["0", {"name": "chain_sum", "options": {}, "seed": 0, "place": 0}]
"""What a new process scores first, to have its imports done."""

MAX_CHARACTERS = 20_000
"""Longer final answers are wrong, and longer completions are read from their end."""


def make_verifier(deadline: float = DEADLINE, processes: int = 2) -> Verifier:
    """The verifier `math`. Raises MissingExtraError without math-verify."""
    if find_spec("math_verify") is None:
        raise MissingExtraError("Verifier 'math'", "math-verify", "model")
    workers = Workers("rlmerge.evaluate.math_verifier:compare", deadline, processes, warm=["$1/2$", "0.5"])

    def check(completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        rights = [wanted(problem) for problem in problems]
        answers = [_unambiguous(completion, problem) for completion, problem in zip(completions, problems, strict=True)]
        return _verdicts(workers, answers, rights, problems)

    return check


def make_gym_verifier(deadline: float = DEADLINE, processes: int = 2) -> Verifier:
    """The verifier `gym`: right is a full score; a part of it is wrong, with the score as reason."""
    if find_spec("reasoning_gym") is None:
        raise MissingExtraError("Verifier 'gym'", "reasoning-gym", "lab")
    workers = Workers("rlmerge.evaluate.math_verifier:gym_score", deadline, processes, warm=_FIRST_SCORE)

    def check(completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        for problem in problems:
            if "gym" not in problem.meta:
                raise VerifierError(f"problem {problem.id}: not from a task gym:…, so 'gym' cannot verify it.")
        answers = [_final(completion, problem) for completion, problem in zip(completions, problems, strict=True)]
        return _verdicts(workers, answers, [problem.meta["gym"] for problem in problems], problems)

    return check


def _verdicts(
    workers: Workers, answers: Sequence[str | Verdict], rights: Sequence[Any], problems: Sequence[Problem]
) -> list[Verdict]:
    """Verdicts of the workers on the answers that there are; a worker gives [right, reason]."""
    places = [place for place, answer in enumerate(answers) if isinstance(answer, str)]
    results = workers([[answers[place], rights[place]] for place in places])
    verdicts = [answer if isinstance(answer, Verdict) else Verdict(False, "") for answer in answers]
    for place, result in zip(places, results):
        if isinstance(result, (TimeoutError, WorkerDied)):
            verdicts[place] = Verdict(False, str(result))
        elif result[0] is None:
            raise VerifierError(f"problem {problems[place].id}: {result[1]}")
        else:
            verdicts[place] = Verdict(result[0], result[1])
    return verdicts


def _final(completion: str, problem: Problem) -> str | Verdict:
    """The final answer, or the whole end of a completion where math-verify must look for it; or why there is none."""
    completion = completion.encode("utf-8", "replace").decode()
    if "marker" not in problem.meta and "\\boxed" in completion:
        return completion[-MAX_CHARACTERS:]
    try:
        answer = answer_of(completion, problem)
    except NoAnswer as reason:
        return Verdict(False, str(reason))
    if "marker" in problem.meta and len(answer) > MAX_CHARACTERS:
        return Verdict(False, "the answer is too long")
    return answer[-MAX_CHARACTERS:]


def _unambiguous(completion: str, problem: Problem) -> str | Verdict:
    """The final answer for `math`; a marked line that offers several numbers in prose is none."""
    answer = _final(completion, problem)
    if isinstance(answer, str) and answer != completion.strip() and _several(answer):
        return Verdict(False, "several numbers in the answer")
    return answer


def _several(answer: str) -> bool:
    """Whether a marked answer is prose with different numbers: math-verify would take the last."""
    answer = regular(answer)
    if "$" in answer or "\\boxed" in answer or _formula(_listed(answer)):
        return False
    return len({found.rstrip(".,") for found in re.findall(r"\d[\d.,]*", answer)}) > 1


def _listed(text: str) -> str:
    """'1 or 2 and 3' as '1, 2, 3'."""
    return re.sub(r"\s*,?\s+(?:or|and)\s+", ", ", text)


_SPACES = re.compile("[\u00a0\u2009\u202f]")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])")
_MIXED = re.compile(r"(?<![\w.,/])(\d+)[ ]+(\d+)/(\d+)(?![\w/])")
_ROOT = re.compile(r"(?<!\\)\bsqrt\s*\(([^()]*)\)|√\s*(?:\(([^()]*)\)|(\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_GROUPED = re.compile(r"[+-]?\d{1,3}( \d{3})+(\.\d+)?")
_NAMED = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|inf|infty)(?![a-zA-Z])")
_PLAIN = re.compile(r"[\s\w\d+\-*/^=.,:;!%°(){}\[\]<>|\\'_&~]*")


def regular(text: str) -> str:
    """The text in notation that math-verify reads, meaning unchanged."""
    text = _SPACES.sub(" ", text).replace("−", "-").replace("–", "-").replace("×", r"\times ").replace("·", r"\cdot ")
    text = (
        text.replace("π", r"\pi ")
        .replace("∞", r"\infty ")
        .replace("∪", r"\cup ")
        .replace("½", " 1/2")
        .replace("**", "^")
    )
    text = text.replace(r"\$", "")
    text = _SCIENTIFIC.sub(lambda found: rf"{found[1]} \times 10^{{{int(found[2])}}}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", text)
    text = _REPEATING.sub(_repeating, text)
    return _NAMED.sub(lambda found: r"\pi" if found[1] == "pi" else r"\infty", text)


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, repeated = found.groups()
    below = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    above = int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0")
    return rf"\frac{{{above}}}{{{below}}}"


def _parsed(text: str) -> list[Any]:
    """What math-verify finds in a text: as mathematics if it can be, else as prose with an answer in it."""
    from math_verify import parse

    text = regular(text).strip().rstrip(".")
    if _GROUPED.fullmatch(text):
        text = text.replace(" ", "")
    if "$" not in text and "\\boxed" not in text and "\n" not in text and _formula(_listed(text)):
        text = _listed(text)
        inner = re.sub(r"(?<!\\)([{}])", r"\\\1", text) if re.fullmatch(r"\{[^{}\\]*\}", text) else text
        found = parse(f"$\\boxed{{{inner}}}$" if "," in inner else f"${inner}$", parsing_timeout=0)
        if found:
            return found
    return parse(text, parsing_timeout=0)


def _formula(text: str) -> bool:
    """Whether a text is mathematics rather than prose: no word of two letters that is no command or function."""
    words = re.findall(r"\\?[A-Za-z]{2,}", re.sub(r"\\text\{[^{}]*\}", "", text))
    functions = {"sin", "cos", "tan", "log", "ln", "exp", "frac", "sqrt"}
    return bool(_PLAIN.fullmatch(text)) and all(word[0] == "\\" or word in functions for word in words)


def compare(pair: list[str]) -> list[Any]:
    """[whether answer and right answer mean the same, why]; [None, why] if the right answer cannot be read.

    Runs in the worker.
    """
    from math_verify import verify

    logging.disable(logging.CRITICAL)
    answer, right = pair
    try:
        gold = _parsed(right)
    except Exception as error:  # a parser may raise anything
        return [None, f"the answer {shown(right)} cannot be read: {type(error).__name__}"]
    if not gold:
        return [None, f"the answer {shown(right)} is no mathematics; use the verifier 'exact'."]
    try:
        found = _parsed(answer)
        if not found:
            return [False, "no mathematics found"]
        same = bool(verify(gold, found, timeout_seconds=None))
    except MemoryError:
        return [False, "out of memory"]
    except Exception as error:  # a parser may raise anything
        return [False, f"cannot be read: {type(error).__name__}"]
    return [same, "equal" if same else f"{shown(str(found[-1]))} is not {shown(right)}"]


def gym_score(pair: list[Any]) -> list[Any]:
    """[whether reasoning-gym gives full points, why]. Runs in the worker."""
    from rlmerge.evaluate.tasks import reasoning

    try:
        points = reasoning.score(*pair)
    except Exception as error:  # a scorer may raise anything
        return [False, f"the scorer failed: {type(error).__name__}"]
    return [points >= 1.0, "full score" if points >= 1.0 else f"score {points:.3g} of 1"]
