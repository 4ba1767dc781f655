"""The coordinate-wise measures: base and experts read once, piece by piece, in threads, and added up in order.

Memory does not grow with the model. What a scope says follows from sums alone, so layers, kinds and the whole model
are sums of tensors.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rlmerge.execute.inputs import Inputs
from rlmerge.execute.memory import Space
from rlmerge.kernels import Backend, load_kernels
from rlmerge.plan import Plan, TensorPlan

from .document import Coordinates, Scope, Storage
from .null import RUN, null_patches, part_of
from .scopes import place_of
from .summary import describe, describe_stored
from .tally import AVERAGE, SUM, Tally, add, count_patches, count_sizes, finish, stored_dtype


@dataclass(frozen=True, slots=True)
class Reading:
    """How far a measurement is: how much of a unit is done, and of how much (0: nobody knows); or a message."""

    done: int
    total: int
    message: str = ""
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class CoordinateSettings:
    """What is measured.

    null      whether the null model stands beside it
    storage   whether the survival of average and sum is predicted
    seed      of the null model's permutations
    run       coordinates that a thread handles at once, and within a part of which it permutes
    order     keys of the experts as checkpoints of one run, or none
    """

    null: bool = True
    storage: bool = True
    seed: int = 0
    run: int = RUN
    order: tuple[str, ...] = ()


@dataclass
class Measured:
    """The tallies of every tensor, in the plan's order, and of the null model where it was asked for."""

    tensors: list[int] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    nulls: list[Tally] = field(default_factory=list)


def measure_coordinates(
    plan: Plan,
    settings: CoordinateSettings = CoordinateSettings(),
    threads: int = 1,
    kernels: Backend = "auto",
    progress: Callable[[Reading], None] = lambda step: None,
) -> tuple[Coordinates, Storage | None]:
    """The sections `coordinates` and `storage` (average and sum only) of the document, from one reading.

    plan     over a base and its experts, of any method of deltas; nothing is merged
    threads  no number depends on it, nor on the kernels
    Raises NonFiniteError for weights that are no numbers, CheckpointError for files that cannot be read.
    """
    loaded = load_kernels(kernels, 3 * plan.values_read)
    inputs = Inputs(plan, loaded)
    try:
        stamps = inputs.stamps()
        measured = _Run(plan, settings, inputs, progress).measure(threads)
        inputs.check_unchanged(stamps)
    finally:
        inputs.close()
    return _scopes(plan, settings, measured), _storage(plan, measured) if settings.storage else None


def measured_tensors(plan: Plan) -> list[int]:
    """The tensors that are compared: those that a merge would make, a tied one once."""
    return [
        t
        for t, tensor in enumerate(plan.tensors)
        if tensor.carry is None and tensor.base is not None and not tensor.repeats and tensor.size
    ]


class _Run:
    """One reading of a plan's models."""

    def __init__(
        self, plan: Plan, settings: CoordinateSettings, inputs: Inputs, progress: Callable[[Reading], None]
    ) -> None:
        self.plan, self.settings, self.inputs, self.progress = plan, settings, inputs, progress
        self._local = threading.local()

    def measure(self, threads: int) -> Measured:
        """All pieces of all tensors, some of them made ahead, added in their order."""
        found = Measured(measured_tensors(self.plan))
        total = sum(_bytes(self.plan.tensors[t]) for t in found.tensors)
        with ThreadPoolExecutor(threads, "rlmerge") as pool:
            for (tally, null), first in self._pieces(pool, threads, found.tensors):
                if first:
                    found.tallies.append({})
                    found.nulls.append({})
                add(found.tallies[-1], tally)
                add(found.nulls[-1], null)
                self.progress(Reading(self.inputs.bytes_read, total))
        for tally, null in zip(found.tallies, found.nulls):
            size = int(tally["size"][0])
            finish(tally, size)
            if null:
                finish(null, size)
        return found

    def _pieces(
        self, pool: ThreadPoolExecutor, threads: int, tensors: Sequence[int]
    ) -> Iterator[tuple[tuple[Tally, Tally], bool]]:
        waiting: deque[tuple[Future[tuple[Tally, Tally]], bool]] = deque()
        try:
            for t in tensors:
                size = self.plan.tensors[t].size
                for start in range(0, size, self.settings.run):
                    stop = min(start + self.settings.run, size)
                    waiting.append((pool.submit(self._piece, t, start, stop), start == 0))
                    if len(waiting) > 2 * threads + 2:
                        job, first = waiting.popleft()
                        yield job.result(), first
            while waiting:
                job, first = waiting.popleft()
                yield job.result(), first
        finally:
            for job, _ in waiting:
                job.cancel()

    def _piece(self, t: int, start: int, stop: int) -> tuple[Tally, Tally]:
        """The tallies of [start, stop) of a tensor, of the models and of the null model."""
        if not hasattr(self._local, "space"):
            self._local.space = Space()
        space, tensor = self._local.space, self.plan.tensors[t]
        block = self.inputs.block(t, start, stop, space)
        experts, keys = len(tensor.experts), self.plan.experts_of(tensor)
        tally = count_patches(block.patches, block.size, experts, self.inputs.kernels)
        tally |= count_sizes(self.inputs, tensor, block, space, self.settings.storage)
        if not self.settings.null:
            return tally, {}
        part = part_of(tensor, start, block.size, self.settings.seed)
        patches = null_patches(self.inputs, tensor, block, part, keys, self.settings.seed, space)
        return tally, count_patches(patches, part[1] - part[0], experts, self.inputs.kernels)


