"""Merge methods, one file a family, found by name without importing the others.

`METHODS` maps a name to 'module:Class'; `get_method` imports that module only.
"""

from __future__ import annotations

import importlib
from functools import cache

from rlmerge.errors import RecipeError, did_you_mean

from .base import Arity, Block, Merged, Method, Parameter, Stage, Task

METHODS: dict[str, str] = {
    "arcee_fusion": "arcee_fusion:ArceeFusion",
    "breadcrumbs": "breadcrumbs:Breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs:BreadcrumbsTies",
    "dare_linear": "dare:DareLinear",
    "dare_ties": "dare:DareTies",
    "della": "della:Della",
    "della_linear": "della:DellaLinear",
    "dots": "dots:Dots",
    "fisher": "curvature:Fisher",
    "iso_c": "singular:IsoC",
    "iso_cts": "singular:IsoCts",
    "iso_merger": "iso_merger:IsoMerger",
    "karcher": "karcher:Karcher",
    "linear": "linear:Linear",
    "model_stock": "model_stock:ModelStock",
    "multislerp": "slerp:MultiSlerp",
    "nearswap": "nearswap:Nearswap",
    "nuslerp": "slerp:NuSlerp",
    "ota": "curvature:Ota",
    "passthrough": "passthrough:Passthrough",
    "ram": "ram:Ram",
    "ramplus": "ram:RamPlus",
    "ramplus_tl": "ram:RamPlusTensorLocal",
    "regmean": "regmean:RegMean",
    "resmerge": "resmerge:ResMerge",
    "sar": "sar:Sar",
    "sce": "sce:Sce",
    "slerp": "slerp:Slerp",
    "subspace_rewiring": "rewiring:SubspaceRewiring",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "ties": "ties:Ties",
    "tsv_m": "singular:TsvMerge",
}


def method_names() -> list[str]:
    """The names of all methods, alphabetically."""
    return sorted(METHODS)


@cache
def get_method(name: str) -> Method:
    """The method of that name. Raises RecipeError with a suggestion for an unknown one."""
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise RecipeError(f"unknown merge method {name!r}.{hint} Methods: {', '.join(method_names())}.")
    module, cls = METHODS[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)()


__all__ = ["METHODS", "Arity", "Block", "Merged", "Method", "Parameter", "Stage", "Task", "get_method", "method_names"]
