"""Filters of parameters that match no tensor: a misspelt one changes nothing, so what was wanted never happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlmerge.errors import did_you_mean
from rlmerge.plan import TensorPlan
from rlmerge.recipe import Recipe
from rlmerge.slices import Part
from rlmerge.yaml_lines import Place


def idle_filters(recipe: Recipe, tensors: Sequence[TensorPlan]) -> list[str]:
    """A warning, with its line, for every filter whose text no name contains under which it is asked.

    Names are those of merged tensors in the output, and in the models where these have others. A filter that stands
    for several parts of a recipe must match in one of them.
    """
    found: dict[Place, str] = {}
    names: dict[Place, dict[str, None]] = {}
    for number, part in enumerate(recipe.parts):
        asked = [(place, text) for scope, home in _scopes(part) for place, text in _filters(scope, home)]
        if not asked:
            continue
        own = _names([tensor for tensor in tensors if tensor.part == number])
        for place, text in asked:
            found[place] = text
            names.setdefault(place, {}).update(own)
    return [_warning(recipe, place, text, list(names[place])) for place, text in found.items()
            if not any(text in name for name in names[place])]  # fmt: skip


def _names(tensors: Sequence[TensorPlan]) -> dict[str, None]:
    merged = [tensor for tensor in tensors if tensor.carry is None]
    return dict.fromkeys(
        name
        for tensor in merged
        for name in (tensor.name, tensor.known_as, *(tensor.spot.sources if tensor.spot is not None else ()))
    )


def _scopes(part: Part) -> Iterator[tuple[Mapping[str, Any], Place]]:
    """The parameters that hold in a part, and where they stand in the recipe."""
    recipe = part.recipe
    for entry in recipe.models:
        yield entry.parameters, recipe.place(entry, "parameters")
    homes: list[Place] = [recipe.place(recipe.models[0])[:-2]] if part.sliced else []
    homes += [("modules", part.module)] if part.module else []
    for scope, home in zip(recipe.scopes, [*homes, ()], strict=True):
        yield scope, (*home, "parameters")


def _filters(scope: Mapping[str, Any], home: Place) -> Iterator[tuple[Place, str]]:
    for key, value in scope.items():
        for number, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, dict) and entry["filter"] != "*":
                yield (*home, key, number, "filter"), entry["filter"]


def _warning(recipe: Recipe, place: Place, text: str, names: Sequence[str]) -> str:
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    shown = " and ".join(map(repr, dict.fromkeys([names[len(names) // 2], names[-1]]))) if names else "none"
    return (
        f"{recipe.at(place)}: {text!r} is part of no merged tensor's name, so this entry has no effect (mergekit "
        f"ignores it, too).{did_you_mean(text, parts)} Names are, for instance: {shown}."
    )