def _bytes(tensor: TensorPlan) -> int:
    places = [tensor.base, *(place for source in tensor.experts for place in (source.place, source.a, source.b))]
    return sum(place.nbytes + sum(part.nbytes for part in place.parts) for place in places if place is not None)


def piece_bytes(plan: Plan, run: int = RUN) -> int:
    """Memory of one thread, at most, for K experts: words, decoded values, places and deltas, twice with the null."""
    count = len(plan.experts)
    size = min(run, max((tensor.size for tensor in plan.tensors), default=0))
    factors = max(
        (4 * (s.a.nbytes + s.b.nbytes) for t in plan.tensors for s in t.experts if s.a is not None and s.b is not None),
        default=0,
    )
    return size * (96 + count * 72) + count * factors


# -- scopes ------------------------------------------------------------------------------------------------------------


def dtypes_of(plan: Plan) -> tuple[str, list[str], list[str]]:
    """The dtype of most coordinates: of the base; of each expert as it is ('delta' for an adapter), and as it counts
    steps.
    """
    bases: Counter[str] = Counter()
    given = [Counter[str]() for _ in plan.experts]
    steps = [Counter[str]() for _ in plan.experts]
    for t in measured_tensors(plan):
        tensor = plan.tensors[t]
        assert tensor.base is not None
        bases[tensor.base.dtype] += tensor.size
        for k, source in enumerate(tensor.experts):
            given[k]["delta" if source.kind in ("low_rank", "sum") else stored_dtype(tensor, k)] += tensor.size
            steps[k][stored_dtype(tensor, k)] += tensor.size

    def most(counts: Counter[str]) -> str:
        return max(sorted(counts), key=lambda dtype: counts[dtype], default="")

    kinds = ["delta" if "delta" in counts else most(counts) for counts in given]
    return most(bases), kinds, [most(counts) for counts in steps]


def _scopes(plan: Plan, settings: CoordinateSettings, measured: Measured) -> Coordinates:
    places = [place_of(plan.tensors[t].name) for t in measured.tensors]
    whole = _sum(measured.tallies, range(len(places)))
    energy = whole["squares"].tolist() if whole else []
    _, _, dtypes = dtypes_of(plan)
    order = [plan.experts.index(key) for key in settings.order]

    def scope(members: Sequence[int]) -> Scope:
        null = _sum(measured.nulls, members) if settings.null else None
        return describe(_sum(measured.tallies, members), null, plan.experts, dtypes, energy, order)

    def those(keys: Sequence[Any], key: Any) -> list[int]:
        return [place for place, one in enumerate(keys) if one == key]

    layers, kinds = [layer for layer, _ in places], [kind for _, kind in places]
    ordered = sorted(dict.fromkeys(layers), key=lambda layer: -1 if layer is None else layer)
    return {
        "total": scope(range(len(places))),
        "layers": [{"layer": layer, **scope(those(layers, layer))} for layer in ordered],
        "kinds": [{"kind": kind, **scope(those(kinds, kind))} for kind in dict.fromkeys(kinds)],
        "tensors": [
            {
                "name": plan.tensors[t].name,
                "shape": list(plan.tensors[t].shape),
                "layer": layers[place],
                "kind": kinds[place],
                **scope([place]),
            }
            for place, t in enumerate(measured.tensors)
        ],
    }


def _sum(tallies: Sequence[Tally], members: Sequence[int]) -> Tally:
    total: Tally = {}
    for place in members:
        add(total, tallies[place])
    return total


def _storage(plan: Plan, measured: Measured) -> Storage:
    total = _sum(measured.tallies, range(len(measured.tallies)))
    count = len(plan.experts)
    merges = [
        describe_stored(method, {"lambda": scale}, total["survival"][row], total["direction"][row])
        for row, method, scale in ((AVERAGE, "average", 1.0 / count), (SUM, "sum", 1.0))
    ]
    return {"dtype": "BF16", "merges": merges}
