"""What sparsifying methods share: cut each expert's delta, give back a norm, then add up or elect a sign and join.

A family (`dare`, `della`, `breadcrumbs`) says what the cut leaves of a patch; everything else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .base import Block, Change, Merged, Method, Parameter, Result, Stage, Summary, Task, weights_cancel

DENSITY = Parameter("density", "number", 1.0, "share of coordinates that is kept", True, minimum=0, maximum=1)
DENSITY_OF = Parameter(
    "density_of",
    "choice",
    "all",
    "what counts: all coordinates (as published) or the support",
    choices=("all", "support"),
)
CANCELLED = Parameter(
    "cancelled",
    "choice",
    "base",
    "where the weighted deltas sum to 0: keep the base, or elect + as mergekit does",
    late=True,
    choices=("base", "positive"),
)


def normalize(default: bool, what: str = "the sum of the weights") -> Parameter:
    """The flag `normalize`."""
    return Parameter("normalize", "flag", default, f"divide by {what}", late=True)


def rescale(*choices: str) -> Parameter:
    """The choice `rescale`, the first one being the default; mergekit's flag is understood."""
    doc = "what the cut gives back (mergekit's `true` is l1, its `false` none)"
    return Parameter("rescale", "choice", choices[0], doc, choices=choices, flags=("l1", "none"))


@dataclass
class Left:
    """What a cut leaves of a patch: deltas fp64[E, m] at `where` int32[m], 0 where an expert was cut.

    kept         int64[E], coordinates that are left of each expert
    """

    experts: NDArray[np.int64]
    where: NDArray[np.int32]
    values: NDArray[np.float64]
    kept: NDArray[np.int64]

    def compact(self, kernels: ModuleType) -> Left:
        """Without the coordinates where nothing is left: there the base stays, bit for bit."""
        count, size = self.values.shape
        where, values = np.empty(size, np.int32), np.empty(count * size)
        number = kernels.compact(self.values, self.where, where, values)
        if number == size:
            return self
        # copies: what is kept for the merge must not hold on to the room of what was cut
        values = values[: count * number].reshape(count, -1).copy()
        return Left(self.experts, where[:number].copy(), values, self.kept)


class Sparsified(Method):
    """θ0 + λ·consensus(wi·gi·cut(δi)), as mergekit's generalised task arithmetic."""

    consensus: Literal["sum", "sign"]
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    @abstractmethod
    def left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """The cut deltas of a block, patch by patch, not yet rescaled by a norm."""

    def cuts(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """What must be measured before a block can be cut."""
        return ()

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, NDArray[np.float64]]) -> list[str]:
        """Weights that sum to zero cannot be normalised."""
        if self.consensus == "sum" and values.get("normalize") and weights_cancel(per_model["weight"]):
            return ["the weights sum to 0, so they cannot be normalised: change a weight or set `normalize: false`"]
        return []

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Those of the cut, and norms where one is given back."""
        return self.cuts(values) + ((CutNorms(self, 1),) if values["rescale"] == "l1" else ())

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """The rescale factor of each expert."""
        return results["norms"]["factor"] if "norms" in results else []

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Cut, rescale, then add or join."""
        kept, counts = np.zeros(len(task.experts), np.int64), np.zeros(2, np.int64)
        changes = []
        for part in self._compact(block, task, results):
            kept[part.experts] += part.kept
            values, weight = part.values, task.per_model["weight"][part.experts]
            if "norms" in results:
                values = values * np.array(results["norms"]["factor"])[part.experts, None]
            old, out = block.base_at(part.where), np.empty(part.where.size)
            scale = float(task.values["lambda"])
            if self.consensus == "sum":
                scale /= float(np.sum(task.per_model["weight"])) if task.values.get("normalize") else 1.0
                block.kernels.task_arithmetic(old, values, weight, scale, out)
            else:
                positive = int(task.values["cancelled"] == "positive")
                block.kernels.ties(old, values, weight, scale, bool(task.values["normalize"]), positive, out, counts)
            changes.append(Change(part.where, old, out))
        stats: Summary = {"kept": kept}
        if self.consensus == "sign":
            stats |= {"elected": counts[:1] - counts[1:], "cancelled": counts[1:]}
        return Merged(changes, stats)

    def _compact(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        """What is left, as norms were measured of it if there was memory to keep it."""

        def make() -> list[Left]:
            return [part.compact(block.kernels) for part in self.left(block, task, results)]

        return block.keep(("left", task.group), make) if block.roomy else make()


class Norms(Stage):
    """Σ|δ| (order 1) or Σδ² (order 2) of each expert before and after the cut, over a tensor or the model.

    The result is the factor that restores the norm; 1 where nothing is left (no absolute bound, as mergekit has one).
    """

    name = "norms"

    def __init__(self, method: Any, order: int, scope: Literal["tensor", "model"] = "tensor") -> None:
        self.method = method
        self.order = order
        self.scope = scope

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Where something is cut; in a model, every tensor has a share in the norm."""
        return self.scope == "model" or bool((task.per_model["density"] < 1.0).any())

    def empty(self, count: int) -> Summary:
        """Sums of nothing."""
        return {"before": np.zeros(count), "after": np.zeros(count)}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds a block, before and after."""
        whole = [(patch.experts, patch.delta) for patch in block.patches]
        cut = [(part.experts, part.values) for part in self._left(block, task, results)]
        for key, parts in (("before", whole), ("after", cut)):
            for experts, values in parts:
                some = np.zeros(len(experts))
                block.kernels.kept_norms(values, self.order, some)
                summary[key][experts] += some

    def _left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        return self.method.left(block, task, results)

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """Norms before and after, and before / after."""
        before, after = total["before"], total["after"]
        if self.order == 2:
            before, after = np.sqrt(before), np.sqrt(after)
        with np.errstate(invalid="ignore"):  # where a recipe lets infinities in, they come out as such
            factor = np.divide(before, after, out=np.ones(len(before)), where=after > 0.0)
        return {"before": before.tolist(), "after": after.tolist(), "factor": factor.tolist()}


class CutNorms(Norms):
    """Norms of a sparsifying method, whose merge need not cut again what fits into memory."""

    def _left(self, block: Block, task: Task, results: Mapping[str, Result]) -> list[Left]:
        parts = super()._left(block, task, results)
        if block.roomy:
            # norms are sums over all that was there: taken of the compact parts, they would add up in another order
            block.keep(("left", task.group), lambda: [part.compact(block.kernels) for part in parts])
        return parts
