"""`rlmerge explain`: the resolved parameters of every group of tensors."""

from __future__ import annotations

import json
import sys
from typing import Any

from .options import Base, Expert, Fisher, Json, MethodName, Quiet, RecipePath, Set, make_recipe


def explain(
    recipe: RecipePath = None,
    base: Base = None,
    expert: Expert = None,
    fisher: Fisher = None,
    method: MethodName = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print which parameters hold for which tensors, gradients, filters and defaults resolved."""
    from rlmerge.preflight import explain as run

    made, _ = make_recipe(recipe, base, expert, fisher, method, set_)
    groups = run(made)
    if json_:
        json.dump(groups, sys.stdout)
        print()
    elif not quiet:
        for group in groups:
            _show(group)


def _show(group: dict[str, Any]) -> None:
    names = ", ".join(group["tensors"][:6]) + (", …" if len(group["tensors"]) > 6 else "")
    print(f"{group['count']} tensor(s): {names}")
    if "carried" in group:
        print(f"  copied from the base ({group['carried']})")
    for key, value in group["values"].items():
        print(f"  {key}: {value}")
    for model, values in group["models"].items():
        print(f"  {model}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
