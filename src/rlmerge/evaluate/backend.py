"""What makes completions of problems: a model in this process (`generate`), or a server (`server`); one interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rlmerge.evaluate.problem import Problem


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else from the `top_p` mass of the `top_k` best (0: of all)."""

    temperature: float = 0.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One completion to make: of which problem, with which seed, ending at which strings. `key` comes back with it."""

    key: Any
    problem: Problem
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What became of it: text without the stop string, number of new tokens, 'stop', 'length' or a server's word."""

    key: Any
    tokens: int
    text: str
    finish: str


class Backend(Protocol):
    """Makes completions."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the completions beside the sampling, JSON-able, for the results file."""
        ...

    @property
    def identity(self) -> str:
        """Which model it is, as far as can be told: a run is continued with the same one only."""
        ...

    def run(self, asked: Iterable[Asked], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order in which they are finished."""
        ...
