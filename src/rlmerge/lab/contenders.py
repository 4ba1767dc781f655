"""The merges that are compared: every method that there is, at its defaults where they cut, and SAR without Fishers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlmerge.methods import Method, get_method, method_names

HALVES = ("breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")
"""Methods whose default density cuts nothing, which makes them others that are listed already: they keep half."""


INPUTS = ("fisher", "gram")
"""What a method may be given for each expert, beside the model: keys of a recipe's models, and kinds of cells."""


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    each     parameters of single models, by the model's name
    inputs   what it is given for each expert, of INPUTS
    """

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    each: dict[str, dict[str, Any]] = field(default_factory=dict)


def contenders(experts: int, labels: Sequence[str] = ()) -> list[Contender]:
    """All methods that take so many experts, or those of these labels."""
    found = []
    for name in method_names():
        method = get_method(name)
        most = method.arity.maximum
        if method.arity.minimum <= experts and (most is None or experts <= most):
            cut = {"density": 0.5} if name in HALVES else {}
            found.append(Contender(name, name, required(method) | cut, inputs_of(method, {})))
    found.append(Contender("sar-delta2", "sar", {"sensitivity": "delta2"}))
    return [one for one in found if not labels or one.label in labels]


def required(method: Method) -> dict[str, Any]:
    """What must be written: a parameter without default is 1 (a weight, so far, and the t of nearswap)."""
    return {parameter.name: 1.0 for parameter in method.parameters if parameter.default is None}


def inputs_of(method: Method, settings: dict[str, Any]) -> tuple[str, ...]:
    """What the method reads for each expert at these settings, of INPUTS."""
    values = {parameter.name: parameter.default for parameter in method.parameters} | settings
    reads = {"fisher": method.uses_fisher(values), "gram": method.uses_gram(values)}
    return tuple(kind for kind in INPUTS if reads[kind])


def write_recipe(
    contender: Contender, base: Path, experts: dict[str, Path], inputs: dict[str, dict[str, Path]], out: Path
) -> None:
    """Writes the recipe of one merge, as a user would write it; experts by name, inputs by kind and name of the expert.

    Paths are relative to the recipe's folder.
    """

    def shown(path: Path) -> str:
        return os.path.relpath(path, out.parent)

    method, settings, own = get_method(contender.method), dict(contender.settings), {}
    if method.averages_base:  # parameters for all, or none at all, would make the base one more model
        own = {
            spec.name: settings.pop(spec.name) for spec in method.parameters if spec.per_model and spec.name in settings
        }
    models = []
    for name, path in experts.items():
        entry: dict[str, Any] = {"model": shown(path), "name": name}
        entry |= {kind: shown(inputs[kind][name]) for kind in contender.inputs}
        parameters = own | contender.each.get(name, {})
        models.append(entry | ({"parameters": parameters} if parameters else {}))
    recipe: dict[str, Any] = {"merge_method": contender.method, "base_model": shown(base), "models": models}
    if method.averages_base and not any("parameters" in entry for entry in models):
        del recipe["base_model"]
    if settings:
        recipe["parameters"] = settings
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(recipe, sort_keys=False))
