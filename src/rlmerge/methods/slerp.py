"""Great circles between two models: `slerp` and `nuslerp`; and the normalised mean of several, `multislerp`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Arity, Block, Merged, Method, Parameter, Result, Stage, Task, weights_cancel
from .gram import (
    F64,
    GramOfColumns,
    GramOfDeltas,
    GramOfWeights,
    columns_of,
    combine_deltas,
    combine_vectors,
    combine_weights,
    cosines_of,
    geodesic,
    gram_of,
    gram_of_columns,
    norms_of,
    rows_of,
)

SHARE = Parameter("weight", "number", None, "share of this model", per_model=True)


class Slerp(Method):
    """Source: Shoemake 1985, of whole tensors; parameters as mergekit's `slerp`.

    Two models are the ends, or the base and one model. If the base is one of two models, t counts from it; otherwise
    from the first. mergekit requires t; and it takes the straight line where |cos| > 0.9995, which it does not let one
    change. Cost: two passes.
    """

    name = "slerp"
    summary = "a point on the great circle between two models"
    formula = "θ = sin((1-t)·φ)/sin φ · θa + sin(t·φ)/sin φ · θb, φ the angle between θa and θb"
    source = "Animating rotation with quaternion curves (Shoemake 1985)"
    parameters = (
        Parameter("t", "number", 0.5, "how far to go: 0 is the base (or the first model), 1 the other; not clamped"),
        Parameter(
            "dot_threshold",
            "number",
            0.9995,
            "|cos φ| above which the straight line is taken (mergekit's constant); 1 always follows the circle",
            minimum=0,
            maximum=1,
        ),
    )
    arity = Arity(1, 2, base="optional")
    base_entry = "first"
    grain = "element"
    laws = frozenset({"scaling", "sign", "zero"})
    symmetric = False

    def misfit(self, models: int, has_base: bool) -> str:
        """One model alone has no other end."""
        if models == 1 and not has_base:
            return "method 'slerp' goes from one model to another: list two, or write the other as 'base_model'."
        return ""

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The Gram matrix of the two ends."""
        return (GramOfWeights(),)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The combination of the two ends."""
        values = task.values
        return combine_weights(block, geodesic(gram_of(results), float(values["t"]), float(values["dot_threshold"])))


class NuSlerp(Method):
    """Source: mergekit's `nuslerp`, with its parameters.

    With a base it turns deltas, without one weights. Vectors are whole tensors; or, with `nuslerp_flatten: false`, each
    run along the last dimension (what one output reads), and with `nuslerp_row_wise: true` along the first (what one
    input feeds). Weights that sum to 0 are an error (in mergekit t = 1/2). Between opposite vectors the straight line
    is taken; a vector of zeros stands at a right angle to all others. Cost: two passes; one where vectors lie in rows.
    """

    name = "nuslerp"
    summary = (
        "a point on the great circle between two models or their deltas, by weights; whole tensors, rows or columns"
    )
    formula = "θ = θ0 + sin((1-t)·φ)/sin φ · δa + sin(t·φ)/sin φ · δb, t = wb / (wa + wb)"
    source = "mergekit (nuslerp)"
    parameters = (
        SHARE,
        Parameter("nuslerp_flatten", "flag", True, "one angle for the whole tensor"),
        Parameter("nuslerp_row_wise", "flag", False, "without flatten: vectors along the first dimension"),
    )
    arity = Arity(2, 2, base="optional")
    base_entry = "origin"
    grain = "row"
    laws = frozenset({"permutation", "scaling", "sign", "zero"})

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, Any]) -> list[str]:
        """The weights are shares of their sum."""
        if weights_cancel(per_model["weight"]):
            return ["the weights sum to 0, so there is no place between the models: change a weight"]
        return []

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Whole tensors and columns are measured before; rows stand whole in their block.

        A choice that differs between tensors (filters) is decided there, so both stages are offered.
        """
        return (_Flat(), _Columns())

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The combination of both deltas, with one pair of coefficients for each vector."""
        weight = task.per_model["weight"]
        t = float(weight[1] / np.sum(weight))
        if task.values["nuslerp_flatten"]:
            return combine_deltas(block, geodesic(gram_of(results), t))
        if task.values["nuslerp_row_wise"]:
            vector = (block.start + np.arange(block.size)) % columns_of(task)
            return combine_vectors(block, vector, geodesic(gram_of_columns(results["columns"], 2), t))
        gram, vector = rows_of(block, task)
        return combine_vectors(block, vector, geodesic(gram, t))


class _Flat(GramOfDeltas):
    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Only where a tensor is one vector."""
        return bool(task.values["nuslerp_flatten"])


class _Columns(GramOfColumns):
    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Only where vectors run along the first dimension."""
        return not task.values["nuslerp_flatten"] and bool(task.values["nuslerp_row_wise"])


class MultiSlerp(Method):
    """Source: mergekit's `multislerp`, with its parameters.

    mergekit goes from the normalised mean m = Σ wi·ui / ‖Σ wi·ui‖ of the unit vectors along the mean of their parts
    orthogonal to m. With the same weights in both means that step is zero, so the result is m itself, at the mean
    length. Here this closed form is computed. One model is returned as it is, as in mergekit; where the directions
    cancel the result is the weighted mean (in mergekit, for three and more, zero). Cost: two passes.
    """

    name = "multislerp"
    summary = "the mean direction of several models or deltas, at their mean length"
    formula = "θ = θ0 + (Σ wi·‖δi‖) · m, m = Σ wi·δi/‖δi‖ normalised to length 1"
    source = "mergekit (multislerp)"
    parameters = (
        SHARE,
        Parameter("normalize_weights", "flag", True, "divide the weights by their sum"),
        Parameter("eps", "number", 1e-8, "‖Σ wi·ui‖ / Σ |wi| below which directions cancel", minimum=0, maximum=1),
    )
    arity = Arity(1, None, base="optional")
    base_entry = "origin"
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, Any]) -> list[str]:
        """Weights that sum to zero cannot be normalised."""
        if values["normalize_weights"] and weights_cancel(per_model["weight"]):
            return ["the weights sum to 0, so they cannot be normalised: change one or set `normalize_weights: false`"]
        return []

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The Gram matrix of deltas, or of weights without a base."""
        return (GramOfDeltas(),)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The combination of the deltas."""
        values = task.values
        weight = task.per_model["weight"]
        if len(weight) == 1:
            return combine_deltas(block, np.ones(1))
        weight = weight / np.sum(weight) if values["normalize_weights"] else weight
        return combine_deltas(block, mean_direction(gram_of(results), weight, float(values["eps"])))


def mean_direction(gram: F64, weight: F64, eps: float) -> F64:
    """Coefficients fp64[K] of the normalised mean of unit vectors, at the mean length; weights of 0 remove a vector."""
    some = (weight != 0.0) & (np.diagonal(gram) != 0.0)
    out = np.zeros(len(weight))
    if not some.any():
        return out
    own, norms = weight[some], norms_of(gram)[some]
    length = np.sqrt(max(0.0, float(own @ cosines_of(gram[np.ix_(some, some)]) @ own)))
    straight = length <= eps * float(np.sum(np.abs(own)))
    out[some] = own if straight else float(own @ norms) * own / (norms * length)
    return out
