"""The merges that are compared: every method that there is, at its defaults, and SAR without Fishers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlmerge.methods import get_method, method_names
from rlmerge.recipe import Recipe, recipe_from_parts


@dataclass(frozen=True)
class Contender:
    """A method with its settings. fishers: whether it is given one for each expert."""

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    fishers: bool = False


def contenders(experts: int) -> list[Contender]:
    """All methods that take so many experts; a parameter without default is 1 (the weight of a model, so far)."""
    found = []
    for name in method_names():
        method = get_method(name)
        most = method.arity.maximum
        if method.arity.minimum <= experts and (most is None or experts <= most):
            required = {parameter.name: 1.0 for parameter in method.parameters if parameter.default is None}
            found.append(Contender(name, name, required, fishers=name == "sar"))
    return [*found, Contender("sar-delta2", "sar", {"sensitivity": "delta2"})]


def recipe_of(contender: Contender, base: Path, experts: Sequence[Path], fishers: Sequence[Path]) -> Recipe:
    """The recipe of one merge."""
    given = [str(path) for path in fishers] if contender.fishers else []
    return recipe_from_parts(
        str(base), [str(path) for path in experts], contender.method, contender.settings, fishers=given
    )
