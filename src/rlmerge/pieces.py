"""The parts of a recipe with their checkpoints: what each part sees of every model, and what its output is called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.hub import has_headers_only
from rlmerge.checkpoint.pack import check_base
from rlmerge.checkpoint.reference import open_model
from rlmerge.checkpoint.restack import Layers, Stack, find_layers, inside, module_of, place_outside, view
from rlmerge.errors import MismatchError, RecipeError
from rlmerge.heads import embedding_as, is_tied, separate_head
from rlmerge.parameters import Spot, count_layers, layer_of, stack_depths, stack_of
from rlmerge.recipe import Recipe
from rlmerge.slices import Part, Range


@dataclass(frozen=True)
class Piece:
    """A part with opened models.

    donor     the base, or the first model: its tensors are those of the output
    experts   in the order of the part's recipe
    keys      their keys
    names     for each expert {name in the output: its own name}; empty where all have the output's names
    layers    the layers of the part in the donor, where it is a slice: where its names have their numbers
    start     the number in the output of its first layer
    roles     tensors outside of the layers → 'before' or 'after' them
    depths    where it is no slice: the layers of each stack that has others in number than the recipe's donor
    """

    part: Part
    base: Checkpoint | None
    donor: Checkpoint
    experts: tuple[Checkpoint, ...]
    keys: tuple[str, ...]
    names: tuple[Mapping[str, str], ...] = ()
    layers: Layers | None = None
    start: int = 0
    roles: Mapping[str, str] = field(default_factory=dict)
    depths: Mapping[str, int] = field(default_factory=dict)

    def spot(self, name: str) -> Spot | None:
        """Where a tensor stands for gradients and filters; None where its name alone says it."""
        if self.layers is None:
            depth = self.depths.get(stack_of(name))
            return None if depth is None else Spot(layer_of(name) if depth else None, depth)
        layer = self.layers.layer(name)
        first, last = next(iter(self.part.ranges.values()))
        sources = tuple(names.get(name, name) for names in self.names)
        return Spot(None if layer is None else layer - self.start, last - first, sources)


class Models:
    """The checkpoints of a recipe, each opened once, by the path that a reference means.

    planned  what will lie in folders that do not exist yet
    """

    def __init__(self, recipe: Recipe, planned: Mapping[Path, Checkpoint] = MappingProxyType({})) -> None:
        self._planned = planned
        self._open: dict[str, Checkpoint] = {}
        recipe.check_paths()
        paths, adapters = recipe.model_paths, recipe.adapter_paths
        # a part may have a base of its own
        base = None if recipe.slices or recipe.modules else recipe.base_path
        self.experts = {
            entry.key: self._get(paths[entry.key], entry.model, adapters[entry.key], base) for entry in recipe.experts
        }
        self.base = self.base_of(recipe)
        self.donor = self.base if self.base is not None else self.experts[recipe.models[0].key]

    def base_of(self, recipe: Recipe) -> Checkpoint | None:
        """The base of a recipe, or of one of its parts."""
        path = recipe.base_path
        return None if path is None or recipe.base_model is None else self._get(path, recipe.base_model)

    def _get(self, path: Path, reference: str, adapter: Path | None = None, base: Path | None = None) -> Checkpoint:
        key = f"{os.path.abspath(path)}\0{reference}"
        if key not in self._open:
            self._open[key] = open_model(path, adapter, reference, base, self._planned.get(path))
        return self._open[key]

    @property
    def all(self) -> list[Checkpoint]:
        """Donor first, then bases and experts."""
        return list({id(one): one for one in (self.donor, *self._open.values())}.values())


def open_pieces(recipe: Recipe, models: Models) -> tuple[Piece, ...]:
    """The pieces of a recipe, in its order. Raises RecipeError and MismatchError for what cannot be stacked."""
    modules = list(recipe.modules)
    starts: dict[str, int] = {}
    found = []
    for part in recipe.parts:
        base = models.base_of(part.recipe)
        keys = tuple(entry.key for entry in part.recipe.experts)
        experts = tuple(models.experts[key] for key in keys)
        donor = base if base is not None else models.experts[part.recipe.models[0].key]
        check_kinds(base, donor, experts)
        if not part.module and not part.sliced:
            return (Piece(part, base, donor, experts, keys, depths=_depths(donor, models.donor)),)
        if not part.sliced:
            piece = _module(part, base, donor, experts, keys, modules)
            found.append(replace(piece, depths=_depths(donor, models.donor)))
        else:
            start = starts.get(part.module, 0)
            head = _head(recipe, models, part)
            piece = _sliced(part, base, donor, experts, keys, modules, start, head)
            first, last = next(iter(part.ranges.values()))
            starts[part.module] = start + last - first
            found.append(piece)
    return tuple(found)


def _depths(donor: Checkpoint, usual: Checkpoint) -> dict[str, int]:
    """The stacks of a part's donor that are not as deep as the text model of the recipe's."""
    layers = count_layers(usual.tensors, usual.config)
    return {stack: n for stack, n in stack_depths(donor.tensors, donor.config).items() if n != layers}


def check_kinds(base: Checkpoint | None, donor: Checkpoint, experts: Iterable[Checkpoint]) -> None:
    """Raises for an adapter or a pack in the place of a base, without one, or with another one than its own."""
    for checkpoint in (donor, *experts):
        if checkpoint.adapter and checkpoint is donor and base is not None:
            raise MismatchError(
                f"{checkpoint.reference}: a LoRA adapter cannot be the base. Write the model it was trained from as "
                "`base_model:` and the adapter under `models:`."
            )
        if checkpoint.adapter and base is None:
            raise RecipeError(
                f"{checkpoint.reference}: a LoRA adapter is an update and not a model. Write the model it was trained "
                "from as `base_model:`, or before it, 'MODEL+ADAPTER'."
            )
    if base is not None and base.pack is not None:
        raise MismatchError(
            f"{base.reference}: a delta pack cannot be the base: it holds what changed in one. Write the model that it "
            "was made for as `base_model:`, or unpack it (rlmerge unpack) if its expert is to be the base."
        )
    for checkpoint in (donor, *experts):
        if checkpoint.pack is not None and base is None:
            raise RecipeError(
                f"{checkpoint.reference}: a delta pack is what changed in a model. Write that model as `base_model:`, "
                "or unpack it first (rlmerge unpack)."
            )
        absent = base is not None and (base.planned is not None or has_headers_only(base.folder))
        if checkpoint.pack is not None and base is not None and not absent:
            check_base(checkpoint, base)


# ---- Modules ------------------------------------------------------------------------------------------------------


def _of_module(checkpoint: Checkpoint, base: Checkpoint | None, module: str, modules: Sequence[str]) -> list[str]:
    """The names of the tensors of a module; of an adapter, those that it may change."""
    names = list((base if checkpoint.adapter and base is not None else checkpoint).tensors)
    if not module:
        return names
    of = module_of(names, modules)
    return [name for name in names if of[name] == module]


def _module(
    part: Part, base: Checkpoint | None, donor: Checkpoint, experts: tuple[Checkpoint, ...], keys: tuple[str, ...],
    modules: Sequence[str],
) -> Piece:  # fmt: skip
    def seen(checkpoint: Checkpoint) -> Checkpoint:
        return view(checkpoint, {name: name for name in _of_module(checkpoint, base, part.module, modules)})

    views = {id(one): seen(one) for one in (donor, *experts)}
    found = tuple(views[id(one)] for one in experts)
    return Piece(part, None if base is None else views[id(donor)], views[id(donor)], found, keys)


# ---- Slices -------------------------------------------------------------------------------------------------------


def _sliced(
    part: Part, base: Checkpoint | None, donor: Checkpoint, experts: tuple[Checkpoint, ...], keys: tuple[str, ...],
    modules: Sequence[str], start: int, head: str | None,
) -> Piece:  # fmt: skip
    donor_range = part.base_range if base is not None else part.ranges[part.recipe.models[0].key]
    assert donor_range is not None
    names_of_donor = _of_module(donor, base, part.module, modules)
    layers = find_layers(names_of_donor, donor.reference)
    recipe, outer = part.recipe, [name for name in names_of_donor if layers.layer(name) is None]
    patterns = (recipe.pre_weights, recipe.post_weights)
    roles = place_outside(donor, outer, *patterns, is_tied(donor) and head is None)
    taken = {
        word for word, is_here in (("before", part.number == 0), ("after", part.number == part.count - 1)) if is_here
    }

    def seen(checkpoint: Checkpoint, ranges: Range) -> dict[str, str]:
        """{own name: name in the output} of the slice."""
        names = _of_module(checkpoint, base, part.module, modules)
        own = find_layers(names, checkpoint.reference)
        if ranges[1] > own.count:
            raise RecipeError(
                f"{checkpoint.reference}: has layers 0 to {own.count - 1}, so layer_range: [{ranges[0]}, {ranges[1]}] "
                f"ends beyond them; the second number is the one after the last layer, at most {own.count}.",
                _place(part, checkpoint),
            )
        found = {}
        for name in names:
            layer = own.layer(name)
            if layer is None:
                # a tensor that the donor lacks is told apart by its own name; matching then says what is wrong
                tied = is_tied(checkpoint) and head is None
                word = roles.get(name) or place_outside(checkpoint, [name], *patterns, tied)[name]
                if word in taken:
                    found[name] = name
            elif ranges[0] <= layer < ranges[1]:
                found[name] = own.renamed(name, start + layer - ranges[0])
        if head is not None and taken == {"after"}:
            found |= embedding_as(head, base if checkpoint.adapter and base is not None else checkpoint, names)
        return found

    _check_packs(part, donor_range, experts, keys)
    of_donor = seen(donor, donor_range)
    maps = [seen(checkpoint, part.ranges[key]) for key, checkpoint in zip(keys, experts)]
    views = tuple(view(checkpoint, names) for checkpoint, names in zip(experts, maps))
    seen_donor = view(donor, of_donor)
    if base is None:
        seen_donor = next(one for one, key in zip(views, keys) if key == part.recipe.models[0].key)
    turned = tuple({new: old for old, new in names.items()} for names in maps)
    roles = {name: word for name, word in roles.items() if word in taken}
    roles |= {new: "after" for old, new in of_donor.items() if layers.layer(old) is None and old not in roles}
    return Piece(
        part, None if base is None else seen_donor, seen_donor, views, keys, turned, layers, start, roles
    )  # fmt: skip


def _head(recipe: Recipe, models: Models, part: Part) -> str | None:
    """The head of a module made of several slices, where it is a matrix of its own."""
    slices = [other for other in recipe.parts if other.module == part.module]
    found: dict[int, Checkpoint] = {}
    for end in (slices[0], slices[-1]) if len(slices) > 1 else ():
        base = models.base_of(end.recipe)
        for one in (base, *(models.experts[entry.key] for entry in end.recipe.experts)):
            if one is not None and not one.adapter:
                names = _of_module(one, base, part.module, list(recipe.modules))
                found[id(one)] = one if not part.module else view(one, {name: name for name in names})
    return separate_head(found.values())


def _check_packs(part: Part, base_range: Range, experts: Sequence[Checkpoint], keys: Sequence[str]) -> None:
    for key, checkpoint in zip(keys, experts):
        if (checkpoint.pack is not None or checkpoint.adapter) and part.ranges[key] != base_range:
            kind = "delta pack" if checkpoint.pack is not None else "LoRA adapter"
            raise RecipeError(
                f"{checkpoint.reference}: a {kind} changes the layers of its base that have its own numbers, and here "
                f"the base gives layers {list(base_range)}, the {kind} {list(part.ranges[key])}. "
                "Make a full model of it."
            )


def _place(part: Part, checkpoint: Checkpoint) -> tuple[str | int, ...]:
    entry = next((entry for entry in part.recipe.models if entry.model == checkpoint.reference), None)
    return ("base_model",) if entry is None else part.recipe.place(entry, "layer_range")


def stacks_of(pieces: Sequence[Piece], donor: Checkpoint, modules: Sequence[str]) -> tuple[Stack, ...]:
    """What the donor's config.json must say of the layers instead, for every module that is sliced."""
    found = []
    for module in dict.fromkeys(piece.part.module for piece in pieces if piece.layers is not None):
        of = [piece for piece in pieces if piece.part.module == module]
        depth = find_layers(_of_module(donor, None, module, modules), donor.reference).count
        layers = []
        for piece in of:
            first, last = piece.part.base_range if piece.base is not None and piece.part.base_range else (
                piece.part.ranges[piece.part.recipe.models[0].key]
            )  # fmt: skip
            layers += [(piece.donor.config, layer) for layer in range(first, last)]
        found.append(Stack(depth, tuple(layers), inside(donor.config, module)))
    return tuple(found)
