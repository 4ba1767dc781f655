"""rlmerge: merge language models trained by reinforcement learning with verifiable rewards, without breaking them.

import rlmerge
rlmerge.merge_to_folder("recipe.yml", "out")          # what `rlmerge merge recipe.yml out` does
for name, array in rlmerge.merge("recipe.yml"): ...   # the tensors, without touching the disk
rlmerge.merge_to(model, "recipe.yml")                 # into a loaded torch model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Outcome": "api",
    "Recipe": "recipe",
    "RlmergeError": "errors",
    "Step": "api",
    "check": "preflight",
    "convert": "checkpoint.convert",
    "explain": "preflight",
    "get_method": "methods",
    "load_recipe": "recipe",
    "merge": "api",
    "merge_to": "api",
    "merge_to_folder": "api",
    "method_names": "methods",
    "parse_recipe": "recipe",
    "recipe_from_parts": "recipe",
    "verify": "verification",
}

__all__ = [
    "Outcome",
    "Recipe",
    "RlmergeError",
    "Step",
    "__version__",
    "check",
    "convert",
    "explain",
    "get_method",
    "load_recipe",
    "merge",
    "merge_to",
    "merge_to_folder",
    "method_names",
    "parse_recipe",
    "recipe_from_parts",
    "verify",
]

if TYPE_CHECKING:
    from .api import Outcome, Step, merge, merge_to, merge_to_folder
    from .checkpoint.convert import convert
    from .errors import RlmergeError
    from .methods import get_method, method_names
    from .preflight import check, explain
    from .recipe import Recipe, load_recipe, parse_recipe, recipe_from_parts
    from .verification import verify
    from .version import VERSION as __version__


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import rlmerge` itself stays instant."""
    if name == "__version__":
        return importlib.import_module(".version", __name__).VERSION
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
