"""One model, scaled: `passthrough`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import Arity, Average, Block, Merged, Method, Parameter, Result, Task


class Passthrough(Method):
    """Source: mergekit's `passthrough`, with its parameter; filters say which tensors to scale. Cost: one pass.

    `base_model` may be given: it is the reference of the statistics, and what a LoRA or a delta pack adds to.
    """

    name = "passthrough"
    summary = "one model as it is, or with tensors scaled"
    formula = "θ = s·θ1"
    source = "mergekit (passthrough)"
    parameters = (Parameter("scale", "number", 1.0, "factor of the weights", per_model=True),)
    arity = Arity(1, 1, base="optional")
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """s·θ1."""
        if not block.additive[0] and float(task.per_model["scale"][0]) == 1.0:
            return Merged(Average(np.ones(1)))
        value = block.expert[0].astype(np.float64)
        if block.additive[0]:
            value = block.base.astype(np.float64) + value
        return Merged(value * float(task.per_model["scale"][0]))
