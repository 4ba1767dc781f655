"""A look at one percent of the weights: what kind of experts these are, and alarms, before a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import FisherError
from rlmerge.execute.inputs import Inputs, Space
from rlmerge.kernels import Backend, load_kernels
from rlmerge.methods.base import Block
from rlmerge.plan import PartResolver, Plan
from rlmerge.recipe import Recipe

SAMPLE = 0.01
"""Share of the coordinates that is looked at."""
AT_LEAST, AT_MOST = 2**20, 2**23
"""Coordinates: small models are looked at more closely, giant ones not longer than this takes."""
RUN = 2**14
"""Coordinates of one run of the sample."""

DENSE = 0.9
STRANGE_COSINE = 0.8
IGNORED = 0.01
FACTORS = ("weight", "density", "lambda", "scaling", "select_topk")
"""Parameters that keep nothing of an update where they are 0."""


def take_sample(plan: Plan, kernels: Backend = "numpy") -> dict[str, Any]:
    """Supports, sizes, conflicts and Fishers in evenly spread runs of coordinates: about 1 % of the model.

    Raises NonFiniteError or FisherError where the sample already shows what the merge would raise.
    """
    runs = list(_runs(plan))
    runs = [run for run in runs if plan.tensors[run[0]].base is not None]
    if not runs:
        return {}
    inputs = Inputs(plan, load_kernels(kernels))
    total = _Tally(len(plan.experts))
    space = Space()
    try:
        # infinities that a recipe lets in have no cosine and no length
        with np.errstate(over="ignore", invalid="ignore"):
            for tensor, start, stop in runs:
                total.add(inputs.block(tensor, start, stop, space), plan, plan.places_of(plan.tensors[tensor]))
            return total.to_dict(plan.experts)
    finally:
        inputs.close()


def _runs(plan: Plan) -> Sequence[tuple[int, int, int]]:
    merged = [(t, tensor) for t, tensor in enumerate(plan.tensors) if tensor.carry is None]
    size = sum(tensor.size for _, tensor in merged)
    if not size:
        return []
    wanted = min(max(SAMPLE * size, AT_LEAST), AT_MOST)
    every = max(1, round(size / wanted))
    runs, number = [], 0
    for t, tensor in merged:
        length = min(RUN, tensor.block)
        for start in range(0, tensor.size, length):
            if number % every == 0:
                runs.append((t, start, min(start + length, tensor.size)))
            number += 1
    return runs


class _Tally:
    """Sums over the sample."""

    def __init__(self, count: int) -> None:
        self.size = 0
        self.changed = np.zeros(count, np.int64)
        self.small = np.zeros(count, np.int64)
        self.squares = np.zeros((count, 4))
        self.overlap = np.zeros((count, count), np.int64)
        self.conflict = np.zeros((count, count), np.int64)
        self.fisher_zero = np.zeros(count, np.int64)
        self.fisher_size = 0

    def add(self, block: Block, plan: Plan, places: list[int]) -> None:
        """One run of the sample; `places` are the numbers among all experts of those of the block."""
        self.size += block.size
        base = block.base.astype(np.float64)
        square = _dot(base, base)
        self.squares += [square, square, square, 0.0]
        for patch in block.patches:
            old = block.base_at(patch.where)
            signs = np.sign(patch.delta)
            for row, local in enumerate(patch.experts.tolist()):
                delta, k = patch.delta[row], places[local]
                self.changed[k] += np.count_nonzero(delta)
                self.small[k] += np.count_nonzero(np.abs(delta) <= 1e-5) - np.count_nonzero(delta == 0)
                # (θ + δ)² and θ·(θ + δ), beside θ² where nothing changed
                product, own = _dot(old, delta), _dot(delta, delta)
                self.squares[k] += [0.0, 2 * product + own, product, own]
                for before in range(row):
                    j, k2 = sorted((places[int(patch.experts[before])], k))
                    both = (signs[row] != 0) & (signs[before] != 0)
                    self.overlap[j, k2] += np.count_nonzero(both)
                    self.conflict[j, k2] += np.count_nonzero(both & (signs[row] != signs[before]))
        self._add_fisher(block.fisher, plan, places)

    def _add_fisher(self, fisher: NDArray[np.float32], plan: Plan, places: list[int]) -> None:
        if not fisher.size:
            return
        if (fisher < 0).any():
            place = int(np.flatnonzero((fisher < 0).any(axis=1))[0])
            raise FisherError(
                f"the Fisher of {plan.experts[places[place]]!r} has negative entries; a diagonal Fisher is a mean of "
                f"squares. Estimate it again, or {plan.recipe.method.fisherless}."
            )
        self.fisher_size += fisher.shape[1]
        self.fisher_zero[places] += np.count_nonzero(fisher == 0, axis=1)

    def to_dict(self, experts: tuple[str, ...]) -> dict[str, Any]:
        """Shares and cosines with names."""
        out: dict[str, Any] = {"coordinates": self.size, "experts": {}}
        for k, key in enumerate(experts):
            base, value, product, delta = self.squares[k]
            entry = {
                "support": self.changed[k] / self.size,
                "cosine_to_base": product / np.sqrt(base * value) if base > 0 and value > 0 else None,
                "relative_norm": float(np.sqrt(delta / base)) if base > 0 else None,
                "changes_within_1e-5": self.small[k] / self.changed[k] if self.changed[k] else None,
            }
            if self.fisher_size:
                entry["fisher_zero"] = self.fisher_zero[k] / self.fisher_size
            out["experts"][key] = {
                name: float(v) if v is not None and np.isfinite(v) else None for name, v in entry.items()
            }
        out["pairs"] = [
            {
                "experts": [experts[j], experts[k]],
                "overlap": self.overlap[j, k] / self.size,
                "conflict": self.conflict[j, k] / self.overlap[j, k] if self.overlap[j, k] else None,
            }
            for k in range(len(experts))
            for j in range(k)
        ]
        return out


def _dot(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.einsum("i,i", one, other))  # not BLAS, whose threads cost more than so short a sum


def plan_alarms(plan: Plan) -> list[str]:
    """What the plan alone says that a user should think about."""
    found = []
    sizes: dict[str | None, int] = {"mismatch": 0, None: 0}
    for tensor in plan.tensors:
        sizes[tensor.carry] = sizes.get(tensor.carry, 0) + tensor.size
    taken, whole = sizes["mismatch"], sum(sizes.values())
    if 2 * taken > whole:
        found.append(
            f"{taken:,} of {whole:,} weights ({taken / whole:.0%}) do not fit in every model and are taken from "
            "the base (on_mismatch: base). Are these models trained from it, and are their tensors called as its own?"
        )
    if sizes[None] and plan.has_base and all(_keeps_nothing(plan, recipe) for recipe in plan.variants):
        found.append(
            "nothing of any update is kept: the output equals the base, for a weight, density or other factor is 0 "
            "for every model."
        )
    return found


def _keeps_nothing(plan: Plan, recipe: Recipe) -> bool:
    """Whether a factor of every update is 0 at every tensor: one of the whole, or one of each model."""
    if recipe.method.arity.base != "required":
        return False  # an average: its weights are shares of models
    resolver = PartResolver(recipe, plan.layers)
    for tensor in plan.tensors:
        if tensor.carry is None:
            at = resolver.resolve(tensor)
            off = np.zeros(len(tensor.experts), bool)
            for name in FACTORS:
                off |= at.per_model.get(name, np.array(at.values.get(name, 1.0))) == 0.0
            if not off.all():
                return False
    return True


def alarms(plan: Plan, sample: dict[str, Any]) -> list[str]:
    """What the plan and the sample say that a user should think about."""
    found = plan_alarms(plan)
    method = plan.recipe.merge_method
    # an average, or a path that starts at the base, lists it on purpose
    listed = zip(plan.experts, plan.models) if plan.base and plan.recipe.method.arity.base == "optional" else ()
    same = {key for key, model in listed if plan.base and model.folder.samefile(plan.base.folder)}
    for key, entry in sample.get("experts", {}).items():
        if key in same:
            continue
        cosine, support = entry["cosine_to_base"], entry["support"]
        if support == 0.0:
            found.append(
                f"{key}: equals the base in all {sample['coordinates']} coordinates looked at. Is it the right folder?"
            )
        elif cosine is not None and cosine < STRANGE_COSINE:
            found.append(
                f"{key}: does not look trained from this base (cosine of the weights {cosine:.3f}; fine-tuned models "
                "have 0.99 and more)."
            )
        elif support > DENSE and method == "sar":
            found.append(
                f"{key}: {support:.0%} of the weights differ from the base: dense deltas. SAR reduces to "
                "per-coordinate arbitration; `min_change` filters noise."
            )
        if method == "ram" and entry["changes_within_1e-5"]:
            epsilon = plan.recipe.parameters.get("epsilon", 1e-5)
            ignored = entry["changes_within_1e-5"]
            if epsilon == 1e-5 and ignored > IGNORED:
                found.append(
                    f"{key}: ram's `epsilon: 1e-5` ignores {ignored:.0%} of its changes; `epsilon: 0` counts them all."
                )
        if entry.get("fisher_zero", 0.0) > 0.5 and method == "sar":
            found.append(f"{key}: its Fisher is zero at {entry['fisher_zero']:.0%} of the coordinates looked at.")
    return found
