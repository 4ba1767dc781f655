"""Recipe and headers in, plan out: every error that they can show is raised here, and no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.fisher import FisherFolder, open_fisher
from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.checkpoint.header import PackedInfo, TensorInfo
from rlmerge.checkpoint.layout import plan_files
from rlmerge.checkpoint.match import Matched, Source, match
from rlmerge.checkpoint.pack import check_base
from rlmerge.errors import FisherError, MismatchError, RecipeError
from rlmerge.methods.base import Grain
from rlmerge.parameters import Resolver, count_layers
from rlmerge.plan import ExpertSource, FileEntry, Place, Plan, TensorPlan
from rlmerge.recipe import Recipe

BLOCK = 2**19
"""Coordinates of a block, at most: what a kernel sees at once (fewer with many experts)."""
UNIT = 2**24
"""Coordinates of a unit of work, at most: what a journal line covers."""

HEADER_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class _Files:
    """The input files in order of first mention."""

    def __init__(self) -> None:
        self.entries: list[FileEntry] = []
        self._index: dict[Path, int] = {}

    def add(self, checkpoint: Checkpoint | FisherFolder, model: str) -> None:
        for header in checkpoint.headers:
            if header.file not in self._index:
                self._index[header.file] = len(self.entries)
                path = str(header.file.absolute())
                self.entries.append(FileEntry(path, header.size, header.digest, model))

    def place(self, info: TensorInfo) -> Place:
        found = Place(self._index[info.file], info.start, info.dtype, info.nbytes)
        if not isinstance(info, PackedInfo) or info.kind == "whole":
            return found
        return replace(found, kind="packed", parts=(self.place(info.table),) if info.table else ())

    def fisher(self, folder: FisherFolder, name: str) -> Place:
        found = self.place(folder.tensors[name])
        if name not in folder.compact:
            return found
        kind, *parts = folder.compact[name]
        return replace(found, kind=kind, parts=tuple(self.place(part) for part in parts))

    def source(self, source: Source) -> ExpertSource:
        if source.info is not None:
            return ExpertSource("tensor", self.place(source.info))
        if source.low_rank is not None:
            low = source.low_rank
            rank = low.a.shape[0]
            a, b = self.place(low.a), self.place(low.b)
            return ExpertSource("low_rank", None, a, b, rank, low.scale, low.transposed)
        return ExpertSource("base")


def make_plan(recipe: Recipe, variants: Sequence[Recipe] = (), shard_bytes: int = 5 * 10**9) -> Plan:
    """The plan of a recipe, or of several that share inputs (a sweep). Reads headers and small files only.

    Raises a subclass of RlmergeError for everything that recipe and headers can show.
    """
    variants = tuple(variants) or (recipe,)
    keys = tuple(entry.key for entry in recipe.experts)
    paths = recipe.model_paths
    models = {key: open_checkpoint(paths[key], _written(recipe, key)) for key in keys}
    base_path = recipe.base_path
    base = open_checkpoint(base_path, recipe.base_model) if base_path is not None else None
    donor = base if base is not None else models[recipe.models[0].key]
    for checkpoint in (base, *models.values()):
        if checkpoint is not None and checkpoint.adapter and checkpoint is donor:
            raise MismatchError(
                f"{checkpoint.reference}: a LoRA adapter cannot be the base. Write the model it was trained from as "
                "`base_model:` and the adapter under `models:`."
            )
        if checkpoint is not None and checkpoint.adapter and base is None:
            raise RecipeError(
                f"{checkpoint.reference}: a LoRA adapter is an update and not a model. Write the model it was trained "
                "from as `base_model:`."
            )
    _check_packs(donor, base, tuple(models.values()))
    if len(keys) > 64:
        raise RecipeError(f"{len(keys)} models: rlmerge merges at most 64 at once. Merge groups, then their results.")
    matched = match(donor, list(models.values()), list(recipe.include), list(recipe.exclude), recipe.on_mismatch)
    fishers, fisher_notes = _open_fishers(recipe, variants, donor, keys, matched.tied)
    layers = count_layers(donor.tensors, donor.config)
    files = _Files()
    files.add(donor, "base" if base is not None else recipe.models[0].key)
    for key, checkpoint in models.items():
        files.add(checkpoint, key)
    for key, folder in zip(keys, fishers):
        files.add(folder, f"fisher of {key}")
    tensors = tuple(
        _plan_tensor(info, recipe, matched, fishers, files, base is not None) for info in donor.tensors.values()
    )
    for variant in variants:
        _check_parameters(variant, tensors, layers)
    outputs = plan_files([(t.name, t.dtype, t.shape) for t in tensors], shard_bytes)
    notes = tuple(dict.fromkeys((*recipe.warnings, *matched.notes, *fisher_notes)))
    return Plan(
        variants, keys, base is not None, tuple(files.entries), tensors, outputs, layers, notes,
        donor, tuple(models.values()), base, fishers, BLOCK,
    )  # fmt: skip


def _check_packs(donor: Checkpoint, base: Checkpoint | None, models: tuple[Checkpoint, ...]) -> None:
    """Raises for packs in the place of a base, without one, or with another one than theirs."""
    if base is not None and base.pack is not None:
        raise MismatchError(
            f"{base.reference}: a delta pack cannot be the base: it holds what changed in one. Write the model that it "
            "was made for as `base_model:`, or unpack it (rlmerge unpack) if its expert is to be the base."
        )
    for checkpoint in (donor, *models):
        if checkpoint.pack is not None and base is None:
            raise RecipeError(
                f"{checkpoint.reference}: a delta pack is what changed in a model. Write that model as `base_model:`, "
                "or unpack it first (rlmerge unpack)."
            )
        if checkpoint.pack is not None and base is not None:
            check_base(checkpoint, base)


def _written(recipe: Recipe, key: str) -> str:
    return next(entry.model for entry in recipe.models if entry.key == key)


def _open_fishers(
    recipe: Recipe, variants: Sequence[Recipe], donor: Checkpoint, keys: tuple[str, ...], tied: Mapping[str, str]
) -> tuple[tuple[FisherFolder, ...], list[str]]:
    """The Fishers, if the method reads them; all experts have one or none has."""
    paths = recipe.fisher_paths
    having = [key for key in keys if paths[key] is not None]
    wanted = [variant for variant in variants if variant.method.uses_fisher(_global_values(variant))]
    if not wanted:
        notes = [f"`fisher:` is given, but method {recipe.merge_method!r} does not read it with these parameters."]
        return (), notes if having else []
    method = recipe.method
    free = any(spec.name == "sensitivity" for spec in method.parameters)
    if not having:
        raise FisherError(
            f"{recipe.merge_method!r} {'arbitrates' if free else 'averages'} by Fisher information, but no model has a "
            "`fisher:` folder.\n"
            "  Give each model one (`fisher: FOLDER` in the recipe, --fisher on the command line), or "
            f"{method.fisherless}."
        )
    if len(having) < len(keys):
        missing = ", ".join(key for key in keys if key not in having)
        raise FisherError(
            f"these models have no `fisher:`: {missing}; the others have one. Sensitivities of different kinds cannot "
            f"be compared: give all models a Fisher, or {method.fisherless}."
        )
    folders = tuple(open_fisher(path, donor) for key in keys if (path := paths[key]) is not None)
    shared = [name for name in donor.tensors if all(name in folder.tensors for folder in folders)]
    if not shared:
        raise FisherError("the Fishers have no tensor in common, so their scales cannot be compared.")
    copies = {*(tied.get(name, name) for name in shared), *(name for name, first in tied.items() if first in shared)}
    lacking = [name for name in donor.tensors if name not in shared and name not in copies]
    notes = []
    if lacking:
        notes.append(
            f"{len(lacking)} tensors are not in every Fisher and are "
            f"{'arbitrated by δ² alone' if free else 'averaged as if it were the same everywhere'}: "
            + ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
        )  # fmt: skip
    return folders, notes


def _global_values(recipe: Recipe) -> dict[str, Any]:
    """Global parameters where gradients and filters do not matter (choices that decide what is read)."""
    values = {}
    for spec in recipe.method.parameters:
        if not spec.per_model:
            values[spec.name] = recipe.parameters.get(spec.name, spec.default)
    return values


def stage_names(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Names and scopes of the stages that a recipe needs, in their order."""
    return tuple((stage.name, stage.scope) for stage in recipe.method.stages(_global_values(recipe)))


