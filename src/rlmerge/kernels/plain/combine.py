"""The simple methods on a patch, in NumPy (definitions: `compiled.combine`)."""

from __future__ import annotations

import numpy as np

from .. import CANCELS


def linear(base, expert, additive, weight, out):
    """Σ weight[k]·θk."""
    out[:] = 0.0
    for k in range(expert.shape[0]):
        if weight[k] != 0.0:
            value = expert[k].astype(np.float64)
            out += weight[k] * (base.astype(np.float64) + value if additive[k] else value)


def task_arithmetic(base, delta, weight, scale, out):
    """base + scale·Σ weight[k]·δk."""
    sum_ = np.zeros(base.shape)
    for k in range(delta.shape[0]):
        if weight[k] != 0.0:
            sum_ += weight[k] * delta[k]
    out[:] = base + scale * sum_


def ties(base, delta, weight, scale, normalize, cancelled, out, counts):
    """Elects a sign per coordinate and joins those who agree with it."""
    delta, weight = delta[weight != 0.0], weight[weight != 0.0]  # 0 removes an expert, whatever it holds
    values = weight[:, None] * delta
    total = np.zeros(base.shape)
    for value in values:
        total = total + value
    any_ = (values != 0.0).any(axis=0)
    positive = total >= 0.0
    joins = any_ & ((total != 0.0) | (cancelled != 0))
    sum_ = np.zeros(base.shape)
    divisor, size = np.zeros(base.shape), np.zeros(base.shape)
    for k, value in enumerate(values):
        agrees = joins & (value != 0.0) & ((value > 0.0) == positive)
        sum_[agrees] += value[agrees]
        divisor[agrees] += weight[k]
        size[agrees] += abs(weight[k])
    if normalize:
        nonzero = np.abs(divisor) > CANCELS * size
        sum_[nonzero] = sum_[nonzero] / divisor[nonzero]
    out[:] = np.where(any_, base + scale * sum_, base)
    counts += np.array([any_.sum(), (any_ & (total == 0.0)).sum()])


def ram(base, delta, epsilon, out, counts):
    """base + mean of the deltas that count as changes."""
    seen = np.abs(delta) > epsilon
    counts += (~seen & (delta != 0.0)).sum(axis=1)
    sum_ = np.zeros(base.shape)
    for k in range(delta.shape[0]):
        sum_[seen[k]] += delta[k, seen[k]]
    number = seen.sum(axis=0)
    out[:] = np.where(number > 0, base + sum_ / np.maximum(number, 1), base)


def count_shared(delta, epsilon, shared, unique):
    """Changes that others share, and those that they do not."""
    seen = np.abs(delta) > epsilon
    number = seen.sum(axis=0)
    shared += (seen & (number > 1)).sum(axis=1)
    unique += (seen & (number == 1)).sum(axis=1)


def ramplus(base, delta, epsilon, factor, out, counts):
    """As `ram`, unique changes times a factor."""
    ram(base, delta, epsilon, out, counts)
    seen = np.abs(delta) > epsilon
    alone = seen.sum(axis=0) == 1
    own = np.where(seen, factor[:, None] * delta, 0.0)
    out[alone] = base[alone] + own[seen.argmax(axis=0), np.arange(base.size)][alone]
