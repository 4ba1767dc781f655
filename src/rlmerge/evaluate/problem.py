"""What everything in `evaluate` speaks of: a problem, a verdict on a completion, and what verifies.

A verifier is a function of completions and problems, a batch at a time, so that one that needs processes can keep them
busy. It never raises for what a model wrote: whatever a completion is, there is a verdict with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """A question whose answers can be checked.

    id           unique in its task, stable between machines and versions
    prompt       raw text to continue; empty where `messages` holds a chat
    messages     chat messages ({'role', 'content'}), rendered by the model's chat template; empty for raw prompts
    completion   a gold solution as a model could write it (with its working), or None
    answer       the final answer as a verifier wants it, or None
    tests        what the `python` verifier runs: see `verifiers`
    verifier     name of the verifier; '' where nothing is verified
    canonical    its canonical form: two problems with one form are one problem (splits go by it)
    meta         level, kind, source, and what else a verifier needs; JSON-able
    """

    id: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    completion: str | None = None
    answer: str | None = None
    tests: Any = None
    verifier: str = ""
    canonical: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a completion is right, and why: in a few words, such as "timed out after 5 s"."""

    correct: bool
    reason: str


class Verifier(Protocol):
    """Verdicts on completions, one each, in order."""

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        """completions[i] answers problems[i]."""
        ...
