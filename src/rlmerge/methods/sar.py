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
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Patch, Result, Scope, Stage, Summary, Task, Update
from .sar_stages import FisherMean, PairConflict, Ranks, dense_ranks
from .task_arithmetic import LAMBDA
from .topk import Ranked, Scorer, cut, top_k

SENSITIVITY = ("fisher_delta2", "fisher", "delta2")
ARBITRATION = ("winner", "soft", "elect", "margin", "random")
AGREEMENT = ("sensitivity_mean", "mean", "winner", "sum", "multiplicity")
SCORE = ("delta", "share", "merged")
NONE = np.empty((0, 0))
NO_FISHER = np.empty((0, 0), np.float32)
NO_SCORES = np.empty((0, 0), np.float32)
NORMS = {"l1": 1, "l2": 2}
SPARSIFY = ("magnitude", "magprune", "fisher_magnitude", "none")


def sensitivity_reads(values: Mapping[str, Any]) -> bool:
    """Whether these choices look at a Fisher."""
    return values["sensitivity"] != "delta2" or values["sparsify"] == "fisher_magnitude"


@dataclass
class Part(Ranked):
    """A patch after stage 1, and after stage 2 once `cut` is set: t = r·d in `values`, cut in place.

    whole        uint8[m], the shares make a whole; both empty for updates of one expert alone, unless magprune
    dropped      uint8[m], where an update of some expert was cut                                     prunes them
    """

    whole: NDArray[np.uint8]
    dropped: NDArray[np.uint8]


@dataclass
class Resolved:
    """What stage 1 leaves of a block, and stage 2 cuts in place, once.

    wins         int64[K]
    counts       int64[4]: draws, draws under δ², conflicts that both decide, of these with the same winner
    eligible     int64[K], updates before the cut
    kept         int64[K], updates after it; None before the cut
    """

    parts: list[Part]
    wins: NDArray[np.int64]
    counts: NDArray[np.int64]
    eligible: NDArray[np.int64]
    kept: NDArray[np.int64] | None = None


def resolve(block: Block, task: Task, results: Mapping[str, Result]) -> Resolved:
    """Stage 1 for a block: resolved updates, their scores, and what happened; kept for the next stage."""
    if block.roomy:
        return block.keep(("resolved", task.group), lambda: _resolve(block, task, results, keep=False))
    return _resolve(block, task, results, keep=True)


def _resolve(block: Block, task: Task, results: Mapping[str, Result], keep: bool) -> Resolved:
    """All patches of a block. With `keep`, what is dear (the overlaps, which need Fishers) is kept by itself."""
    count = len(task.experts)
    state = Resolved([], np.zeros(count, np.int64), np.zeros(4, np.int64), np.zeros(count, np.int64))
    if task.fisher and task.values["sparsify"] == "fisher_magnitude":
        _ = block.fisher  # every patch asks for it
    for patch in block.patches:
        if not task.per_model["weight"][patch.experts].any():
            continue
        part, wins, counts = _settle(block, task, results, patch, keep)
        state.wins += wins
        state.counts += counts
        if part.values is patch.delta:  # one expert's changes as they are: none of them is 0
            state.eligible[patch.experts] += patch.where.size
        else:
            block.kernels.count_updates(part.values, part.experts, state.eligible)
        state.parts.append(part)
    return state


