"""Deltas and the simple methods: linear, task arithmetic, TIES, RAM. Sums run over experts in their order."""

from __future__ import annotations

import numpy as np

from ._jit import kernel


@kernel
def deltas(base, expert, reference, which, additive, weight, min_change, out):
    """Weighted deltas fp64[K, n]: weight[k]·(expert[k] − reference[which[k]]), 0 where the filter η sees no change."""
    for k in range(expert.shape[0]):
        row = which[k]
        factor = weight[k]
        if factor == 0.0:
            out[k, :] = 0.0
        elif min_change == 0.0:
            for i in range(expert.shape[1]):
                delta = np.float64(expert[k, i]) - np.float64(reference[row, i])
                # equal infinities: no update, and not inf − inf
                out[k, i] = factor * delta if expert[k, i] != reference[row, i] else 0.0
        else:
            for i in range(expert.shape[1]):
                delta = np.float64(expert[k, i]) - np.float64(reference[row, i])
                old = np.float64(base[i]) if additive[k] else np.float64(reference[row, i])
                new = old + delta if additive[k] else np.float64(expert[k, i])
                seen = abs(delta) > min_change * max(abs(new), abs(old))
                out[k, i] = factor * delta if seen else 0.0


@kernel
def linear(base, expert, additive, weight, out):
    """Σ weight[k]·θk into out fp64[n]; the weights are normalised by the caller."""
    out[:] = 0.0
    for k in range(expert.shape[0]):
        factor = weight[k]
        if factor == 0.0:
            continue
        if additive[k]:
            for i in range(expert.shape[1]):
                out[i] += factor * (np.float64(base[i]) + np.float64(expert[k, i]))
        else:
            for i in range(expert.shape[1]):
                out[i] += factor * np.float64(expert[k, i])


@kernel
def task_arithmetic(base, delta, weight, scale, out):
    """base + scale·Σ weight[k]·δk into out fp64[n], for delta fp64[K, n]."""
    out[:] = 0.0
    for k in range(delta.shape[0]):
        for i in range(delta.shape[1]):
            out[i] += weight[k] * delta[k, i]
    for i in range(out.shape[0]):
        out[i] = np.float64(base[i]) + scale * out[i]


@kernel
def ties(base, delta, weight, scale, normalize, cancelled, out, counts):
    """Elects a sign per coordinate and joins those who agree with it: TIES steps 2 and 3, into out fp64[n].

    delta fp64[K, n] is trimmed; the sign is that of Σ weight·δ, and where that is 0 it is `cancelled`: 0 (nobody
    agrees: the base stays) or 1 (mergekit's rule). Adds to counts int64[2]: coordinates with an update, cancelled ones.
    """
    count = delta.shape[0]
    for i in range(delta.shape[1]):
        total = 0.0
        any_ = False
        for k in range(count):
            value = weight[k] * delta[k, i]
            total += value
            any_ |= value != 0.0
        if not any_:
            out[i] = np.float64(base[i])
            continue
        counts[0] += 1
        if total == 0.0:
            counts[1] += 1
            if cancelled == 0:
                out[i] = np.float64(base[i])
                continue
        positive = total >= 0.0
        sum_ = 0.0
        divisor = 0.0
        for k in range(count):
            value = weight[k] * delta[k, i]
            if value != 0.0 and (value > 0.0) == positive:
                sum_ += value
                divisor += weight[k]
        if normalize and divisor != 0.0:
            sum_ = sum_ / divisor
        out[i] = np.float64(base[i]) + scale * sum_


@kernel
def ram(base, delta, epsilon, out, counts):
    """base + mean of the deltas that count as changes, |δ| > epsilon, into out fp64[n] (RAM, "average where shared").

    Adds to counts int64[K]: changes that epsilon ignores.
    """
    count = delta.shape[0]
    for i in range(delta.shape[1]):
        sum_ = 0.0
        number = 0
        for k in range(count):
            value = delta[k, i]
            if abs(value) > epsilon:
                sum_ += value
                number += 1
            elif value != 0.0:
                counts[k] += 1
        out[i] = np.float64(base[i])
        if number > 0:
            out[i] += sum_ / number
