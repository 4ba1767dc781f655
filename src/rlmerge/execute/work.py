"""The two steps of execution: measure one unit for a stage, merge one unit.

Everything that varies between runs (threads, order, machine) stays outside: given a plan, the results of finished
stages and a unit, the outcome is determined to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH
from rlmerge.errors import FisherError, MismatchError
from rlmerge.methods.base import Average, Block, Change, Merged, Result, Stage, Summary, Task
from rlmerge.plan import PartResolver, Plan, TensorPlan
from rlmerge.recipe import Recipe

from .blocks import InputBlock
from .inputs import Hashes, Inputs, blocks_of
from .memory import Memo, Space
from .storing import Storing, hash_key
from .whole_tensor import WholeTensor, read_gram

Write = Callable[[int, int, int, NDArray[np.uint8]], None]
"""write(variant, tensor, first coordinate, bytes)."""


@dataclass(slots=True)
class UnitRecord:
    """What a merged unit leaves behind: digests of written and read bytes, statistics per variant and per group, the
    sum of each Fisher where its file records one, and that of the base's words where a pack records it.
    """

    tensor: int
    unit: int
    written: list[str]
    read: list[str]
    stats: list[dict[str, list[Any]]]
    census: list[dict[str, list[Any]]]
    fisher_sums: list[float] = field(default_factory=list)
    base_sum: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One unit to measure for some stages, or to merge. Small, and as good on another machine.

    wanted    (group, number of the stage) to measure; empty: merge
    results   of finished stages: for each entry of `wanted`, or for every group
    alone     the first stage of a tensor that goes through all that are left and its merge in this one job
    """

    tensor: int
    unit: int
    wanted: tuple[tuple[int, int], ...]
    results: tuple[Mapping[str, Result], ...]
    alone: int | None = None


@dataclass(frozen=True, slots=True)
class Walked:
    """What came of a job that is `alone`: the results of its stages as (group, stage, result), and the merged unit."""

    stages: list[tuple[int, str, Result]]
    record: UnitRecord


Outcome = list[Summary] | UnitRecord | Walked
"""What comes of a job: the summaries that it measured, or what its merge leaves behind."""