def _settle(
    block: Block, task: Task, results: Mapping[str, Result], patch: Patch, keep: bool
) -> tuple[Part, NDArray[np.int64], NDArray[np.int64]]:
    """A patch: its resolved updates and their scores; wins int64[K] and counts int64[4] as in `Resolved`.

    With `keep`, what arbitration made of overlaps is kept for the next stage.
    """
    reads = task.fisher and sensitivity_reads(task.values)
    mean = np.asarray(results["fisher_mean"]["mean"], np.float64) if reads else np.empty(0)
    by_fisher = reads and task.values["sparsify"] == "fisher_magnitude"
    # Fishers matter where several meet, and for a sparsifier that ranks by them
    fisher = block.fisher_at(patch.experts, patch.where) if by_fisher else NO_FISHER
    weight = task.per_model["weight"][patch.experts]
    delta = patch.delta
    if (weight != 1.0).any():
        delta = np.where(weight[:, None] != 0.0, delta, 0.0) * weight[:, None]
    rows = np.zeros(1, np.int64) if task.values["score"] == "merged" else patch.experts
    size = patch.where.size
    # a lone update is a whole, and goes when it is dropped (magprune leaves a zero): it needs no flags
    flags = 0 if patch.alone and task.values["sparsify"] != "magprune" else size
    whole, dropped = np.ones(flags, np.uint8), np.zeros(flags, np.uint8)
    part = Part(rows, patch.where, delta, NO_SCORES, patch.experts, whole, dropped)
    wins, counts = np.zeros(len(task.experts), np.int64), np.zeros(4, np.int64)
    if not patch.alone:
        make = partial(_arbitrate, block, task, results, part, delta, mean)
        part.values, part.whole, wins, counts = block.keep(("overlap", task.group), make) if keep else make()
    if task.values["sparsify"] != "none" and task.is_matrix:
        choice = "delta" if task.values["sparsify"] == "fisher_magnitude" else task.values["score"]
        part.scores = np.empty((len(rows), size), np.float32)
        own = mean[patch.experts] if reads else mean
        block.kernels.scores(delta, part.values, fisher, own, 3 if by_fisher else SCORE.index(choice), part.scores)
    return part, wins, counts


