"""Means weighted by curvature: `fisher` (of weights), `ota` (of the changes that a curvature mask leaves).

F̂ is an expert's diagonal Fisher divided by its mean, so a factor of a Fisher means nothing. Tensors without a Fisher
count as F̂ = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Result, Stage, Task
from .sar_stages import FisherMean
from .topk import Ranked, Scorer, cut, top_k

EVERY = "factor of this model's curvature; 0 removes it"
WEIGHT = Parameter("weight", "number", 1.0, EVERY, per_model=True, minimum=0)


def curvature(
    block: Block, task: Task, results: Mapping[str, Result], experts: NDArray[np.int64], where: NDArray[np.int32]
) -> NDArray[np.float64]:
    """F̂ of some experts at some coordinates, fp64[E, m]."""
    if not task.fisher:
        return np.ones((len(experts), where.size))
    mean = np.asarray(results["fisher_mean"]["mean"], np.float64)[experts]
    return block.fisher_at(experts, where).astype(np.float64) / mean[:, None]


class Curvature(Method):
    """What both methods share: they read Fishers, and weights must not all be zero."""

    def uses_fisher(self, values: Mapping[str, Any]) -> bool:
        """Always."""
        return True

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, NDArray[np.float64]]) -> list[str]:
        """A mean needs a weight."""
        if not np.any(per_model["weight"]):
            return ["all weights are 0, so there is nothing to average: give some model a weight"]
        return []


class Fisher(Curvature):
    """Source: Matena and Raffel (arXiv 2111.09832), equation 4, with F̂ and a floor relative to its mean.

    Of weights, not of changes: an expert that left a weight as it was pulls towards the base with all of its Fisher. So
    a change that one of K experts made keeps about 1/K of its size. The published floor of 1e-6 is absolute and larger
    than the Fishers of language models.
    Cost: every Fisher is read at the changed coordinates; once more for the means where no fisher.json records them.
    """

    name = "fisher"
    summary = "average of the weights, each weighted by its Fisher"
    formula = "θ = Σ wi·ci·θi / Σ wi·ci, ci = max(F̂i, floor)"
    source = "Merging models with Fisher-weighted averaging (arXiv 2111.09832)"
    parameters = (
        WEIGHT,
        Parameter("floor", "number", 1e-3, "smallest F̂ that counts, as a share of its mean", minimum=0, late=True),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The means of the Fishers."""
        return (FisherMean(self.fisherless),)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """θ0 + Σ c·δ / Σ c over all experts; by weight alone where all c are 0."""
        every, changes = np.arange(len(task.experts)), []
        weight = task.per_model["weight"]
        for patch in block.patches:
            share = np.maximum(curvature(block, task, results, every, patch.where), float(task.values["floor"]))
            share *= weight[:, None]
            share[:, ~share.any(axis=0)] = weight[:, None]
            old, out = block.base_at(patch.where), np.empty(patch.where.size)
            own = np.ascontiguousarray(share[patch.experts])
            block.kernels.weighted_mean(old, patch.delta, own, in_order(share), out)
            changes.append(Change(patch.where, old, out))
        return Merged(changes)


def in_order(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums over experts, fp64[m], added in their order."""
    total = np.zeros(shares.shape[1])
    for row in shares:
        total = total + row
    return total


class Saliency(Scorer):
    """Ranks changes by |δ|·√F̂, the root of what the loss rises by if they are dropped."""

    def applies(self, task: Task) -> bool:
        """Every tensor is masked."""
        return True

    def density(self, task: Task) -> NDArray[np.float64]:
        """The density of each expert."""
        return task.per_model["density"]

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """int(ρ·n), n the changed coordinates."""
        return int(density * eligible)

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Ranked]:
        """Changes and their scores."""
        found = []
        for patch in block.patches:
            scores = np.empty(patch.delta.shape, np.float32)
            if task.fisher:
                mean = np.asarray(results["fisher_mean"]["mean"], np.float64)[patch.experts]
                fisher = block.fisher_at(patch.experts, patch.where)
                block.kernels.scores(patch.delta, patch.delta, fisher, mean, 3, scores)
            else:
                block.kernels.scores(patch.delta, patch.delta, np.empty((0, 0), np.float32), np.empty(0), 0, scores)
            found.append(Ranked(patch.experts, patch.where, patch.delta, scores, patch.experts))
        return found


class Ota(Curvature):
    """Source: OTA-Merging with FFG masks (arXiv 2509.11167); Adam's second moments are the authors' Fishers.

    Their thresholds are absolute numbers found by grafting at several densities; here the density is given, counted
    among an expert's changes over the whole model (or a tensor).
    Cost: the Fishers are read for the histograms of the mask (one or two passes) and for the merge.
    """

    name = "ota"
    summary = "mask changes by curvature, average the rest by a power of it"
    formula = "θ = θ0 + Σ wi·ci·mi·δi / Σ wi·ci·mi, ci = F̂i^power, mi = [F̂i·δi² among the ρ·n largest]"
    source = "OTA-Merging (arXiv 2509.11167)"
    parameters = (
        WEIGHT,
        Parameter(
            "density", "number", 0.4, "share of the changed coordinates that the mask keeps", True, minimum=0, maximum=1
        ),
        Parameter("power", "number", 0.5, "exponent of F̂ in the average", minimum=0, late=True),
        Parameter("scope", "choice", "model", "where density is counted", choices=("tensor", "model")),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The means of the Fishers, then the thresholds."""
        return (FisherMean(self.fisherless), *top_k(Saliency(), values["scope"]))

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """θ0 + Σ c·δ / Σ c over what is kept; by weight alone where all c are 0."""
        changes, kept = [], np.zeros(len(task.experts), np.int64)
        cutting = bool((task.per_model["density"] < 1.0).any())
        for part in Saliency().score(block, task, results):
            where, values = (part.where, part.values) if not cutting else cut(part, block, task, results)[:2]
            weight = task.per_model["weight"][part.experts, None]
            share = curvature(block, task, results, part.experts, where) ** float(task.values["power"]) * weight
            share[values == 0.0] = 0.0
            lost = ~share.any(axis=0)
            share[:, lost] = np.where(values[:, lost] != 0.0, weight, 0.0)
            old, out = block.base_at(where), np.empty(where.size)
            block.kernels.weighted_mean(old, values, share, in_order(share), out)
            block.kernels.count_updates(values, part.experts, kept)
            changes.append(Change(where, old, out))
        return Merged(changes, {"kept": kept})
