"""Deltas and the simple methods, in NumPy (see `compiled.combine` for the definitions)."""

from __future__ import annotations

import numpy as np


def deltas(base, expert, reference, which, additive, weight, min_change, out):
    """Weighted deltas, 0 where the filter η sees no change."""
    for k in range(expert.shape[0]):
        if weight[k] == 0.0:
            out[k] = 0.0
            continue
        with np.errstate(invalid="ignore"):
            delta = expert[k].astype(np.float64) - reference[which[k]].astype(np.float64)
        delta[expert[k] == reference[which[k]]] = 0.0
        if min_change != 0.0:
            old = base.astype(np.float64) if additive[k] else reference[which[k]].astype(np.float64)
            new = old + delta if additive[k] else expert[k].astype(np.float64)
            delta[~(np.abs(delta) > min_change * np.maximum(np.abs(new), np.abs(old)))] = 0.0
        out[k] = weight[k] * delta


def linear(base, expert, additive, weight, out):
    """Σ weight[k]·θk."""
    out[:] = 0.0
    for k in range(expert.shape[0]):
        if weight[k] != 0.0:
            value = expert[k].astype(np.float64)
            out += weight[k] * (base.astype(np.float64) + value if additive[k] else value)


def task_arithmetic(base, delta, weight, scale, out):
    """base + scale·Σ weight[k]·δk."""
    out[:] = 0.0
    for k in range(delta.shape[0]):
        out += weight[k] * delta[k]
    out[:] = base.astype(np.float64) + scale * out


def ties(base, delta, weight, scale, normalize, cancelled, out, counts):
    """Elects a sign per coordinate and joins those who agree with it."""
    values = weight[:, None] * delta
    total = np.zeros(delta.shape[1])
    for value in values:
        total = total + value
    any_ = (values != 0.0).any(axis=0)
    positive = total >= 0.0
    joins = any_ & ((total != 0.0) | (cancelled != 0))
    sum_ = np.zeros(delta.shape[1])
    divisor = np.zeros(delta.shape[1])
    for k, value in enumerate(values):
        agrees = joins & (value != 0.0) & ((value > 0.0) == positive)
        sum_[agrees] += value[agrees]
        divisor[agrees] += weight[k]
    if normalize:
        nonzero = divisor != 0.0
        sum_[nonzero] = sum_[nonzero] / divisor[nonzero]
    out[:] = base.astype(np.float64)
    out[joins] += scale * sum_[joins]
    counts += np.array([any_.sum(), (any_ & (total == 0.0)).sum()])


def ram(base, delta, epsilon, out, counts):
    """base + mean of the deltas that count as changes."""
    seen = np.abs(delta) > epsilon
    counts += (~seen & (delta != 0.0)).sum(axis=1)
    sum_ = np.zeros(delta.shape[1])
    for k in range(delta.shape[0]):
        sum_[seen[k]] += delta[k, seen[k]]
    number = seen.sum(axis=0)
    out[:] = base.astype(np.float64)
    out[number > 0] += sum_[number > 0] / number[number > 0]
