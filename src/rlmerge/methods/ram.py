"""Methods made for RL experts that average only where updates are shared: `ram`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import Block, Change, Merged, Method, Parameter, Result, Task


class Ram(Method):
    """Source: RAM (arXiv 2601.13572), as mergekit's `ram`.

    The published constant 1e-5 is absolute: it ignores every one-step bf16 change of a weight below 2⁻⁹. `epsilon: 0`
    counts every stored change, which is what the method means.
    """

    name = "ram"
    summary = "mean over the experts that changed a coordinate, full update where only one did"
    formula = "θ = θ0 + Σ mi·δi / max(1, Σ mi), mi = [|δi| > ε]"
    source = "RAM (arXiv 2601.13572)"
    parameters = (
        Parameter(
            "epsilon", "number", 1e-5, "smallest |δ| that counts as a change (absolute, as published)", minimum=0
        ),
    )
    laws = frozenset({"permutation", "identity", "sign", "zero"})

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Mean of the updates that count; statistics say how many do not."""
        ignored = np.zeros(len(task.experts), np.int64)
        changes = []
        for patch in block.patches:
            old, out, few = (
                block.base_at(patch.where),
                np.empty(patch.where.size),
                np.zeros(len(patch.experts), np.int64),
            )
            block.kernels.ram(old, patch.delta, float(task.values["epsilon"]), out, few)
            ignored[patch.experts] += few
            changes.append(Change(patch.where, old, out))
        return Merged(changes, {"ignored": ignored})
