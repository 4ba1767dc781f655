"""The rows of the benchmark by section: which method, on a model of which size, with which contenders."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import models
from contenders import METHODS, SPECTRAL, THREE, Method

FLOORS = ("plain", "floor", "hashed", "floor_fsync")
AGAINST = ("first", "warm", "rlmerge", "mergekit", *FLOORS)
SYNCED = ("linear", "ties", "sar")
"""Rows that also measure `merge --fsync`."""
COUNTS = (1, 2, 3, 4, 6, 8)
THREADS = (1, 2, 4)
LARGE = ("linear", "ties", "sar_delta2")
"""Rows of the large model: each kind of work once. Its Fishers would take 18 GB."""


@dataclass(frozen=True)
class Row:
    """One cell to measure.

    size          of the model, in models.SIZES
    contenders    in the order in which they take turns
    threads       of rlmerge; None: as it likes
    """

    section: str
    name: str
    size: str
    method: Method
    contenders: tuple[str, ...]
    runs: int
    threads: int | None = None
    label: tuple[tuple[str, str | int], ...] = ()
    """What tables sort and fit by."""


def against(section: str, size: str, names: tuple[str, ...], runs: int, skip_mergekit: bool) -> list[Row]:
    """Rows against mergekit, where it has the method, and against the floor."""
    rows = []
    for name in names:
        method = METHODS[name]
        wanted = [one for one in AGAINST if one != "mergekit" or (method.mergekit and not skip_mergekit)]
        if name in SYNCED:
            wanted.insert(-1, "rlmerge_fsync")
        rows.append(Row(section, name, size, method, tuple(wanted), runs))
    return rows


def start_up(size: str, runs: int) -> list[Row]:
    """A small model: what a merge costs however little there is to do."""
    return [Row("small", "ties", size, METHODS["ties"], ("first", "warm", "rlmerge", *FLOORS), runs + 2)]


def counts(size: str, runs: int) -> list[Row]:
    """The same merge of 1 to 8 experts."""
    rows = []
    for name in ("task_arithmetic", "ties", "sar_delta2"):
        for k in COUNTS:
            method = METHODS[name].on(f"{name}-{k}", tuple(f"expert{i}" for i in range(k)))
            label = (("method", name), ("experts", k))
            rows.append(Row("experts", method.name, size, method, ("warm", "rlmerge", "floor"), runs, label=label))
    return rows


def memory(sizes: tuple[str, ...]) -> list[Row]:
    """The same merge of models of several sizes, with 1 to 4 threads."""
    rows = []
    for name in ("linear", "ties", "sar_delta2", "sar"):
        for size in sizes:
            for threads in THREADS:
                if name == "sar" and size == "1.5B":
                    continue
                label = (("method", name), ("size", size), ("threads", threads))
                row_name = f"{name}-{size}-{threads}"
                rows.append(
                    Row("memory", row_name, size, METHODS[name], ("warm", "rlmerge"), 2, threads=threads, label=label)
                )
    return rows


def spectral(sizes: tuple[str, ...]) -> list[Row]:
    """Methods that decompose, beside a method that does not: the difference is the arrays. Rows are named after the
    method, and but for the first size after the size, too.
    """
    rows = []
    for size in sizes:
        largest = max(models.SIZES[size].tensors().values(), key=prod)
        shape = " × ".join(map(str, largest))
        for one in (METHODS["task_arithmetic"], *SPECTRAL.values()):
            label = (("matrix_bytes", 8 * prod(largest)), ("method", one.name), ("shape", shape))
            method = one if size == sizes[0] else one.on(f"{one.name}-{size}", one.inputs)
            contenders = ("warm", "rlmerge", "floor")
            rows.append(Row("spectral", method.name, size, method, contenders, 1, threads=1, label=label))
    return rows


def nothing(size: str, runs: int) -> list[Row]:
    """Inputs of which nothing comes: experts equal to the base byte for byte, and a model that is only copied."""
    equal = tuple(f"equal{i}" for i in range(len(THREE)))
    methods = {
        "ties of equal models": METHODS["ties"].on("ties-equal", equal),
        "sar of equal models": METHODS["sar_delta2"].on("sar-equal", equal),
        "copy of one model": METHODS["passthrough"].on("copy", THREE[:1]),
    }
    return [
        Row("nothing", method.name, size, method, ("warm", "rlmerge", "floor", "hashed"), runs, label=(("what", what),))
        for what, method in methods.items()
    ]


def needs(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Per size, how many experts, Fishers and copies of the base there must be."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        have = found.setdefault(row.size, {"experts": 0, "fishers": 0, "equal": 0})
        for name in row.method.reads():
            for kind, key in (("expert", "experts"), ("fisher", "fishers"), ("equal", "equal")):
                if name.startswith(kind):
                    have[key] = max(have[key], int(name.removeprefix(kind)) + 1)
    return found
