"""Methods made for RL experts that average only where updates are shared: `ram`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import Block, Merged, Method, Parameter, Result, Task


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
        out = np.empty(block.size, np.float64)
        ignored = np.zeros(len(task.experts), np.int64)
        block.kernels.ram(block.base, block.delta, block.where, float(task.values["epsilon"]), out, ignored)
        return Merged(out, {"ignored": ignored})
