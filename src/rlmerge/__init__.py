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
    "FisherSettings": "fisher.estimate",
    "GramSettings": "gram.estimate",
    "Grams": "gram.estimate",
    "Outcome": "api",
    "Packed": "packs.write",
    "Packing": "packs.write",
    "Recipe": "recipe",
    "RlmergeError": "errors",
    "SequenceChoice": "fisher.data",
    "Stages": "stages",
    "Step": "api",
    "Unpacked": "packs.restore",
    "check": "preflight",
    "combine_fishers": "fisher.combine",
    "convert": "checkpoint.convert",
    "estimate_fisher": "fisher.estimate",
    "estimate_gram": "gram.estimate",
    "explain": "preflight",
    "fisher_from_adam": "fisher.adam",
    "geometry_schema": "geometry.document",
    "get_method": "methods",
    "inspect": "geometry.inspect",
    "judge_fishers": "fisher.stats",
    "load_plugins": "plugins",
    "load_recipe": "recipe",
    "load_stages": "stages",
    "merge": "api",
    "merge_to": "api",
    "merge_to_folder": "api",
    "method_names": "methods",
    "pack": "packs.write",
    "parse_recipe": "recipe",
    "recipe_from_parts": "recipe_flags",
    "recipe_schema": "schema",
    "unpack": "packs.restore",
    "verify": "verification",
    "write_report": "report.outputs",
}

__all__ = [
    "FisherSettings",
    "GramSettings",
    "Grams",
    "Outcome",
    "Packed",
    "Packing",
    "Recipe",
    "RlmergeError",
    "SequenceChoice",
    "Stages",
    "Step",
    "Unpacked",
    "__version__",
    "check",
    "combine_fishers",
    "convert",
    "estimate_fisher",
    "estimate_gram",
    "explain",
    "fisher_from_adam",
    "geometry_schema",
    "get_method",
    "inspect",
    "judge_fishers",
    "load_plugins",
    "load_recipe",
    "load_stages",
    "merge",
    "merge_to",
    "merge_to_folder",
    "method_names",
    "pack",
    "parse_recipe",
    "recipe_from_parts",
    "recipe_schema",
    "unpack",
    "verify",
    "write_report",
]

if TYPE_CHECKING:
    from .api import Outcome, Step, merge, merge_to, merge_to_folder
    from .checkpoint.convert import convert
    from .errors import RlmergeError
    from .fisher.adam import fisher_from_adam
    from .fisher.combine import combine_fishers
    from .fisher.data import SequenceChoice
    from .fisher.estimate import FisherSettings, estimate_fisher
    from .fisher.stats import judge_fishers
    from .geometry.document import geometry_schema
    from .geometry.inspect import inspect
    from .gram.estimate import Grams, GramSettings, estimate_gram
    from .methods import get_method, method_names
    from .packs.restore import Unpacked, unpack
    from .packs.write import Packed, Packing, pack
    from .plugins import load_plugins
    from .preflight import check, explain
    from .recipe import Recipe, load_recipe, parse_recipe
    from .recipe_flags import recipe_from_parts
    from .report.outputs import write_report
    from .schema import recipe_schema
    from .stages import Stages, load_stages
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
