"""DARE: drop coordinates of each delta by chance, rescale the rest; then add (`dare_linear`) or join (`dare_ties`).

Each coordinate has its own random number, a hash of (seed, method, expert, tensor, coordinate): a mask depends on no
other model, order, thread or machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import Block, Result, Task
from .sparsified import CANCELLED, DENSITY, Left, Sparsified, normalize, rescale
from .task_arithmetic import LAMBDA, WEIGHT


class DareLinear(Sparsified):
    """Source: DARE (arXiv 2311.03099), algorithm 1, with task arithmetic.

    `inverse_probability` divides what is kept by the density, as published: unbiased. The default is mergekit's, `l1`
    (`true`): each tensor gets its l1 norm back, which in small tensors depends on whether one large entry was dropped.
    Cost: with `l1` the updates are read twice, else once.
    """

    name = "dare_linear"
    summary = "drop updates by chance, rescale the rest, add"
    formula = "θ = θ0 + λ·Σ wi·mi·δi/ρi, mi ~ Bernoulli(ρi)"
    source = "DARE (arXiv 2311.03099)"
    parameters = (WEIGHT, DENSITY, LAMBDA, normalize(False), rescale("l1", "inverse_probability", "none"))
    deterministic = False
    consensus = "sum"

    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """Every update stays with the chance ρi."""
        inverse = task.values["rescale"] == "inverse_probability"
        found = []
        for patch in block.patches:
            part = Left(patch.experts, patch.where, patch.delta, np.zeros(len(patch.experts), np.int64))
            chance = task.per_model["density"][patch.experts].reshape(-1, 1)
            part.values = patch.delta.copy()
            keys = task.keys[patch.experts]
            block.kernels.draw(part.values, chance, keys, block.start, part.where, inverse, part.kept)
            found.append(part)
        return found


class DareTies(DareLinear):
    """Source: DARE (arXiv 2311.03099) before steps 2 and 3 of TIES (arXiv 2306.01708); see `DareLinear`."""

    name = "dare_ties"
    summary = "drop updates by chance, rescale the rest, elect one sign per coordinate, join those who agree"
    formula = "θ = θ0 + λ·Σ_{sgn(di) = γ} di, di = wi·mi·δi/ρi, γ = sgn Σ di, mi ~ Bernoulli(ρi)"
    source = "DARE (arXiv 2311.03099) with TIES-Merging (arXiv 2306.01708)"
    parameters = (
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(False, "the weights of those who agree"),
        rescale("l1", "inverse_probability", "none"),
        CANCELLED,
    )
    consensus = "sign"
