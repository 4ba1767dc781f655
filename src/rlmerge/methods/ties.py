"""Trim, elect sign, merge: `ties`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Merged, Method, Parameter, Result, Stage, Task
from .task_arithmetic import LAMBDA, WEIGHT
from .topk import Scorer, apply_cut, top_k

NO_FISHER = np.empty((0, 0), np.float32)


class Magnitude(Scorer):
    """Ranks unweighted deltas by |δ|; density counts all coordinates (as published) or the support."""

    def __init__(self, density_of: str) -> None:
        self.density_of = density_of

    def applies(self, task: Task) -> bool:
        """TIES trims every tensor."""
        return True

    def density(self, task: Task) -> NDArray[np.float64]:
        """The density of each expert."""
        return task.per_model["density"]

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """int(ρ·n), at least one unless ρ = 0 (as mergekit); n is the tensor's size or the support's."""
        total = eligible if self.density_of == "support" else task.size
        return max(1, int(density * total)) if density > 0.0 else 0

    def score(
        self, block: Block, task: Task, results: Mapping[str, Result]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """δ and |δ|."""
        delta = block.keep("delta", lambda: block.delta)
        scores = np.empty(delta.shape, np.float32)
        block.kernels.scores(delta, delta, NO_FISHER, block.where, np.empty(0), 0, scores)
        return delta, scores


class Ties(Method):
    """Source: TIES-Merging (arXiv 2306.01708); weights and normalisation as mergekit's `ties`.

    Where the weighted deltas cancel exactly (often, between bf16 RLVR experts) nobody is elected and the base stays;
    mergekit elects +, a bias that `cancelled: positive` reproduces.
    """

    name = "ties"
    summary = "trim small updates, elect one sign per coordinate, average those who agree"
    formula = "θ = θ0 + λ·Σ_{sgn(wi·δi) = γ} wi·δi / Σ_{same} wi, γ = sgn Σ wi·trim(δi)"
    source = "TIES-Merging (arXiv 2306.01708)"
    parameters = (
        WEIGHT,
        Parameter("density", "number", 1.0, "share of coordinates that survives the trim", True, minimum=0, maximum=1),
        LAMBDA,
        Parameter("normalize", "flag", True, "divide by the weights of those who agree", late=True),
        Parameter(
            "density_of",
            "choice",
            "all",
            "what density is a share of: all coordinates (as published) or the support",
            choices=("all", "support"),
        ),
        Parameter(
            "cancelled",
            "choice",
            "base",
            "where the weighted deltas sum to 0: keep the base, or elect + as mergekit does",
            late=True,
            choices=("base", "positive"),
        ),
        Parameter("scope", "choice", "tensor", "where density is counted", choices=("tensor", "model")),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Thresholds of |δ|."""
        return top_k(Magnitude(values["density_of"]), values["scope"])

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Trim, elect, merge."""
        scorer = Magnitude(task.values["density_of"])
        kept_deltas, scores = scorer.score(block, task, results)
        deltas = kept_deltas.copy()
        kept, _ = apply_cut(scorer, block, task, results, deltas, scores)
        out = np.empty(block.size, np.float64)
        counts = np.zeros(2, np.int64)
        block.kernels.ties(
            block.base,
            deltas,
            block.where,
            task.per_model["weight"],
            float(task.values["lambda"]),
            bool(task.values["normalize"]),
            int(task.values["cancelled"] == "positive"),
            out,
            counts,
        )
        return Merged(out, {"kept": kept, "elected": counts[:1] - counts[1:], "cancelled": counts[1:]})
