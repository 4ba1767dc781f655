"""RegMean the plain way: dense matrices, one equation, NumPy's general solver. Written from the paper's text."""

from __future__ import annotations

import numpy as np


def regmean(weights, grams, factors=None, alpha=0.9):
    """W [out, in] of Wᵀ = (Σ G̃i)⁻¹·Σ G̃i·Wiᵀ, G̃ = factor·(α·G + (1 - α)·diag G), in fp64, for models in a list."""
    factors = factors or [1.0] * len(weights)
    reduced = [
        f * (alpha * g.astype(np.float64) + (1 - alpha) * np.diag(np.diag(g).astype(np.float64)))
        for f, g in zip(factors, grams)
    ]
    right = sum(g @ w.astype(np.float64).T for g, w in zip(reduced, weights))
    return np.linalg.solve(sum(reduced), right).T
