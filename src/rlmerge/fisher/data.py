"""The problems that a Fisher is estimated on, and which sequences of them; without torch, as `check` uses it, too."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

from rlmerge.errors import FisherError, did_you_mean
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import Task, load_task

SOURCES = ("own", "gold", "sampled", "policy")


@dataclass(frozen=True)
class SequenceChoice:
    """Which sequences to take; for `gold` only `sequences` matters.

    sequences     how many, over all groups under `policy`; None: 256, or all that `gold` has if they are fewer
    attempts      how often a prompt is tried (`own`), at most
    group         samples of one prompt under `policy`
    temperature, max_new_tokens, seed    of sampling
    """

    source: str = "own"
    sequences: int | None = None
    attempts: int = 8
    group: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def wanted(self) -> int:
        """How many sequences."""
        return 256 if self.sequences is None else self.sequences


def load_data(data: str, wanted: int, group: int, seed: int) -> Task:
    """A file whole; of a generated task as many problems as are wanted, from its training split.

    wanted    sequences; group: how many of them belong to one problem. Raises TaskError for what cannot be read.
    """
    whole = data.endswith(".jsonl") or data.partition(":")[0] in ("file", "humaneval")
    return load_task(data, "train", None if whole else max(1, wanted // group), seed)


def check_choice(choice: SequenceChoice, problems: Several[Problem], data: str) -> None:
    """Raises FisherError for what the data cannot give, before any model is loaded."""
    if choice.source not in SOURCES:
        raise FisherError(
            f"--source {choice.source}: unknown.{did_you_mean(choice.source, SOURCES)} There are: {', '.join(SOURCES)}."
        )
    if choice.source == "gold":
        missing = [problem.id for problem in problems if not problem.completion]
        if missing:
            raise FisherError(
                f"{data}: --source gold differentiates the data's completions, and {len(missing)} of {len(problems)} "
                f"problems have none ({missing[0]!r}, for instance). Add a 'completion', or use --source sampled."
            )
        if choice.sequences is not None and choice.sequences > len(problems):
            raise FisherError(f"{data}: holds {len(problems)} completions, fewer than --sequences {choice.sequences}.")
        return
    if choice.source in ("own", "policy"):
        missing = [problem.id for problem in problems if not problem.verifier]
        if missing:
            raise FisherError(
                f"{data}: --source {choice.source} needs to know which completions are right, and {len(missing)} of "
                f"{len(problems)} problems have no 'verifier' ({missing[0]!r}, for instance). Add one with its "
                "'answer', or use --source sampled or gold."
            )
    if choice.source == "own" and choice.wanted > len(problems) * choice.attempts:
        raise FisherError(
            f"{data}: {len(problems)} problems tried {choice.attempts} times cannot give {choice.wanted} right "
            "completions. Lower --sequences, or raise --attempts."
        )
    if choice.source == "policy":
        groups = choice.wanted // choice.group
        if choice.group < 2 or groups * choice.group != choice.wanted:
            raise FisherError(
                f"--source policy takes groups of {choice.group}: --sequences {choice.wanted} is no multiple of that, "
                "or a group of one has no advantage."
            )
        if groups > len(problems):
            raise FisherError(f"{data}: {groups} groups need as many problems; it holds {len(problems)}.")
    if not 0.0 < choice.temperature < float("inf"):
        raise FisherError(f"--temperature {choice.temperature}: sampling needs a temperature above 0.")