class Worker:
    """A plan ready to be worked on: open inputs, resolved tasks, stages. Threads share it."""

    def __init__(self, plan: Plan, kernels: ModuleType, keep_bytes: int = 0) -> None:
        self.plan = plan
        self.kernels = kernels
        self.memo = Memo(keep_bytes)
        self._hashes: dict[tuple[int, int], Hashes] = {}
        self.inputs = Inputs(plan, kernels)
        self._tasks: dict[tuple[int, int], Task] = {}
        self.resolvers = [PartResolver(recipe, plan.layers) for recipe in plan.variants]
        self.storing = Storing(plan, self.inputs)
        self.group_of, self.leaders = _group(plan.variants)
        self.stages = [self._stages(plan.variants[leader], leader) for leader in self.leaders]

    def _stages(self, recipe: Recipe, variant: int) -> tuple[Stage, ...]:
        merged = next((t for t, tensor in enumerate(self.plan.tensors) if tensor.carry is None), None)
        return () if merged is None else recipe.method.stages(self.task(variant, merged).values)

    def task(self, variant: int, tensor: int) -> Task:
        """What the method of a variant knows of a tensor."""
        if (variant, tensor) not in self._tasks:
            plan, recipe = self.plan.tensors[tensor], self.plan.variants[variant]
            resolved, experts = self.resolvers[variant].resolve(plan), self.plan.experts_of(plan)
            keys = [hash_key(recipe.seed, recipe.merge_method, expert, plan.known_as) for expert in experts]
            self._tasks[variant, tensor] = Task(
                plan.name,
                plan.shape,
                experts,
                resolved.values,
                {name: np.array(values) for name, values in resolved.per_model.items()},
                np.array(keys, np.uint64),
                hash_key(recipe.seed, recipe.merge_method, "", plan.known_as),
                bool(plan.fishers),
                bool(plan.repeats),
                plan.fisher_sums,
                self.group_of[variant],
                int(not plan.gram_first) if plan.grams else None,
            )
        return self._tasks[variant, tensor]

    def model_task(self, variant: int, tensors: list[int]) -> Task:
        """The task of a whole model at scope 'model': the parameters of the first tensor that takes part."""
        size = sum(self.plan.tensors[t].size for t in tensors)
        first = self.task(variant, tensors[0])
        return Task("", (size,), first.experts, first.values, first.per_model, first.keys, first.key, first.fisher)

    def do(self, job: Job, write: Write, space: Space) -> list[Summary] | UnitRecord:
        """Measures or merges a unit."""
        if not job.wanted:
            return self.merge(job.tensor, job.unit, job.results, write, space)
        asked = [(group, self.stages[group][step], known) for (group, step), known in zip(job.wanted, job.results)]
        return self.measure(asked, job.tensor, job.unit, space)

    def forget(self, tensor: int, unit: int) -> None:
        """Drops what a measured unit left behind for its merge, which somebody else may do."""
        self._hashes.pop((tensor, unit), None)
        self.memo.drop(tensor)

    def measure(
        self, wanted: Sequence[tuple[int, Stage, Mapping[str, Result]]], tensor: int, unit: int, space: Space
    ) -> list[Summary]:
        """Summaries of one unit for several stages (group, stage, results so far), in one reading."""
        summaries = [stage.empty(len(self.plan.experts_of(self.plan.tensors[tensor]))) for _, stage, _ in wanted]
        for block in self._blocks(tensor, unit, space, last=False):
            for (group, stage, results), summary in zip(wanted, summaries):
                task = self.task(self.leaders[group], tensor)
                stage.measure(block, task, results, summary)
                # kept for the merge, which counts where there is a base
                if stage.scope == "tensor" and self.plan.tensors[tensor].base is not None:
                    self._census(block, group, task)
        return summaries

    def merge(
        self, tensor: int, unit: int, results: Sequence[Mapping[str, Result]], write: Write, space: Space
    ) -> UnitRecord:
        """Merges one unit for every variant; `results` are those of the groups. Writes through `write`."""
        plan = self.plan.tensors[tensor]
        if plan.carry is not None:
            return self._carry(plan, tensor, unit, write)
        variants = range(len(self.plan.variants))
        written = [xxhash.xxh3_128() for _ in variants]
        stats = [_Stats() for _ in variants]
        census = [_Stats() for _ in self.leaders]
        for some in self._together():
            # at most one where tensors are made whole
            made = self._whole(some[0], tensor, unit, results[self.group_of[some[0]]], space)
            for block in self._blocks(tensor, unit, space, last=True):
                block.read_all()
                if plan.base is not None and some[0] == 0:
                    for group, leader in enumerate(self.leaders):
                        census[group].add(self._census(block, group, self.task(leader, tensor)))
                for variant in some:
                    task, method = self.task(variant, tensor), self.plan.variants[variant].method
                    if made is not None:
                        merged = Merged(made[block.start : block.start + block.size])
                    else:
                        merged = method.merge(block, task, results[self.group_of[variant]])
                    if self.inputs.allow_nonfinite:
                        spread_nonfinite(block, task, merged)
                    stats[variant].add(merged.stats)
                    raw, left = self.storing.encode(plan, variant, block, merged, space)
                    stats[variant].add(left)
                    written[variant].update(raw.data)
                    write(variant, tensor, block.start, raw)
        hashes = self._hashes.pop((tensor, unit))
        return UnitRecord(
            tensor,
            unit,
            [state.hexdigest() for state in written],
            hashes.digests(1 + len(plan.experts) + len(plan.fishers) + len(plan.grams)),
            [entry.to_lists() for entry in stats],
            [entry.to_lists() for entry in census],
            hashes.sums.tolist() if plan.fisher_sums else [],
            hashes.base_sum,
        )

    def _together(self) -> list[list[int]]:
        """Variants that are merged in one reading: all, or one after the other where each makes a whole tensor."""
        variants = list(range(len(self.plan.variants)))
        return [[v] for v in variants] if self.plan.recipe.method.grain == "matrix" else [variants]

    def _whole(
        self, variant: int, tensor: int, unit: int, results: Mapping[str, Result], space: Space
    ) -> NDArray[np.float64] | None:
        """The merged tensor where the method makes it whole."""
        plan, method = self.plan.tensors[tensor], self.plan.variants[variant].method
        if method.grain != "matrix":
            return None
        hashes = self._hashes.setdefault((tensor, unit), Hashes(plan.units[unit][0], len(plan.fisher_sums)))

        def gram(expert: int) -> NDArray[np.float64]:
            return read_gram(self.inputs, plan, expert, hashes)

        whole = WholeTensor(plan.shape, len(plan.experts), lambda: self._blocks(tensor, unit, space, last=True), gram)
        return method.whole(whole, self.task(variant, tensor), results)

    def check_sums(self, tensor: int, units: Mapping[tuple[int, int], UnitRecord]) -> None:
        """Raises FisherError where fisher.json recorded another sum than the merge has read from the file, and
        MismatchError where a pack did so for the base.
        """
        plan = self.plan.tensors[tensor]
        self._check_base(tensor, units)
        if not plan.fisher_sums or plan.carry is not None:
            return
        for k, digest in enumerate(plan.fisher_digests):
            if units[tensor, 0].read[1 + len(plan.experts) + k] != digest:
                raise FisherError(
                    f"{self.plan.files[plan.fishers[k].file].path}: the bytes of tensor {plan.name!r} are not those of "
                    "which the fisher.json beside it speaks, which this merge believed. Nothing was delivered.\n"
                    "  The file was changed after fisher.json was written: remove fisher.json, or estimate again, and "
                    "merge with --overwrite."
                )
        if plan.fisher_digests:
            return
        found = sum(np.array(units[tensor, unit].fisher_sums) for unit in range(len(plan.units)))
        for place, recorded, read in zip(plan.fishers, plan.fisher_sums, np.atleast_1d(found).tolist()):
            # both are fp64 sums of the same numbers in another order
            if place.kind != "sparse" and abs(read - recorded) > 1e-6 * max(read, recorded):
                raise FisherError(
                    f"{self.plan.files[place.file].path}: tensor {plan.name!r} adds up to {read:.9g}, but the "
                    f"fisher.json beside it says {recorded:.9g}, which this merge believed. Nothing was delivered.\n"
                    "  The file was changed after fisher.json was written: remove fisher.json, or estimate again, and "
                    "merge with --overwrite."
                )

    def _check_base(self, tensor: int, units: Mapping[tuple[int, int], UnitRecord]) -> None:
        plan = self.plan.tensors[tensor]
        if not plan.base_sum:
            return
        found = sum(units[tensor, unit].base_sum for unit in range(len(plan.units))) % 2**64
        if found != int(plan.base_sum, 16):
            assert plan.base is not None
            packs = [model.reference for model in self.plan.models if model.pack is not None]
            raise MismatchError(
                f"{self.plan.files[plan.base.file].path}: tensor {plan.name!r} is not that of the base for which "
                f"{', '.join(packs)} {'was' if len(packs) == 1 else 'were'} made: its words add up to {found:016x}, "
                f"and those of that base to {plan.base_sum}. Nothing was delivered. Write the base that it was made "
                "for."
            )

    def _blocks(self, tensor: int, unit: int, space: Space, last: bool) -> Iterator[InputBlock]:
        plan = self.plan.tensors[tensor]
        hashes = self._hashes.setdefault((tensor, unit), Hashes(plan.units[unit][0], len(plan.fisher_sums)))
        for start, stop in blocks_of(plan, unit):
            yield self.inputs.block(tensor, start, stop, space, hashes, self.memo, last)

    def _census(self, block: Block, group: int, task: Task) -> dict[str, NDArray[Any]]:
        return block.keep(("census", group), lambda: count_changes(block, task))

    def _carry(self, plan: TensorPlan, tensor: int, unit: int, write: Write) -> UnitRecord:
        """Copies the bytes of the donor's tensor."""
        place = plan.base
        assert place is not None
        width = WIDTH[place.dtype]
        self._hashes.pop((tensor, unit), None)  # of its Fishers, if they counted in a mean
        written, hashes = xxhash.xxh3_128(), Hashes(plan.units[unit][0])
        for start, stop in blocks_of(plan, unit):
            raw = np.empty((stop - start) * width, np.uint8)
            self.inputs.read_into(place, start * width, raw)
            hashes.update(0, start, stop, raw.data)
            written.update(raw.data)
            for variant in range(len(self.plan.variants)):
                write(variant, tensor, start, raw)
        digest = written.hexdigest()
        return UnitRecord(tensor, unit, [digest] * len(self.plan.variants), hashes.digests(1), [], [])


