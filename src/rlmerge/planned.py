"""Plans all stages of a recipe before the first is made: a plan says what the headers of its output will be."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.header import PlannedInfo, parse_header
from rlmerge.checkpoint.tokenizer_files import is_tokenizer_file
from rlmerge.errors import OutputError
from rlmerge.execute.folder import OutputFolder, nearest
from rlmerge.execute.stage_folder import StageFolder
from rlmerge.figures import size
from rlmerge.fisher.on_demand import with_kept
from rlmerge.plan import GatheredPlace, Plan
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.settings import DEFAULT_SHARD_BYTES, make_variants, sweep_names
from rlmerge.small_files import copied_files, written_config
from rlmerge.stages import Stages


@dataclass(frozen=True)
class Planned:
    """One document of a file, planned.

    name      of the stage, '' for the output
    made      it is there already, whole and unchanged
    waits     names of the stages that it needs and that are not there yet
    notes     on Fishers that are still to be estimated
    """

    name: str
    recipe: Recipe
    plan: Plan
    made: bool
    waits: tuple[str, ...]
    notes: tuple[str, ...]


def plan_stages(
    stages: Stages,
    sweep: Sequence[dict[str, Any]] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    is_made: Callable[[str, Plan], bool] | None = None,
) -> list[Planned]:
    """The plan of every document, in order. Reads headers and small files of what is there, and writes nothing.

    sweep    of the output
    is_made  whether a stage is there as this plan would make it; asked only if all that it is made of is there
    Raises a subclass of RlmergeError for everything that recipes and headers can show.
    """
    unmade: dict[Path, Checkpoint] = {}
    found = []
    for recipe in stages.recipes:
        last = recipe is stages.final
        name = "" if last else recipe.name or ""
        waits = tuple(folder.name for folder, _ in recipe.stages.values() if folder in unmade)
        kept, notes = with_kept(recipe, unmade)
        with recipe.located():
            variants = make_variants(kept, sweep if last else ())
            plan = make_plan(kept, variants, shard_bytes, unmade)
        made = not (last or waits or notes) and is_made is not None and is_made(name, plan)
        found.append(Planned(name, recipe, plan, made, waits, tuple(notes)))
        if not last and not made:
            folder = stages.folder(name)
            unmade[folder] = planned_checkpoint(plan, name, folder)
    return found


def planned_checkpoint(plan: Plan, reference: str, folder: Path) -> Checkpoint:
    """What `open_checkpoint` will find in a folder when the plan is carried out; its tensors have no bytes yet."""
    headers = tuple(parse_header(folder / file.name, file.header, file.size) for file in plan.outputs)
    stored = {tensor.name: tensor for tensor in plan.tensors}
    given = {(str(i.file.absolute()), i.start): i for one in (plan.donor, *plan.models) for i in one.tensors.values()}
    tensors = {}
    for header in headers:
        for name, info in header.tensors.items():
            tensor = stored[name]
            at = tensor.base if tensor.carry is not None and not isinstance(tensor.base, GatheredPlace) else None
            source = given.get((plan.files[at.file].path, at.start)) if at is not None else None
            tensors[name] = PlannedInfo(
                name, info.dtype, info.shape, info.file, info.start, info.nbytes, tensor.known_as, source
            )
    config = plan.donor.config and json.loads(written_config(plan, json.dumps(plan.donor.config).encode()))
    return Checkpoint(reference, folder, tensors, headers, config, False, planned=_small_files(plan))


def _small_files(plan: Plan) -> Path:
    """Where the small files of an output lie before it is made: with the donor, unless it gets a tokenizer or template
    of its own; then in a temporary folder, until this process ends.
    """
    if plan.vocabulary is None and plan.chat_template is None:
        return plan.donor.planned or plan.donor.folder
    home = Path(tempfile.mkdtemp(prefix="rlmerge-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name, data in copied_files(plan).items():
        if is_tokenizer_file(name) or name == "generation_config.json":
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
    return home


def check_places(
    place: StageFolder, found: Sequence[Planned], sweep: Sequence[dict[str, Any]], overwrite: bool
) -> None:
    """Raises OutputError where stages or output cannot be made, or the disk is too small for all of them together.

    Touches nothing.
    """
    making = [planned for planned in found[:-1] if not planned.made]
    if len(found) > 1:
        place.check([planned.name for planned in making])
    final = OutputFolder(found[-1].plan, place.out, sweep_names(sweep), overwrite)
    targets = [OutputFolder(planned.plan, place.place(planned.name), ("",), True) for planned in making]
    for target in (*targets, final):
        target.check()
    if making and final.is_begun() and not overwrite:
        raise OutputError(
            f"{final.work}: was begun with stages that are not there any more, or were changed: "
            f"{', '.join(p.name for p in making)}. Throw it away with --overwrite."
        )
    if not making:
        final.check_space()
        return
    needed: dict[int, int] = {}
    for target in (*targets, final):
        device = nearest(target.work).stat().st_dev
        needed[device] = needed.get(device, 0) + target.needed_bytes()
    for target in (*targets, final):
        at = nearest(target.work)
        wanted, free = needed[at.stat().st_dev], shutil.disk_usage(at).free
        if wanted > free:
            raise OutputError(
                f"{target.out}: {final.out.name} and the stages {', '.join(p.name for p in making)} need "
                f"{size(wanted)} more on that disk, and {size(free)} are free. Nothing was written. "
                "--stages FOLDER makes the stages elsewhere."
            )


def disk_bytes(planned: Planned) -> int:
    """What an output, or all points of a sweep, take on the disk."""
    return sum(file.size for file in planned.plan.outputs) * len(planned.plan.variants)
