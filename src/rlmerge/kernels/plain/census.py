"""What the experts did and what became of it, in NumPy (see `compiled.census` for the definitions)."""

from __future__ import annotations

import numpy as np


def census(expert, reference, which, sign, min_change, base, additive, support, regions, overlap, conflict):
    """Counts who changed what."""
    count = expert.shape[0]
    signs = np.zeros(expert.shape, np.int64)
    for k in range(count):
        with np.errstate(invalid="ignore"):
            delta = expert[k].astype(np.float64) - reference[which[k]].astype(np.float64)
        delta[expert[k] == reference[which[k]]] = 0.0
        if min_change != 0.0:
            old = base.astype(np.float64) if additive[k] else reference[which[k]].astype(np.float64)
            new = old + delta if additive[k] else expert[k].astype(np.float64)
            delta[~(np.abs(delta) > min_change * np.maximum(np.abs(new), np.abs(old)))] = 0.0
        signs[k] = np.sign(np.nan_to_num(delta)).astype(np.int64) * sign[k]
    active = signs != 0
    number = active.sum(axis=0)
    mixed = (signs > 0).any(axis=0) & (signs < 0).any(axis=0)
    support += active.sum(axis=1)
    several = number >= 2
    regions += np.array([(number == 1).sum(), several.sum(), (several & mixed).sum(), (several & ~mixed).sum()])
    for k in range(count):
        for j in range(k + 1, count):
            both = active[k] & active[j]
            overlap[k, j] += both.sum()
            conflict[k, j] += (both & (signs[k] != signs[j])).sum()


def realised(base, stored_base, intended, stored, counts, sums):
    """Compares the intended update with the one that the stored values make."""
    update = intended - base.astype(np.float64)
    real = stored.astype(np.float64) - stored_base.astype(np.float64)
    counts += np.array([np.count_nonzero(update), np.count_nonzero((update != 0) & (real != 0))])
    if base.shape[0]:
        with np.errstate(invalid="ignore", over="ignore"):
            for place, terms in enumerate((update * update, real * real, update * real)):
                sums[place] += np.cumsum(terms)[-1]


def fisher_sums(fisher, total, negative):
    """Adds the sum of each row, in eight interleaved lanes; counts negative entries."""
    even = fisher.shape[1] - fisher.shape[1] % 8
    for k, row in enumerate(fisher.astype(np.float64)):
        lanes = np.zeros(8)
        if even:
            lanes = np.cumsum(row[:even].reshape(-1, 8), axis=0)[-1]
        rest = np.cumsum(row[even:])[-1] if even < len(row) else 0.0
        a, b, c, d, e, f, g, h = lanes
        total[k] += (((a + b) + (c + d)) + ((e + f) + (g + h))) + rest
        negative[k] += np.count_nonzero(row < 0)
