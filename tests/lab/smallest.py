"""A policy of a few thousand parameters."""

from __future__ import annotations

from rlmerge.lab.policy import Policy
from rlmerge.lab.text import documents, solution
from rlmerge.lab.tiny import Shape, make_policy

TASKS = ("math:0", "code:0")
SMALLEST = Shape(hidden=32, inner=64, layers=2, heads=2, vocabulary=300, positions=192)


def smallest_policy(seed: int = 0) -> Policy:
    """Random weights."""
    texts = [prompt + completion for prompt, completion in documents(TASKS, "tests", 0, 200, solution)]
    return make_policy(texts, SMALLEST, seed)
