"""Spectra of what training did: every matrix measured whole, side by side, and means by tensor, kind, layer and total.

Means are over matrices, each counted once whatever its size, as published; a figure that is undefined for some of
them (None) is the mean over the others.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rlmerge.errors import RecipeError
from rlmerge.execute.inputs import Inputs
from rlmerge.kernels import Backend, load_kernels
from rlmerge.plan import Plan
from rlmerge.settings import default_threads

from .matrices import Matrix, MatrixReader, matrices_of
from .matrix_figures import SpectraSettings, Tree, measure_matrix
from .scopes import place_of
from .spectra_types import Spectra

LEAST_MEMORY = 2 * 2**30
"""Bytes for matrices in work that nobody has to ask for."""


@dataclass(frozen=True, slots=True)
class SpectraStep:
    """How far a measurement is: matrices done and in all, the share of the expected work, and a message."""

    done: int
    total: int
    share: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class SpectraCost:
    """What a measurement takes: matrices, how many of them are sketched, decompositions, seconds on so many threads."""

    matrices: int
    sketched: int
    decompositions: int
    seconds: float
    bytes: int


def measure_spectra(
    models: Plan,
    settings: SpectraSettings = SpectraSettings(),  # noqa: B008 (frozen)
    threads: int | None = None,
    progress: Callable[[SpectraStep], None] = lambda step: None,
    kernels: Backend = "auto",
) -> Spectra:
    """The `spectra` section of a geometry document: `settings`, `total`, `layers`, `kinds`, `tensors`, `left_out`,
    `warnings`.

    models   a plan over a base and its experts, of any method; nothing is merged
    threads  matrices at a time (default: the processors at hand), as far as memory goes; no number depends on it
    progress is told first how long it will take

    Every scope has `matrices` (how many), `base`, `experts` {key: figures}, `pairs` [{a, b, …}] and `null` {`experts`:
    …}, the same update shuffled; see docs/spectra.md for every figure.
    Raises RecipeError without a base, or for less memory than one matrix takes; NonFiniteError for weights that are no
    numbers.
    """
    from threadpoolctl import threadpool_limits

    matrices, left = matrices_of(models)
    threads = threads or default_threads()
    budget = _budget(models, matrices, settings)
    with threadpool_limits(1):
        cost = spectra_cost(models, settings, threads)
        progress(SpectraStep(0, len(matrices), 0.0, _announce(cost, threads)))
        found = _measure_all(models, matrices, settings, threads, budget, progress, kernels)
    said = {
        "settings": settings.to_dict(),
        **_scopes(models, matrices, found, settings),
        "left_out": left,
        "warnings": _warnings(matrices, found),
    }
    return cast(Spectra, said)  # a test holds it against the schema


def check_spectra(models: Plan, settings: SpectraSettings) -> None:
    """Raises RecipeError where not even one matrix fits in the memory that the settings allow."""
    _budget(models, matrices_of(models)[0], settings)


# -- cost --------------------------------------------------------------------------------------------------------------


def spectra_cost(models: Plan, settings: SpectraSettings, threads: int = 1) -> SpectraCost:
    """Estimates a measurement, within a factor of two, from one small decomposition that it times here."""
    matrices, _ = matrices_of(models)
    experts = len(models.experts)
    speed = _time_of_flop()
    each = _decompositions(experts, settings)
    work = sum(_work(matrix, experts, settings) for matrix in matrices)
    most = max((_work(matrix, experts, settings) for matrix in matrices), default=0.0)
    sketched = sum(settings.sketched(matrix) for matrix in matrices)
    size = max((_bytes(matrix, experts) for matrix in matrices), default=0)
    seconds = speed * max(most, work / max(1, threads))
    return SpectraCost(len(matrices), sketched, each * len(matrices), seconds, size)


def _decompositions(experts: int, settings: SpectraSettings) -> int:
    return 1 + experts * (3 if settings.null == "all" else 2)


def _work(matrix: Matrix, experts: int, settings: SpectraSettings) -> float:
    """Multiplications of BLAS that take as long, roughly (constants measured, see docs/spectra.md)."""
    short, long = matrix.short, max(matrix.rows, matrix.columns)
    k = settings.angles_of(matrix)
    if settings.sketched(matrix):
        width = min(short, 4 * (k // 2 + 8))
        one = 6.0 * matrix.size * width + 20.0 * long * width**2
    else:
        one = matrix.size * (short + 4.0 * k) + 9.0 * short**3 + 8.0 * long * k**2
    pieces = 3000.0 * matrix.size * (2 + experts * (0.4 if settings.null == "none" else 1.5))
    return one * _decompositions(experts, settings) + pieces


def _time_of_flop() -> float:
    """Seconds of a multiplication in the decomposition of a matrix of a few hundred rows, here and now."""
    side = 512
    start = time.perf_counter()
    np.linalg.eigh(np.cos(np.arange(side * side, dtype=np.float64)).reshape(side, side))
    return (time.perf_counter() - start) / (9.0 * side**3)


def _bytes(matrix: Matrix, experts: int) -> int:
    """Memory of a matrix in work, at most: six times itself in fp64, and the subspaces of the experts."""
    return int(8 * matrix.size * (6 + experts / 4))


def _budget(models: Plan, matrices: Sequence[Matrix], settings: SpectraSettings) -> int:
    largest = max(matrices, key=lambda matrix: matrix.size, default=None)
    needed = _bytes(largest, len(models.experts)) if largest else 0
    if settings.memory is None:
        return max(needed, LEAST_MEMORY)
    if largest and needed > settings.memory:
        raise RecipeError(
            f"{settings.memory / 1e6:.0f} MB of memory for matrices are less than "
            f"{models.tensors[largest.tensor].name!r} needs: its {largest.rows}x{largest.columns} values take "
            f"{needed / 1e6:.0f} MB while they are decomposed. Give as much, or leave spectra out."
        )
    return settings.memory


def _announce(cost: SpectraCost, threads: int) -> str:
    minutes = cost.seconds / 60
    length = (
        f"{cost.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )
    sketched = f", {cost.sketched} of them sketched," if cost.sketched else ""
    return (
        f"spectra: {cost.matrices:,} matrices{sketched} {cost.decompositions:,} decompositions on {threads} "
        f"thread{'s' if threads > 1 else ''}: about {length}"
    )


# -- running -----------------------------------------------------------------------------------------------------------


class _Gate:
    """Lets matrices in while their memory fits; one alone always does."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._taken = 0
        self._free = threading.Condition()

    def enter(self, size: int) -> None:
        with self._free:
            self._free.wait_for(lambda: self._taken == 0 or self._taken + size <= self._budget)
            self._taken += size

    def leave(self, size: int) -> None:
        with self._free:
            self._taken -= size
            self._free.notify_all()


