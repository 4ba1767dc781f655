"""Slices and modules of a recipe: which layers of which models make which part of the output.

A recipe is cut into parts, each of them an ordinary recipe with models, a base and parameters of its own: the whole, a
slice, or a module. What a slice says comes before what its module says, and that before what the recipe says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlmerge.parameters import as_integer, show
from rlmerge.yaml_lines import Place

if TYPE_CHECKING:
    from rlmerge.methods.base import Method
    from rlmerge.recipe import ModelEntry, Recipe
    from rlmerge.recipe_checks import Checker

Range = tuple[int, int]
"""Layers [start, stop) of a model."""


@dataclass(frozen=True)
class Part:
    """One part of a recipe.

    recipe   the models, the base and the parameters of this part, as if it were all
    module   which tensors it makes, by the key under `modules:`; '' for all
    number   the place of the slice among the `count` ones of its module
    ranges   the layers that each model gives, by its key; empty where it gives all
    base_range  those of the base, where it has one
    """

    recipe: Recipe
    module: str = ""
    number: int = 0
    count: int = 1
    ranges: Mapping[str, Range] = field(default_factory=dict)
    base_range: Range | None = None

    @property
    def sliced(self) -> bool:
        """Whether only some layers of the models take part."""
        return bool(self.ranges)


# ---- From a checked recipe to its parts -----------------------------------------------------------------------------


def parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """The parts in the order of the recipe; the recipe itself where it has neither slices nor modules."""
    if recipe.slices:
        return tuple(_slices(recipe, "", ("slices",), recipe.slices, (recipe.parameters,)))
    if not recipe.modules:
        return (Part(recipe),)
    found: list[Part] = []
    for name, module in recipe.modules.items():
        scopes = (module.get("parameters", {}), recipe.parameters)
        home: Place = ("modules", name)
        if "slices" in module:
            found += _slices(recipe, name, (*home, "slices"), module["slices"], scopes)
        else:
            entries = _entries(module["models"])
            places = [(*home, "models", k) for k in range(len(entries))]
            kept = [k for k, entry in enumerate(entries) if not _is_origin(recipe, entry, recipe.base_model)]
            found.append(Part(_inner(recipe, entries, places, kept, recipe.base_model, scopes), name))
    return tuple(found)


def _slices(
    recipe: Recipe, module: str, home: Place, slices: Sequence[Mapping[str, Any]], scopes: tuple[Mapping[str, Any], ...]
) -> list[Part]:
    return [
        _slice(recipe, module, (*home, number), number, len(slices), piece, scopes)
        for number, piece in enumerate(slices)
    ]


def _slice(
    recipe: Recipe,
    module: str,
    home: Place,
    number: int,
    count: int,
    piece: Mapping[str, Any],
    scopes: tuple[Mapping[str, Any], ...],
) -> Part:
    entries = _entries(piece["sources"])
    layers: list[Range] = [tuple(source["layer_range"]) for source in piece["sources"]]
    base = piece.get("base_model") or recipe.base_model
    listed = next((layers[k] for k, entry in enumerate(entries) if _names(entry, base)), None)
    kept = [k for k, entry in enumerate(entries) if not _is_origin(recipe, entry, base)]
    if recipe.method.base_entry == "model" and recipe.method.arity.base == "optional":
        base = None  # one model among the others, or it only lends its small files
    base_range = None
    if base is not None:
        base_range = listed or (layers[0] if len(set(layers)) == 1 else None)
    places = [(*home, "sources", k) for k in range(len(entries))]
    inner = _inner(recipe, entries, places, kept, base, (piece.get("parameters", {}), *scopes))
    return Part(inner, module, number, count, {entries[k].key: layers[k] for k in kept}, base_range)


def _inner(
    recipe: Recipe,
    entries: Sequence[ModelEntry],
    places: Sequence[Place],
    kept: Sequence[int],
    base: str | None,
    scopes: tuple[Mapping[str, Any], ...],
) -> Recipe:
    """The recipe of a part; its `parameters` are what holds where no filter and no gradient says more."""
    together = {key: value for scope in reversed(scopes) for key, value in scope.items()}
    return replace(
        recipe, models=tuple(entries[k] for k in kept), base_model=base, parameters=together, slices=(), modules={},
        _scopes=scopes, _places=tuple(places[k] for k in kept),
    )  # fmt: skip


def _entries(given: Sequence[Mapping[str, Any]]) -> list[ModelEntry]:
    from rlmerge.recipe import ModelEntry

    return [ModelEntry(**{key: value for key, value in entry.items() if key != "layer_range"}) for entry in given]


def _names(entry: ModelEntry, base: str | None) -> bool:
    return base is not None and os.path.normpath(entry.model) == os.path.normpath(base)


def _is_origin(recipe: Recipe, entry: ModelEntry, base: str | None) -> bool:
    """Whether an entry is the base from which deltas start, and so no expert."""
    method = recipe.method
    return _names(entry, base) and (method.arity.base == "required" or method.base_entry == "origin")


# ---- What `slices` and `modules` may hold ---------------------------------------------------------------------------

SLICE_KEYS = ("sources", "base_model", "parameters")
MODULE_KEYS = ("slices", "models", "parameters")


def check_slices(checker: Checker, method: Method, place: Place, given: Any) -> list[dict[str, Any]]:
    """The canonical slices; mistakes are noted in the checker."""
    if not isinstance(given, list) or not given:
        checker.add(place, f"expected a list of slices, '- sources: [...]' each, found {show(given)}.")
        return []
    return [_check_slice(checker, method, (*place, k), piece) for k, piece in enumerate(given)]


def _check_slice(checker: Checker, method: Method, place: Place, piece: Any) -> dict[str, Any]:
    sources = piece.get("sources") if isinstance(piece, dict) else None
    if not isinstance(piece, dict) or not isinstance(sources, list) or not sources:
        checker.add(place, "a slice is a mapping with 'sources', a list of '- model: path, layer_range: [0, 4]'.")
        return {"sources": []}
    checker.unknown(place, piece, SLICE_KEYS, method)
    entries = [_check_source(checker, method, (*place, "sources", k), source) for k, source in enumerate(sources)]
    lengths = {stop - start for start, stop in (entry["layer_range"] for entry in entries)}
    if len(lengths) > 1 and (0, 0) not in [tuple(entry["layer_range"]) for entry in entries]:
        said = ", ".join(str(entry["layer_range"]) for entry in entries)
        checker.add(place, f"the sources of a slice must give the same number of layers each, found {said}.")
    found: dict[str, Any] = {"sources": entries}
    found |= checker.values(place, ("base_model",), piece)
    parameters = checker.parameters(method, (*place, "parameters"), piece.get("parameters"), own=False)
    return found | ({"parameters": parameters} if parameters else {})


def _check_source(checker: Checker, method: Method, place: Place, source: Any) -> dict[str, Any]:
    """One source; layers (0, 0) where they are wrong, which is said."""
    given = dict(source) if isinstance(source, dict) else source
    layers = given.pop("layer_range", None) if isinstance(given, dict) else None
    entry = checker.entry(method, place, given)
    try:
        found = [as_integer(number) for number in layers] if isinstance(layers, list) else []
        if len(found) != 2:
            raise ValueError(f"expected the first layer and the one after the last, '[0, 4]', found {show(layers)}")
        if not 0 <= found[0] < found[1]:
            raise ValueError(f"{found} holds no layer: the first number must be >= 0 and less than the second")
    except ValueError as error:
        if isinstance(given, dict):
            checker.add((*place, "layer_range"), f"{error}.")
        found = [0, 0]
    return {"model": entry["model"], "layer_range": found, **entry}


def check_modules(checker: Checker, method: Method, place: Place, given: Any) -> dict[str, dict[str, Any]]:
    """The canonical modules by name; mistakes are noted in the checker."""
    if not isinstance(given, dict) or not given:
        checker.add(
            place, f"expected a mapping from prefixes of tensor names to slices or models, found {show(given)}."
        )
        return {}
    return {str(name): _check_module(checker, method, (*place, str(name)), module) for name, module in given.items()}


def _check_module(checker: Checker, method: Method, place: Place, module: Any) -> dict[str, Any]:
    ways = [key for key in ("slices", "models") if isinstance(module, dict) and module.get(key) is not None]
    if not isinstance(module, dict) or len(ways) != 1:
        checker.add(place, "a module is a mapping with either 'slices' or 'models'.")
        return {"models": []}
    checker.unknown(place, module, MODULE_KEYS, method)
    way = ways[0]
    found: dict[str, Any] = {}
    if way == "slices":
        found[way] = check_slices(checker, method, (*place, way), module[way])
    else:
        found[way] = checker.models(method, (*place, way), module[way])
    parameters = checker.parameters(method, (*place, "parameters"), module.get("parameters"), own=False)
    return found | ({"parameters": parameters} if parameters else {})


def own_parameters(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every mapping of parameters below the top of a recipe's data: those of models, slices, modules and sources."""
    found: list[dict[str, Any]] = []
    pieces = list(data.get("slices") or ())
    for module in (data.get("modules") or {}).values():
        pieces += [*module.get("slices", ()), *module.get("models", ())]
        found.append(module.get("parameters", {}))
    for piece in [*pieces, *(data.get("models") or ())]:
        found.append(piece.get("parameters", {}))
        found += [source.get("parameters", {}) for source in piece.get("sources", ())]
    return [parameters for parameters in found if parameters]
