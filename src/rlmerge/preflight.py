"""Everything that headers, small files and a one-percent sample can show before a merge: errors, alarms, estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlmerge.fisher.on_demand import with_kept
from rlmerge.parameters import explain as explain_parameters
from rlmerge.plan import PartResolver, Plan, sum_bytes
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.sample import alarms, take_sample
from rlmerge.settings import (
    DEFAULT_SHARD_BYTES,
    as_recipe,
    check_run,
    check_tokenizers,
    default_threads,
    limit_threads,
    make_variants,
    sweep_names,
    thread_bytes,
    whole_cost,
)
from rlmerge.slices import Part

RATE = 6e8
"""Bytes per second and thread that one pass handles, measured on two cores (docs/log.md); only for the estimate."""
DECOMPOSED = 4e-10
"""Seconds of a thread for a decomposition in fp64 and the products with it, divided by m·n·min(m, n) (docs/log.md)."""


@dataclass
class CheckReport:
    """What `rlmerge check` found. `alarms` are warnings: they never make a merge fail."""

    notes: list[str]
    alarms: list[str]
    sample: dict[str, Any]
    estimate: dict[str, Any]
    summary: dict[str, Any]
    seconds: float = field(default=0.0)


def check(
    recipe: Recipe | Path | str,
    *,
    sweep: Sequence[dict[str, Any]] = (),
    out: Path | str | None = None,
    threads: int | None = None,
    memory: int | None = None,
    kernels: str = "auto",
    overwrite: bool = False,
    accept_tokenizers: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> CheckReport:
    """Plans the merge, compares tokenizers, looks at a sample of the weights; with `out`, at the output folder too.

    Writes nothing. Raises a subclass of RlmergeError for everything that would make the merge fail and can be known.
    """
    started = time.monotonic()
    recipe, waiting = with_kept(as_recipe(recipe))
    check_run(threads, kernels, shard_bytes)
    variants = make_variants(recipe, sweep)
    with recipe.located():
        plan = make_plan(recipe, variants, shard_bytes)
    notes = [*waiting, *plan.notes, *check_tokenizers(plan, accept_tokenizers)]
    if out is not None:
        from rlmerge.execute.folder import OutputFolder

        target = OutputFolder(plan, Path(out), sweep_names(sweep), overwrite)
        target.check()
        target.check_space()
    threads = limit_threads(threads or default_threads(), memory, plan)
    # NumPy is done with a sample before numba is loaded
    sample = take_sample(plan, "numpy")
    report = CheckReport(notes, alarms(plan, sample), sample, estimate(plan, threads), summarise(plan))
    report.seconds = time.monotonic() - started
    return report


def explain(recipe: Recipe | Path | str) -> list[dict[str, Any]]:
    """Resolved parameters per group of tensors: {'tensors', 'count', 'values', 'models'}, and what is only carried."""
    recipe = as_recipe(recipe)
    with recipe.located():
        plan = make_plan(with_kept(recipe)[0])
    groups = []
    for number, part in enumerate(recipe.parts):
        of_part = {t.name: t.spot for t in plan.tensors if t.part == number}
        merged = [t.name for t in plan.tensors if t.part == number and t.carry is None]
        found = explain_parameters(part.recipe, recipe.method, merged, plan.layers, of_part)
        said = describe_part(part, {name: word for name, word in plan.roles.items() if name in of_part})
        groups += [group | said for group in found]
    carried: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.carry is not None:
            carried.setdefault(tensor.carry, []).append(tensor.name)
    return groups + [
        {"tensors": names, "count": len(names), "carried": reason, "values": {}, "models": {}}
        for reason, names in carried.items()
    ]


def describe_part(part: Part, roles: Mapping[str, str]) -> dict[str, Any]:
    """Where the tensors of a slice or module come from, for `explain`; nothing for a whole model."""
    said: dict[str, Any] = {"module": part.module} if part.module else {}
    if part.sliced:
        said["slice"] = part.number
        said["layers"] = {key: list(layers) for key, layers in part.ranges.items()}
        if part.base_range is not None:
            said["base_layers"] = list(part.base_range)
        for word in ("before", "after"):
            if names := [name for name, role in roles.items() if role == word]:
                said[word] = names
    return said


def summarise(plan: Plan) -> dict[str, Any]:
    """What will be made: method, coordinates, dtypes, files."""
    merged = [tensor for tensor in plan.tensors if tensor.carry is None]
    return {
        "method": plan.recipe.merge_method,
        "experts": list(plan.experts),
        "coordinates": sum(tensor.size for tensor in plan.tensors),
        "merged_tensors": len(merged),
        "carried_tensors": len(plan.tensors) - len(merged),
        "dtypes": sorted({tensor.dtype for tensor in merged}),
        "files": [{"file": file.name, "bytes": file.size} for file in plan.outputs],
    }


def estimate(plan: Plan, threads: int) -> dict[str, Any]:
    """Bytes to move, memory, disk, and a rough time (one pass of a thread: RATE bytes a second)."""
    moved = sum_bytes(plan)
    resolver = PartResolver(plan.recipe, plan.layers)
    values = next((resolver.resolve(tensor) for tensor in plan.tensors if tensor.carry is None), None)
    stages = plan.recipe.method.stages(values.values) if values else ()
    names = {stage.name for stage in stages}
    # of the Gram matrices a tensor needs one kind
    passes = 1 + len(names & {"coarse", "ranks", "norms", "pair_conflict"}) + bool(names & {"gram", "columns"})
    each = thread_bytes(plan)
    # whole matrices: each decomposition reads its input anew, which is little beside its own time
    decomposing = DECOMPOSED * sum(number * work for number, work, _ in whole_cost(plan))
    read = passes * (moved["read"] + moved["fisher"]) + moved["fisher"] * any(s.name == "fisher_mean" for s in stages)
    return {
        "bytes_read": read,
        "bytes_written": moved["written"],
        "passes": passes,
        "disk_bytes": sum(file.size for file in plan.outputs) * len(plan.variants),
        "memory_bytes": 250 * 2**20 + threads * each,
        "threads": threads,
        "hours": ((read + moved["written"]) / RATE + decomposing) / threads / 3600,
    }
