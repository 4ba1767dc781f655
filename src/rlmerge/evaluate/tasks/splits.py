"""Which problems are for training, validation and test, and streams of different problems on one side.

A split is decided by a hash of the canonical form alone: never by order, seed, wording or level. What one run trains
on, another cannot be tested on, however either was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from rlmerge.errors import RlmergeError, did_you_mean
from rlmerge.evaluate.problem import Problem

SHARES = {"train": 80, "validation": 5, "test": 15}
"""Percent of the canonical forms on each side."""

END = "\n\n"
"""A blank line ends every completion of the project's own domains: give it to the sampler as a stop string."""

_PATIENCE = 5000
"""Drafts in a row that bring nothing new before a stream says that its space is used up."""


class TaskError(RlmergeError):
    """A task that is unknown, asked for something it cannot give, or a file of problems that cannot be read."""


def digest(text: str, size: int = 8) -> str:
    """Hex digest of a text, `size` bytes: the same on every machine, unlike `hash`."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def split_of(canonical: str) -> str:
    """The split that a canonical form belongs to."""
    place = int(digest("rlmerge/split/" + canonical), 16) % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("shares add up to 100")


def checked_split(split: str) -> str:
    """The split itself; raises TaskError if there is none of that name."""
    if split not in SHARES:
        raise TaskError(f"split {split!r}: unknown.{did_you_mean(split, SHARES)} There are: {', '.join(SHARES)}.")
    return split


@dataclass(frozen=True)
class Draft:
    """A problem before anything is written: cheap, so that most can be thrown away.

    canonical   decides the split and what counts as the same problem
    build       writes the problem, given the random state to choose wording with
    """

    canonical: str
    build: Callable[[Random], Problem]


def stream(draw: Callable[[Random], Draft], name: str, split: str, seed: int | str) -> Iterator[Problem]:
    """Different problems of one split, the same on every machine for the same name, split and seed.

    name   what is drawn, such as 'math/2': other names give independent streams
    Ends with TaskError when the space seems used up: 5,000 drafts in a row without a new problem.
    """
    checked_split(split)
    random = Random(f"rlmerge/{name}/{split}/{seed}")
    seen: set[str] = set()
    idle = 0
    while idle < _PATIENCE:
        draft = draw(random)
        idle += 1
        if draft.canonical not in seen and split_of(draft.canonical) == split:
            idle = 0
            seen.add(draft.canonical)
            yield draft.build(random)
    raise TaskError(
        f"{name}: only {len(seen)} different problems found in split {split!r}; ask for fewer, or for a higher level."
    )
