"""Where anything changed, whose change it is, and by how much, in NumPy (definitions: `compiled.changes`)."""

from __future__ import annotations

import numpy as np

from .codec import decode_bf16


def _seen(base, expert, reference, which, additive, min_change, k):
    seen = expert[k] != reference[which[k]]
    if min_change != 0.0:
        with np.errstate(invalid="ignore"):
            delta = expert[k].astype(np.float64) - reference[which[k]].astype(np.float64)
            old = base.astype(np.float64) if additive[k] else reference[which[k]].astype(np.float64)
            new = old + delta if additive[k] else expert[k].astype(np.float64)
            seen &= np.abs(delta) > min_change * np.maximum(np.abs(new), np.abs(old))
    return seen


def _sort_out(seen, places, counts):
    number = sum(row.astype(np.int64) for row in seen)
    for row, mask in enumerate([*(mine & (number == 1) for mine in seen), number > 1]):
        found = np.flatnonzero(mask)
        places[row, : found.size] = found
        counts[row] = found.size


def changes(base, expert, reference, which, additive, min_change, places, counts):
    """Sorts the coordinates that some expert changed by who did: each alone, or several."""
    every = range(expert.shape[0])
    _sort_out([_seen(base, expert, reference, which, additive, min_change, k) for k in every], places, counts)


def patches_bf16(words, places, counts, alone, several):
    """As `changes`, from stored words, with the deltas. Returns how many words are not finite."""
    nonzero = (words & np.uint16(0x7FFF)) != 0
    _sort_out([(row != words[0]) & (mine | nonzero[0]) for row, mine in zip(words[1:], nonzero[1:])], places, counts)
    experts = len(words) - 1
    shared = places[experts, : counts[experts]]
    for k in range(experts):
        _fill(words, k, places[k, : counts[k]], alone[k, : counts[k]])
        _fill(words, k, shared, several[k * shared.size : (k + 1) * shared.size])
    return int(np.count_nonzero((words & np.uint16(0x7F80)) == np.uint16(0x7F80)))


def deltas(base, expert, reference, which, additive, min_change, experts, where, out):
    """Deltas of the chosen experts at `where`, 0 where that is no change."""
    for row, k in enumerate(experts):
        with np.errstate(invalid="ignore"):
            delta = expert[k, where].astype(np.float64) - reference[which[k], where].astype(np.float64)
        delta[~_seen(base, expert, reference, which, additive, min_change, k)[where]] = 0.0
        out[row] = delta


def _fill(words, expert, where, out):
    old = np.empty(where.size)
    take_bf16(words[0], where, old)
    take_bf16(words[1 + expert], where, out)
    with np.errstate(invalid="ignore"):
        out[:] = (out - old) + 0.0


def take(values, where, out):
    """values at `where`, as fp64."""
    out[:] = values[where]


def take_bf16(words, where, out):
    """Stored bf16 words at `where`, as fp64."""
    some = np.empty(where.size, np.float32)
    decode_bf16(words[where], some)
    out[:] = some
