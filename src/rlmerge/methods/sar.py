"""SAR-Merging (Sensitivity-aware Resolving Merging): resolve conflicts by sensitivity, sparsify, rescale, add.

The paper's public text (arXiv 2606.18521) names three stages and their order, not their equations; this is our reading
(docs/methods/sar.md), with every choice a parameter. Per coordinate, with d = w·δ and s = F̂·d²:

1. Resolve: unique updates stay; in a conflict the most sensitive expert keeps its update; in an agreement the
   updates are averaged by sensitivity. Result: t = r·d with shares r in [0, 1].
2. Sparsify, per expert: keep the `density` largest of the non-zero t.
3. Rescale, per expert: restore the norm that sparsifying took, at most by `rescale_max`.
4. θ = θ0 + λ·Σ g·t. A sum: the shares already divide what experts have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Merged, Method, Parameter, Result, Stage, Task
from .sar_stages import FisherMean, PairConflict, Ranks, dense_ranks
from .task_arithmetic import LAMBDA
from .topk import Norms, Scorer, apply_cut, top_k

SENSITIVITY = ("fisher_delta2", "fisher", "delta2")
ARBITRATION = ("winner", "soft", "elect", "margin", "random")
AGREEMENT = ("sensitivity_mean", "mean", "winner", "sum", "multiplicity")
SCORE = ("delta", "share", "merged")
NO_FISHER = np.empty((0, 0), np.float32)
SPARSIFY = ("magnitude", "magprune", "fisher_magnitude", "none")


def sensitivity_reads(values: Mapping[str, Any]) -> bool:
    """Whether these choices look at a Fisher."""
    return values["sensitivity"] != "delta2" or values["sparsify"] == "fisher_magnitude"


def resolve(block: Block, task: Task, results: Mapping[str, Result]) -> _Resolved:
    """Stage 1 for a block: resolved updates, their scores, and what happened; kept for the next stage."""
    choices = tuple(value for name, value in task.values.items() if name != LAMBDA.name)
    key = ("resolved", task.key, choices, *(values.tobytes() for values in task.per_model.values()))
    return block.keep(key, lambda: _resolve(block, task, results))


def _resolve(block: Block, task: Task, results: Mapping[str, Result]) -> _Resolved:
    count = len(task.experts)
    values = task.values
    weight = task.per_model["weight"]
    deltas = block.delta
    if (weight != 1.0).any():
        deltas = weight[:, None] * block.delta
        deltas[weight == 0.0] = 0.0
    resolved = np.empty(deltas.shape, np.float64)
    whole = np.empty(block.where.size, np.uint8)
    wins = np.zeros(count, np.int64)
    counts = np.zeros(4, np.int64)
    reads = task.fisher and sensitivity_reads(values)
    sensitivity = SENSITIVITY.index(values["sensitivity"] if reads else "delta2")
    mean = np.asarray(results["fisher_mean"]["mean"], np.float64) if reads else np.empty(0)
    phi = np.zeros((count, count))
    if values["agreement"] == "multiplicity":
        phi = np.asarray(results["pair_conflict"]["phi"], np.float64).reshape(count, count)
    fisher = block.fisher if reads else NO_FISHER
    block.kernels.resolve(
        deltas,
        fisher,
        mean,
        sensitivity,
        ARBITRATION.index(values["arbitration"]),
        AGREEMENT.index(values["agreement"]),
        values["allies"] == "join",
        float(values["power"]),
        float(values["margin"]),
        phi,
        task.keys,
        block.start,
        block.where,
        block.owner,
        resolved,
        whole,
        wins,
        counts,
    )
    code = 3 if values["sparsify"] == "fisher_magnitude" else SCORE.index(values["score"])
    code = 0 if code == 3 and not reads else code
    scores = np.empty((1 if values["score"] == "merged" else count, block.where.size), np.float32)
    if values["sparsify"] != "none" and task.is_matrix:
        block.kernels.scores(deltas, resolved, fisher, block.where, mean, code, scores)
    return _Resolved(resolved, scores, whole, wins, counts, np.count_nonzero(resolved, axis=1))


@dataclass(slots=False)
class _Resolved:
    """What stage 1 leaves of a block, and stage 2 cuts in place, once.

    updates      fp64[K, m], t = r·d
    scores       fp32[K or 1, m], what sparsification ranks
    whole        uint8[m], the shares make a whole
    wins         int64[K]
    counts       int64[4]: draws, draws under δ², conflicts that both decide, of these with the same winner
    eligible     int64[K], updates before the cut
    kept         int64[K], updates after it; dropped uint8[m], where one was cut; None before the cut
    """

    updates: NDArray[np.float64]
    scores: NDArray[np.float32]
    whole: NDArray[np.uint8]
    wins: NDArray[np.int64]
    counts: NDArray[np.int64]
    eligible: NDArray[np.int64]
    kept: NDArray[np.int64] | None = None
    dropped: NDArray[np.uint8] | None = None


class ResolvedUpdates(Scorer):
    """Ranks the resolved updates of each expert; only tensors with two dimensions of size > 1 are sparsified."""

    def __init__(self, score: str) -> None:
        self.merged = score == "merged"

    def applies(self, task: Task) -> bool:
        """Matrices, and only if something is to be cut."""
        return task.is_matrix

    def density(self, task: Task) -> NDArray[np.float64]:
        """The density of each expert, or the one density of a merged score."""
        return task.per_model["density"][:1] if self.merged else task.per_model["density"]

    def wanted(self, task: Task, density: float, eligible: int) -> int:
        """max(1, int(ρ·n)), n the coordinates with a resolved update."""
        return max(1, int(density * eligible))

    def rows(self, count: int) -> int:
        """One row of scores an expert, or one for all."""
        return 1 if self.merged else count

    def score(
        self, block: Block, task: Task, results: Mapping[str, Result]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Resolved updates and their scores."""
        state = resolve(block, task, results)
        return state.updates, state.scores


