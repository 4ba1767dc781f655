"""SAR's rules for one coordinate that several experts changed: every arbitration and every agreement, in a loop.

Codes: sensitivity 0 fisher_delta2, 1 fisher, 2 delta2. Arbitration 0 winner, 1 soft, 2 elect, 3 margin, 4 random.
Agreement 0 sensitivity_mean, 1 mean, 2 winner, 3 sum, 4 multiplicity. Source: design, section 2 (our reading of arXiv
2606.18521, whose equations are not public).
"""

from __future__ import annotations

import math

import numpy as np

from ._jit import helper, kernel
from .hash import hash64

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


@kernel
def resolve_by(
    delta, fisher, mean, sensitivity, arbitration, agreement, join, power, margin, phi, keys, start, where,
    out, whole, wins, counts,
):  # fmt: skip
    """Stage 1 of SAR where several experts changed a coordinate: t = r·d, fp64[K, m], from weighted d, fp64[K, m].

    fisher fp32[K, m] and mean fp64[K] (empty at sensitivity delta2); phi fp64[K, K] for multiplicity; keys uint64[K]
    for random arbitration; `where` int32[m] lies in the block at `start`. whole uint8[m]: the shares make a whole, or
    one is 1 and the others are 0. Adds to wins int64[K] and to counts int64[4]: draws, draws under δ², conflicts that
    both rules decide, of these the same winners.
    """
    experts = delta.shape[0]
    who = np.empty(experts, np.int64)
    value = np.empty(experts, np.float64)
    sens = np.empty(experts, np.float64)
    share = np.empty(experts, np.float64)
    scratch = np.empty(experts, np.float64)
    chosen = np.empty(experts, np.bool_)
    other = np.empty(experts, np.bool_)
    for c in range(delta.shape[1]):
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
                weight = np.float64(fisher[who[j], c]) / mean[who[j]]
                sens[j] = weight * square if sensitivity == 0 else weight
        if positive == 0 or positive == count:
            whole[c] = _agree(agreement, value, sens, who, chosen, count, phi, scratch, other, share)
        elif arbitration == 1 or (arbitration == 3 and not _clear(sens, count, margin)):
            _soft(sens, count, power, share)
            if _winners(value, sens, count, chosen) > 0:
                for j in range(count):
                    wins[who[j]] += chosen[j]
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
                wins[who[j]] += chosen[j]
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
