"""The Riemannian mean of several models on the sphere: `karcher`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Arity, Block, Merged, Method, Parameter, Result, Stage, Task
from .gram import F64, GramOfWeights, combine_weights, cosines_of, gram_of, norms_of

ROUNDING = 1e-12
"""A squared distance between unit vectors that rounding of the Gram matrix makes of none, with room."""


class Karcher(Method):
    """Source: Karcher 1977 (the point with the least sum of squared angles), as mergekit's `karcher`.

    All models count alike. The unit vectors of the weights are averaged by logarithm and exponential maps in the span
    of the models, where K numbers are a point. mergekit takes angles from fp32 cosines and skips those below `tol`,
    which makes its mean of RL experts land anywhere between them; here they come from chords in fp64, and none is
    skipped. As in mergekit, a `base_model` is one more point of the mean, listed or not. Cost: two passes.
    """

    name = "karcher"
    summary = "the mean direction of several models on the sphere, at their mean length"
    formula = "θ = mean ‖θi‖ · u, u = argmin Σ angle(u, θi)²"
    source = "Riemannian center of mass (Karcher 1977), as in mergekit"
    parameters = (
        Parameter("max_iter", "integer", 10, "steps at most", minimum=0),
        Parameter("tol", "number", 1e-5, "length of a step, in radians, below which it is the last", minimum=0),
    )
    arity = Arity(1, None, base="optional")
    laws = frozenset({"permutation", "scaling", "identity", "sign", "zero"})

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The Gram matrix of the weights."""
        return (GramOfWeights(),)

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The combination of the weights."""
        if len(task.experts) == 1:
            return combine_weights(block, np.ones(1))
        values = task.values
        return combine_weights(block, karcher_mean(gram_of(results), int(values["max_iter"]), float(values["tol"])))


def karcher_mean(gram: F64, steps: int, tol: float) -> F64:
    """Coefficients fp64[K] of the mean of vectors with this Gram matrix; those of length 0 count in the length only."""
    norms, out = norms_of(gram), np.zeros(len(gram))
    some = norms > 0.0
    if not some.any():
        return out
    cosines = cosines_of(gram[np.ix_(some, some)])
    place = np.full(len(cosines), 1.0 / len(cosines))
    if _square(place, cosines) <= max(tol**2, ROUNDING):
        place = np.eye(len(cosines))[0]  # the directions cancel: any of them is as good a start
    place /= np.sqrt(_square(place, cosines))
    for _ in range(steps):
        step = np.zeros(len(cosines))
        for towards in np.eye(len(cosines)):
            chord, opposite = _square(place - towards, cosines), _square(place + towards, cosines)
            if opposite < ROUNDING:
                continue  # every way leads to the other pole, so none does
            angle = 2.0 * np.arctan2(np.sqrt(chord), np.sqrt(opposite))
            cosine = float(place @ cosines @ towards)
            stretch = angle / np.sin(angle) if angle > 0.0 else 1.0
            step += stretch / len(cosines) * (towards - cosine * place)
        length = np.sqrt(_square(step, cosines))
        if length < tol or length == 0.0:
            break
        place = np.cos(length) * place + np.sin(length) / length * step
        place /= np.sqrt(_square(place, cosines))
    out[some] = np.mean(norms) * place / norms[some]
    return out


def _square(vector: F64, cosines: F64) -> float:
    return max(0.0, float(vector @ cosines @ vector))
