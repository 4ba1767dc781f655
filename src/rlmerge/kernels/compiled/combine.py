"""Where anything changed, by how much, and the simple methods: linear, task arithmetic, TIES, RAM.

RL updates are sparse, so a block is first reduced to the coordinates that some expert changed: `where` int32[m], the
deltas fp64[K, m] there, and `owner` int32[m], the one expert that changed a coordinate, or -1 where several did. Every
other coordinate is the base. Sums run over experts in their order.
"""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel

TILE = 2048


@inlined
def _is_seen(new, old, base, additive, min_change):
    delta = np.float64(new) - np.float64(old)
    if additive:
        old_ = np.float64(base)
        new_ = old_ + delta
    else:
        old_ = np.float64(old)
        new_ = np.float64(new)
    return abs(delta) > min_change * max(abs(new_), abs(old_))


@kernel
def changed(base, expert, reference, which, additive, min_change, where):
    """Writes the coordinates that some expert changed to where int32[n], ascending. Returns their number.

    A change is expert[k] != reference[which[k]] (so -0 equals +0, and equal infinities are none) and, with a filter,
    |δ| > min_change·max(|θk|, |θ0|).
    """
    size = expert.shape[1]
    mask = np.empty(TILE, np.uint8)
    found = 0
    for first in range(0, size, TILE):
        last = min(first + TILE, size)
        mask[:] = 0
        for k in range(expert.shape[0]):
            row = which[k]
            if min_change == 0.0:
                for i in range(first, last):
                    mask[i - first] |= expert[k, i] != reference[row, i]
            else:
                for i in range(first, last):
                    mask[i - first] |= _is_seen(expert[k, i], reference[row, i], base[i], additive[k], min_change)
        for i in range(first, last):
            where[found] = i
            found += mask[i - first]
    return found


@kernel
def deltas(base, expert, reference, which, additive, min_change, where, out, owner):
    """Deltas fp64[K, m] at `where`: expert[k] - reference[which[k]], 0 where that is no change; and owner int32[m]."""
    size = where.shape[0]
    number = np.zeros(size, np.int32)
    for k in range(expert.shape[0]):
        new = expert[k]
        old = reference[which[k]]
        row = out[k]
        if min_change == 0.0:
            for j in range(size):
                i = where[j]
                # + 0.0 makes -0.0 (base +0, expert -0) the 0.0 that means "no change"
                row[j] = (np.float64(new[i]) - np.float64(old[i])) + 0.0
            strange = 0
            for j in range(size):
                strange += row[j] != row[j]
            if strange > 0:
                for j in range(size):
                    # equal infinities are no change, though their difference is not a number
                    if new[where[j]] == old[where[j]]:
                        row[j] = 0.0
        else:
            for j in range(size):
                i = where[j]
                seen = new[i] != old[i] and _is_seen(new[i], old[i], base[i], additive[k], min_change)
                row[j] = np.float64(new[i]) - np.float64(old[i]) if seen else 0.0
        for j in range(size):
            active = np.int32(row[j] != 0.0)
            number[j] += active
            owner[j] = owner[j] + np.int32(k) * active if k > 0 else np.int32(0)
    for j in range(size):
        owner[j] = owner[j] if number[j] == 1 else np.int32(-1)


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
def task_arithmetic(base, delta, where, weight, scale, out):
    """base + scale·Σ weight[k]·δk into out fp64[n]."""
    for i in range(base.shape[0]):
        out[i] = np.float64(base[i])
    sum_ = np.empty(TILE, np.float64)
    for first in range(0, where.shape[0], TILE):
        size = min(TILE, where.shape[0] - first)
        sum_[:] = 0.0
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            if weight[k] == 0.0:
                continue
            for j in range(size):
                sum_[j] += weight[k] * row[j]
        for j in range(size):
            out[where[first + j]] += scale * sum_[j]


@kernel
def ties(base, delta, where, weight, scale, normalize, cancelled, out, counts):
    """Elects a sign per coordinate and joins those who agree with it: TIES steps 2 and 3, into out fp64[n].

    delta fp64[K, m] is trimmed; the sign is that of Σ weight·δ, and where that is 0 it is `cancelled`: 0 (nobody
    agrees: the base stays) or 1 (mergekit's rule). Adds to counts int64[2]: coordinates with an update, cancelled ones.
    """
    for i in range(base.shape[0]):
        out[i] = np.float64(base[i])
    updates = 0
    draws = 0
    total = np.empty(TILE, np.float64)
    sum_ = np.empty(TILE, np.float64)
    divisor = np.empty(TILE, np.float64)
    any_ = np.empty(TILE, np.bool_)
    for first in range(0, where.shape[0], TILE):
        size = min(TILE, where.shape[0] - first)
        total[:] = 0.0
        sum_[:] = 0.0
        divisor[:] = 0.0
        any_[:] = False
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            for j in range(size):
                value = weight[k] * row[j]
                total[j] += value
                any_[j] |= value != 0.0
        for k in range(delta.shape[0]):
            row = delta[k, first : first + size]
            for j in range(size):
                value = weight[k] * row[j]
                agrees = (value > 0.0) if total[j] >= 0.0 else (value < 0.0)
                sum_[j] += value if agrees else 0.0
                divisor[j] += weight[k] if agrees else 0.0
        for j in range(size):
            nobody = any_[j] & (total[j] == 0.0)
            updates += any_[j]
            draws += nobody
            mean = sum_[j] / divisor[j] if normalize & (divisor[j] != 0.0) else sum_[j]
            i = where[first + j]
            out[i] = out[i] + (0.0 if nobody and cancelled == 0 else scale * mean) if any_[j] else out[i]
    counts[0] += updates
    counts[1] += draws


@kernel
def ram(base, delta, where, epsilon, out, counts):
    """base + mean of the deltas that count as changes, |δ| > epsilon, into out fp64[n] (RAM, "average where shared").

    Adds to counts int64[K]: changes that epsilon ignores.
    """
    for i in range(base.shape[0]):
        out[i] = np.float64(base[i])
    sum_ = np.empty(TILE, np.float64)
    number = np.empty(TILE, np.float64)
    for first in range(0, where.shape[0], TILE):
        size = min(TILE, where.shape[0] - first)
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
        for j in range(size):
            i = where[first + j]
            out[i] = out[i] + sum_[j] / number[j] if number[j] > 0.0 else out[i]
