"""DoTS: each delta's largest changes, at the norm of the whole delta, added with given coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Block, Parameter, Result, Stage, Task
from .sparsified import Left, Norms, Sparsified
from .task_arithmetic import LAMBDA
from .ties import Magnitude
from .topk import cut, top_k


class Largest(Magnitude):
    """As TIES ranks, but where int(ρ·n) is 0 nothing stays."""

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """int(ρ·n); n is the tensor's size or the support's."""
        return int(density * (eligible if self.density_of == "support" else task.size))


class Dots(Sparsified):
    """Source: DoTS (arXiv 2605.00610). Its coefficients come from a search; here they are given as weights.

    The authors' code gives back the l2 norm of the whole delta if asked, so that what is large keeps its share between
    tensors (`norm: model`). Of changes tied at the threshold it keeps all; here exactly int(ρ·n) stay.
    Cost: a histogram of magnitudes (two where one is not enough) and a pass for the norms before the merge.
    """

    name = "dots"
    summary = "keep the largest updates of each tensor, give each delta its norm back, add with coefficients"
    formula = "θ = θ0 + λ·Σ wi·gi·top(δi), gi = ‖δi‖₂ / ‖top(δi)‖₂"
    source = "DoTS (arXiv 2605.00610)"
    parameters = (
        Parameter("weight", "number", None, "coefficient of this model's delta; 0 removes it", per_model=True),
        Parameter(
            "density", "number", 0.3, "share of each tensor's coordinates that is kept", True, minimum=0, maximum=1
        ),
        LAMBDA,
        Parameter(
            "norm",
            "choice",
            "model",
            "over what the norm is given back: the model's delta, each tensor's, or none",
            choices=("model", "tensor", "none"),
        ),
        Parameter(
            "density_of",
            "choice",
            "all",
            "what counts: all coordinates (as published) or the support",
            choices=("all", "support"),
        ),
    )
    consensus = "sum"

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Thresholds, then norms."""
        found = top_k(Largest(values["density_of"]), "tensor")
        return found if values["norm"] == "none" else (*found, Norms(self, 2, values["norm"]))

    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """The largest of each tensor."""
        found = []
        for part in Largest(task.values["density_of"]).score(block, task, results):
            if not (task.per_model["density"] < 1.0).any():
                kept = np.zeros(len(part.experts), np.int64)
                block.kernels.count_updates(part.values, np.arange(len(kept)), kept)
                found.append(Left(part.experts, part.where, part.values, kept))
                continue
            where, values, kept, _ = cut(part, block, task, results)
            found.append(Left(part.experts, where, values, kept))
        return found
