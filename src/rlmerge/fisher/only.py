"""What a recipe will ask of a Fisher: which tensors, and at which coordinates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import FisherError
from rlmerge.execute.inputs import Inputs, Space, blocks_of
from rlmerge.kernels import load_kernels
from rlmerge.plan import Plan
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe, load_recipe

from .on_demand import without_fishers


def tensors_asked(path: Path | str) -> tuple[Recipe, Plan, set[str]]:
    """The recipe, its plan without Fishers, and the names of the tensors whose Fishers the merge will read.

    Raises FisherError for a recipe that reads none, or whose coordinates are not those of its models.
    """
    recipe = load_recipe(path)
    values = {spec.name: recipe.parameters.get(spec.name, spec.default) for spec in recipe.method.parameters}
    if not recipe.method.uses_fisher(values):
        raise FisherError(f"{path}: its method {recipe.merge_method!r} reads no Fisher with these parameters.")
    with recipe.located():
        plan = make_plan(without_fishers(recipe))
    if plan.vocabulary is not None:
        raise FisherError(
            f"{path}: gives the output a vocabulary of its own, so what it asks for are not coordinates of the models. "
            "Estimate without --only."
        )
    return recipe, plan, {tensor.name for tensor in plan.tensors if tensor.carry is None}


def positions_asked(recipe: Recipe, plan: Plan) -> dict[str, NDArray[np.int64]]:
    """Per tensor, the flat coordinates at which the merge will ask: where several experts changed something, and for a
    sparsifier that ranks by Fishers wherever any did. Reads base and experts once.
    """
    everywhere = recipe.parameters.get("sparsify") == "fisher_magnitude"
    inputs = Inputs(plan, load_kernels("auto", plan.values_read))
    found: dict[str, NDArray[np.int64]] = {}
    space = Space()
    try:
        for number, tensor in enumerate(plan.tensors):
            if tensor.carry is not None:
                continue
            places = []
            for unit in range(len(tensor.units)):
                for start, stop in blocks_of(tensor, unit):
                    patches = inputs.block(number, start, stop, space).patches
                    here = [patch.where for patch in patches if everywhere or not patch.alone]
                    if here:
                        places.append(start + np.sort(np.concatenate(here)).astype(np.int64))
            found[tensor.name] = np.concatenate(places) if places else np.zeros(0, np.int64)
    finally:
        inputs.close()
    return found
