"""Everything that headers, small files and a one-percent sample can show before a merge: errors, alarms, estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlmerge.disk_errors import disk_errors
from rlmerge.downloads import with_all_downloads, without_weights
from rlmerge.execute.stage_folder import StageFolder
from rlmerge.fisher.on_demand import with_kept
from rlmerge.parameters import explain as explain_parameters
from rlmerge.plan import PartResolver, Plan, sum_bytes
from rlmerge.planned import Planned, check_places, plan_stages
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.sample import alarms, plan_alarms, take_sample
from rlmerge.settings import (
    DEFAULT_SHARD_BYTES,
    PROCESS_BYTES,
    as_recipes,
    check_run,
    check_tokenizers,
    default_threads,
    limit_threads,
    thread_bytes,
    whole_cost,
)
from rlmerge.slices import Part
from rlmerge.stages import Stages

RATE = 6e8
"""Bytes per second and thread that one pass handles, measured on two cores (docs/log.md); only for the estimate."""
DECOMPOSED = 4e-10
"""Seconds of a thread for a decomposition in fp64 and the products with it, divided by m·n·min(m, n) (docs/log.md)."""


@dataclass
class CheckReport:
    """What `rlmerge check` found. `alarms` are warnings: they never make a merge fail.

    stages  of a file of several documents: what was found of each stage; the rest is about the output
    total   with stages: the estimate of all documents that are still to be merged
    """

    notes: list[str]
    alarms: list[str]
    sample: dict[str, Any]
    estimate: dict[str, Any]
    summary: dict[str, Any]
    seconds: float = field(default=0.0)
    stages: dict[str, CheckReport] = field(default_factory=dict)
    total: dict[str, Any] = field(default_factory=dict)


@disk_errors()
def check(
    recipe: Recipe | Stages | Mapping[str, Any] | Path | str,
    *,
    sweep: Sequence[dict[str, Any]] = (),
    out: Path | str | None = None,
    stages: Path | str | None = None,
    threads: int | None = None,
    memory: int | None = None,
    kernels: str = "auto",
    overwrite: bool = False,
    accept_tokenizers: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    download: bool = False,
) -> CheckReport:
    """Plans the merge, compares tokenizers, looks at a sample of the weights; with `out`, at the output folder too.

    Of several documents all are checked, those that need stages against what the headers of these will be.
    Writes nothing; with `download`, headers and small files of models on the hub into the cache. Raises a subclass of
    RlmergeError for everything that would make the merge fail and can be known.
    """
    started = time.monotonic()
    recipe = as_recipes(recipe, stages)
    recipe = with_all_downloads(recipe, headers=True) if download else recipe
    check_run(threads, kernels, shard_bytes)
    place = StageFolder(Path(out), None if stages is None else Path(stages)) if out is not None else None
    documents = recipe if isinstance(recipe, Stages) else Stages((recipe,))
    if place is not None:
        documents = documents.at(place.folder)
    found = plan_stages(documents, sweep, shard_bytes, place.is_made if place is not None else None)
    reports = {}
    for planned in found:
        notes = [*planned.notes, *planned.plan.notes, *check_tokenizers(planned.plan, accept_tokenizers)]
        fitting = limit_threads(threads or default_threads(), memory, planned.plan)
        reports[planned.name] = CheckReport(
            notes, plan_alarms(planned.plan), {}, estimate(planned.plan, fitting), summarise(planned.plan)
        )
    if place is not None:
        check_places(place, found, sweep, overwrite)
    for planned in found:
        _look(planned, reports[planned.name])
    report = reports.pop("")
    if reports:
        report.stages = reports
        making = [reports[planned.name].estimate for planned in found[:-1] if not planned.made]
        report.total = _add([*making, report.estimate])
    report.seconds = time.monotonic() - started
    return report


def _look(planned: Planned, report: CheckReport) -> None:
    """Adds the sample and its alarms to a report, where the weights are there and matter."""
    if planned.made:
        report.notes.append("is there already, whole and unchanged: it is not merged again")
    elif absent := without_weights(planned.recipe):
        report.notes.append(
            f"only headers are here of {', '.join(absent)}: no sample of the weights was looked at, and tied weights "
            "and the bases of packs were not compared"
        )
    elif planned.waits:
        report.notes.append(f"no sample was taken: the weights of {', '.join(planned.waits)} are not there yet")
    else:  # NumPy is done with a sample before numba is loaded
        report.sample = take_sample(planned.plan, "numpy")
        report.alarms = alarms(planned.plan, report.sample)


def _add(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several merges take, one after the other: the sum, and the most memory of one."""
    keys = ("bytes_read", "bytes_written", "disk_bytes", "hours")
    return {key: sum(each[key] for each in estimates) for key in keys} | {
        "memory_bytes": max(each["memory_bytes"] for each in estimates)
    }


def explain(
    recipe: Recipe | Stages | Mapping[str, Any] | Path | str, *, download: bool = False
) -> list[dict[str, Any]]:
    """Resolved parameters per group of tensors: {'tensors', 'count', 'values', 'models'}, what is only carried, and
    last, where the recipe names a vocabulary, the tensors that follow it, with its report as 'vocabulary'.

    Of several documents those of each, with its name as 'stage', '' for the output.
    download   fetches headers of models on the hub
    """
    recipe = as_recipes(recipe)
    recipe = with_all_downloads(recipe, headers=True) if download else recipe
    if isinstance(recipe, Stages):
        found = plan_stages(recipe)
        return [{"stage": each.name, **group} for each in found for group in _groups(each.recipe, each.plan)]
    with recipe.located():
        return _groups(recipe, make_plan(with_kept(recipe)[0]))


def _groups(recipe: Recipe, plan: Plan) -> list[dict[str, Any]]:
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
    groups += [
        {"tensors": names, "count": len(names), "carried": reason, "values": {}, "models": {}}
        for reason, names in carried.items()
    ]
    if plan.vocabulary is not None:
        names = [tensor.name for tensor in plan.tensors if tensor.name in plan.vocabulary.tensors]
        report = {"vocabulary": plan.vocabulary.report, "values": {}, "models": {}}
        groups.append({"tensors": names, "count": len(names), **report})
    return groups


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
    } | ({"vocabulary": plan.vocabulary.report} if plan.vocabulary else {})


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
        "memory_bytes": PROCESS_BYTES + threads * each,
        "threads": threads,
        "hours": ((read + moved["written"]) / RATE + decomposing) / threads / 3600,
    }