def _plan_tensor(
    info: TensorInfo,
    recipe: Recipe,
    matched: Matched,
    fishers: tuple[FisherFolder, ...],
    files: _Files,
    has_base: bool,
) -> TensorPlan:
    reason = matched.carried.get(info.name)
    block = _block_size(info.shape, len(matched.merged.get(info.name, ())), recipe.method.grain)
    step = info.size if recipe.method.grain == "matrix" else UNIT // block * block
    units = tuple(_ranges(info.size, max(step, block)))
    repeats = matched.tied.get(info.name, "")
    # a Fisher has a tied tensor once, under the name that its file has
    copies = {info.name, repeats, *(name for name, first in matched.tied.items() if first in (info.name, repeats))}
    named = next((name for name in sorted(copies - {""}) if fishers and all(name in f.tensors for f in fishers)), None)
    places = tuple(files.fisher(folder, named) for folder in fishers) if named else ()
    known = named is not None and all(named in folder.sums for folder in fishers)
    sums = tuple(folder.sums[named] for folder in fishers) if known and named else ()
    if named is not None and not known and any(place.kind == "sparse" for place in places):
        raise FisherError(
            f"the Fishers of tensor {named!r} are stored at some coordinates by some models, and others have no "
            "fisher.json that records its sum, so their scales cannot be compared. Estimate them alike."
        )
    known = known and len(units) == 1 and all(named in folder.digests for folder in fishers)
    digests = tuple(folder.digests[named] for folder in fishers) if known and named else ()
    if reason is not None:
        base = files.place(info)
        # a sparse Fisher's sum is written down only; others are added up with what is read
        own = sums if any(place.kind == "sparse" for place in places) else ()
        return TensorPlan(info.name, info.shape, info.dtype, base, (), places, reason, block, units, repeats, own)
    sources = matched.merged[info.name]
    stored = [source.info.dtype for source in sources if source.info is not None]
    if has_base or not stored:
        stored.append(info.dtype)
    wanted = HEADER_DTYPE[recipe.output_dtype] if recipe.output_dtype else _promote(stored)
    experts = tuple(files.source(source) for source in sources)
    base = files.place(info) if has_base else None
    return TensorPlan(
        info.name, info.shape, wanted, base, experts, places, None, block, units, repeats, sums, digests,
        _base_sum(info.name, sources),
    )  # fmt: skip


