"""SAR-Merging over arrays, in NumPy (see `compiled.sar` for the definitions and codes)."""

from __future__ import annotations

import math

import numpy as np

from .hash import hash64

ARBITRATION = np.uint64(0xA5A5A5A55A5A5A5A)
_pow = np.frompyfunc(math.pow, 2, 1)


def _sum_over_experts(rows):
    """Adds rows one after the other, as the compiled loops do."""
    total = np.zeros(rows.shape[1])
    for row in rows:
        total = total + row
    return total


def _winners(delta, sens, among):
    """T as a mask [K, n], and whether its signs agree [n]."""
    masked = np.where(among, sens, -1.0)
    first = among & (masked == masked.max(axis=0))
    size = np.where(first, np.abs(delta), -1.0)
    chosen = first & (size == size.max(axis=0))
    up = (chosen & (delta > 0)).any(axis=0)
    down = (chosen & (delta < 0)).any(axis=0)
    return chosen, ~(up & down)


def _multiplicity(chosen, phi):
    experts, size = chosen.shape
    share = np.zeros(chosen.shape)
    for a in range(experts):
        chance = np.zeros((experts, size))
        chance[0] = 1.0
        for b in range(experts):
            if b == a:
                continue
            p = np.where(chosen[b], phi[a, b], 0.0)
            for n in range(experts - 1, 0, -1):
                chance[n] = chance[n] * (1.0 - p) + chance[n - 1] * p
            chance[0] = chance[0] * (1.0 - p)
        for n in range(experts):
            share[a] += chance[n] / (n + 1)
    return np.where(chosen, share, 0.0)


