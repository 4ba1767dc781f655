"""SCE: select coordinates on which experts differ most, weigh experts by their energy there, erase minority signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Patch, Result, Stage, Summary, Task
from .sparsified import CANCELLED
from .topk import Ranked, Scorer, cut, top_k


class Spread(Scorer):
    """Ranks coordinates by the standard deviation of the experts' deltas; where all agree exactly it is 0."""

    def applies(self, task: Task) -> bool:
        """Every tensor is selected from."""
        return True

    def density(self, task: Task) -> NDArray[np.float64]:
        """`select_topk`."""
        return np.array([task.values["select_topk"]], np.float64)

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """int(τ·n), n the coordinates on which experts differ."""
        return int(density * eligible)

    def rows(self, count: int) -> int:
        """One decision for all experts."""
        return 1

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Ranked]:
        """Deltas and how far they spread, over all experts: one that changed nothing counts as 0."""

        def make() -> list[Ranked]:
            return [_rank(block, patch, len(task.experts)) for patch in block.patches]

        return block.keep("ranked by spread", make) if block.roomy else make()


def _rank(block: Block, patch: Patch, count: int) -> Ranked:
    scores = np.empty((1, patch.where.size), np.float32)
    block.kernels.spread(patch.delta, count, scores[0])
    return Ranked(np.zeros(1, np.int64), patch.where, patch.delta, scores, patch.experts)


class Energy(Stage):
    """Σδ² of each expert over the selected coordinates of a tensor, and its share of their sum (equal if that is 0)."""

    name = "energy"

    def empty(self, count: int) -> Summary:
        """Sums of nothing."""
        return {"energy": np.zeros(count)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds a block."""
        for experts, _, values in selected(block, task, results):
            some = np.zeros(len(experts))
            block.kernels.kept_norms(values, 2, some)
            summary["energy"][experts] += some

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Coefficients that sum to 1. No absolute bound: RL-sized deltas have energies of 1e-9 and less."""
        energy = total["energy"]
        whole = float(energy.sum())
        with np.errstate(invalid="ignore"):  # where a recipe lets infinities in, they come out as such
            share = energy / whole if whole > 0.0 else np.full(len(energy), 1.0 / len(energy))
        return {"coefficient": share.tolist()}


def selected(
    block: Block, task: Task, results: Mapping[str, Result]
) -> list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]]:
    """Experts, coordinates and deltas fp64[E, m] of what is selected, patch by patch."""
    if task.values["select_topk"] >= 1.0:
        return [(patch.experts, patch.where, patch.delta) for patch in block.patches]
    found = []
    for part in Spread().score(block, task, results):
        where, values, _, _ = cut(part, block, task, results)
        found.append((part.experts, where, values))
    return found


class Sce(Method):
    """Source: FuseChat (arXiv 2408.07990), SCE; as mergekit's `sce`, without its bound on energies.

    mergekit weighs experts equally where their mean squares sum to less than 1e-6, which RL-sized deltas always do.
    Cost: a histogram of spreads (two where one is not enough), a pass for the energies, the merge; with
    `select_topk: 1` the last two.
    """

    name = "sce"
    summary = "select where experts differ most, weigh them by their energy there, erase minority signs"
    formula = "θ = θ0 + Σ_{sgn δi = γ} ci·δi / Σ_{same} ci, ci = Σδi² / Σj Σδj² over the selected, γ = sgn Σ δi"
    source = "FuseChat (arXiv 2408.07990)"
    parameters = (
        Parameter(
            "select_topk",
            "number",
            1.0,
            "share of the coordinates on which experts differ that is merged; below 1 also drops where all agree",
            minimum=0,
            maximum=1,
        ),
        CANCELLED,
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Threshold of the spread, then energies."""
        return (*top_k(Spread(), "tensor"), Energy())

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Elect by the plain sum, join by energy."""
        counts, changes = np.zeros(2, np.int64), []
        kept = np.zeros(len(task.experts), np.int64)
        share = np.asarray(results["energy"]["coefficient"], np.float64)
        positive = int(task.values["cancelled"] == "positive")
        for experts, where, values in selected(block, task, results):
            old, out = block.base_at(where), np.empty(where.size)
            block.kernels.join(old, values, share[experts], positive, out, counts)
            block.kernels.count_updates(values, experts, kept)
            changes.append(Change(where, old, out))
        return Merged(changes, {"kept": kept, "elected": counts[:1] - counts[1:], "cancelled": counts[1:]})
