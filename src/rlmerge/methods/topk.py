"""Exact top-k as stages that every sparsifying method shares: coarse histogram, fine one, ties; and the cut.

A method says how a block is scored (`Scorer`); the stages find, per expert and tensor or model, the threshold and, for
coordinates equal to it, the hash below which they stay. bf16 deltas tie in large classes, so ties are decided by a
hash of the coordinate: unbiased, in any order; tensors of up to 2²⁰ coordinates keep exactly k.

The same histograms can carry the norms of the updates (`order`), which saves large tensors a pass: what the cut leaves
is what lies in the bins above the threshold and, of many ties (2¹⁴ or more), the share that stays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Result, Stage, Summary, Task

EXACT = 2**20
"""Tensors of up to this many coordinates keep exactly k; larger ones k in expectation over ties."""

MANY = 2**14
"""Ties from so many on count in the norm after the cut by the share that stays; fewer are measured one by one."""

COARSE, FINE = 65536, 32768
NO_FLAGS = np.empty(0, np.uint8)
ALL = 2**64 - 1


@dataclass
class Ranked:
    """Updates of a patch and what ranks them.

    rows         int64[S]: the rows of the histograms that the scores belong to, one an expert or one for all
    where        int32[m]
    values       fp64[E, m], what a cut sets to zero
    scores       fp32[S, m], 0: not eligible
    experts      int64[E], whose updates they are
    """

    rows: NDArray[np.int64]
    where: NDArray[np.int32]
    values: NDArray[np.float64]
    scores: NDArray[np.float32]
    experts: NDArray[np.int64]


class Scorer(ABC):
    """What a method ranks."""

    @abstractmethod
    def applies(self, task: Task) -> bool:
        """Whether this tensor is sparsified at all."""

    @abstractmethod
    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> Sequence[Ranked]:
        """The updates of a block, patch by patch, and the scores that decide about them."""

    @abstractmethod
    def density(self, task: Task) -> NDArray[np.float64]:
        """The share to keep, fp64[rows], one for each row of scores."""

    @abstractmethod
    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """How many of the eligible coordinates to keep at this density."""

    def rows(self, count: int) -> int:
        """Rows of scores for `count` experts."""
        return count

    def places(self, task: Task, row: int, eligible: int) -> int:
        """How many to keep in a row of scores: all of them at density 1."""
        density = float(self.density(task)[row])
        return eligible if density >= 1.0 else self.wanted(task, density, eligible)


class _TopK(Stage):
    def __init__(self, scorer: Scorer, scope: str, order: int = 0) -> None:
        self.scorer = scorer
        self.scope = scope  # type: ignore[assignment]
        self.order = order
        """1 or 2: also Σ|t| or Σt² per bin, for tensors (or models) whose ties are kept in proportion; 0: none."""

    def sums(self, task: Task) -> bool:
        """Whether norms are added up with the scores of this tensor."""
        return self.order > 0 and (self.scope == "model" or task.size > EXACT)

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Only tensors that are sparsified, and only where some density cuts."""
        return self.scorer.applies(task) and bool((self.scorer.density(task) < 1.0).any())

    def skip(self, task: Task, results: Mapping[str, Result]) -> Result:
        """Nothing for tensors that are never cut: nobody asks for their thresholds."""
        return super().skip(task, results) if self.scorer.applies(task) else {}


class Coarse(_TopK):
    """Counts scores by the upper 16 of their 31 bits; finds the bin of the threshold, often the threshold itself."""

    name = "coarse"

    def empty(self, count: int) -> Summary:
        """Histograms of nothing."""
        shape = (self.scorer.rows(count), COARSE)
        low = np.full(shape, 65535, np.uint16)
        # made when needed: small tensors add no norms up
        norm = np.zeros((2, count, 0))
        return {"count": np.zeros(shape, np.int64), "low": low, "high": np.zeros(shape, np.uint16), "norm": norm}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds the scores of a block."""
        for part in self.scorer.score(block, task, results):
            block.kernels.coarse(part.scores, part.rows, summary["count"], summary["low"], summary["high"])
            if self.sums(task):
                if not summary["norm"].size:
                    # the last bin takes updates that have no score: they count before the cut and not after it
                    summary["norm"] = np.zeros((2, len(task.experts), COARSE + 1))
                block.kernels.coarse_norms(part.scores, part.values, part.experts, self.order, summary["norm"])

    def combine(self, total: Summary, part: Summary) -> None:
        """Counts add up; extremes are extremes of extremes."""
        total["count"] += part["count"]
        if part["norm"].size:
            total["norm"] = total["norm"] + part["norm"] if total["norm"].size else part["norm"]
        np.minimum(total["low"], part["low"], out=total["low"])
        np.maximum(total["high"], part["high"], out=total["high"])

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Per row: eligible n, wanted k, the bin, and the threshold where the bin holds one value (−1 keeps all)."""
        rows = []
        for row, density in enumerate(self.scorer.density(task)):
            count = total["count"][row]
            eligible = int(count.sum())
            wanted = self.scorer.places(task, row, eligible)
            entry: dict[str, Any] = {"eligible": eligible, "wanted": wanted, "bin": -1, "threshold": -1.0}
            entry |= {"above": 0, "ties": 0}
            if wanted <= 0 and (density < 1.0 or eligible):
                entry |= {"threshold": float(np.inf), "wanted": 0}
            elif wanted < eligible:
                bin_, above = bin_of(count, wanted)
                low, high = int(total["low"][row, bin_]), int(total["high"][row, bin_])
                entry |= {"bin": bin_, "above": above}
                if low == high:
                    entry |= {"threshold": from_bits(bin_ * FINE + low), "ties": int(count[bin_])}
            rows.append(entry)
        norms = []
        if self.order and task.size > EXACT:
            norms = [_norms(row, own) for row, own in _by_expert(rows, total["norm"][0] + total["norm"][1])]
        return {"rows": rows, "norms": norms}


