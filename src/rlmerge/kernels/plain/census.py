"""What the experts did and what became of it, in NumPy (see `compiled.census` for the definitions)."""

from __future__ import annotations

import numpy as np

from .lanes import sum_in_lanes

RESIDUE = 2.0**-48


def census(delta, owner, sign, support, regions, overlap, conflict):
    """Counts who changed what."""
    signs = np.sign(np.nan_to_num(delta)).astype(np.int64) * sign[:, None]
    active = signs != 0
    number = active.sum(axis=0)
    mixed = (signs > 0).any(axis=0) & (signs < 0).any(axis=0)
    support += active.sum(axis=1)
    several = number >= 2
    regions += np.array([(number == 1).sum(), several.sum(), (several & mixed).sum(), (several & ~mixed).sum()])
    for k in range(delta.shape[0]):
        for j in range(k + 1, delta.shape[0]):
            both = active[k] & active[j]
            overlap[k, j] += both.sum()
            conflict[k, j] += (both & (signs[k] != signs[j])).sum()


def realised(base, stored_base, intended, stored, where, counts, sums):
    """Compares the intended update with the one that the stored values make."""
    old = base[where].astype(np.float64)
    update = intended[where] - old
    update[~(np.abs(update) > RESIDUE * np.abs(old))] = 0.0
    real = stored[where].astype(np.float64) - stored_base[where].astype(np.float64)
    counts += np.array([np.count_nonzero(update), np.count_nonzero((update != 0) & (real != 0))])
    if where.size:
        with np.errstate(invalid="ignore", over="ignore"):
            for place, terms in enumerate((update * update, real * real, update * real)):
                sums[place] += np.cumsum(terms)[-1]


def fisher_sums(fisher, total, negative):
    """Adds the sum of each row, in eight interleaved lanes; counts negative entries."""
    for k, row in enumerate(fisher.astype(np.float64)):
        total[k] += sum_in_lanes(row)
        negative[k] += np.count_nonzero(row < 0)
