"""NearSwap: take the second model where it is near the base, move at most so far elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import Arity, Block, Change, Merged, Method, Parameter, Result, Task


class Nearswap(Method):
    """Source: QuartetAnemoi-70B (alchemonaut, 2024), as mergekit's `nearswap`.

    Its interpolation by min(1, t/|δ|) is the delta clipped to [−t, t].
    Cost: one pass.
    """

    name = "nearswap"
    summary = "the model where it is within t of the base, a step of t towards it elsewhere"
    formula = "θ = θ0 + clip(δ, −t, t)"
    source = "QuartetAnemoi-70B-t0.0001 (alchemonaut, 2024)"
    parameters = (Parameter("t", "number", None, "largest change of a weight (absolute, as published)", above=0),)
    arity = Arity(minimum=1, maximum=1)
    laws = frozenset({"sign", "zero"})

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Clips every change."""
        bound = float(task.values["t"])
        changes, clipped = [], 0
        for patch in block.patches:
            old, delta = block.base_at(patch.where), patch.delta[0]
            changes.append(Change(patch.where, old, old + np.clip(delta, -bound, bound)))
            clipped += int(np.count_nonzero(np.abs(delta) > bound))
        return Merged(changes, {"clipped": np.array([clipped])})
