"""The problems that a Fisher is estimated on. Needs no torch, so that `check` can look at them."""

from __future__ import annotations

from rlmerge.evaluate.tasks import Task, load_task


def load_data(data: str, wanted: int, group: int, seed: int) -> Task:
    """A file whole; of a generated task as many problems as are wanted, from its training split.

    wanted    sequences; group: how many of them belong to one problem. Raises TaskError for what cannot be read.
    """
    whole = data.endswith(".jsonl") or data.partition(":")[0] in ("file", "humaneval")
    return load_task(data, "train", None if whole else max(1, wanted // group), seed)
