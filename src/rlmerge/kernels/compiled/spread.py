"""SCE on a patch: how far experts spread, and their join by given coefficients."""

from __future__ import annotations

import math

import numpy as np

from ._jit import kernel


@kernel
def spread(delta, count, out):
    """The standard deviation of deltas fp64[E, m] over `count` experts into fp32[m]; those not in E have 0.

    Exactly 0 where all are equal, and at least the smallest fp32 number elsewhere.
    """
    experts = delta.shape[0]
    smallest = np.float32(1e-45)
    for j in range(delta.shape[1]):
        total = 0.0
        low = delta[0, j] if experts == count else 0.0
        high = low
        for k in range(experts):
            total += delta[k, j]
            low = min(low, delta[k, j])
            high = max(high, delta[k, j])
        mean = total / count
        squares = 0.0
        for k in range(experts):
            squares += (delta[k, j] - mean) * (delta[k, j] - mean)
        squares += (count - experts) * (mean * mean)
        size = np.float32(math.sqrt(squares / count))
        # what is no number gets the smallest score: its bits would lie outside the histograms
        out[j] = (size if size > smallest else smallest) if low != high else np.float32(0.0)


@kernel
def join(base, delta, coefficient, cancelled, out, counts):
    """base + Σ c·δ / Σ c over those deltas fp64[E, m] that have the sign of Σ δ, with c fp64[E].

    Where Σ δ is 0 the sign is `cancelled`: 0 (nobody joins: the base stays) or 1 (+). Adds to counts int64[2]:
    coordinates with an update, cancelled ones.
    """
    for j in range(out.shape[0]):
        total = 0.0
        some = False
        for k in range(delta.shape[0]):
            total += delta[k, j]
            some |= delta[k, j] != 0.0
        counts[0] += some
        counts[1] += some & (total == 0.0)
        sum_ = 0.0
        divisor = 0.0
        if total != 0.0 or cancelled != 0:
            for k in range(delta.shape[0]):
                agrees = (delta[k, j] > 0.0) if total >= 0.0 else (delta[k, j] < 0.0)
                sum_ += coefficient[k] * delta[k, j] if agrees else 0.0
                divisor += coefficient[k] if agrees else 0.0
        out[j] = base[j] + sum_ / divisor if divisor != 0.0 else base[j]


@kernel
def weighted_mean(base, delta, share, total, out):
    """base + Σ share·δ / total, share fp64[E, m], total fp64[m]; the base where nothing changed or total is 0."""
    for j in range(out.shape[0]):
        sum_ = 0.0
        for k in range(delta.shape[0]):
            sum_ += share[k, j] * delta[k, j] if share[k, j] != 0.0 else 0.0
        out[j] = base[j] + sum_ / total[j] if (total[j] != 0.0) & (sum_ != 0.0) else base[j]