class Sar(Method):
    """Source: SAR-Merging (arXiv 2606.18521), our reading: design, section 2."""

    name = "sar"
    summary = "settle each conflict by sensitivity, sparsify by magnitude, rescale, add"
    formula = "θ = θ0 + λ·Σ gi·keep(ri·wi·δi), r from si = F̂i·(wi·δi)²"
    source = "SAR-Merging (arXiv 2606.18521), our reading"
    parameters = (
        Parameter("weight", "number", 1.0, "factor of this model's delta, never normalised; 0 removes it", True),
        Parameter("density", "number", 0.8, "share of the non-zero updates that is kept", True, maximum=1, above=0),
        LAMBDA,
        Parameter(
            "sensitivity", "choice", SENSITIVITY[0], "what arbitrates: F̂·d², F̂ alone, or d²", choices=SENSITIVITY
        ),
        Parameter("arbitration", "choice", ARBITRATION[0], "who keeps an update in a conflict", choices=ARBITRATION),
        Parameter("agreement", "choice", AGREEMENT[0], "how updates of one sign are combined", choices=AGREEMENT),
        Parameter("allies", "choice", "drop", "K ≥ 3: others with the winner's sign", choices=("drop", "join")),
        Parameter("power", "number", 1.0, "exponent a of the soft shares (s/max s)^a", minimum=0),
        Parameter("margin", "number", 1.0, "κ: a winner needs κ times the second sensitivity", minimum=0),
        Parameter("sparsify", "choice", SPARSIFY[0], "how updates are cut", choices=SPARSIFY),
        Parameter("score", "choice", SCORE[0], "what magnitude ranks: |d|, |r·d|, or |Σ r·d|", choices=SCORE),
        Parameter("scope", "choice", "tensor", "where density and norms are counted", choices=("tensor", "model")),
        Parameter(
            "rescale",
            "choice",
            "l2",
            "which norm the cut gives back",
            choices=("l2", "l1", "inverse_probability", "none"),
        ),
        Parameter("rescale_max", "number", 1.5, "the largest rescale factor", minimum=1),
        Parameter("epsilon", "number", 0.15, "magprune: keep-probabilities run from ρ − ε to ρ + ε", minimum=0),
    )
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, Any]) -> list[str]:
        """Combinations that cannot mean anything."""
        problems = []
        density = np.asarray(per_model["density"])
        if values["sparsify"] == "magprune" and (density < 1.0).any():
            cutting = density[density < 1.0]
            low, high = cutting.min() - values["epsilon"], cutting.max() + values["epsilon"]
            if not 0.0 < low <= high <= 1.0:
                problems.append(
                    f"magprune keeps with probabilities density ± epsilon = {low:.4g} … {high:.4g}, which must lie in "
                    "(0, 1]: lower epsilon, or change density"
                )
        if values["sparsify"] != "magprune" and values["rescale"] == "inverse_probability":
            problems.append("`rescale: inverse_probability` needs `sparsify: magprune`; others have l2, l1, none")
        if values["score"] == "merged" and np.unique(density).size > 1:
            problems.append("`score: merged` decides once for all experts, so they need one density: write it globally")
        if values["score"] != "delta" and values["sparsify"] == "fisher_magnitude":
            problems.append("`sparsify: fisher_magnitude` has its own score: leave out `score`")
        return problems

    def uses_fisher(self, values: Mapping[str, Any]) -> bool:
        """All but delta2, and sparsification by Fisher magnitude."""
        return sensitivity_reads(values)

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Fisher means, conflict shares of pairs, thresholds (or ranks), norms: those that these choices need."""
        stages: list[Stage] = []
        if self.uses_fisher(values):
            stages.append(FisherMean())
        if values["agreement"] == "multiplicity":
            stages.append(PairConflict())
        if values["sparsify"] != "none":
            scorer = ResolvedUpdates(values["score"])
            if values["sparsify"] == "magprune":
                stages.append(Ranks(scorer, values["scope"]))
            else:
                stages += top_k(scorer, values["scope"])
            if values["rescale"] in ("l1", "l2"):
                stages.append(KeptNorms(scorer, values["scope"], 2 if values["rescale"] == "l2" else 1))
        return tuple(stages)

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """The rescale factors of a matrix."""
        return rescale_factors(task, results).tolist() if "norms" in results and task.is_matrix else []

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Resolve, cut, rescale, add: one block."""
        values = task.values
        count = len(task.experts)
        state = resolve(block, task, results)
        scorer = ResolvedUpdates(values["score"])
        cuts = values["sparsify"] != "none" and scorer.applies(task)
        eligible = kept = state.eligible if cuts else np.zeros(count, np.int64)
        dropped = np.zeros(block.where.size, np.uint8)
        if cuts and bool((scorer.density(task) < 1.0).any()):
            kept, dropped = cut(scorer, block, task, results, state)
        gain = rescale_factors(task, results)
        scale = float(values["lambda"])
        unit = (scale * gain * task.per_model["weight"] == 1.0) & ~block.additive
        # stored values are copied only where a factor of exactly 1 makes that possible
        expert = block.expert if unit.any() else NO_FISHER
        out = np.empty(block.size, np.float64)
        block.kernels.compose(
            block.base,
            expert,
            state.updates,
            block.where,
            block.owner,
            gain,
            scale,
            unit,
            state.whole,
            dropped,
            out,
        )
        names = ("draws", "delta2_draws", "both_decide", "same_winner")
        stats = {name: state.counts[place : place + 1] for place, name in enumerate(names)}
        return Merged(out, stats | {"wins": state.wins, "eligible": np.asarray(eligible, np.int64), "kept": kept})


