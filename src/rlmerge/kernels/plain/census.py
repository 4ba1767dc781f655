"""What the experts did, and the sums of their Fishers, in NumPy (definitions: `compiled.census`)."""

from __future__ import annotations

import numpy as np

from .lanes import sum_in_lanes


def census(delta, sign, support, regions, overlap, conflict):
    """Counts who changed what where several did."""
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


def fisher_sums(fisher, total, negative):
    """Adds the sum of each row, in eight interleaved lanes; counts negative entries."""
    for k, row in enumerate(fisher.astype(np.float64)):
        total[k] += sum_in_lanes(row)
        negative[k] += np.count_nonzero(row < 0)
