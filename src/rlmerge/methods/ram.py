"""Methods made for RL experts that average only where updates are shared: `ram`, `ramplus`, `ramplus_tl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Result, Scope, Stage, Summary, Task, kept_patches

EPSILON = Parameter(
    "epsilon", "number", 1e-5, "smallest |δ| that counts as a change (absolute, as published)", minimum=0
)


class Ram(Method):
    """Source: RAM (arXiv 2601.13572), as mergekit's `ram`.

    The published constant 1e-5 is absolute: it ignores every one-step bf16 change of a weight below 2⁻⁹. `epsilon: 0`
    counts every stored change, which is what the method means.
    """

    name = "ram"
    summary = "mean over the experts that changed a coordinate, full update where only one did"
    formula = "θ = θ0 + Σ mi·δi / max(1, Σ mi), mi = [|δi| > ε]"
    source = "RAM (arXiv 2601.13572)"
    parameters = (EPSILON,)
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


class Overlap(Stage):
    """How many changes of each expert are shared with others, and how many are its own."""

    name = "overlap"

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def empty(self, count: int) -> Summary:
        """No change seen."""
        return {"shared": np.zeros(count, np.int64), "unique": np.zeros(count, np.int64)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Counts the changes of a block."""
        for patch in kept_patches(block):
            shared, unique = (np.zeros(len(patch.experts), np.int64) for _ in range(2))
            block.kernels.count_shared(patch.delta, float(task.values["epsilon"]), shared, unique)
            summary["shared"][patch.experts] += shared
            summary["unique"][patch.experts] += unique

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """The counts."""
        return {key: value.tolist() for key, value in total.items()}


class RamPlus(Method):
    """Source: RAM+ (arXiv 2601.13572); the ratio is counted over the whole model, as in the paper.

    r = 0.2 and α = 1 are the authors' rescale factor of 1.2 and its bound. Their code divides by zero where an expert
    has no change of its own; then there is nothing to multiply.
    Cost: the deltas are read twice.
    """

    name = "ramplus"
    summary = "as ram, and what only one expert changed is raised by how much it shares elsewhere"
    formula = "θ = θ0 + Σ mi·ci·δi / max(1, Σ mi), ci = 1 + r·min(α, shared_i/unique_i) where only i changed, else 1"
    source = "RAM+ (arXiv 2601.13572)"
    parameters = (
        Parameter("r", "number", 0.2, "how much unique changes are raised", late=True),
        Parameter("alpha", "number", 1.0, "α, the largest ratio that counts", minimum=0, late=True),
        EPSILON,
    )
    laws = frozenset({"permutation", "identity", "sign", "zero"})
    scope: Scope = "model"

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Shared and unique changes."""
        return (Overlap(self.scope),)

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """c of each expert."""
        return self.raised(task, results).tolist()

    def raised(self, task: Task, results: Mapping[str, Result]) -> NDArray[np.float64]:
        """c = 1 + r·min(α, shared/unique), fp64[K]; a ratio over nothing is α if anything is shared."""
        shared, unique = (np.asarray(results["overlap"][key], np.float64) for key in ("shared", "unique"))
        alpha = float(task.values["alpha"])
        ratio = np.where(shared > 0.0, alpha, 0.0)
        np.divide(shared, unique, out=ratio, where=unique > 0.0)
        return 1.0 + float(task.values["r"]) * np.minimum(ratio, alpha)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """As RAM, unique changes times c."""
        ignored, changes = np.zeros(len(task.experts), np.int64), []
        factor = self.raised(task, results)
        for patch in kept_patches(block):
            old, out = block.base_at(patch.where), np.empty(patch.where.size)
            few = np.zeros(len(patch.experts), np.int64)
            block.kernels.ramplus(old, patch.delta, float(task.values["epsilon"]), factor[patch.experts], out, few)
            ignored[patch.experts] += few
            changes.append(Change(patch.where, old, out))
        return Merged(changes, {"ignored": ignored})


class RamPlusTensorLocal(RamPlus):
    """Source: mergekit's `ramplus_tl`: RAM+ (arXiv 2601.13572) with the ratio of each tensor."""

    name = "ramplus_tl"
    summary = "as ramplus, with the ratio of shared to unique changes counted in each tensor"
    source = "RAM+ (arXiv 2601.13572), tensor by tensor as in mergekit"
    parameters = (
        Parameter("r", "number", 0.1, "how much unique changes are raised", late=True),
        Parameter("alpha", "number", 0.2, "α, the largest ratio that counts", minimum=0, late=True),
        EPSILON,
    )
    scope: Scope = "tensor"