def cut(
    scorer: ResolvedUpdates, block: Block, task: Task, results: Mapping[str, Result], state: _Resolved
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Stage 2 of SAR on a block, in place and once: top-k by threshold, or magprune by rank. Returns kept, dropped."""
    if state.kept is not None and state.dropped is not None:
        return state.kept, state.dropped
    if task.values["sparsify"] == "magprune":
        state.kept, state.dropped = _prune(scorer, block, task, results, state)
    else:
        state.kept, state.dropped = apply_cut(scorer, block, task, results, state.updates, state.scores)
    return state.kept, state.dropped


def _prune(
    scorer: ResolvedUpdates, block: Block, task: Task, results: Mapping[str, Result], state: _Resolved
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    kept = np.zeros(state.updates.shape[0], np.int64)
    dropped = np.zeros(state.updates.shape[1], np.uint8)
    density = scorer.density(task)
    epsilon = np.where(density < 1.0, float(task.values["epsilon"]), 0.0)
    block.kernels.ramp(
        state.scores,
        dense_ranks(results["ranks"]),
        np.minimum(density, 1.0) - epsilon,
        np.minimum(density, 1.0) + epsilon,
        np.array([task.key], np.uint64) if scorer.merged else task.keys,
        block.start,
        block.where,
        state.updates,
        task.values["rescale"] == "inverse_probability",
        kept,
        dropped,
    )
    return kept, dropped


class KeptNorms(Norms):
    """Norms before and after SAR's cut."""

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: dict[str, Any]) -> None:
        """Adds the norms of a block before and after."""
        assert isinstance(self.scorer, ResolvedUpdates)
        state = resolve(block, task, results)
        block.kernels.kept_norms(state.updates, self.order, summary["before"])
        cut(self.scorer, block, task, results, state)
        block.kernels.kept_norms(state.updates, self.order, summary["after"])


def rescale_factors(task: Task, results: Mapping[str, Result]) -> NDArray[np.float64]:
    """g per expert: norm before / norm after, at most rescale_max; 1 where nothing was kept or cut."""
    factors = np.ones(len(task.experts))
    if "norms" not in results or not task.is_matrix:
        return factors
    before, after = (np.asarray(results["norms"][k], np.float64) for k in ("before", "after"))
    lossy = after > 0.0
    factors[lossy] = np.minimum(before[lossy] / after[lossy], float(task.values["rescale_max"]))
    return factors
