"""What SAR must measure beside top-k: Fisher means, conflict shares of pairs, mid-ranks for magprune."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import FisherError

from .base import Block, Result, Stage, Summary, Task
from .topk import COARSE, Coarse


class FisherMean(Stage):
    """The fp64 mean of each Fisher over the tensors that all Fishers have: the unit of F̂."""

    name = "fisher_mean"
    scope = "model"
    carried = True

    def __init__(self, instead: str) -> None:
        self.instead = instead

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Tensors that every Fisher has, merged or not; a tied one once."""
        return task.fisher and not task.repeats

    def known(self, task: Task) -> Summary | None:
        """The sums that every fisher.json records; the engine compares them with what it reads later."""
        if not task.fisher_sums:
            return None
        return {"sum": np.array(task.fisher_sums), "negative": np.zeros(len(task.fisher_sums), np.int64)}

    def empty(self, count: int) -> Summary:
        """No sum, no count, no negative entries."""
        return {"sum": np.zeros(count), "negative": np.zeros(count, np.int64)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds a block of each Fisher."""
        block.kernels.fisher_sums(block.fisher, summary["sum"], summary["negative"])

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Means; raises FisherError where a Fisher is all zero or has negative entries."""
        for place, expert in enumerate(task.experts):
            if total["negative"][place]:
                raise FisherError(
                    f"the Fisher of {expert!r} has {int(total['negative'][place])} negative entries; a diagonal Fisher "
                    f"is a mean of squares. Estimate it again, or {self.instead}."
                )
            if total["sum"][place] == 0.0:
                raise FisherError(
                    f"the Fisher of {expert!r} is zero everywhere, so it says nothing. Estimate it again with data "
                    f"on which the model has a gradient, or {self.instead}."
                )
        return {"mean": (total["sum"] / task.size).tolist()}


class PairConflict(Stage):
    """For each pair, its conflict share c of its overlap over the model, as φ = max(0, 1 − c/(1 − c)).

    φ estimates how likely two experts that agree share a direction (0 for independent signs, 1 without conflicts);
    docs/log.md tells where it comes from.
    """

    name = "pair_conflict"
    scope = "model"

    def empty(self, count: int) -> Summary:
        """No pair met."""
        pairs = (count, count)
        return {"overlap": np.zeros(pairs, np.int64), "conflict": np.zeros(pairs, np.int64)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Counts overlaps and conflicts of each pair in a block."""
        support = np.zeros(len(task.experts), np.int64)
        regions = np.zeros(4, np.int64)
        sign = np.sign(task.per_model["weight"]).astype(np.int64)
        for patch in block.patches:
            if not patch.alone:
                pairs = summary["overlap"], summary["conflict"]
                block.kernels.census(patch.delta, sign, support, regions, *pairs)

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """φ as a symmetric matrix, flattened by JSON into lists; 0 for pairs that never overlap."""
        overlap = total["overlap"].astype(np.float64)
        share = np.divide(total["conflict"], overlap, out=np.full(overlap.shape, 0.5), where=overlap > 0)
        odds = np.divide(share, 1.0 - share, out=np.ones(share.shape), where=share < 0.5)
        phi = 1.0 - odds
        upper = np.triu(phi, 1)
        return {"phi": (upper + upper.T).tolist()}


class Ranks(Coarse):
    """Mid-ranks of the coarse bins: where in the ascending order of magnitudes a score stands, in [0, 1].

    Scores are ranked by their upper 16 bits (8 significant bits of magnitude); scores that agree in them share a
    mid-rank.
    """

    name = "ranks"

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Per row, the filled bins and their mid-ranks."""
        bins, ranks = [], []
        for count in total["count"]:
            filled = np.flatnonzero(count != 0)
            below = np.cumsum(count[filled]) - count[filled]
            bins.append(filled.tolist())
            ranks.append(((below + count[filled] / 2) / max(1, int(count.sum()))).tolist())
        return {"bins": bins, "rank": ranks}


def dense_ranks(result: Result) -> NDArray[np.float64]:
    """The mid-ranks as fp64[rows, 65536], 0 in empty bins."""
    dense = np.zeros((len(result["bins"]), COARSE))
    for row, (bins, ranks) in enumerate(zip(result["bins"], result["rank"])):
        dense[row, np.asarray(bins, np.int64)] = ranks
    return dense
