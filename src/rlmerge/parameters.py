"""What a method's parameter may be in a recipe, and what it is at one tensor: scalars, gradients and filters.

The rules are mergekit 0.1.5's: a model's own value comes before the global one, that one before the method's default; a
list of numbers is a gradient over the layers; a list of `{filter, value}` entries is asked in order.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.methods.base import Method, Parameter

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
CATCH_ALL = (None, "", "*")


# ---- Values as written ------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as a message shows it: short, and in YAML's words."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        text = "a very long integer"
    return text if len(text) <= 60 else text[:57] + "..."


def as_number(value: Any) -> float:
    """A finite number from a number or from text that is one; a flag is none. Raises ValueError."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {show(value)}")
    return number


def as_integer(value: Any) -> int:
    """An integer from an integer, or from a number or text without a fraction. Raises ValueError."""
    number = as_number(value)
    if not number.is_integer():
        raise ValueError(f"expected an integer, found {show(value)}")
    return value if isinstance(value, int) else int(number)


def as_flag(value: Any) -> bool:
    """A flag from a flag, or from 0, 1 or the text 'true', which recipes for mergekit hold, too. Raises ValueError.

    mergekit takes every text for true: where the word says the other, nobody can know which of them is meant.
    """
    if isinstance(value, str) and value.lower() == "true":
        return True
    if isinstance(value, str) and value.lower() == "false":
        raise ValueError(
            "expected true or false, found the text 'false', which mergekit takes for true: drop the quotes"
        )
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"expected true or false, found {show(value)}")


def check_value(spec: Parameter, value: Any) -> Any:
    """The canonical form of what a recipe gives for a parameter; ValueError says what is wrong with it.

    A scalar, a list of scalars (a gradient), or a list of `{'filter': str, 'value': scalar or gradient}`. `[]` stays.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _check_scalar(spec, value)
    conditions = [isinstance(item, dict) for item in value]
    if all(conditions):
        return [_check_condition(spec, item, number) for number, item in enumerate(value, 1)]
    if any(conditions):
        raise ValueError("a list holds either numbers (a gradient) or {filter, value} entries, not both")
    return _check_gradient(spec, value)


def _check_condition(spec: Parameter, entry: dict[str, Any], number: int) -> dict[str, Any]:
    place = f"entry {number}"
    for key in entry:
        if key not in ("filter", "value"):
            raise ValueError(f"{place}: unknown key {show(key)}; an entry has 'filter' and 'value'")
    if "value" not in entry:
        raise ValueError(f"{place}: 'value' is missing")
    wanted = entry.get("filter")
    if not (wanted is None or isinstance(wanted, str)):
        raise ValueError(f"{place}: filter: expected part of a tensor name, found {show(wanted)}")
    value = entry["value"]
    try:
        value = _check_gradient(spec, value) if isinstance(value, list) else _check_scalar(spec, value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return {"filter": "*" if wanted in CATCH_ALL else wanted, "value": value}


def _check_gradient(spec: Parameter, values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError("an empty list has no value")
    if spec.kind == "integer":
        raise ValueError("an integer cannot be a gradient; use {filter, value} entries")
    return [_check_scalar(spec, value) for value in values]


def _check_scalar(spec: Parameter, value: Any) -> Any:
    if value is None:
        raise ValueError(f"there is no value; expected {expected(spec)}")
    if spec.kind == "flag":
        return as_flag(value)
    if spec.kind == "choice":
        if spec.flags and value not in spec.choices:
            with contextlib.suppress(ValueError):
                return spec.flags[not as_flag(value)]
        if value not in spec.choices:
            hint = did_you_mean(value, spec.choices) if isinstance(value, str) else ""
            raise ValueError(f"{show(value)} is not one of: {', '.join(spec.choices)}.{hint}")
        return value
    number = as_integer(value) if spec.kind == "integer" else as_number(value)
    low = spec.minimum is not None and number < spec.minimum
    high = spec.maximum is not None and number > spec.maximum
    if low or high or (spec.above is not None and number <= spec.above):
        raise ValueError(f"expected {expected(spec)}, found {show(value)}")
    return number


def expected(spec: Parameter) -> str:
    """What a parameter takes, in words: 'a number > 0 and <= 1'."""
    if spec.kind == "flag":
        return "true or false"
    if spec.kind == "choice":
        return f"one of: {', '.join(spec.choices)}"
    bounds = ((">=", spec.minimum), (">", spec.above), ("<=", spec.maximum))
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    return f"{'an integer' if spec.kind == 'integer' else 'a number'} {limits}".rstrip()


def dead_entries(value: Any) -> bool:
    """Whether a filter list has entries after one that matches everything."""
    return _is_filtered(value) and any(entry["filter"] == "*" for entry in value[:-1])


def _is_filtered(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


# ---- Layers -----------------------------------------------------------------------------------------------------


def layer_of(tensor: str) -> int | None:
    """The layer of a tensor: the first all-digits component of its name ('model.layers.12.mlp.up.weight' → 12).

    None for embeddings, final norm and head. Indices of experts come after the layer's.
    """
    for part in tensor.split("."):
        if _is_index(part):
            return int(part)
    return None


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def count_layers(tensors: Iterable[str], config: Mapping[str, Any]) -> int:
    """Layers of a model: the config's `num_hidden_layers` (also in `text_config`), else the largest index + 1."""
    for place in (config, config.get("text_config")):
        layers = place.get("num_hidden_layers") if isinstance(place, Mapping) else None
        if isinstance(layers, int) and not isinstance(layers, bool) and layers > 0:
            return layers
    return max((layer for layer in map(layer_of, tensors) if layer is not None), default=-1) + 1