def _measure_all(
    models: Plan, matrices: Sequence[Matrix], settings: SpectraSettings, threads: int, budget: int,
    progress: Callable[[SpectraStep], None], kernels: Backend,
) -> list[Tree]:  # fmt: skip
    """The figures of all matrices, in their order; the dearest are begun first."""
    inputs = Inputs(models, load_kernels(kernels, models.values_read))
    gate, local = _Gate(budget), threading.local()

    def measure(matrix: Matrix) -> Tree:
        size = _bytes(matrix, len(models.experts))
        gate.enter(size)
        try:
            if not hasattr(local, "reader"):
                local.reader = MatrixReader(inputs)
            tensor = models.tensors[matrix.tensor]
            name = f"{tensor.name}#{matrix.number}" if len(tensor.shape) == 3 else tensor.name
            return measure_matrix(local.reader, matrix, name, models.experts, settings)
        finally:
            gate.leave(size)

    work = [_work(matrix, len(models.experts), settings) for matrix in matrices]
    order = sorted(range(len(matrices)), key=lambda place: (-work[place], place))
    found: list[Tree] = [{}] * len(matrices)
    pool = ThreadPoolExecutor(threads)
    try:
        jobs = {pool.submit(measure, matrices[place]): place for place in order}
        done, spent, total = 0, 0.0, sum(work)
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            done, spent = done + 1, spent + work[jobs[job]]
            progress(SpectraStep(done, len(matrices), spent / total))
    finally:
        pool.shutdown(cancel_futures=True)
        inputs.close()
    return found