class Fine(_TopK):
    """Counts the scores of the threshold's coarse bin by their lower 15 bits, where that bin holds several values."""

    name = "fine"

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Where the coarse histogram left a threshold open."""
        return super().needed(task, results) and any(is_open(row) for row in results["coarse"]["rows"])

    def empty(self, count: int) -> Summary:
        """Histograms of nothing."""
        norm = np.zeros((count, FINE) if self.order else (0, 0))
        return {"count": np.zeros((self.scorer.rows(count), FINE), np.int64), "norm": norm}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds the scores of a block that lie in the open bins."""
        bins = np.array([row["bin"] if is_open(row) else -1 for row in results["coarse"]["rows"]], np.int64)
        for part in self.scorer.score(block, task, results):
            block.kernels.fine(part.scores, part.rows, bins, summary["count"])
            if self.sums(task):
                own = bins[part.rows]
                block.kernels.fine_norms(part.scores, part.values, part.experts, own, self.order, summary["norm"])

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Per row: the threshold, how many scores lie above it and how many equal it."""
        rows = []
        for place, coarse in enumerate(results["coarse"]["rows"]):
            entry = dict(coarse) | {"place": -1}
            if is_open(coarse):
                count = total["count"][place]
                bin_, above = bin_of(count, coarse["wanted"] - coarse["above"])
                entry |= {
                    "threshold": from_bits(coarse["bin"] * FINE + bin_),
                    "above": coarse["above"] + above,
                    "ties": int(count[bin_]),
                    "place": bin_,
                }
            rows.append(entry)
        norms = [dict(entry) for entry in results["coarse"]["norms"]]
        for entry, (row, own) in zip(norms, _by_expert(rows, total["norm"])):
            if row["place"] >= 0:
                above = entry["above"] + _exact_sum(own[row["place"] + 1 :])
                entry |= {"above": above, "tied": float(own[row["place"]])}
        return {"rows": rows, "norms": norms}


class Ties(_TopK):
    """Gathers the hashes of tied coordinates of small tensors, so that exactly k stay; states the cut for all."""

    name = "ties"

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Small tensors (scope tensor) with more ties than places."""
        small = self.scope == "tensor" and task.size <= EXACT
        return small and super().needed(task, results) and any(_is_tied(row) for row in _rows(results))

    def empty(self, count: int) -> Summary:
        """No hashes."""
        return {str(row): np.zeros(0, np.uint64) for row in range(self.scorer.rows(count))}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Appends the hashes of the ties of a block."""
        rows = _rows(results)
        for part in self.scorer.score(block, task, results):
            for row, scores in zip(part.rows.tolist(), part.scores):
                if _is_tied(rows[row]):
                    threshold = np.float32(rows[row]["threshold"])
                    hashes, key = np.empty(scores.size, np.uint64), np.uint64(task.key)
                    found = block.kernels.tie_hashes(scores, threshold, key, block.start, part.where, hashes)
                    summary[str(row)] = np.concatenate([summary[str(row)], hashes[:found]])

    def combine(self, total: Summary, part: Summary) -> None:
        """Hashes are a set: the order in which they came means nothing."""
        for key, value in part.items():
            total[key] = np.concatenate([total[key], value])

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Per row: threshold and cut, and with them n, k, ties."""
        rows = _rows(results)
        thresholds, cuts = [], []
        for place, row in enumerate(rows):
            thresholds.append(row["threshold"])
            if not _is_tied(row):
                cuts.append(ALL)
                continue
            places = row["wanted"] - row["above"]
            hashes = total.get(str(place))
            if hashes is not None and hashes.size:
                cuts.append(int(np.partition(hashes, places - 1)[places - 1]))
            else:
                cuts.append(places * 2**64 // row["ties"] - 1)
        found: Result = {"threshold": thresholds, "cut": cuts}
        found |= {key: [row[key] for row in rows] for key in ("eligible", "wanted")}
        norms = results["fine"]["norms"]
        if norms and all(row["ties"] >= MANY for row in rows if _is_tied(row)):
            shares = [(row["wanted"] - row["above"]) / row["ties"] if row["ties"] else 0.0 for row in rows]
            after = [entry["above"] + shares[k % len(rows)] * entry["tied"] for k, entry in enumerate(norms)]
            found["norms"] = {"before": [entry["before"] for entry in norms], "after": after}
        return found


def cut(
    part: Ranked, block: Block, task: Task, results: Mapping[str, Result]
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64], NDArray[np.uint8]]:
    """What the stages leave of a patch: coordinates, updates fp64[E, m'], how many of each expert, and where some were
    dropped (uint8[m]; empty for one expert alone, whose updates shrink to what is left; where several meet they are 0).

    One hash key serves all experts, so that tied experts keep or lose a coordinate together. (With a key an expert,
    half of a consensus would be cut away at a tie.)
    """
    threshold = np.asarray(results["ties"]["threshold"], np.float32)[part.rows]
    cuts = np.asarray(results["ties"]["cut"], np.uint64)[part.rows]
    key = np.uint64(task.key)
    size = part.where.size
    if part.values.shape[0] == 1:
        left, kept = np.empty(size + 1, np.int32), np.empty(size + 1, np.float64)
        number = block.kernels.sift(
            part.scores[0], threshold[0], cuts[0], key, block.start, part.where, part.values[0], left, kept
        )
        some = np.array([number], np.int64)
        return left[:number], kept[:number].reshape(1, -1), some, NO_FLAGS
    values, number = part.values.copy(), np.zeros(part.values.shape[0], np.int64)
    dropped = np.zeros(size, np.uint8)
    keys = np.full(len(part.rows), key)
    block.kernels.trim(part.scores, threshold, cuts, keys, block.start, part.where, values, number, dropped)
    return part.where, values, number, dropped


