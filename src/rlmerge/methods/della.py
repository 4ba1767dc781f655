"""DELLA: drop small updates of each row more often than large ones, rescale; then add or join.

Ranks come from whole rows: blocks of these methods hold them (grain `row`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Parameter, Result, Task
from .sparsified import CANCELLED, DENSITY, DENSITY_OF, Left, Sparsified, normalize, rescale
from .task_arithmetic import LAMBDA, WEIGHT

NOTHING = np.empty(0, np.int32), np.empty(0), np.empty(0)
EPSILON = Parameter("epsilon", "number", 0.15, "chances run from density − ε (smallest |δ|) to density + ε", True)


class DellaLinear(Sparsified):
    """Source: DELLA-Merging (arXiv 2406.11617), MAGPRUNE with task arithmetic; row and ε as mergekit's.

    A row is what one index of the other dimensions leaves along the second one; a vector is one row. An update whose
    magnitude has the rank r in its row, 0 for the smallest and 1 for the largest, is kept with the chance
    density − ε + 2ε·r. Equal magnitudes share their middle rank; a row of one coordinate has the rank 1/2.
    `inverse_probability` divides by these chances, as published; the default, `l1`, is mergekit's. Cost: magnitudes are
    ranked in each row, without sorting where there are few, as in bf16; with `l1`, twice in tensors that do not fit in
    memory between stages.
    """

    name = "della_linear"
    summary = "drop updates by chance, small ones of a row more often, rescale the rest, add"
    formula = "θ = θ0 + λ·Σ wi·mi·δi/pi, mi ~ Bernoulli(pi), pi = ρi − εi + 2εi·rank(|δi|)"
    source = "DELLA-Merging (arXiv 2406.11617)"
    parameters = (
        WEIGHT,
        DENSITY,
        EPSILON,
        LAMBDA,
        normalize(False),
        rescale("l1", "inverse_probability", "none"),
        DENSITY_OF,
    )
    deterministic = False
    grain = "row"
    consensus = "sum"

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, NDArray[np.float64]]) -> list[str]:
        """Chances lie in (0, 1), both ends excluded as in mergekit; densities 0 and 1 draw nothing."""
        problems = super().check(values, per_model)
        for density, epsilon in sorted(set(zip(per_model["density"].tolist(), per_model["epsilon"].tolist()))):
            low, high = density - abs(epsilon), density + abs(epsilon)
            if 0.0 < density < 1.0 and not 0.0 < low <= high < 1.0:
                most = min(density, 1.0 - density)
                problems.append(
                    f"density {density:g} ± epsilon {epsilon:g} gives chances from {low:.4g} to {high:.4g}, which must "
                    f"lie between 0 and 1: write an epsilon below {most:.4g}, or another density"
                )
        return problems

    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """Every update stays with the chance that its rank gives it."""
        inverse = task.values["rescale"] == "inverse_probability"
        density, epsilon = task.per_model["density"], task.per_model["epsilon"]
        found = []
        ranks = self._ranks(block, task)
        for patch, rank in zip(block.patches, ranks):
            chance = np.empty(patch.delta.shape)
            for row, k in enumerate(patch.experts.tolist()):
                chance[row] = density[k]
                if self._ranked(task, k):
                    chance[row] = (density[k] - epsilon[k]) + (2.0 * epsilon[k]) * rank[row]
            part = Left(patch.experts, patch.where, patch.delta.copy(), np.zeros(len(patch.experts), np.int64))
            keys = task.keys[patch.experts]
            block.kernels.draw(part.values, chance, keys, block.start, part.where, inverse, part.kept)
            found.append(part)
        return found

    def _ranked(self, task: Task, expert: int) -> bool:
        """Whether the chances of an expert depend on ranks."""
        density, epsilon = task.per_model["density"][expert], task.per_model["epsilon"][expert]
        return bool(0.0 < density < 1.0 and epsilon)

    def _ranks(self, block: Block, task: Task) -> list[NDArray[np.float64]]:
        """The rank of each |δ| among all of its expert in its row, for every patch fp64[E, m]; undefined if unused."""
        ranks = [np.empty(patch.delta.shape) for patch in block.patches]
        length, stride = row_of(task.shape)
        for k in range(len(task.experts)):
            if not self._ranked(task, k):
                continue
            # what it changed alone, and what several changed
            lists = [NOTHING, NOTHING]
            for patch, rank in zip(block.patches, ranks):
                for row in np.flatnonzero(patch.experts == k):
                    lists[0 if patch.alone else 1] = patch.where, patch.delta[row], rank[row]
            (where, values, out), (others_where, others, others_out) = lists
            support = task.values["density_of"] == "support"
            block.kernels.row_ranks(where, values, others_where, others, length, stride, support, out, others_out)
        return ranks


def row_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Coordinates of a row, and the distance between its neighbours: along the second dimension, or the only one."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return shape[1], int(np.prod(shape[2:], dtype=np.int64))


class Della(DellaLinear):
    """Source: DELLA-Merging (arXiv 2406.11617) with steps 2 and 3 of TIES (arXiv 2306.01708); see `DellaLinear`."""

    name = "della"
    summary = "drop updates by chance, small ones of a row more often, rescale, elect one sign, join those who agree"
    formula = "θ = θ0 + λ·Σ_{sgn(wi·di) = γ} wi·di / Σ_{same} wi, di = mi·δi/pi, γ = sgn Σ wi·di, mi as in della_linear"
    source = "DELLA-Merging (arXiv 2406.11617)"
    parameters = (
        WEIGHT,
        DENSITY,
        EPSILON,
        LAMBDA,
        normalize(True, "the weights of those who agree"),
        rescale("l1", "inverse_probability", "none"),
        DENSITY_OF,
        CANCELLED,
    )
    consensus = "sign"
