"""SAR-Merging per coordinate: who keeps an update where experts overlap (resolve), what it scores, how it is added up.

Codes: sensitivity 0 fisher_delta2, 1 fisher, 2 delta2. Arbitration 0 winner, 1 soft, 2 elect, 3 margin, 4 random.
Agreement 0 sensitivity_mean, 1 mean, 2 winner, 3 sum, 4 multiplicity. Score 0 delta, 1 share, 2 merged,
3 fisher_magnitude. Source: design, section 2 (our reading of arXiv 2606.18521, whose equations are not public).
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import helper, inlined, kernel
from .hash import hash64

TILE = 2048
SETTLE = 512
ARBITRATION = np.uint64(0xA5A5A5A55A5A5A5A)
"""Keeps the random winners apart from the random numbers of magprune, which have the same keys."""


@helper
def _winners(value, sens, count, chosen):
    """Marks T: the largest sensitivity and, among those, the largest |value|. Returns |T|, or 0 for a draw."""
    best = -1.0
    size = -1.0
    for j in range(count):
        if sens[j] > best or (sens[j] == best and abs(value[j]) > size):
            best = sens[j]
            size = abs(value[j])
    number = 0
    positive = 0
    for j in range(count):
        chosen[j] = sens[j] == best and abs(value[j]) == size
        if chosen[j]:
            number += 1
            positive += value[j] > 0.0
    return number if positive == 0 or positive == number else 0


@helper
def _multiplicity(who, chosen, count, phi, chance, share):
    """share_i = E[1/(1 + N_i)], N_i a sum of independent Bernoulli(phi_ij) over the other chosen experts."""
    for a in range(count):
        share[a] = 0.0
        if not chosen[a]:
            continue
        chance[:] = 0.0
        chance[0] = 1.0
        for b in range(count):
            if b == a or not chosen[b]:
                continue
            p = phi[who[a], who[b]]
            for n in range(count - 1, 0, -1):
                chance[n] = chance[n] * (1.0 - p) + chance[n - 1] * p
            chance[0] = chance[0] * (1.0 - p)
        for n in range(count):
            share[a] += chance[n] / (n + 1)


@helper
def _agree(agreement, value, sens, who, chosen, count, phi, scratch, winners, share):
    """Shares of the chosen experts, whose signs agree. Returns whether the shares make a whole (sum to one)."""
    number = 0
    total = 0.0
    for j in range(count):
        share[j] = 0.0
        if chosen[j]:
            number += 1
            total += sens[j]
    if agreement == 4:
        _multiplicity(who, chosen, count, phi, scratch, share)
        return False
    if agreement == 2:
        # T among the chosen: the others take part with a sensitivity below every real one
        for j in range(count):
            scratch[j] = sens[j] if chosen[j] else -2.0
        number = _winners(value, scratch, count, winners)
        for j in range(count):
            share[j] = 1.0 / number if winners[j] else 0.0
        return True
    for j in range(count):
        if not chosen[j]:
            continue
        if agreement == 3:
            share[j] = 1.0
        elif agreement == 1 or total == 0.0:
            share[j] = 1.0 / number
        else:
            share[j] = sens[j] / total
    return agreement != 3


@helper
def _soft(sens, count, power, share):
    """Shares (s/max s)^power, normalised; equal where every sensitivity is 0."""
    best = 0.0
    for j in range(count):
        best = max(best, sens[j])
    total = 0.0
    for j in range(count):
        ratio = sens[j] / best if best > 0.0 else 1.0
        share[j] = ratio if power == 1.0 else math.pow(ratio, power)
        total += share[j]
    for j in range(count):
        share[j] = share[j] / total


@helper
def _clear(sens, count, margin):
    """Whether the largest sensitivity is at least `margin` times the second largest."""
    first = -1.0
    second = -1.0
    for j in range(count):
        if sens[j] > first:
            second = first
            first = sens[j]
        elif sens[j] > second:
            second = sens[j]
    return first >= margin * second


@helper
def _settle_many(several, where, delta, fisher, mean, sensitivity, agreement, out, whole, wins, counts):
    """The default rules (arbitration winner, allies drop; agreement sensitivity_mean, mean or winner) without branches.

    `several` int32[s] are the overlaps; a tile of them is gathered and settled with one vector operation a step, where
    the general path below goes coordinate by coordinate. Same sums in the same order, hence the same bits.
    """
    experts = delta.shape[0]
    value = np.empty((experts, SETTLE), np.float64)
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
    size_of_both = np.empty(SETTLE, np.float64)
    won_here = np.empty(SETTLE, np.float64)
    moved = np.empty(SETTLE, np.float64)
    for first in range(0, several.shape[0], SETTLE):
        length = min(SETTLE, several.shape[0] - first)
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
            row = delta[k]
            for j in range(length):
                value[k, j] = row[several[first + j]]
            if sensitivity == 2:
                for j in range(length):
                    sens[k, j] = value[k, j] * value[k, j]
            else:
                scale = mean[k]
                there = fisher[k]
                for j in range(length):
                    sens[k, j] = np.float64(there[where[several[first + j]]]) / scale
                for j in range(length):
                    square = value[k, j] * value[k, j]
                    sens[k, j] = sens[k, j] * (square if sensitivity == 0 else 1.0)
            for j in range(length):
                v = value[k, j]
                moves = v != 0.0
                sens[k, j] = sens[k, j] if moves else -1.0
                total[j] += sens[k, j] if moves else 0.0
                active[j] += 1.0 if moves else 0.0
                balance[j] += (1.0 if v > 0.0 else 0.0) - (1.0 if v < 0.0 else 0.0)
                best[j] = max(best[j], sens[k, j])
                largest[j] = max(largest[j], abs(v))
        for k in range(experts):
            for j in range(length):
                size[j] = max(size[j], abs(value[k, j]) if sens[k, j] == best[j] else -1.0)
        for k in range(experts):
            for j in range(length):
                v = value[k, j]
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
            both = fight[j] - draw[j] if abs(plain_winners[j]) == plain[j] else 0.0
            largest[j] = fight[j] if abs(plain_winners[j]) != plain[j] else 0.0
            size_of_both[j] = both
            same[j] = both if same[j] == 0.0 else 0.0
        draws = plain_draws = decided = equal = 0.0
        for j in range(length):
            draws += draw[j]
            plain_draws += largest[j]
            decided += size_of_both[j]
            equal += same[j]
            whole[several[first + j]] = (active[j] > 0.0) & (draw[j] == 0.0)
        counts[0] += np.int64(draws)
        if sensitivity != 2:
            counts[1] += np.int64(plain_draws)
            counts[2] += np.int64(decided)
            counts[3] += np.int64(equal)
        for k in range(experts):
            won = 0.0
            for j in range(length):
                v = value[k, j]
                chosen = (sens[k, j] == best[j]) & (abs(v) == size[j]) & (v != 0.0)
                lead = 1.0 / number[j] if chosen else 0.0
                even = 1.0 / active[j]
                blend = sens[k, j] / total[j] if (agreement == 0) & (total[j] > 0.0) else even
                blend = lead if agreement == 2 else blend
                share = lead if fight[j] != 0.0 else blend
                keeps = (v != 0.0) & (draw[j] == 0.0) & (share != 0.0)
                won_here[j] = fight[j] if chosen & (draw[j] == 0.0) else 0.0
                moved[j] = share * v if keeps else 0.0
            for j in range(length):
                won += won_here[j]
            wins[k] += np.int64(won)
            row = out[k]
            for j in range(length):
                row[several[first + j]] = moved[j]


@kernel
def resolve(
    delta,
    fisher,
    mean,
    sensitivity,
    arbitration,
    agreement,
    join,
    power,
    margin,
    phi,
    keys,
    start,
    where,
    owner,
    out,
    whole,
    wins,
    counts,
):
    """Stage 1 of SAR: resolved updates t = r·d, fp64[K, m], from weighted deltas d, fp64[K, m].

    Arrays of m coordinates lie at `where` in the block of n. fisher fp32[K, n] and mean fp64[K] (empty at sensitivity
    delta2); phi fp64[K, K] for multiplicity; keys uint64[K] for random arbitration. whole uint8[m]: the shares make a
    whole, or one is 1 and the others are 0. Adds to wins int64[K] and to counts int64[4]: draws, draws under δ²,
    conflicts that both rules decide, of these the same winners.
    """
    experts = delta.shape[0]
    who = np.empty(experts, np.int64)
    value = np.empty(experts, np.float64)
    sens = np.empty(experts, np.float64)
    share = np.empty(experts, np.float64)
    scratch = np.empty(experts, np.float64)
    chosen = np.empty(experts, np.bool_)
    other = np.empty(experts, np.bool_)
    # where one expert changed the coordinate its update stays: copy everything, then settle the overlaps
    out[:] = delta
    whole[:] = 1
    several = np.empty(owner.shape[0], np.int32)
    found = 0
    for c in range(owner.shape[0]):
        several[found] = c
        found += owner[c] < 0
    if arbitration == 0 and agreement <= 2 and not join:
        _settle_many(several[:found], where, delta, fisher, mean, sensitivity, agreement, out, whole, wins, counts)
        return
    for entry in range(found):
        c = several[entry]
        whole[c] = 0
        count = 0
        positive = 0
        for k in range(experts):
            out[k, c] = 0.0
            if delta[k, c] != 0.0:
                who[count] = k
                value[count] = delta[k, c]
                positive += delta[k, c] > 0.0
                count += 1
        if count == 0:
            continue
        if count == 1:
            out[who[0], c] = value[0]
            whole[c] = 1
            continue
        for j in range(count):
            chosen[j] = True
            square = value[j] * value[j]
            if sensitivity == 2:
                sens[j] = square
            else:
                weight = np.float64(fisher[who[j], where[c]]) / mean[who[j]]
                sens[j] = weight * square if sensitivity == 0 else weight
        if positive == 0 or positive == count:
            whole[c] = _agree(agreement, value, sens, who, chosen, count, phi, scratch, other, share)
        elif arbitration == 1 or (arbitration == 3 and not _clear(sens, count, margin)):
            _soft(sens, count, power, share)
        elif arbitration == 2:
            up = 0.0
            down = 0.0
            for j in range(count):
                if value[j] > 0.0:
                    up += sens[j]
                else:
                    down += sens[j]
            if up == down:
                counts[0] += 1
                continue
            for j in range(count):
                chosen[j] = (value[j] > 0.0) == (up > down)
            whole[c] = _agree(agreement, value, sens, who, chosen, count, phi, scratch, other, share)
        else:
            if arbitration == 4:
                best = np.uint64(0)
                place = -1
                for j in range(count):
                    word = hash64(keys[who[j]] ^ ARBITRATION, np.uint64(start + where[c]))
                    if place < 0 or word > best:
                        best = word
                        place = j
                for j in range(count):
                    chosen[j] = j == place
                number = 1
            else:
                number = _winners(value, sens, count, chosen)
                if sensitivity != 2:
                    for j in range(count):
                        scratch[j] = value[j] * value[j]
                    if _winners(value, scratch, count, other) == 0:
                        counts[1] += 1
                    elif number != 0:
                        counts[2] += 1
                        same = True
                        for j in range(count):
                            same &= chosen[j] == other[j]
                        counts[3] += same
            if number == 0:
                counts[0] += 1
                continue
            sign = False
            for j in range(count):
                if chosen[j]:
                    wins[who[j]] += 1
                    sign = value[j] > 0.0
                    share[j] = 1.0 / number
                else:
                    share[j] = 0.0
            whole[c] = 1
            if join:
                for j in range(count):
                    chosen[j] = (value[j] > 0.0) == sign
                whole[c] = _agree(agreement, value, sens, who, chosen, count, phi, scratch, other, share)
        single = 0
        for j in range(count):
            if share[j] != 0.0:
                out[who[j], c] = share[j] * value[j]
                single += 1 if share[j] == 1.0 else 2
        if single == 1:
            whole[c] = 1


@kernel
def scores(delta, resolved, fisher, where, mean, score, out):
    """The fp32 scores that sparsification ranks, fp32[K, m] or, for merged, fp32[1, m]; 0 where nothing is eligible."""
    smallest = np.float32(1e-45)
    if score == 2:
        for j in range(resolved.shape[1]):
            sum_ = 0.0
            for k in range(resolved.shape[0]):
                sum_ += resolved[k, j]
            out[0, j] = max(np.float32(abs(sum_)), smallest) if sum_ != 0.0 else np.float32(0.0)
        return
    for k in range(resolved.shape[0]):
        if score == 3:
            for j in range(resolved.shape[1]):
                size = abs(delta[k, j]) * math.sqrt(np.float64(fisher[k, where[j]]) / mean[k])
                out[k, j] = max(np.float32(size), smallest) if resolved[k, j] != 0.0 else np.float32(0.0)
        else:
            for j in range(resolved.shape[1]):
                size = abs(resolved[k, j]) if score == 1 else abs(delta[k, j])
                out[k, j] = max(np.float32(size), smallest) if resolved[k, j] != 0.0 else np.float32(0.0)


@inlined
def _common(expert, resolved, unit, c, i, otherwise):
    """The stored value on which all who contribute at coordinate c agree, or `otherwise`."""
    found = False
    stored = np.float32(0.0)
    for k in range(resolved.shape[0]):
        if resolved[k, c] != 0.0:
            if not unit[k] or (found and expert[k, i] != stored):
                return otherwise
            found = True
            stored = expert[k, i]
    return np.float64(stored)


@kernel
def compose(base, expert, resolved, where, owner, gain, scale, unit, whole, dropped, out):
    """θ0 + scale·Σ gain[k]·t[k] into out fp64[n]; the stored value where one whole share returns to it.

    unit bool[K]: scale·gain·weight is 1 and expert[k] is a stored value. Where the shares make a whole, nothing was
    dropped, and all who contribute are units with one and the same stored value, that value is copied: no rounding.
    """
    for i in range(base.shape[0]):
        out[i] = np.float64(base[i])
    copies = False
    for k in range(unit.shape[0]):
        copies = copies or unit[k]
    sum_ = np.empty(TILE, np.float64)
    any_ = np.empty(TILE, np.bool_)
    for first in range(0, where.shape[0], TILE):
        size = min(TILE, where.shape[0] - first)
        sum_[:] = 0.0
        any_[:] = False
        for k in range(resolved.shape[0]):
            row = resolved[k, first : first + size]
            for j in range(size):
                sum_[j] += gain[k] * row[j]
                any_[j] |= row[j] != 0.0
        for j in range(size):
            c = first + j
            i = where[c]
            moved = np.float64(base[i]) + scale * sum_[j]
            if copies:
                if owner[c] >= 0:
                    moved = np.float64(expert[owner[c], i]) if unit[owner[c]] else moved
                elif whole[c] == 1 and dropped[c] == 0 and any_[j]:
                    moved = _common(expert, resolved, unit, c, i, moved)
            out[i] = moved if any_[j] else out[i]
