"""Trim, elect sign, merge: `ties`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Patch, Result, Stage, Task, Update
from .sparsified import Left, Norms, rescale
from .task_arithmetic import LAMBDA, WEIGHT
from .topk import Ranked, Scorer, cut, top_k

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
        """int(ρ·n), at least one unless ρ = 0 (as mergekit); n is the tensor's size or the support's.

        Over the whole model (its task has no tensor's name) one more, as the authors' code keeps it: their threshold
        is the largest entry that ought to go.
        """
        total = eligible if self.density_of == "support" else task.size
        more = int(not task.tensor and self.density_of == "all")
        return max(1, int(density * total) + more) if density > 0.0 else 0

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Ranked]:
        """δ and |δ|."""
        if not block.roomy:
            return [_rank(block, patch) for patch in block.patches]
        return block.keep("ranked by magnitude", lambda: [_rank(block, patch) for patch in block.patches])


def _rank(block: Block, patch: Patch) -> Ranked:
    scores = np.empty(patch.delta.shape, np.float32)
    block.kernels.scores(patch.delta, patch.delta, NO_FISHER, np.empty(0), 0, scores)
    return Ranked(patch.experts, patch.where, patch.delta, scores, patch.experts)


class Ties(Method):
    """Source: TIES-Merging (arXiv 2306.01708); weights and normalisation as mergekit's `ties`.

    Where the weighted deltas cancel exactly (often, between bf16 RLVR experts) nobody is elected and the base stays;
    mergekit elects +, a bias that `cancelled: positive` reproduces. `rescale: l1` (mergekit's `true`) gives each
    trimmed delta back the sum of its absolute values, which is no part of the paper.
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
        rescale("none", "l1"),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Thresholds of |δ|, and norms where one is given back."""
        norms = (Norms(self, 1, values["scope"]),) if values["rescale"] == "l1" else ()
        return top_k(Magnitude(values["density_of"]), values["scope"]) + norms

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """The rescale factor of each expert."""
        return results["norms"]["factor"] if "norms" in results else []

    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """The trimmed deltas of a block, patch by patch."""
        found = []
        for part in Magnitude(task.values["density_of"]).score(block, task, results):
            where, deltas, kept, _ = cut(part, block, task, results)
            found.append(Left(part.rows, where, deltas, kept))
        return found

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Trim, elect, merge."""
        changes, stats = [], {"kept": np.zeros(len(task.experts), np.int64), "counts": np.zeros(2, np.int64)}
        for part in self.left(block, task, results):
            where, deltas = part.where, part.values
            if "norms" in results:
                deltas = deltas * np.array(results["norms"]["factor"])[part.experts, None]
            stats["kept"][part.experts] += part.kept
            weight = task.per_model["weight"][part.experts]
            if weight.tolist() == [1.0]:  # nobody else votes, and there is nothing to divide by
                changes.append(Update(where, deltas[0], 1.0, float(task.values["lambda"])))
                stats["counts"][0] += where.size
                continue
            old, out = block.base_at(where), np.empty(where.size)
            block.kernels.ties(
                old,
                deltas,
                weight,
                float(task.values["lambda"]),
                bool(task.values["normalize"]),
                int(task.values["cancelled"] == "positive"),
                out,
                stats["counts"],
            )
            changes.append(Change(where, old, out))
        updates, cancelled = stats.pop("counts")
        return Merged(changes, stats | {"elected": np.array([updates - cancelled]), "cancelled": np.array([cancelled])})