class _Stats:
    """Statistics of a unit: arrays that are added block by block."""

    def __init__(self) -> None:
        self.total: dict[str, NDArray[Any]] = {}

    def add(self, part: Mapping[str, NDArray[Any]]) -> None:
        for key, value in part.items():
            self.total[key] = self.total[key] + value if key in self.total else value.copy()

    def to_lists(self) -> dict[str, list[Any]]:
        return {key: value.tolist() for key, value in self.total.items()}


def spread_nonfinite(block: Block, task: Task, merged: Merged) -> None:
    """A delta that is no number makes the result no number, whatever the method's comparisons do with it.

    Only where the recipe lets such inputs in; a weight of 0 removes an expert before. The cast then raises the error.
    """
    if isinstance(merged.values, Average):
        merged.values = merged.values.applied(block)
    weight = task.per_model.get("weight", np.ones(len(task.experts)))
    for patch in block.patches:
        active = patch.delta[weight[patch.experts] != 0.0]
        where = patch.where[~np.isfinite(active).all(axis=0)]
        if isinstance(merged.values, list):
            merged.values.append(Change(where, np.zeros(where.size), np.full(where.size, np.nan)))
        else:
            merged.values[where] = np.nan


def count_changes(block: Block, task: Task) -> dict[str, NDArray[Any]]:
    """Supports, regions and conflicts of pairs in a block, as arrays that add up."""
    count = len(task.experts)
    weight = task.per_model.get("weight", np.ones(count))
    support, regions = np.zeros(count, np.int64), np.zeros(4, np.int64)
    overlap, conflict = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    sign = np.sign(weight).astype(np.int64)
    for patch in block.patches:
        if not patch.alone:
            block.kernels.census(patch.delta, sign, support, regions, overlap, conflict)
        elif sign[patch.experts[0]] != 0:
            support[patch.experts] += patch.where.size
            regions[0] += patch.where.size
    return {"support": support, "regions": regions, "pair_overlap": overlap, "pair_conflict": conflict}


def _group(variants: tuple[Recipe, ...]) -> tuple[list[int], list[int]]:
    """Variants that differ only in `late` parameters share their stages: the group of each, and the leaders."""
    seen: dict[str, int] = {}
    group_of, leaders = [], []
    for place, recipe in enumerate(variants):
        data = recipe.to_dict()
        late = {spec.name for spec in recipe.method.parameters if spec.late}
        data["parameters"] = {key: value for key, value in data["parameters"].items() if key not in late}
        key = json.dumps({k: v for k, v in data.items() if k not in ("name", "rounding")}, sort_keys=True)
        if key not in seen:
            seen[key] = len(leaders)
            leaders.append(place)
        group_of.append(seen[key])
    return group_of, leaders
