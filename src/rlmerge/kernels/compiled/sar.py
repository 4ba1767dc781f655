"""SAR-Merging on a patch: who keeps an update where experts overlap (resolve), what it scores, how it is added up.

The usual rules run here, a tile at a time; all others are in `sar_rules`, which has the codes. Score 0 delta,
1 share, 2 merged, 3 fisher_magnitude.
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import helper, kernel

TILE = 2048
SETTLE = 256


@kernel
def resolve(delta, fisher, mean, sensitivity, agreement, out, whole, wins, counts):
    """Stage 1 of SAR by its usual rules: `resolve_by` for arbitration winner, allies drop, agreement 0 … 2.

    A tile of coordinates is settled with one vector operation a step. Same sums in the same order, hence the same bits.
    """
    experts = delta.shape[0]
    sens = np.empty((experts, SETTLE), np.float64)
    best = np.empty(SETTLE, np.float64)
    size = np.empty(SETTLE, np.float64)
    largest = np.empty(SETTLE, np.float64)
    total = np.empty(SETTLE, np.float64)
    active = np.empty(SETTLE, np.float64)
    number = np.empty(SETTLE, np.float64)
    balance = np.empty(SETTLE, np.float64)
    winners = np.empty(SETTLE, np.float64)
    plain = np.empty(SETTLE, np.float64)
    plain_winners = np.empty(SETTLE, np.float64)
    same = np.empty(SETTLE, np.float64)
    fight = np.empty(SETTLE, np.float64)
    draw = np.empty(SETTLE, np.float64)
    both = np.empty(SETTLE, np.float64)
    for first in range(0, delta.shape[1], SETTLE):
        length = min(SETTLE, delta.shape[1] - first)
        best[:] = -1.0
        size[:] = -1.0
        largest[:] = -1.0
        total[:] = 0.0
        active[:] = 0.0
        number[:] = 0.0
        balance[:] = 0.0
        winners[:] = 0.0
        plain[:] = 0.0
        plain_winners[:] = 0.0
        same[:] = 0.0
        for k in range(experts):
            value = delta[k, first : first + length]
            if sensitivity == 2:
                for j in range(length):
                    sens[k, j] = value[j] * value[j]
            else:
                scale = mean[k]
                there = fisher[k, first : first + length]
                for j in range(length):
                    square = value[j] * value[j]
                    sens[k, j] = np.float64(there[j]) / scale * (square if sensitivity == 0 else 1.0)
            for j in range(length):
                v = value[j]
                moves = v != 0.0
                sens[k, j] = sens[k, j] if moves else -1.0
                total[j] += sens[k, j] if moves else 0.0
                active[j] += 1.0 if moves else 0.0
                balance[j] += (1.0 if v > 0.0 else 0.0) - (1.0 if v < 0.0 else 0.0)
                best[j] = max(best[j], sens[k, j])
                largest[j] = max(largest[j], abs(v))
        for k in range(experts):
            value = delta[k, first : first + length]
            for j in range(length):
                size[j] = max(size[j], abs(value[j]) if sens[k, j] == best[j] else -1.0)
        for k in range(experts):
            value = delta[k, first : first + length]
            for j in range(length):
                v = value[j]
                sign = (1.0 if v > 0.0 else 0.0) - (1.0 if v < 0.0 else 0.0)
                chosen = 1.0 if (sens[k, j] == best[j]) & (abs(v) == size[j]) else 0.0
                also = 1.0 if abs(v) == largest[j] else 0.0
                number[j] += chosen
                winners[j] += chosen * sign
                plain[j] += also
                plain_winners[j] += also * sign
                same[j] += abs(chosen - also)
        for j in range(length):
            # a conflict: signs do not add up to the number; a draw: those of the winners do not either
            fight[j] = 1.0 if abs(balance[j]) != active[j] else 0.0
            draw[j] = fight[j] if abs(winners[j]) != number[j] else 0.0
            both[j] = fight[j] - draw[j] if abs(plain_winners[j]) == plain[j] else 0.0
            largest[j] = fight[j] if abs(plain_winners[j]) != plain[j] else 0.0
            same[j] = both[j] if same[j] == 0.0 else 0.0
            number[j] = 1.0 / number[j]
            active[j] = 1.0 / active[j]
        draws = plain_draws = decided = equal = 0.0
        for j in range(length):
            draws += draw[j]
            plain_draws += largest[j]
            decided += both[j]
            equal += same[j]
            # where nobody is left (weights of 0), 1 / active is infinite
            whole[first + j] = (active[j] <= 1.0) & (draw[j] == 0.0)
        counts[0] += np.int64(draws)
        if sensitivity != 2:
            counts[1] += np.int64(plain_draws)
            counts[2] += np.int64(decided)
            counts[3] += np.int64(equal)
        for k in range(experts):
            value = delta[k, first : first + length]
            moved = out[k, first : first + length]
            won = 0.0
            for j in range(length):
                v = value[j]
                chosen = (sens[k, j] == best[j]) & (abs(v) == size[j]) & (v != 0.0)
                lead = number[j] if chosen else 0.0
                blend = sens[k, j] / total[j] if (agreement == 0) & (total[j] > 0.0) else active[j]
                blend = lead if agreement == 2 else blend
                share = lead if fight[j] != 0.0 else blend
                keeps = (v != 0.0) & (draw[j] == 0.0) & (share != 0.0)
                both[j] = fight[j] if chosen & (draw[j] == 0.0) else 0.0
                moved[j] = share * v if keeps else 0.0
            for j in range(length):
                won += both[j]
            wins[k] += np.int64(won)


@kernel
def scores(delta, resolved, fisher, mean, score, out):
    """The fp32 scores that sparsification ranks, fp32[E, m] or, for merged, fp32[1, m]; 0 where nothing is eligible.

    delta and resolved fp64[E, m]; for fisher_magnitude also fisher fp32[E, m] and mean fp64[E].
    """
    smallest = np.float32(1e-45)
    if score == 2:
        for j in range(resolved.shape[1]):
            sum_ = 0.0
            for k in range(resolved.shape[0]):
                sum_ += resolved[k, j]
            out[0, j] = max(np.float32(abs(sum_)), smallest) if sum_ != 0.0 else np.float32(0.0)
        return
    for k in range(resolved.shape[0]):
        left = resolved[k]
        size = left if score == 1 else delta[k]
        found = out[k]
        if score == 3:
            for j in range(left.shape[0]):
                weighted = np.float32(abs(size[j]) * math.sqrt(np.float64(fisher[k, j]) / mean[k]))
                # what is no number gets the smallest score: its bits would lie outside the histograms
                found[j] = (weighted if weighted > smallest else smallest) if left[j] != 0.0 else np.float32(0.0)
        else:
            for j in range(left.shape[0]):
                found[j] = max(np.float32(abs(size[j])), smallest) if left[j] != 0.0 else np.float32(0.0)


@helper
def _common(stored, resolved, unit, c, otherwise):
    """The stored value on which all who contribute at coordinate c agree, or `otherwise`."""
    found = False
    value = 0.0
    for k in range(resolved.shape[0]):
        if resolved[k, c] != 0.0:
            if not unit[k] or (found and stored[k, c] != value):
                return otherwise
            found = True
            value = stored[k, c]
    return value


@kernel
def compose(base, stored, resolved, gain, scale, unit, whole, dropped, out):
    """base + scale·Σ gain[k]·t[k] into out fp64[m]; the stored value where one whole share returns to it.

    base fp64[m], stored fp64[E, m] the experts' own values (not read unless some unit is true), resolved fp64[E, m].
    unit bool[E]: scale·gain·weight is 1 and the expert is stored as a value. Where the shares make a whole, nothing was
    dropped, and all who contribute are units with one and the same stored value, that value is copied: no rounding.
    """
    copies = False
    for k in range(unit.shape[0]):
        copies = copies or unit[k]
    any_ = np.empty(TILE, np.bool_)
    for first in range(0, out.shape[0], TILE):
        some = out[first : first + TILE]
        some[:] = 0.0
        any_[:] = False
        for k in range(resolved.shape[0]):
            row = resolved[k, first : first + TILE]
            for j in range(some.shape[0]):
                some[j] += gain[k] * row[j]
                any_[j] |= row[j] != 0.0
        old = base[first : first + TILE]
        for j in range(some.shape[0]):
            some[j] = old[j] + scale * some[j] if any_[j] else old[j]
        if copies:
            for j in range(some.shape[0]):
                c = first + j
                if any_[j] and whole[c] == 1 and dropped[c] == 0:
                    some[j] = _common(stored, resolved, unit, c, some[j])