def _agree(agreement, delta, sens, chosen, phi):
    """Shares [K, n] of the chosen experts, and whether they make a whole."""
    number = np.maximum(chosen.sum(axis=0), 1)
    if agreement == 4:
        return _multiplicity(chosen, phi), False
    if agreement == 2:
        winners, _ = _winners(delta, sens, chosen)
        return np.where(winners, 1.0 / np.maximum(winners.sum(axis=0), 1), 0.0), True
    if agreement == 3:
        return np.where(chosen, 1.0, 0.0), False
    share = np.where(chosen, 1.0 / number, 0.0)
    if agreement == 0:
        total = _sum_over_experts(np.where(chosen, sens, 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(chosen & (total > 0.0), sens / total, share)
    return share, True


def _soft(sens, active, power):
    best = np.where(active, sens, 0.0).max(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(best > 0.0, sens / best, 1.0)
    share = ratio if power == 1.0 else np.asarray(_pow(ratio, power), np.float64)
    share = np.where(active, share, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return share / _sum_over_experts(share)


def _clear(sens, active, margin):
    ordered = np.sort(np.where(active, sens, -1.0), axis=0)
    second = ordered[-2] if ordered.shape[0] > 1 else np.full(sens.shape[1], -1.0)
    return ordered[-1] >= margin * second


def resolve(delta, fisher, mean, sensitivity, agreement, out, whole, wins, counts):
    """Stage 1 of SAR by its usual rules."""
    experts = delta.shape[0]
    none = np.zeros((experts, experts)), np.zeros(experts, np.uint64), 0, np.zeros(delta.shape[1], np.int32)
    resolve_by(delta, fisher, mean, sensitivity, 0, agreement, False, 1.0, 1.0, *none, out, whole, wins, counts)


def resolve_by(
    delta, fisher, mean, sensitivity, arbitration, agreement, join, power, margin, phi, keys, start, where,
    out, whole, wins, counts,
):  # fmt: skip
    """Stage 1 of SAR where several experts changed a coordinate: t = r·d."""
    active = delta != 0.0
    number = active.sum(axis=0)
    conflict = (delta > 0).any(axis=0) & (delta < 0).any(axis=0)
    square = delta * delta
    if sensitivity == 2:
        sens = square
    else:
        weight = fisher.astype(np.float64) / mean[:, None]
        sens = weight * square if sensitivity == 0 else weight
    sens = np.where(active, sens, 0.0)
    share, is_whole = _agree(agreement, delta, sens, active, phi)
    share[:, number == 1] = active[:, number == 1]
    complete = np.where(number == 1, True, is_whole & (number > 0))

    soft = conflict & (arbitration == 1)
    if arbitration == 3:
        soft = conflict & ~_clear(sens, active, margin)
    share = np.where(soft, _soft(sens, active, power), share)
    complete &= ~soft
    blended, decided = _winners(delta, sens, active)
    wins += (blended & active & soft & decided).sum(axis=1)
    hard = conflict & ~soft
    if arbitration == 2:
        up = _sum_over_experts(np.where(delta > 0, sens, 0.0))
        down = _sum_over_experts(np.where(delta < 0, sens, 0.0))
        draw = hard & (up == down)
        chosen = active & ((delta > 0) == (up > down))
        wins += (chosen & hard & ~draw).sum(axis=1)
        joined, is_whole = _agree(agreement, delta, sens, chosen, phi)
        share = np.where(hard, joined, share)
        complete = np.where(hard, is_whole, complete)
    else:
        if arbitration == 4:
            places = where.astype(np.uint64) + np.uint64(start)
            hashes = np.stack([hash64(key ^ ARBITRATION, places) for key in keys])
            hashes[~active] = 0
            chosen = np.zeros(active.shape, np.bool_)
            np.put_along_axis(chosen, hashes.argmax(axis=0)[None], True, axis=0)
            draw = np.zeros(number.shape, np.bool_)
        else:
            chosen, decided = _winners(delta, sens, active)
            draw = hard & ~decided
            if sensitivity != 2:
                other, other_decided = _winners(delta, square, active)
                both = hard & decided & other_decided
                counts[1] += np.count_nonzero(hard & ~other_decided)
                counts[2] += np.count_nonzero(both)
                counts[3] += np.count_nonzero(both & (chosen == other).all(axis=0))
        chosen = chosen & active
        wins += (chosen & hard & ~draw).sum(axis=1)
        equal = np.where(chosen, 1.0 / np.maximum(chosen.sum(axis=0), 1), 0.0)
        share = np.where(hard, equal, share)
        complete = np.where(hard, True, complete)
        if join:
            positive = (chosen & (delta > 0)).any(axis=0)
            allies = active & ((delta > 0) == positive)
            joined, is_whole = _agree(agreement, delta, sens, allies, phi)
            share = np.where(hard, joined, share)
            complete = np.where(hard, is_whole, complete)
    counts[0] += np.count_nonzero(draw)
    share = np.where(active & ~draw, share, 0.0)
    out[:] = np.where(share != 0.0, share * delta, 0.0)
    single = ((share != 0.0).sum(axis=0) == 1) & (share == 1.0).any(axis=0)
    whole[:] = (complete | single) & ~draw & (number > 0)


def scores(delta, resolved, fisher, mean, score, out):
    """The fp32 scores that sparsification ranks."""
    if score == 2:
        size = np.abs(_sum_over_experts(resolved))[None]
        eligible = size != 0.0
    else:
        size = np.abs(resolved if score == 1 else delta)
        if score == 3:
            size = size * np.sqrt(fisher.astype(np.float64) / mean[:, None])
        eligible = resolved != 0.0
    smallest = np.float32(1e-45)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found = size.astype(np.float32)
        found = np.where(found > smallest, found, smallest) if score == 3 else np.maximum(found, smallest)
        out[:] = np.where(eligible, found, np.float32(0.0))


def compose(base, stored, resolved, gain, scale, unit, whole, dropped, out):
    """base + scale·Σ gain·t; the stored value where one whole share returns to it."""
    contributes = resolved != 0.0
    sum_ = _sum_over_experts(np.where(contributes, gain[:, None] * resolved, 0.0))
    any_ = contributes.any(axis=0)
    out[:] = np.where(any_, base + scale * sum_, base)
    if unit.any():
        first = stored[contributes.argmax(axis=0), np.arange(base.size)]
        same = (~contributes | ((stored == first) & unit[:, None])).all(axis=0)
        copy = any_ & (whole == 1) & (dropped == 0) & same
        out[copy] = first[copy]
