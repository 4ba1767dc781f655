"""Recipe and headers in, plan out: every error that they can show is raised here, and no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlmerge.checkpoint.chat_templates import plan_template
from rlmerge.checkpoint.copied import other_files
from rlmerge.checkpoint.fisher import FisherFolder, open_fisher
from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.gram import GramFolder
from rlmerge.checkpoint.header import PackedInfo, TensorInfo
from rlmerge.checkpoint.layout import plan_files
from rlmerge.checkpoint.match import Matched, Source, match, names_of, select
from rlmerge.checkpoint.restack import view_fisher
from rlmerge.checkpoint.vocabulary import Vocabulary, plan_vocabulary
from rlmerge.errors import FisherError, MismatchError, RecipeError
from rlmerge.gathering import gather_rows
from rlmerge.gram_places import open_grams, with_grams
from rlmerge.heads import plan_tie
from rlmerge.idle_filters import idle_filters
from rlmerge.methods.base import Grain
from rlmerge.parameters import count_layers
from rlmerge.pieces import Models, Piece, open_pieces, stacks_of
from rlmerge.plan import ExpertSource, FileEntry, PartResolver, Place, Plan, TensorPlan
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

    def add(self, checkpoint: Checkpoint | FisherFolder | GramFolder, model: str) -> None:
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
        stored = self.place(source.info) if source.info is not None else None
        if source.low_rank is not None:
            low = source.low_rank
            a, b = self.place(low.a), self.place(low.b)
            return ExpertSource(source.kind, stored, a, b, low.a.shape[0], low.scale, low.transposed)
        return ExpertSource(source.kind, stored)


def make_plan(
    recipe: Recipe,
    variants: Sequence[Recipe] = (),
    shard_bytes: int = 5 * 10**9,
    planned: Mapping[Path, Checkpoint] = MappingProxyType({}),
) -> Plan:
    """The plan of a recipe, or of several that share inputs (a sweep). Reads headers and small files only.

    planned  what will lie in folders that do not exist yet
    Raises a subclass of RlmergeError for everything that recipe and headers can show.
    """
    variants = tuple(variants) or (recipe,)
    models = Models(recipe, planned)
    pieces = open_pieces(recipe, models)
    keys = tuple(models.experts)
    if len(keys) > 64:
        raise RecipeError(f"{len(keys)} models: rlmerge merges at most 64 at once. Merge groups, then their results.")
    vocabulary = plan_vocabulary(recipe, models.base, models.experts, models.all)
    matched = _match(recipe, pieces, vocabulary)
    fishers, of_pieces, notes = _open_fishers(recipe, variants, models, pieces, matched, vocabulary)
    grams, grams_of, gram_notes = open_grams(recipe, variants, models, pieces, matched)
    files = _Files()
    files.add(models.donor, "base" if models.base is not None else recipe.models[0].key)
    for key, checkpoint in models.experts.items():
        files.add(checkpoint, key)
    for checkpoint in models.all:
        files.add(checkpoint, "base")
    for key, folder in zip(keys, fishers):
        files.add(folder, f"fisher of {key}")
    for key, folder in zip(keys, grams):
        files.add(folder, f"gram of {key}")
    tensors = _in_order(
        [
            with_grams(
                _plan_tensor(info, piece, number, found, folders, files, vocabulary), of_inputs, files.place, found.tied
            )
            for number, (piece, found, folders, of_inputs) in enumerate(zip(pieces, matched, of_pieces, grams_of))
            for info in piece.donor.tensors.values()
        ],
        models.donor,
    )
    layers = count_layers(models.donor.tensors, models.donor.config)
    for variant in variants:
        _check_parameters(variant, pieces, tensors, layers)
    other_files(models.donor.planned or models.donor.folder)  # what cannot be copied is known now, not at the end
    outputs = plan_files([(t.name, t.dtype, t.shape) for t in tensors], shard_bytes)
    tied, tie_notes = plan_tie(pieces, models.donor)
    said = (*(vocabulary.notes if vocabulary else ()), *tie_notes)
    idle = [text for variant in variants for text in idle_filters(variant, tensors)]
    notes = (*recipe.warnings, *said, *(note for found in matched for note in found.notes), *notes, *gram_notes, *idle)
    return Plan(
        variants, keys, models.base is not None, tuple(files.entries), tensors, outputs, layers,
        tuple(dict.fromkeys(notes)), models.donor, tuple(models.experts.values()), models.base, fishers, BLOCK,
        tuple(piece.keys for piece in pieces), stacks_of(pieces, models.donor, list(recipe.modules)),
        {name: word for piece in pieces for name, word in piece.roles.items()},
        vocabulary, plan_template(recipe, models.donor, models.experts), grams, tied,
    )  # fmt: skip


def _match(recipe: Recipe, pieces: Sequence[Piece], vocabulary: Vocabulary | None) -> list[Matched]:
    """Every piece's experts matched to its donor. Patterns must find something in the whole, not in every piece."""
    include, exclude = list(recipe.include), list(recipe.exclude)
    chosen = None
    if len(pieces) > 1:
        names = dict.fromkeys(name for piece in pieces for name in names_of(piece.donor, piece.experts))
        chosen = select(list(names), include, exclude)
    resized = vocabulary.tensors if vocabulary else frozenset()
    return [
        match(piece.donor, list(piece.experts), include, exclude, recipe.on_mismatch, chosen, resized)
        for piece in pieces
    ]


