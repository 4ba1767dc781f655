"""The simple methods on a patch: task arithmetic, TIES, RAM; and `linear` on a whole block.

A patch is m coordinates that the same E experts changed: base fp64[m], deltas fp64[E, m], result fp64[m]. Sums run over
experts in their order.
"""

from __future__ import annotations

import numpy as np

from .. import CANCELS
from ._jit import kernel

TILE = 2048


@kernel
def linear(base, expert, additive, weight, out):
    """Σ weight[k]·θk into out fp64[n], from fp32[K, n]; the weights are normalised by the caller."""
    for first in range(0, out.shape[0], TILE):
        some = out[first : first + TILE]
        some[:] = 0.0
        for k in range(expert.shape[0]):
            factor = weight[k]
            if factor == 0.0:
                continue
            value = expert[k, first : first + TILE]
            if additive[k]:
                old = base[first : first + TILE]
                for i in range(some.shape[0]):
                    some[i] += factor * (np.float64(old[i]) + np.float64(value[i]))
            else:
                for i in range(some.shape[0]):
                    some[i] += factor * np.float64(value[i])


@kernel
def task_arithmetic(base, delta, weight, scale, out):
    """base + scale·Σ weight[k]·δk."""
    for first in range(0, out.shape[0], TILE):
        some = out[first : first + TILE]
        some[:] = 0.0
        for k in range(delta.shape[0]):
            if weight[k] == 0.0:
                continue
            row = delta[k, first : first + TILE]
            for j in range(some.shape[0]):
                some[j] += weight[k] * row[j]
        old = base[first : first + TILE]
        for j in range(some.shape[0]):
            some[j] = old[j] + scale * some[j]


@kernel
def ties(base, delta, weight, scale, normalize, cancelled, out, counts):
    """Elects a sign per coordinate and joins those who agree with it: TIES steps 2 and 3.

    The deltas are trimmed; the sign is that of Σ weight·δ, and where that is 0 it is `cancelled`: 0 (nobody agrees: the
    base stays) or 1 (mergekit's rule). With `normalize` the sum is divided by the weights of those who agree, unless
    these cancel. Adds to counts int64[2]: coordinates with an update, cancelled ones.
    """
    updates = 0
    draws = 0
    if delta.shape[0] == 1:
        # nobody else votes: the same sums with one term each
        own = weight[0]
        row = delta[0]
        if own == 0.0:
            out[:] = base
            return
        for j in range(row.shape[0]):
            value = own * row[j]
            mean = value / own if normalize & (own != 0.0) else value
            out[j] = base[j] + scale * mean if value != 0.0 else base[j]
            updates += value != 0.0
        counts[0] += updates
        return
    total = np.empty(TILE, np.float64)
    sum_ = np.empty(TILE, np.float64)
    divisor = np.empty(TILE, np.float64)
    weights = np.empty(TILE, np.float64)
    any_ = np.empty(TILE, np.bool_)
    for first in range(0, out.shape[0], TILE):
        size = min(TILE, out.shape[0] - first)
        total[:] = 0.0
        sum_[:] = 0.0
        divisor[:] = 0.0
        weights[:] = 0.0
        any_[:] = False
        for k in range(delta.shape[0]):
            if weight[k] == 0.0:
                continue
            row = delta[k, first : first + size]
            for j in range(size):
                value = weight[k] * row[j]
                total[j] += value
                any_[j] |= value != 0.0
        for k in range(delta.shape[0]):
            if weight[k] == 0.0:
                continue
            row = delta[k, first : first + size]
            for j in range(size):
                value = weight[k] * row[j]
                agrees = (value > 0.0) if total[j] >= 0.0 else (value < 0.0)
                sum_[j] += value if agrees else 0.0
                divisor[j] += weight[k] if agrees else 0.0
                weights[j] += abs(weight[k]) if agrees else 0.0
        some = out[first : first + size]
        old = base[first : first + size]
        for j in range(size):
            nobody = any_[j] & (total[j] == 0.0)
            updates += any_[j]
            draws += nobody
            divides = normalize & (abs(divisor[j]) > CANCELS * weights[j])
            mean = sum_[j] / divisor[j] if divides else sum_[j]
            moved = old[j] + (0.0 if nobody and cancelled == 0 else scale * mean)
            some[j] = moved if any_[j] else old[j]
    counts[0] += updates
    counts[1] += draws


@kernel
def ram(base, delta, epsilon, out, counts):
    """base + mean of the deltas that count as changes, |δ| > epsilon (RAM, "average where shared").

    Adds to counts int64[E]: changes that epsilon ignores.
    """
    sum_ = np.empty(TILE, np.float64)
    number = np.empty(TILE, np.float64)
    for first in range(0, out.shape[0], TILE):
        size = min(TILE, out.shape[0] - first)
        sum_[:] = 0.0
        number[:] = 0.0
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            ignored = 0
            for j in range(size):
                seen = abs(row[j]) > epsilon
                sum_[j] += row[j] if seen else 0.0
                number[j] += 1.0 if seen else 0.0
                ignored += (row[j] != 0.0) & (not seen)
            counts[k] += ignored
        some = out[first : first + size]
        old = base[first : first + size]
        for j in range(size):
            some[j] = old[j] + sum_[j] / number[j] if number[j] > 0.0 else old[j]


@kernel
def count_shared(delta, epsilon, shared, unique):
    """Adds to int64[E] each: changes |δ| > epsilon of fp64[E, m] where others changed something, too, and where not."""
    number = np.empty(TILE, np.int32)
    for first in range(0, delta.shape[1], TILE):
        size = min(TILE, delta.shape[1] - first)
        number[:] = 0
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            for j in range(size):
                number[j] += np.int32(abs(row[j]) > epsilon)
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            all_ = 0
            own = 0
            for j in range(size):
                seen = abs(row[j]) > epsilon
                all_ += np.int64(seen)
                own += np.int64(seen & (number[j] == np.int32(1)))
            shared[k] += all_ - own
            unique[k] += own


@kernel
def ramplus(base, delta, epsilon, factor, out, counts):
    """As `ram`; where one expert alone changed something, its delta is multiplied by its factor, fp64[E]."""
    sum_ = np.empty(TILE, np.float64)
    raised = np.empty(TILE, np.float64)
    number = np.empty(TILE, np.float64)
    for first in range(0, out.shape[0], TILE):
        size = min(TILE, out.shape[0] - first)
        sum_[:] = 0.0
        raised[:] = 0.0
        number[:] = 0.0
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            ignored = 0
            for j in range(size):
                seen = abs(row[j]) > epsilon
                sum_[j] += row[j] if seen else 0.0
                raised[j] = factor[k] * row[j] if seen else raised[j]
                number[j] += 1.0 if seen else 0.0
                ignored += np.int64((row[j] != 0.0) & (not seen))
            counts[k] += ignored
        some = out[first : first + size]
        old = base[first : first + size]
        for j in range(size):
            moved = raised[j] if number[j] == 1.0 else sum_[j] / number[j]
            some[j] = old[j] + moved if number[j] > 0.0 else old[j]
