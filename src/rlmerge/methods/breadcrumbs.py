"""Model Breadcrumbs: drop the largest and the smallest updates of each tensor; then add (`breadcrumbs`) or join."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Parameter, Result, Stage, Task
from .sparsified import CANCELLED, DENSITY, DENSITY_OF, Left, Sparsified, normalize, rescale
from .task_arithmetic import LAMBDA, WEIGHT
from .ties import Magnitude
from .topk import Ranked, top_k

GAMMA = Parameter("gamma", "number", 0.01, "share of the largest that is dropped", True, minimum=0, maximum=1)


class Band(Magnitude):
    """Two thresholds an expert: row k of the scores for the smallest that stay, row K + k for the largest that go."""

    def density(self, task: Task) -> NDArray[np.float64]:
        """The density of each expert, twice."""
        return np.tile(task.per_model["density"], 2)

    def rows(self, count: int) -> int:
        """Two rows an expert."""
        return 2 * count

    def places(self, task: Task, row: int, eligible: int) -> int:
        """How many are at least as large as the threshold: outliers, or outliers and what stays.

        int(ρ·n) stay and int(γ·n) are outliers, fewer of these where both are more than n (as mergekit 0.1.5); nothing
        is cut where ρ = 1.
        """
        outliers, expert = divmod(row, len(task.experts))
        density, gamma = float(task.per_model["density"][expert]), float(task.per_model["gamma"][expert])
        total = eligible if self.density_of == "support" else task.size
        if density >= 1.0:
            return 0 if outliers else eligible
        wanted = int(density * total)
        top = min(int(gamma * total), total - wanted)
        return top if outliers else top + wanted

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Ranked]:
        """|δ| in both rows."""
        count = len(task.experts)
        return [
            Ranked(
                np.concatenate([part.rows, part.rows + count]),
                part.where,
                part.values,
                np.concatenate([part.scores, part.scores]),
                part.experts,
            )
            for part in super().score(block, task, results)
        ]


class Breadcrumbs(Sparsified):
    """Source: Model Breadcrumbs (arXiv 2312.06795); parameters and counts as mergekit's.

    Cost: a histogram of magnitudes (two where fp32 deltas leave a threshold open) before the merge.
    """

    name = "breadcrumbs"
    summary = "drop the largest and the smallest updates of each tensor, add the rest"
    formula = "θ = θ0 + λ·Σ wi·mi·δi, mi = [|δi| neither among the γ·n largest nor below the ρ·n after them]"
    source = "Model Breadcrumbs (arXiv 2312.06795)"
    parameters = (WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(False), rescale("none", "l1"), DENSITY_OF)
    consensus = "sum"

    def cuts(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Thresholds of |δ|."""
        return top_k(Band(values["density_of"]), "tensor")

    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """What lies between the two thresholds; ties at both are decided by one hash, so the counts are exact."""
        density, key = task.per_model["density"], np.full(len(task.experts), task.key, np.uint64)
        cutting = bool((density < 1.0).any())
        found = []
        for part in Magnitude(task.values["density_of"]).score(block, task, results):
            values, kept = part.values, np.zeros(len(part.experts), np.int64)
            if cutting:
                ends = []
                for rows in (part.rows, part.rows + len(density)):
                    threshold = np.asarray(results["ties"]["threshold"], np.float32)[rows]
                    cuts = np.asarray(results["ties"]["cut"], np.uint64)[rows]
                    left = part.values.copy()
                    some, dropped = np.zeros(len(part.experts), np.int64), np.zeros(part.where.size, np.uint8)
                    block.kernels.trim(
                        part.scores, threshold, cuts, key[part.experts], block.start, part.where, left, some, dropped
                    )
                    ends.append(left)
                whole = (density[part.experts] >= 1.0)[:, None]
                values = np.where(whole | (ends[1] == 0.0), ends[0], 0.0)
            block.kernels.count_updates(values, np.arange(len(part.experts)), kept)
            found.append(Left(part.experts, part.where, values, kept))
        return found


class BreadcrumbsTies(Breadcrumbs):
    """Source: Model Breadcrumbs (arXiv 2312.06795) before steps 2 and 3 of TIES (arXiv 2306.01708)."""

    name = "breadcrumbs_ties"
    summary = "drop the largest and the smallest updates of each tensor, elect one sign, join those who agree"
    formula = "θ = θ0 + λ·Σ_{sgn(di) = γ} di, di = wi·mi·δi as in breadcrumbs, γ = sgn Σ di"
    source = "Model Breadcrumbs (arXiv 2312.06795) with TIES-Merging (arXiv 2306.01708)"
    parameters = (
        WEIGHT,
        DENSITY,
        GAMMA,
        LAMBDA,
        normalize(False, "the weights of those who agree"),
        rescale("none", "l1"),
        DENSITY_OF,
        CANCELLED,
    )
    consensus = "sign"
