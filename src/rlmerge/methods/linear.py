"""Weighted averages of weights: `linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Arity, Average, Block, Merged, Method, Parameter, Result, Task, weights_cancel


class Linear(Method):
    """Source: Model soups (arXiv 2203.05482); parameters as mergekit's `linear`.

    As in mergekit, a `base_model` that is not listed is averaged in, too, where `weight` is given for all models at
    once; where each model has its own, the base only lends names, small files and the reference of the statistics.
    """

    name = "linear"
    summary = "weighted average of the weights themselves"
    formula = "θ = Σ wi·θi / Σ wi"
    source = "Model soups (arXiv 2203.05482)"
    parameters = (
        Parameter("weight", "number", None, "share of this model", per_model=True),
        Parameter("normalize", "flag", True, "divide by the sum of the weights"),
    )
    arity = Arity(minimum=1, base="optional")
    laws = frozenset({"permutation", "identity"})

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, Any]) -> list[str]:
        """Weights that sum to zero cannot be normalised."""
        if values["normalize"] and weights_cancel(per_model["weight"]):
            return ["the weights sum to 0, so they cannot be normalised: change a weight or set `normalize: false`"]
        return []

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Σ wi·θi in fp64, the normalised weights computed once."""
        weight = task.per_model["weight"]
        if task.values["normalize"]:
            weight = weight / np.sum(weight)
        return Merged(Average(weight))