_SENSES = re.compile(r"vision|visual|audio|speech")


def stack_depths(tensors: Iterable[str], config: Mapping[str, Any]) -> dict[str, int]:
    """The layers of each stack of a model, by what stands before their numbers, as {'model.layers.': 24}.

    `num_hidden_layers` is that of the text model: of the smallest stack that has as many. Numbers with gaps, as in a
    list of a few modules with activations between them, count no layers and have depth 0, unless there are no others.
    """
    found: dict[str, set[int]] = {}
    for name in tensors:
        layer = layer_of(name)
        if layer is not None:
            found.setdefault(stack_of(name), set()).add(layer)
    if len(found) == 1:
        return dict.fromkeys(found, count_layers((), config) or max(max(layers) + 1 for layers in found.values()))
    depths = {prefix: max(layers) + 1 if max(layers) < len(layers) else 0 for prefix, layers in found.items()}
    said = count_layers((), config)
    deep = {prefix: depth for prefix, depth in depths.items() if depth >= said > 0 and not _SENSES.search(prefix)}
    return depths | {prefix: said for prefix, depth in deep.items() if depth == min(deep.values())}


def stack_of(tensor: str) -> str:
    """What stands before the number of a tensor's layer, with the dot; '' outside of layers."""
    parts = tensor.split(".")
    place = next((k for k, part in enumerate(parts) if _is_index(part)), 0)
    return "".join(f"{part}." for part in parts[:place])


