"""Arcee Fusion: take those changes whose size times the row's divergence stands out among a tensor's coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Arity, Block, Change, Merged, Method, Parameter, Result, Stage, Task
from .topk import FINE, Coarse, Fine, Ranked, Scorer, bin_of, from_bits, is_open

QUARTERS = (0.25, 0.5, 0.75)


class Importance(Scorer):
    """|δ| times the divergence of the softmax of its row, in fp64; ranked after one rounding to fp32."""

    def applies(self, task: Task) -> bool:
        """Every tensor has a threshold."""
        return True

    def density(self, task: Task) -> NDArray[np.float64]:
        """One row of scores for each quartile; none of them keeps all."""
        return np.zeros(3)

    def rows(self, count: int) -> int:
        """Three quartiles of one list of scores."""
        return 3

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """Not asked for: `places` knows the quartile."""
        return eligible

    def places(self, task: Task, row: int, eligible: int) -> int:
        """How many coordinates are at least as large as the quartile, whose place from below is int(q·(n − 1))."""
        return task.size - int(QUARTERS[row] * (task.size - 1))

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Ranked]:
        """The importances of what changed (all others have none), three times."""
        return block.keep(("importance", task.group), lambda: _ranked(block, task))


def _ranked(block: Block, task: Task) -> list[Ranked]:
    found, divergence = [], None
    length = task.shape[-1] if task.shape else 1
    for patch in block.patches:
        if divergence is None:
            divergence = divergences(block, length, float(task.values["epsilon"]))
        with np.errstate(all="ignore"):  # what is no number has no importance: its bits lie outside the histograms
            importance = (np.abs(patch.delta[0]) * divergence[patch.where // length]).astype(np.float32)
        scores = np.tile(np.where(importance > 0.0, importance, np.float32(0.0)), (3, 1))
        found.append(Ranked(np.arange(3), patch.where, patch.delta, scores, patch.experts))
    return found


def divergences(block: Block, length: int, epsilon: float) -> NDArray[np.float64]:
    """KL(softmax(expert row) + ε ‖ softmax(base row) + ε), fp64[rows], rows along the last dimension.

    The expert is base + δ: stored narrower than the base, its values differ from the base's where nothing was trained.
    Both sides sum to 1 + n·ε, so Σ p·log(p/q) = Σ p·log(p/q) − p + q, whose terms are never negative: no cancellation
    (in fp32 and by the plain formula, the divergence of RL-sized deltas is noise).
    """
    base = block.base.astype(np.float64)
    expert = base.copy()
    with np.errstate(all="ignore"):
        for patch in block.patches:
            expert[patch.where] += patch.delta[0]
        p, q = (_softmax(values.reshape(-1, length)) + epsilon for values in (expert, base))
        difference = p - q
        return np.sum(p * np.log1p(difference / q) - difference, axis=1)


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    power = np.exp(values - values.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


class CoarseQuartiles(Coarse):
    """As `Coarse`, where also the smallest score of all may be wanted."""

    def reduce(self, total: Any, task: Task, results: Mapping[str, Result]) -> Result:
        """Per quartile: the bin it lies in, or 0 where fewer coordinates changed."""
        rows = []
        for row in range(3):
            count = total["count"][row]
            eligible, wanted = int(count.sum()), self.scorer.places(task, row, 0)
            entry: dict[str, Any] = {"eligible": eligible, "wanted": wanted, "bin": -1, "threshold": 0.0}
            entry |= {"above": 0, "ties": 0}
            if wanted <= eligible:
                bin_, above = bin_of(count, wanted)
                low, high = int(total["low"][row, bin_]), int(total["high"][row, bin_])
                entry |= {"bin": bin_, "above": above, "threshold": -1.0}
                if low == high:
                    entry |= {"threshold": from_bits(bin_ * FINE + low), "ties": int(count[bin_])}
            rows.append(entry)
        return {"rows": rows, "norms": []}


class FineQuartiles(Fine):
    """As `Fine`; states the threshold of the tensor."""

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Where the coarse histogram left a quartile open."""
        return any(is_open(row) for row in results["coarse"]["rows"])

    def reduce(self, total: Any, task: Task, results: Mapping[str, Result]) -> Result:
        """Median + 1.5·(third − first quartile)."""
        found = super().reduce(total, task, results)
        first, median, third = (row["threshold"] for row in found["rows"])
        return found | {"cut": median + 1.5 * (third - first)}


class ArceeFusion(Method):
    """Source: mergekit's `arcee_fusion` (Arcee AI), in fp64 and with exact quartiles.

    mergekit computes importances in the dtype of the inputs, where those of RL-sized deltas are noise, and takes
    quartiles of a random sample of large tensors.
    Cost: two softmaxes of the whole tensor in fp64 and one or two histograms before the merge.
    """

    name = "arcee_fusion"
    summary = "take the changes whose size times their row's divergence is exceptional in the tensor"
    formula = "θ = θ0 + [s ≥ median(s) + 1.5·IQR(s)]·δ, s = |δ|·KL(softmax(θ1 row) ‖ softmax(θ0 row))"
    source = "mergekit (Arcee AI)"
    parameters = (
        Parameter(
            "epsilon", "number", 1e-8, "added to each probability before the divergence (as mergekit's code)", minimum=0
        ),
    )
    arity = Arity(minimum=1, maximum=1)
    grain = "row"
    laws = frozenset({"zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Quartiles of the importances."""
        return CoarseQuartiles(Importance(), "tensor"), FineQuartiles(Importance(), "tensor")

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The expert's values where the importance reaches the threshold."""
        threshold, changes, kept = results["fine"]["cut"], [], 0
        for part in Importance().score(block, task, results):
            stays = part.scores[0].astype(np.float64) >= threshold
            where = part.where[stays]
            old = block.base_at(where)
            changes.append(Change(where, old, old + part.values[0][stays]))
            kept += where.size
        return Merged(changes, {"kept": np.array([kept])})