# -- scopes ------------------------------------------------------------------------------------------------------------


def _scopes(
    models: Plan, matrices: Sequence[Matrix], found: Sequence[Tree], settings: SpectraSettings
) -> dict[str, Any]:
    """`total`, `layers`, `kinds`, `tensors`."""
    tensors = [models.tensors[matrix.tensor] for matrix in matrices]
    names = [tensor.name for tensor in tensors]
    places_of = [place_of(name) for name in names]
    layers, kinds = [layer for layer, _ in places_of], [kind for _, kind in places_of]

    def scope(chosen: Iterable[int]) -> dict[str, Any]:
        return _scope([found[place] for place in chosen], models.experts)

    def where(values: Sequence[Any], value: Any) -> list[int]:
        return [place for place, other in enumerate(values) if other == value]

    own = []
    for name in dict.fromkeys(names):
        places = where(names, name)
        first = matrices[places[0]]
        own.append(
            {
                "name": name,
                "layer": layers[places[0]],
                "kind": kinds[places[0]],
                "shape": list(tensors[places[0]].shape),
                "by": "sketch" if settings.sketched(first) else "exact",
                "angles_k": settings.angles_of(first),
                "principal_rank": settings.rank_of(first),
                **scope(places),
            }
        )
    ordered = sorted(dict.fromkeys(layers), key=lambda layer: -1 if layer is None else layer)
    return {
        "total": scope(range(len(matrices))),
        "layers": [{"layer": layer, **scope(where(layers, layer))} for layer in ordered],
        "kinds": [{"kind": kind, **scope(where(kinds, kind))} for kind in sorted(set(kinds))],
        "tensors": own,
    }


def _scope(trees: Sequence[Tree], experts: Sequence[str]) -> dict[str, Any]:
    """The means of some matrices in the form of a document."""
    mean = mean_of(trees)
    changed = {key: sum(tree["experts"][key]["delta"]["norm"] > 0.0 for tree in trees) for key in experts}
    pairs = [
        {"a": a, "b": b, "similarity": mean["pairs"][f"{a}|{b}"]}
        for place, a in enumerate(experts)
        for b in experts[place + 1 :]
        if trees
    ]
    return {
        "matrices": len(trees),
        **({"base": mean["base"]} if trees else {}),
        "experts": {key: {"changed": changed[key], **mean["experts"][key]} for key in experts if trees},
        "pairs": pairs,
        "null": {"experts": mean.get("null", {})},
    }


def mean_of(trees: Sequence[Tree]) -> Tree:
    """The mean of every number over the trees in which it is one; None where it is in none."""
    found: Tree = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = [tree[key] for tree in trees if key in tree]
        if isinstance(values[0], dict):
            found[key] = mean_of(values)
        else:
            known = [value for value in values if value is not None]
            found[key] = math.fsum(known) / len(known) if known else None
    return found


def _warnings(matrices: Sequence[Matrix], found: Sequence[Tree]) -> list[str]:
    """What makes figures meaningless."""
    on = [tree["base"]["distinct_in_32"] for tree in found if tree["base"]["lattice"]]
    if not on:
        return []
    distinct = sorted(value for value in on if value is not None)
    return [
        f"The base was dequantised, as it seems: in {len(on)} of {len(matrices)} matrices its weights lie on a lattice "
        f"(in the median {distinct[len(distinct) // 2]:.0f} distinct values in a block of 32, where bf16 weights have "
        "31 or 32). Which weights are small or principal is then the quantiser's doing: overlaps with the masks mean "
        "nothing, and singular values and subspaces are those of the lattice. Compare with the original base."
    ]