def _arbitrate(
    block: Block, task: Task, results: Mapping[str, Result], part: Part, delta: NDArray[np.float64],
    mean: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Updates fp64[K, m], whole, wins and counts, from weighted deltas and the means of the Fishers (empty: none)."""
    values, count = task.values, len(task.experts)
    given = (delta, block.fisher_at(part.experts, part.where) if mean.size else NO_FISHER, mean)
    made = np.empty(delta.shape), part.whole, np.zeros(count, np.int64), np.zeros(4, np.int64)
    sensitivity = SENSITIVITY.index(values["sensitivity"] if given[2].size else "delta2")
    agreement = AGREEMENT.index(values["agreement"])
    if values["arbitration"] == "winner" and values["allies"] == "drop" and agreement <= 2:
        block.kernels.resolve(*given, sensitivity, agreement, *made)
        return made
    phi = np.zeros((count, count))
    if values["agreement"] == "multiplicity":
        phi = np.asarray(results["pair_conflict"]["phi"], np.float64).reshape(count, count)
    block.kernels.resolve_by(
        *given,
        sensitivity,
        ARBITRATION.index(values["arbitration"]),
        agreement,
        values["allies"] == "join",
        float(values["power"]),
        float(values["margin"]),
        phi,
        task.keys,
        block.start,
        part.where,
        *made,
    )
    return made


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

    def score(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Part]:
        """Resolved updates and their scores."""
        return resolve(block, task, results).parts


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
            stages.append(FisherMean(self.fisherless))
        if values["agreement"] == "multiplicity":
            stages.append(PairConflict())
        if values["sparsify"] != "none":
            scorer = ResolvedUpdates(values["score"])
            if values["sparsify"] == "magprune":
                stages.append(Ranks(scorer, values["scope"]))
            else:
                stages += top_k(scorer, values["scope"], NORMS.get(values["rescale"], 0))
            if values["rescale"] in NORMS:
                stages.append(KeptNorms(scorer, values["scope"], NORMS[values["rescale"]]))
        return tuple(stages)

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """The rescale factors of a matrix."""
        return rescale_factors(task, results).tolist() if "norms" in results and task.is_matrix else []

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Resolve, cut, rescale, add: one block."""
        state = resolve(block, task, results)
        cuts = task.values["sparsify"] != "none" and task.is_matrix
        eligible = kept = state.eligible if cuts else np.zeros(len(task.experts), np.int64)
        if cuts and bool((task.per_model["density"] < 1.0).any()):
            kept = cut_resolved(block, task, results, state)
        gain = rescale_factors(task, results)
        scale = float(task.values["lambda"])
        unit = (scale * gain * task.per_model["weight"] == 1.0) & block.comparable
        if task.values["rescale"] == "inverse_probability":
            unit &= task.per_model["density"] >= 1.0  # survivors were divided by their chance: no stored value fits
        changes = []
        for part in state.parts:
            units = unit[part.experts]
            if len(part.experts) == 1 and not units.any() and task.values["sparsify"] != "magprune":
                # (magprune leaves zeros behind, which must not touch a base of -0)
                changes.append(Update(part.where, part.values[0], float(gain[part.experts[0]]), scale))
                continue
            old, out = block.base_at(part.where), np.empty(part.where.size)
            # stored values are copied only where a factor of exactly 1 makes that possible
            stored = block.stored_at(part.experts, part.where) if units.any() else NONE
            own = gain[part.experts]
            whole, dropped = part.whole, part.dropped
            if not whole.size:
                whole, dropped = np.ones(part.where.size, np.uint8), np.zeros(part.where.size, np.uint8)
            block.kernels.compose(old, stored, part.values, own, scale, units, whole, dropped, out)
            changes.append(Change(part.where, old, out))
        names = ("draws", "delta2_draws", "both_decide", "same_winner")
        stats = {name: state.counts[place : place + 1] for place, name in enumerate(names)}
        return Merged(changes, stats | {"wins": state.wins, "eligible": eligible, "kept": kept})


def cut_resolved(block: Block, task: Task, results: Mapping[str, Result], state: Resolved) -> NDArray[np.int64]:
    """Stage 2 of SAR on a block, in place and once: top-k by threshold, or magprune by rank. Returns kept int64[K]."""
    if state.kept is None:
        state.kept = np.zeros(len(task.experts), np.int64)
        for part in state.parts:
            if task.values["sparsify"] == "magprune":
                _prune(part, block, task, results, state.kept)
                continue
            part.where, part.values, kept, part.dropped = cut(part, block, task, results)
            part.scores = NO_SCORES
            state.kept[part.experts] += kept
    return state.kept


def _prune(part: Part, block: Block, task: Task, results: Mapping[str, Result], total: NDArray[np.int64]) -> None:
    density = task.per_model["density"][part.rows]
    epsilon = np.where(density < 1.0, float(task.values["epsilon"]), 0.0)
    kept = np.zeros(len(part.experts), np.int64)
    part.values = part.values.copy()
    block.kernels.ramp(
        part.scores,
        dense_ranks(results["ranks"])[part.rows],
        np.minimum(density, 1.0) - epsilon,
        np.minimum(density, 1.0) + epsilon,
        task.keys[part.rows] if task.values["score"] != "merged" else np.array([task.key], np.uint64),
        block.start,
        part.where,
        part.values,
        task.values["rescale"] == "inverse_probability",
        kept,
        part.dropped,
    )
    total[part.experts] += kept


class KeptNorms(Stage):
    """Norms of the resolved updates before and after the cut, per expert: what a rescaling must restore.

    Measured only where the histograms of top-k do not have them already (they do above 2²⁰ coordinates).
    """

    name = "norms"

    def __init__(self, scorer: Scorer, scope: Scope, order: int) -> None:
        self.scorer = scorer
        self.scope = scope
        self.order = order

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Where something is cut and no earlier stage has added it up."""
        if "norms" in results.get("ties", {}):
            return False
        return self.scorer.applies(task) and bool((self.scorer.density(task) < 1.0).any())

    def empty(self, count: int) -> Summary:
        """Sums of nothing."""
        return {"before": np.zeros(count), "after": np.zeros(count)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds Σ|t| or Σt² of a block, before and after."""
        state = resolve(block, task, results)
        self._add(block, state, summary["before"])
        cut_resolved(block, task, results, state)
        self._add(block, state, summary["after"])

    def _add(self, block: Block, state: Resolved, total: NDArray[np.float64]) -> None:
        for part in state.parts:
            some = np.zeros(len(part.experts))
            block.kernels.kept_norms(part.values, self.order, some)
            total[part.experts] += some

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Norms (not their squares) per expert."""
        sums = results.get("ties", {}).get("norms", total)
        before, after = (np.asarray(sums[key], np.float64) for key in ("before", "after"))
        if self.order == 2:
            before, after = np.sqrt(before), np.sqrt(after)
        return {"before": before.tolist(), "after": after.tolist()}


def rescale_factors(task: Task, results: Mapping[str, Result]) -> NDArray[np.float64]:
    """g per expert: norm before / norm after, at most rescale_max; 1 where nothing was kept or cut."""
    factors = np.ones(len(task.experts))
    if "norms" not in results or not task.is_matrix:
        return factors
    before, after = (np.asarray(results["norms"][k], np.float64) for k in ("before", "after"))
    lossy = after > 0.0
    factors[lossy] = np.minimum(before[lossy] / after[lossy], float(task.values["rescale_max"]))
    return factors
