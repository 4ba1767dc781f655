"""From the base towards the mean of the experts, as far as they agree: `model_stock`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Arity, Block, Merged, Method, Parameter, Result, Stage, Task
from .gram import F64, GramOfDeltas, combine_deltas, combine_vectors, cosines_of, gram_of, norms_of, rows_of


class ModelStock(Method):
    """Source: Model Stock (arXiv 2403.19522); mean of pairwise cosines and parameters as mergekit's `model_stock`.

    cos is the mean over pairs of experts; a pair with an update of length 0 counts as 0. Cosines are those of the
    deltas, however small (mergekit clamps products of norms at 1e-6, which turns RL-sized updates into the base).
    Where experts point apart, t is negative and without bound: it is cut where the merged update would be longer than
    the longest expert's. Cost: two passes; one with `filter_wise`.
    """

    name = "model_stock"
    summary = "from the base towards the mean of the experts, as far as their deltas agree"
    formula = "θ = θ0 + t·mean δi, t = K·cos / (1 + (K-1)·cos)"
    source = "Model Stock (arXiv 2403.19522)"
    parameters = (Parameter("filter_wise", "flag", False, "one t for each row (along the last dimension)"),)
    arity = Arity(2)
    grain = "row"
    laws = frozenset({"permutation", "scaling", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The Gram matrix of the deltas; rows stand whole in their block."""
        return (_Flat(),)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The combination of the deltas."""
        if not task.values["filter_wise"]:
            return combine_deltas(block, stock(gram_of(results)))
        gram, vector = rows_of(block, task)
        return combine_vectors(block, vector, stock(gram))


class _Flat(GramOfDeltas):
    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Only where a tensor has one t."""
        return not task.values["filter_wise"]


def stock(gram: F64) -> F64:
    """Coefficients fp64[..., K] for Gram matrices fp64[..., K, K]: t/K, all alike."""
    count = gram.shape[-1]
    first, second = np.triu_indices(count, 1)
    cosine = cosines_of(gram)[..., first, second].mean(axis=-1)
    divisor = 1.0 + (count - 1) * cosine
    t = np.divide(count * cosine, divisor, out=np.full_like(cosine, -np.inf), where=divisor > 0.0)
    mean = np.sqrt(np.maximum(gram.sum(axis=(-2, -1)), 0.0)) / count
    longest = norms_of(gram).max(axis=-1)
    # |t|·mean <= longest, where mean may be 0: then there is no direction and the base stays
    bound = np.divide(longest, mean, out=np.zeros_like(mean), where=mean > 0.0)
    t = np.where(t < -bound, -bound, t)
    return np.repeat(t[..., None] / count, count, axis=-1)
