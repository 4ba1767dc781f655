"""SCE on a patch, in NumPy (definitions: `compiled.spread`)."""

from __future__ import annotations

import numpy as np


def spread(delta, count, out):
    """The standard deviation of deltas over all experts."""
    absent = count - len(delta)
    total, squares = np.zeros(delta.shape[1]), np.zeros(delta.shape[1])
    for row in delta:
        total = total + row
    mean = total / count
    with np.errstate(all="ignore"):
        for row in delta:
            squares = squares + (row - mean) * (row - mean)
        squares = squares + absent * (mean * mean)
        size = np.sqrt(squares / count).astype(np.float32)
    edges = np.zeros((min(absent, 1), delta.shape[1]))
    every = np.concatenate([delta, edges])
    differ = every.min(axis=0) != every.max(axis=0)
    out[:] = np.where(differ, np.where(size > np.float32(1e-45), size, np.float32(1e-45)), np.float32(0.0))


def join(base, delta, coefficient, cancelled, out, counts):
    """Elects by the plain sum, joins by coefficients."""
    total = np.zeros(base.shape)
    for row in delta:
        total = total + row
    some = (delta != 0.0).any(axis=0)
    counts += np.array([some.sum(), (some & (total == 0.0)).sum()])
    joins = (total != 0.0) | (cancelled != 0)
    sum_, divisor = np.zeros(base.shape), np.zeros(base.shape)
    for row, own in zip(delta, coefficient):
        agrees = joins & np.where(total >= 0.0, row > 0.0, row < 0.0)
        sum_[agrees] += own * row[agrees]
        divisor[agrees] += own
    divided = np.divide(sum_, divisor, out=np.zeros(base.shape), where=divisor != 0.0)
    out[:] = np.where(divisor != 0.0, base + divided, base)


def weighted_mean(base, delta, share, total, out):
    """base + Σ share·δ / total."""
    sum_ = np.zeros(base.shape)
    for own, row in zip(share, delta):
        some = own != 0.0
        sum_[some] = sum_[some] + own[some] * row[some]
    some = (total != 0.0) & (sum_ != 0.0)
    mean = np.divide(sum_, total, out=np.zeros(base.shape), where=some)
    out[:] = np.where(some, base + mean, base)