def _in_order(tensors: list[TensorPlan], donor: Checkpoint) -> tuple[TensorPlan, ...]:
    """The tensors in the order of the donor's files, where it has all of them; else in that of the parts."""
    names = {tensor.name: place for place, tensor in enumerate(tensors)}
    if len(names) < len(tensors):
        twice = next(tensor.name for place, tensor in enumerate(tensors) if names[tensor.name] != place)
        raise RecipeError(f"two parts of the recipe make tensor {twice!r}.")
    if names.keys() != donor.tensors.keys():
        return tuple(tensors)
    return tuple(tensors[names[name]] for name in donor.tensors)


def _open_fishers(
    recipe: Recipe,
    variants: Sequence[Recipe],
    models: Models,
    pieces: Sequence[Piece],
    matched: Sequence[Matched],
    vocabulary: Vocabulary | None,
) -> tuple[tuple[FisherFolder, ...], list[tuple[FisherFolder, ...]], list[str]]:
    """The Fishers, if the method reads them, and as each piece sees them; all experts have one or none has."""
    keys = tuple(models.experts)
    nothing: list[tuple[FisherFolder, ...]] = [() for _ in pieces]
    if recipe.bare:
        return (), nothing, []
    paths = recipe.fisher_paths
    having = [key for key in keys if paths[key] is not None]
    wanted = [variant for variant in variants if variant.method.uses_fisher(_global_values(variant))]
    if not wanted:
        notes = [f"`fisher:` is given, but method {recipe.merge_method!r} does not read it with these parameters."]
        return (), nothing, notes if having else []
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
    # an adapter's Fisher has the names of its base; with slices, models may differ in depth
    plain = all(piece.layers is None for piece in pieces)
    shaped = {key: vocabulary.stored_by(models.donor, key) if vocabulary else models.donor for key in keys}
    opened = {
        key: open_fisher(path, shaped[key] if plain or models.experts[key].adapter else models.experts[key])
        for key in keys
        if (path := paths[key]) is not None
    }
    of_pieces = [tuple(_seen(opened[key], piece, k) for k, key in enumerate(piece.keys)) for piece in pieces]
    lacking: list[str] = []
    some = False
    for piece, folders, found in zip(pieces, of_pieces, matched):
        names, tied = piece.donor.tensors, found.tied
        shared = [name for name in names if all(name in folder.tensors for folder in folders)]
        some |= bool(shared)
        copies = {*(tied.get(n, n) for n in shared), *(name for name, first in tied.items() if first in shared)}
        lacking += [name for name in names if name not in shared and name not in copies]
    if not some:
        raise FisherError("the Fishers have no tensor in common, so their scales cannot be compared.")
    notes = []
    if lacking:
        notes.append(
            f"{len(lacking)} tensors are not in every Fisher and are "
            f"{'arbitrated by δ² alone' if free else 'averaged as if it were the same everywhere'}: "
            + ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
        )  # fmt: skip
    return tuple(opened.values()), of_pieces, notes


def _seen(folder: FisherFolder, piece: Piece, number: int) -> FisherFolder:
    """A Fisher as a piece sees the model that it is of."""
    if piece.layers is None:
        return folder
    return view_fisher(folder, {own: name for name, own in piece.names[number].items()})


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
    info: TensorInfo, piece: Piece, part: int, matched: Matched, fishers: tuple[FisherFolder, ...], files: _Files,
    vocabulary: Vocabulary | None,
) -> TensorPlan:  # fmt: skip
    """The plan of a tensor; embedding and head with the rows of the output's vocabulary."""
    if vocabulary is None:
        return _plan_stored(info, piece, part, matched, fishers, files)
    tensor = _plan_stored(vocabulary.resized(info), piece, part, matched, fishers, files)
    return gather_rows(tensor, vocabulary, piece, matched.merged.get(info.name, ()), files.place)


def _plan_stored(
    info: TensorInfo, piece: Piece, part: int, matched: Matched, fishers: tuple[FisherFolder, ...], files: _Files
) -> TensorPlan:
    recipe, has_base, spot = piece.part.recipe, piece.base is not None, piece.spot(info.name)
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
        return TensorPlan(
            info.name, info.shape, info.dtype, base, (), places, reason, block, units, repeats, own,
            part=part, spot=spot,
        )  # fmt: skip
    sources = matched.merged[info.name]
    stored = [source.info.dtype for source in sources if source.info is not None]
    if has_base or not stored:
        stored.append(info.dtype)
    wanted = HEADER_DTYPE[recipe.output_dtype] if recipe.output_dtype else _promote(stored)
    experts = tuple(files.source(source) for source in sources)
    base = files.place(info) if has_base else None
    return TensorPlan(
        info.name, info.shape, wanted, base, experts, places, None, block, units, repeats, sums, digests,
        _base_sum(info.name, sources), part, spot,
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


def _check_parameters(recipe: Recipe, pieces: Sequence[Piece], tensors: tuple[TensorPlan, ...], layers: int) -> None:
    """Resolves every parameter at every tensor, so that nothing can be missing or out of range later."""
    resolver = PartResolver(recipe, layers)
    wide = any(stage.scope == "model" for stage in recipe.method.stages(_global_values(recipe.parts[0].recipe)))
    if wide and len({piece.keys for piece in pieces}) > 1:
        raise RecipeError(
            f"method {recipe.merge_method!r} measures its models as a whole with these parameters, and here not all "
            "parts of the recipe have the same ones: list the same models in every slice, or choose another method."
        )
    seen: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.carry is not None:
            continue
        resolved = resolver.resolve(tensor, tensor.name)
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