def interpolate(values: Sequence[Any], layer: int | None, layers: int) -> Any:
    """The value of a gradient at a layer, t = layer / (layers - 1): 0 without a layer, 1 in a one-layer model.

    Linear for numbers, never leaving the range between neighbours; flags and choices hold until the next one's place.
    """
    if layer is None:
        return values[0]
    if layers <= 1 or layer >= layers - 1:
        return values[-1]
    index, rest = divmod(layer * (len(values) - 1), layers - 1)
    low = values[index]
    if rest == 0 or isinstance(low, (bool, str)):
        return low
    high, part = values[index + 1], rest / (layers - 1)
    step = high - low
    value = low + part * step if math.isfinite(step) else (1 - part) * low + part * high
    return min(max(value, min(low, high)), max(low, high))


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a tensor of a slice, or of another stack than the text model's, stands: its layer among those of the slice
    or stack, None outside of them.

    sources   the names under which the models have it, in the order of the experts: what per-model filters test; ()
              where they are the output's
    """

    layer: int | None
    layers: int
    sources: tuple[str, ...] = ()


# ---- Resolution -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Resolved:
    """The parameters at a tensor: global `values`, and `per_model` arrays fp64[K] in the order of `recipe.experts`.

    In the arrays a flag is 0 or 1 and a choice is its place in `Parameter.choices`.
    """

    values: dict[str, Any]
    per_model: dict[str, NDArray[np.float64]]


class Resolver:
    """Resolves the parameters of a recipe at each tensor; tensors with equal outcomes share one `Resolved`."""

    def __init__(self, recipe: Recipe, method: Method, layers: int) -> None:
        self.method = method
        self.layers = layers
        self.experts = tuple(entry.key for entry in recipe.experts)
        self._scopes = recipe.scopes
        self._models = tuple(entry.parameters for entry in recipe.experts)
        self._recipe = recipe
        given = [value for scope in (*self._scopes, *self._models) for value in scope.values()]
        entries = [entry for value in given if _is_filtered(value) for entry in value]
        self._filters = tuple(dict.fromkeys(entry["filter"] for entry in entries if entry["filter"] != "*"))
        plain = [value for value in given if not _is_filtered(value)] + [entry["value"] for entry in entries]
        self._graded = any(isinstance(value, list) for value in plain)
        self._cache: dict[Any, Resolved] = {}
        self._outcomes: dict[Any, Resolved] = {}

    @property
    def constant(self) -> bool:
        """Whether all tensors resolve alike: no gradients and no filters."""
        return not self._filters and not self._graded

    def resolve(self, tensor: str, spot: Spot | None = None) -> Resolved:
        """The parameters at this tensor; RecipeError if one is missing or the method refuses the combination.

        Without a spot the tensor's name says its layer, and all models have it under that name.
        """
        if spot is None or not self._graded:
            layer, layers = layer_of(tensor) if self._graded else None, self.layers
        else:
            layer, layers = spot.layer, spot.layers
        names = (tensor,) if spot is None else (tensor, *spot.sources)
        place = (layer, layers, tuple(text in name for name in names for text in self._filters))
        if place not in self._cache:
            resolved = self._resolve(names, layer, layers)
            outcome = (
                tuple(resolved.values.items()),
                tuple((name, values.tobytes()) for name, values in resolved.per_model.items()),
            )
            if outcome not in self._outcomes:
                self._check(tensor, resolved)
                self._outcomes[outcome] = resolved
            self._cache[place] = self._outcomes[outcome]
        return self._cache[place]

    def _resolve(self, names: tuple[str, ...], layer: int | None, layers: int) -> Resolved:
        tensor, sources = names[0], names[1:] or names * len(self._models)
        values: dict[str, Any] = {}
        per_model: dict[str, NDArray[np.float64]] = {}
        for spec in self.method.parameters:
            if not spec.per_model:
                values[spec.name] = self._ask(spec, self._scopes, tensor, layer, layers)
                continue
            asked = [
                self._ask(spec, (own, *self._scopes), name, layer, layers) for own, name in zip(self._models, sources)
            ]
            if spec.kind == "choice":
                asked = [spec.choices.index(value) for value in asked]
            array = np.array(asked, np.float64)
            array.flags.writeable = False
            per_model[spec.name] = array
        return Resolved(values, per_model)

    def _ask(
        self, spec: Parameter, scopes: tuple[Mapping[str, Any], ...], tensor: str, layer: int | None, layers: int
    ) -> Any:
        """The first scope that yields a value, else the method's default."""
        for scope in scopes:
            value = scope.get(spec.name)
            if _is_filtered(value):
                matching = (entry["value"] for entry in value if entry["filter"] == "*" or entry["filter"] in tensor)
                value = next(matching, None)
            if isinstance(value, list):
                value = interpolate(value, layer, layers) if value else None
            if value is not None:
                return value
        if spec.default is None:
            raise RecipeError(
                f"{self._recipe.at(self._place(spec, scopes[0]))}: {tensor}: no value for {spec.name!r}, which method "
                f"{self.method.name!r} needs: no filter matches this tensor.\n"
                "  Add an entry without a filter, '- value: ...', as the last one."
            )
        return spec.default

    def _place(self, spec: Parameter, scope: Mapping[str, Any]) -> tuple[str | int, ...]:
        """Where the recipe gives a parameter: in the model that has this scope, else for all."""
        for entry in self._recipe.models:
            if entry.parameters is scope and spec.name in scope:
                return self._recipe.place(entry, "parameters", spec.name)
        return ("parameters", spec.name)

    def _check(self, tensor: str, resolved: Resolved) -> None:
        problems = self.method.check(resolved.values, resolved.per_model)
        if problems:
            place = self._recipe.at(("parameters",)) + ("" if self.constant else f" at {tensor}")
            raise RecipeError("\n".join(f"{place}: {problem}" for problem in problems))


