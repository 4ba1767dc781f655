"""Merges the documents of a recipe file one after the other: the stages into a folder of their own, then the output.

The same call continues what was interrupted. A stage that is whole and unchanged is not made again; one that was
changed is, and with it all that are made of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlmerge.api import Outcome, Step, merge_to_folder
from rlmerge.execute.ray_cluster import connected
from rlmerge.execute.stage_folder import StageFolder
from rlmerge.figures import size
from rlmerge.fisher.on_demand import check_extra, with_estimates
from rlmerge.planned import Planned, check_places, disk_bytes, plan_stages
from rlmerge.planner import make_plan
from rlmerge.settings import check_tokenizers, default_threads, limit_threads
from rlmerge.stages import Stages


def merge_stages(
    stages: Stages,
    out: Path,
    folder: Path | None,
    *,
    sweep: Sequence[dict[str, Any]],
    overwrite: bool,
    shard_bytes: int,
    progress: Callable[[Step], None],
    accept_tokenizers: bool,
    threads: int | None,
    memory: int | None,
    executor: str = "local",
    address: str | None = None,
    **options: Any,
) -> Outcome:
    """`merge_to_folder` for several documents; arguments and errors as there. `folder` keeps the stages."""
    started = time.monotonic()
    place = StageFolder(out, folder)
    stages = stages.at(place.folder)
    place.tidy(stages.names, keep=overwrite)
    found = plan_stages(stages, sweep, shard_bytes, place.is_made)
    for planned in found:
        if planned.notes:
            check_extra()
        check_tokenizers(planned.plan, accept_tokenizers)
        limit_threads(threads or default_threads(), memory, planned.plan)
    check_places(place, found, sweep, overwrite)
    progress(Step(0, 0, 0, _announce(place, found)))
    options |= {"shard_bytes": shard_bytes, "accept_tokenizers": accept_tokenizers}
    options |= {"threads": threads, "memory": memory, "executor": executor, "address": address}
    outcomes: dict[str, Outcome | None] = {}
    with place.locked(), connected(address, threads or default_threads()) if executor == "ray" else nullcontext():
        for recipe in stages.recipes[:-1]:
            name = recipe.name or ""
            tell = _labelled(name, progress)
            recipe = with_estimates(recipe, lambda text, tell=tell: tell(Step(0, 0, 0, text)))
            plan = make_plan(recipe, (), shard_bytes)
            if place.is_made(name, plan):
                outcomes[name] = None
                continue
            place.begin(name, plan)
            outcomes[name] = merge_to_folder(recipe, place.place(name), progress=tell, **options)
            place.done(name, plan)
        place.finishing()
        outcome = merge_to_folder(stages.final, out, sweep=sweep, overwrite=overwrite, progress=progress, **options)
        left = place.remove() if place.temporary else None
    if left is not None:
        progress(Step(0, 0, 0, f"warning: {left}"))
    read = outcome.bytes_read + sum(stage.bytes_read for stage in outcomes.values() if stage is not None)
    return replace(outcome, stages=outcomes, seconds=time.monotonic() - started, bytes_read=read)


def _announce(place: StageFolder, found: Sequence[Planned]) -> str:
    """What is about to be made, and the disk that it takes."""
    made = [planned.name for planned in found if planned.made]
    todo = [planned for planned in found[:-1] if not planned.made]
    names, taken = ", ".join(planned.name for planned in todo), sum(map(disk_bytes, todo))
    parts = [f"to merge: {names} ({size(taken)})"] if todo else []
    parts += [f"there already: {', '.join(made)}"] if made else []
    then = "removed when the output is whole" if place.temporary else "kept"
    last = f"{place.out} ({size(disk_bytes(found[-1]))})"
    return f"{len(found) - 1} stage(s) in {place.folder}, {then}: {'; '.join(parts)}; then {last}"


def _labelled(name: str, progress: Callable[[Step], None]) -> Callable[[Step], None]:
    """Tells of a stage's steps with its name before every message."""

    def tell(step: Step) -> None:
        if step.message.startswith("warning: "):
            step = replace(step, message=f"warning: {name}: {step.message.removeprefix('warning: ')}")
        elif step.message:
            step = replace(step, message=f"{name}: {step.message}")
        progress(step)

    return tell
