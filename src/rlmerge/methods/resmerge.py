"""Heads and residuals of the updates, merged apart: `resmerge`."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .base import Parameter, Task, Whole
from .gram import F64, cosines_of, norms_of
from .spectral import MATRIX, Spectral, embeddings, inner, noise
from .svd import svd

FAMILIES = ("attn", "attention", "mlp", "ffn", "feed_forward", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
            "up_proj", "down_proj")  # fmt: skip
"""Parts of the names of attention and feed-forward matrices, whose coherence counts in β."""

Factors = tuple[F64, F64]


class ResMerge(Spectral):
    """Source: ResMerge (arXiv 2606.02252) and its authors' script, which computes in fp32.

    Hi is the part of rank `rank` of an update, Ri the rest, qi = Ri/‖Ri‖, q = Σ qi normalised, c = mean cos(qi, q)
    (at least 0), s = mean cos(qi, qj). The backbone A is c^β·mean‖Ri‖·q, or mean Ri if c is no more than the 1/√K of
    random directions; β = beta_max - (beta_max - beta_min)·((s + 1)/2 + (c + 1)/2)/2 for attention and feed-forward
    matrices, beta_max for others. Heads add rho·S·‖A‖ in the direction of their mean, S the mean over pairs of
    max(0, cos(Hi, Hj)). Other tensors, embeddings and head take the mean. Cost: K decompositions.
    """

    name = "resmerge"
    summary = "residuals of the updates along their common direction, and of their heads what agrees"
    formula = "θ = θ0 + A + rho·S·‖A‖·H/‖H‖, A = c^β·mean‖Ri‖·q, H = mean Hi"
    source = "ResMerge (arXiv 2606.02252)"
    parameters = (
        Parameter("rank", "integer", 1, "singular directions of a head", minimum=1),
        Parameter("rho", "number", 0.2, "most that the heads may add, as a share of ‖A‖", minimum=0),
        Parameter("beta_min", "number", 0.7, "exponent of c where residuals agree", minimum=0),
        Parameter("beta_max", "number", 1.0, "exponent of c where they do not", minimum=0),
        embeddings(False),
        MATRIX,
    )
    svds = (0, 1)
    held = 2

    def update(self, tensor: Whole, task: Task) -> F64:
        """Σ a[i]·Ri + Σ h[i]·Hi, as Σ a[i]·δi and a correction of low rank."""
        heads = [self._head(tensor, k, task) for k in range(len(task.experts))]
        residuals = _gram_of_residuals(tensor, heads)
        some = np.array([left.shape[1] > 0 for left, _ in heads])
        shares = self._backbone(residuals, task)
        size = math.sqrt(max(0.0, float(shares @ residuals @ shares)))
        products = np.array([[inner(a[0].T @ b[0], a[1] @ b[1].T) for b in heads] for a in heads])
        mean = np.full(len(heads), 1.0 / len(heads))
        length = math.sqrt(max(0.0, float(mean @ products @ mean)))
        budget = float(task.values["rho"]) * _agreement(products[np.ix_(some, some)]) * size
        added = budget / length * mean if length > 0.0 else np.zeros(len(heads))
        out = tensor.combine(shares)
        for (left, right), own, more in zip(heads, shares, added):
            out += ((more - own) * left) @ right
        return out

    def _head(self, tensor: Whole, k: int, task: Task) -> Factors:
        """U·S fp64[m, rank] and Vᵀ of the leading part of one update."""
        delta = partial(tensor.delta, k)
        found = svd(delta, task.shape, noise(task.shape), int(task.values["rank"]))
        left, values, right = found.triplets(delta)
        return left * values, right.copy()

    def _backbone(self, gram: F64, task: Task) -> F64:
        """Shares fp64[K] of the residuals with this Gram matrix."""
        count, norms, cosines = len(gram), norms_of(gram), cosines_of(gram)
        length = math.sqrt(max(0.0, float(cosines.sum())))
        pairs = cosines[np.triu_indices(count, 1)]
        similar = float(pairs.mean()) if pairs.size else 1.0
        coherence = min(1.0, float(cosines.sum(axis=1).mean()) / length) if length > 0.0 else 0.0
        if coherence <= 1.0 / math.sqrt(count):
            return np.full(count, 1.0 / count)
        score = ((similar + 1.0) / 2.0 + (coherence + 1.0) / 2.0) / 2.0
        if not any(part in task.tensor.lower() for part in FAMILIES):
            score = 0.0
        low, high = float(task.values["beta_min"]), float(task.values["beta_max"])
        target = coherence ** (high - (high - low) * score) * float(norms.mean())
        return np.divide(target / length, norms, out=np.zeros(count), where=norms > 0.0)


def _gram_of_residuals(tensor: Whole, heads: list[Factors]) -> F64:
    """⟨Ri, Rj⟩ with two residuals in memory at a time."""
    gram = np.zeros((len(heads), len(heads)))
    for i, (left, right) in enumerate(heads):
        one = tensor.delta(i)
        one -= left @ right
        gram[i, i] = inner(one, one)
        for j in range(i):
            other = tensor.delta(j)
            other -= heads[j][0] @ heads[j][1]
            gram[i, j] = gram[j, i] = inner(one, other)
    return gram


def _agreement(products: F64) -> float:
    """Mean over pairs of heads of max(0, cos); 1 for a single head, 0 for none."""
    if not len(products):
        return 0.0
    pairs = cosines_of(products)[np.triu_indices(len(products), 1)]
    return float(np.maximum(pairs, 0.0).mean()) if pairs.size else 1.0
