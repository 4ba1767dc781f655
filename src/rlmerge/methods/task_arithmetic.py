"""Sums of task vectors: `task_arithmetic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Block, Change, Merged, Method, Parameter, Result, Task, Update, weights_cancel

WEIGHT = Parameter("weight", "number", None, "factor of this model's delta; 0 removes it", per_model=True)
LAMBDA = Parameter("lambda", "number", 1.0, "factor of the merged delta", late=True)


class TaskArithmetic(Method):
    """Source: Editing models with task arithmetic (arXiv 2212.04089); parameters as mergekit's."""

    name = "task_arithmetic"
    summary = "sum of the weighted deltas"
    formula = "θ = θ0 + λ·Σ wi·δi (divided by Σ wi with normalize)"
    source = "Editing models with task arithmetic (arXiv 2212.04089)"
    parameters = (
        WEIGHT,
        LAMBDA,
        Parameter("normalize", "flag", False, "divide by the sum of the weights", late=True),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, Any]) -> list[str]:
        """Weights that sum to zero cannot be normalised."""
        if values["normalize"] and weights_cancel(per_model["weight"]):
            return ["the weights sum to 0, so they cannot be normalised: change a weight or set `normalize: false`"]
        return []

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """θ0 + λ·Σ wi·δi."""
        weight = task.per_model["weight"]
        scale = float(task.values["lambda"])
        if task.values["normalize"]:
            scale /= float(np.sum(weight))
        changes = []
        for patch in block.patches:
            if patch.alone:
                changes.append(Update(patch.where, patch.delta[0], float(weight[patch.experts[0]]), scale))
                continue
            old, out = block.base_at(patch.where), np.empty(patch.where.size)
            block.kernels.task_arithmetic(old, patch.delta, weight[patch.experts], scale, out)
            changes.append(Change(patch.where, old, out))
        return Merged(changes)
