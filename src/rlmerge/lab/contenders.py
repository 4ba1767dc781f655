"""The merges that are compared: every method that there is, at its defaults where they cut, and SAR without Fishers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlmerge.methods import get_method, method_names

HALVES = ("breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")
"""Methods whose default density cuts nothing, which makes them others that are listed already: they keep half."""


@dataclass(frozen=True)
class Contender:
    """A method with its settings. fishers: whether it is given one for each expert."""

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    fishers: bool = False


def contenders(experts: int, labels: Sequence[str] = ()) -> list[Contender]:
    """All methods that take so many experts, or those of these labels.

    A parameter without default is 1 (the weight of a model, so far).
    """
    found = []
    for name in method_names():
        method = get_method(name)
        most = method.arity.maximum
        if method.arity.minimum <= experts and (most is None or experts <= most):
            required = {parameter.name: 1.0 for parameter in method.parameters if parameter.default is None}
            defaults = {parameter.name: parameter.default for parameter in method.parameters}
            cut = {"density": 0.5} if name in HALVES else {}
            found.append(Contender(name, name, required | cut, fishers=method.uses_fisher(defaults)))
    found.append(Contender("sar-delta2", "sar", {"sensitivity": "delta2"}))
    return [one for one in found if not labels or one.label in labels]


def write_recipe(
    contender: Contender, base: Path, experts: dict[str, Path], fishers: dict[str, Path], out: Path
) -> None:
    """Writes the recipe of one merge, as a user would write it; experts and their Fishers by name.

    Paths are relative to the recipe's folder.
    """

    def shown(path: Path) -> str:
        return os.path.relpath(path, out.parent)

    models = []
    for name, path in experts.items():
        fisher = {"fisher": shown(fishers[name])} if contender.fishers else {}
        models.append({"model": shown(path), "name": name, **fisher})
    recipe: dict[str, Any] = {"merge_method": contender.method, "base_model": shown(base), "models": models}
    settings, method = dict(contender.settings), get_method(contender.method)
    if method.averages_base:  # parameters for all, or none at all, would make the base one more model
        own = {spec.name: settings.pop(spec.name) for spec in method.parameters if spec.per_model}
        for entry in models:
            entry |= {"parameters": own} if own else {}
        if not own:
            del recipe["base_model"]
    if settings:
        recipe["parameters"] = settings
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(recipe, sort_keys=False))