def top_k(scorer: Scorer, scope: str, order: int = 0) -> tuple[Stage, ...]:
    """The three stages that end in results['ties']: thresholds and cuts.

    With `order` 1 or 2, also 'norms' (Σ|t| or Σt² before and after the cut, per expert) where the group that shares a
    threshold has more than 2²⁰ coordinates.
    """
    return Coarse(scorer, scope, order), Fine(scorer, scope, order), Ties(scorer, scope, order)


def _by_expert(
    rows: Sequence[Mapping[str, Any]], norm: NDArray[np.float64]
) -> list[tuple[Mapping[str, Any], NDArray[np.float64]]]:
    """Each expert's row of scores and its sums by bin."""
    return [(rows[k % len(rows)], norm[k]) for k in range(norm.shape[0])]


def _norms(row: Mapping[str, Any], sums: NDArray[np.float64]) -> dict[str, float]:
    """Σ over all updates, over those above the bin of the threshold, and in that bin."""
    before, bin_ = _exact_sum(sums), row["bin"]
    if not sums.size:
        return {"before": 0.0, "above": 0.0, "tied": 0.0}
    if bin_ < 0:
        return {"before": before, "above": before if row["wanted"] else 0.0, "tied": 0.0}
    return {"before": before, "above": _exact_sum(sums[bin_ + 1 : COARSE]), "tied": float(sums[bin_])}


def _exact_sum(values: NDArray[np.float64]) -> float:
    """Rounded once, so that no order of adding shows."""
    return math.fsum(values[values != 0.0].tolist())


def bin_of(count: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The highest bin at which `wanted` of the largest are reached, and how many lie in the bins above it."""
    filled = np.flatnonzero(count != 0)[::-1]  # few of the bins, for bf16 deltas; of Booleans NumPy finds them faster
    from_top = np.cumsum(count[filled])
    place = int(np.searchsorted(from_top, wanted))
    return int(filled[place]), int(from_top[place - 1]) if place else 0


def from_bits(bits: int) -> float:
    """The fp32 number of a coarse bin and a fine one."""
    return float(np.array(bits, np.uint32).view(np.float32))


def is_open(row: Mapping[str, Any]) -> bool:
    """Whether the coarse bin of a threshold holds several values."""
    return row["bin"] >= 0 and row["threshold"] < 0


def _is_tied(row: Mapping[str, Any]) -> bool:
    return 0 < row["wanted"] - row["above"] < row["ties"]


def _rows(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    return results["fine"]["rows"]
