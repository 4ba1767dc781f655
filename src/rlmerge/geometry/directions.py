"""Directions in which a model is moved: another expert's delta, its control, and random ones scaled to each tensor.

Random numbers depend on (seed, kind, tensor) alone: the order of tensors, and whatever else is measured, shows nowhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlmerge.evaluate.run import seed_of

from .weights import Direction, Weights


def along_delta(weights: Weights, key: str) -> Direction:
    """The delta of an expert."""

    def of(name: str) -> Tensor | None:
        delta = weights.delta(key, name)
        return delta if bool(delta.any()) else None

    return of


def shuffled_delta(weights: Weights, key: str, seed: int) -> Direction:
    """The delta of an expert with its values permuted within the support of each tensor, and random signs.

    Equal support and, but for the order of a sum, equal norm in every tensor: what is left of a difference to the delta
    itself is where on its support it puts which values.
    """

    def of(name: str) -> Tensor | None:
        delta = weights.delta(key, name).numpy()
        places = np.flatnonzero(delta)
        if not len(places):
            return None
        random = _random("shuffled", seed, key, name)
        found = np.zeros_like(delta)
        found[places] = random.permutation(np.abs(delta[places])) * random.choice((-1.0, 1.0), len(places))
        return torch.from_numpy(found)

    return of


def random_direction(weights: Weights, key: str, seed: int) -> Direction:
    """A Gaussian direction with the norm of the model's own tensor in each tensor: ‖θl‖·u, ‖u‖ = 1."""

    def of(name: str) -> Tensor | None:
        size = float(weights.stored[key][name].double().square().sum()) ** 0.5
        if size == 0.0:
            return None
        drawn = _random("gaussian", seed, name).standard_normal(weights.stored[key][name].numel(), np.float32)
        norm = float(np.sqrt(np.square(drawn, dtype=np.float64).sum()))
        return torch.from_numpy(drawn) * (size / norm)

    return of


def size_of(weights: Weights, key: str) -> tuple[float, float]:
    """‖δ‖₂ of an expert, and its support as a share of all weights."""
    squares, changed, total = 0.0, 0, 0
    for name, live in weights.live.items():
        delta = weights.delta(key, name)
        squares += float(delta.square().sum())
        changed += int(delta.count_nonzero())
        total += live.numel()
    return squares**0.5, changed / total


def _random(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed_of("function", *parts)))
