"""Where anything changed, by how much, and the simple methods, in NumPy (definitions: `compiled.combine`)."""

from __future__ import annotations

import numpy as np


def _seen(base, expert, reference, which, additive, min_change, k):
    seen = expert[k] != reference[which[k]]
    if min_change != 0.0:
        with np.errstate(invalid="ignore"):
            delta = expert[k].astype(np.float64) - reference[which[k]].astype(np.float64)
            old = base.astype(np.float64) if additive[k] else reference[which[k]].astype(np.float64)
            new = old + delta if additive[k] else expert[k].astype(np.float64)
            seen &= np.abs(delta) > min_change * np.maximum(np.abs(new), np.abs(old))
    return seen


def changed(base, expert, reference, which, additive, min_change, where):
    """The coordinates that some expert changed, ascending, and their number."""
    any_ = np.zeros(expert.shape[1], np.bool_)
    for k in range(expert.shape[0]):
        any_ |= _seen(base, expert, reference, which, additive, min_change, k)
    found = np.flatnonzero(any_)
    where[: found.size] = found
    return found.size


def deltas(base, expert, reference, which, additive, min_change, where, out, owner):
    """Deltas at `where`, 0 where that is no change; and the owner of each coordinate."""
    for k in range(expert.shape[0]):
        with np.errstate(invalid="ignore"):
            delta = expert[k].astype(np.float64) - reference[which[k]].astype(np.float64)
        delta[~_seen(base, expert, reference, which, additive, min_change, k)] = 0.0
        out[k] = delta[where]
    active = out != 0.0
    owner[:] = np.where(active.sum(axis=0) == 1, active.argmax(axis=0), -1)


def linear(base, expert, additive, weight, out):
    """Σ weight[k]·θk."""
    out[:] = 0.0
    for k in range(expert.shape[0]):
        if weight[k] != 0.0:
            value = expert[k].astype(np.float64)
            out += weight[k] * (base.astype(np.float64) + value if additive[k] else value)


def task_arithmetic(base, delta, where, weight, scale, out):
    """base + scale·Σ weight[k]·δk."""
    sum_ = np.zeros(where.shape[0])
    for k in range(delta.shape[0]):
        if weight[k] != 0.0:
            sum_ += weight[k] * delta[k]
    out[:] = base.astype(np.float64)
    out[where] += scale * sum_


def ties(base, delta, where, weight, scale, normalize, cancelled, out, counts):
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
    out[where[joins]] += scale * sum_[joins]
    counts += np.array([any_.sum(), (any_ & (total == 0.0)).sum()])


def ram(base, delta, where, epsilon, out, counts):
    """base + mean of the deltas that count as changes."""
    seen = np.abs(delta) > epsilon
    counts += (~seen & (delta != 0.0)).sum(axis=1)
    sum_ = np.zeros(delta.shape[1])
    for k in range(delta.shape[0]):
        sum_[seen[k]] += delta[k, seen[k]]
    number = seen.sum(axis=0)
    out[:] = base.astype(np.float64)
    out[where[number > 0]] += sum_[number > 0] / number[number > 0]