# ---- Explanation ------------------------------------------------------------------------------------------------


def explain(
    recipe: Recipe, method: Method, tensors: Iterable[str], layers: int, spots: Mapping[str, Spot | None] | None = None
) -> list[dict[str, Any]]:
    """Groups of tensors with equal parameters, in the order of their first tensor; `spots` as in `Resolver.resolve`.

    Each is `{'tensors': patterns, 'count': n, 'values': {...}, 'models': {key: {...}}}`, JSON-able; a pattern folds
    numbers of layers and whole sub-modules: 'model.layers.{0-3}.mlp.*'.
    """
    resolver = Resolver(recipe, method, layers)
    names = list(dict.fromkeys(tensors))
    groups: dict[int, tuple[Resolved, list[str]]] = {}
    for name in names:
        resolved = resolver.resolve(name, (spots or {}).get(name))
        groups.setdefault(id(resolved), (resolved, []))[1].append(name)
    return [
        {
            "tensors": fold_names(members, names),
            "count": len(members),
            "values": dict(resolved.values),
            "models": _by_model(resolver, resolved),
        }
        for resolved, members in groups.values()
    ]


def _by_model(resolver: Resolver, resolved: Resolved) -> dict[str, dict[str, Any]]:
    specs = [spec for spec in resolver.method.parameters if spec.per_model]
    turn = {"number": float, "integer": int, "flag": bool}
    return {
        key: {
            spec.name: turn.get(spec.kind, lambda place, spec=spec: spec.choices[int(place)])(
                resolved.per_model[spec.name][k]
            )
            for spec in specs
        }
        for k, key in enumerate(resolver.experts)
    }


def fold_names(members: Sequence[str], names: Sequence[str]) -> list[str]:
    """Patterns that cover exactly `members` among all `names` of a model."""
    if len(members) == len(names) > 1:
        return ["*"]
    outside = _prefixes(set(names) - set(members))
    found: dict[str, set[int]] = {}
    for name in members:
        found.setdefault(_template(name), set()).add(-1 if (layer := layer_of(name)) is None else layer)
    width: dict[str, set[str]] = {}
    for template in found:
        for cut in _cuts(template):
            width.setdefault(cut, set()).add(template)
    patterns: dict[str, None] = {}
    for template, layers in found.items():
        pattern = template
        for cut in _cuts(template):
            alike = len(width[cut]) > 1 and all(found[other] == layers for other in width[cut])
            if alike and not any(_fill(cut, layer) in outside for layer in layers):
                pattern = f"{cut}.*"
                break
        patterns[_fill(pattern, _ranges(layers))] = None
    return list(patterns)


def _template(name: str) -> str:
    """The name with {} in place of its layer."""
    parts = name.split(".")
    place = next((k for k, part in enumerate(parts) if _is_index(part)), None)
    return name if place is None else ".".join([*parts[:place], "{}", *parts[place + 1 :]])


def _cuts(template: str) -> list[str]:
    """Prefixes that a pattern may end with, short ones first; never before the layer's place."""
    parts = template.split(".")
    first = parts.index("{}") + 1 if "{}" in parts else 1
    return [".".join(parts[:cut]) for cut in range(first, len(parts))]


def _prefixes(names: Iterable[str]) -> set[str]:
    return {".".join(parts[:cut]) for parts in (name.split(".") for name in names) for cut in range(1, len(parts))}


def _fill(pattern: str, layer: int | str) -> str:
    return pattern.replace("{}", str(layer), 1)


def _ranges(layers: set[int]) -> str:
    """'{0-3,7}', or the plain number of a single layer."""
    ordered = sorted(layers)
    if len(ordered) == 1:
        return str(ordered[0])
    starts = [ordered[0]] + [after for before, after in pairwise(ordered) if after != before + 1]
    ends = [before for before, after in pairwise(ordered) if after != before + 1] + [ordered[-1]]
    return "{" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends)) + "}"