def _base_sum(name: str, sources: tuple[Source, ...]) -> str:
    """The sum of the base's words that all packs agree on; '' where none says it."""
    said = {source.info.base_sum: source.info for source in sources if isinstance(source.info, PackedInfo)}
    said.pop("", None)
    if len(said) > 1:
        one, other = list(said.values())[:2]
        raise MismatchError(
            f"{one.file.parent} and {other.file.parent}: these packs were made for bases that differ in tensor "
            f"{name!r}. Make both from one base."
        )
    return next(iter(said), "")


def _promote(dtypes: list[str]) -> str:
    """The dtype that holds all of these, as mergekit promotes: bf16 and fp16 together need fp32."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else "F32"


def _block_size(shape: tuple[int, ...], experts: int, grain: Grain = "element") -> int:
    """Whole rows where they fit in a block, else a block of coordinates; buffers grow with the number of experts.

    A method of grain `row` sees whole rows, however long; a vector is one row.
    """
    most = max(1, BLOCK * 4 // max(4, experts + 1))
    row = prod(shape[1:]) if len(shape) > 1 else 1
    if grain == "row":
        row = row if len(shape) > 1 else prod(shape)
        most = max(most, row)
    return max(1, most // row) * row if 0 < row <= most else most


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _check_parameters(recipe: Recipe, tensors: tuple[TensorPlan, ...], layers: int) -> None:
    """Resolves every parameter at every tensor, so that nothing can be missing or out of range later."""
    resolver = Resolver(recipe, recipe.method, layers)
    seen: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.carry is not None:
            continue
        resolved = resolver.resolve(tensor.name)
        model_wide = [spec.name for spec in recipe.method.parameters if spec.kind == "choice" and not spec.per_model]
        if resolved.values.get("scope") == "model" and "density" in resolved.per_model:
            densities = tuple(resolved.per_model["density"])
            if seen.setdefault("density", densities) != densities:
                raise RecipeError(
                    "parameters.density: `scope: model` counts density over the whole model: write one number."
                )
        for name in model_wide:
            if seen.setdefault(name, resolved.values[name]) != resolved.values[name]:
                raise RecipeError(f"parameters.{name}: this choice must be the same for all tensors; drop its filters.")
