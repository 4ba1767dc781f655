"""Exact top-k without sorting: histograms of scores, ties by hash, norms before and after, the cut itself.

A score is an fp32 ≥ 0; 0 means "not eligible". Its bit pattern orders it: the upper 16 of its 31 bits are the coarse
bin, the lower 15 the fine one. The k largest are those above a threshold, and of those equal to it the ones whose hash
is below a cut.
"""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel
from .hash import hash64
from .select import bit_places, select

TILE = 2048


@inlined
def in_pairs(lane):
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))


@kernel
def coarse(score, rows, count, low, high):
    """Adds scores fp32[E, m] to rows int64[E] of count int64[K, 65536]; low and high uint16 keep extremes of fine bins.

    A coarse bin whose extremes are equal holds one value only and needs no fine histogram: the rule for bf16 deltas.
    """
    bits = score.view(np.uint32)
    filled = np.empty(TILE + 1, np.uint32)
    for e in range(score.shape[0]):
        k = rows[e]
        for first in range(0, score.shape[1], TILE):
            row = bits[e, first : min(first + TILE, score.shape[1])]
            found = 0
            for j in range(row.shape[0]):
                filled[found] = row[j]
                found += row[j] != np.uint32(0)
            for j in range(found):
                bin_ = filled[j] >> np.uint32(15)
                rest = np.uint16(filled[j] & np.uint32(0x7FFF))
                count[k, bin_] += 1
                if rest < low[k, bin_]:
                    low[k, bin_] = rest
                if rest > high[k, bin_]:
                    high[k, bin_] = rest


@kernel
def fine(score, rows, bin_, count):
    """Adds scores fp32[E, m] that lie in coarse bin bin_[rows[e]] (negative: none) to rows of count int64[K, 32768]."""
    bits = score.view(np.uint32)
    for e in range(score.shape[0]):
        k = rows[e]
        if bin_[k] < 0:
            continue
        wanted = np.uint32(bin_[k])
        for i in range(score.shape[1]):
            word = bits[e, i]
            if word != np.uint32(0) and word >> np.uint32(15) == wanted:
                count[k, word & np.uint32(0x7FFF)] += 1


@kernel
def count_updates(values, experts, count):
    """Adds the non-zero values of each row of fp64[E, m] to count[experts[e]], int64[K]."""
    for e in range(values.shape[0]):
        value = values[e]
        found = 0
        for j in range(value.shape[0]):
            found += value[j] != 0.0
        count[experts[e]] += found


@inlined
def _size(value, order):
    return abs(value) if order == 1 else value * value


@kernel
def coarse_norms(score, values, experts, order, norm):
    """Adds |t| (order 1) or t² (order 2) of values fp64[E, m] to rows experts[e] of norm fp64[2, K, 65537], by bin.

    `score` fp32[E, m] or [1, m] for all; what has no score goes into the last bin. The first half of the values is
    added to norm[0], the second to norm[1], in turn: bf16 deltas fill few bins, and a sum waits for the one before.
    """
    bits = score.view(np.uint32)
    for e in range(values.shape[0]):
        value = values[e]
        row = bits[0 if score.shape[0] == 1 else e]
        sums = norm[0, experts[e]]
        others = norm[1, experts[e]]
        half = value.shape[0] // 2
        for j in range(half):
            bin_ = row[j] >> np.uint32(15) if row[j] != np.uint32(0) else np.uint32(65536)
            other = row[j + half] >> np.uint32(15) if row[j + half] != np.uint32(0) else np.uint32(65536)
            sums[bin_] += _size(value[j], order)
            others[other] += _size(value[j + half], order)
        for j in range(2 * half, value.shape[0]):
            bin_ = row[j] >> np.uint32(15) if row[j] != np.uint32(0) else np.uint32(65536)
            others[bin_] += _size(value[j], order)


@kernel
def fine_norms(score, values, experts, bin_, order, norm):
    """As `coarse_norms`, by fine bin in norm fp64[K, 32768], for scores in coarse bin bin_[e or 0] (negative: none)."""
    bits = score.view(np.uint32)
    for e in range(values.shape[0]):
        own = 0 if score.shape[0] == 1 else e
        if bin_[own] < 0:
            continue
        wanted = np.uint32(bin_[own])
        sums = norm[experts[e]]
        for j in range(values.shape[1]):
            word = bits[own, j]
            if word != np.uint32(0) and word >> np.uint32(15) == wanted:
                sums[word & np.uint32(0x7FFF)] += _size(values[e, j], order)


@kernel
def tie_hashes(score, threshold, key, start, where, out):
    """Writes to out uint64[m] the hashes of the coordinates start + where[j] with a score, fp32[m], at the threshold.

    Returns how many; what lies behind them is undefined.
    """
    flags = np.empty(TILE, np.uint8)
    places = np.empty(TILE + 8, np.int32)
    table = bit_places()
    found = 0
    for first in range(0, score.shape[0], TILE):
        some = score[first : first + TILE]
        spot = where[first : first + TILE].view(np.uint32)
        for j in range(some.shape[0]):
            flags[j] = np.uint8(some[j] == threshold)
        number = select(flags, some.shape[0], 0, table, places, 0)
        for place in range(number):
            out[found + place] = hash64(key, np.uint64(start) + np.uint64(spot[np.uint64(places[place])]))
        found += number
    return found


@kernel
def sift(score, threshold, cut, key, start, where, values, left, kept):
    """What a cut leaves of the updates fp64[m] of one expert: coordinates to left int32[m], updates to kept fp64[m].

    Left: eligible (score fp32[m] > 0) with a score above the threshold, or equal to it and a hash ≤ cut. Returns how
    many; what lies behind them is undefined.
    """
    number = 0
    ties = cut != np.uint64(0xFFFFFFFFFFFFFFFF) and threshold > np.float32(0.0)
    flags = np.empty(TILE, np.uint8)
    lucky = np.empty(TILE, np.uint8)
    places = np.empty(TILE + 8, np.int32)
    table = bit_places()
    for first in range(0, score.shape[0], TILE):
        some = score[first : first + TILE]
        size = some.shape[0]
        lucky[:] = np.uint8(not ties)
        if ties:
            # only ties need a hash: they are gathered first, so that no loop has to guess which they are
            for j in range(size):
                flags[j] = np.uint8(some[j] == threshold)
            for place in range(select(flags, size, 0, table, places, 0)):
                j = np.uint64(places[place])
                lucky[j] = np.uint8(hash64(key, np.uint64(start + where[np.uint64(first) + j])) <= cut)
        for j in range(size):
            above = (some[j] > threshold) | ((some[j] == threshold) & (lucky[j] != np.uint8(0)))
            flags[j] = np.uint8(above & (some[j] > np.float32(0.0)))
        found = select(flags, size, first, table, places, 0)
        for place in range(found):
            j = np.uint64(places[place])
            left[number + place] = where[j]
            kept[number + place] = values[j]
        number += found
    return number


@kernel
def compact(values, where, left, kept):
    """Coordinates of fp64[E, m] where some value is not 0: their places to left int32[m], their values to kept.

    Returns how many, n. kept fp64[E·m] begins with an array [E, n]; what lies behind is not touched.
    """
    flags = np.empty(TILE, np.uint8)
    places = np.empty(values.shape[1] + 8, np.int32)
    table = bit_places()
    number = 0
    for first in range(0, values.shape[1], TILE):
        size = min(TILE, values.shape[1] - first)
        flags[:] = np.uint8(0)
        for e in range(values.shape[0]):
            row = values[e, first : first + size]
            for j in range(size):
                flags[j] |= np.uint8(row[j] != 0.0)
        number = select(flags, size, first, table, places, number)
    spot = places[:number].view(np.uint32)
    for j in range(number):
        left[j] = where[spot[j]]
    for e in range(values.shape[0]):
        row = values[e]
        out = kept[e * number : (e + 1) * number]
        for j in range(number):
            out[j] = row[spot[j]]
    return number


@kernel
def trim(score, threshold, cut, keys, start, where, values, kept, dropped):
    """Zeroes, in place, the values fp64[E, m] of eligible coordinates that are not kept.

    Kept: score above threshold[e], or equal to it and hash ≤ cut[e]. Adds to kept int64[E]; dropped uint8[m] is set to
    1 where some expert's eligible coordinate was cut. `score`, threshold, cut and keys may have one row for all.
    """
    flags = np.empty(TILE, np.uint8)
    places = np.empty(TILE + 8, np.int32)
    table = bit_places()
    for k in range(values.shape[0]):
        row = 0 if score.shape[0] == 1 else k
        value = values[k]
        size = score[row]
        bound = threshold[row]
        # one sweep without branches cuts what is below; ties are rarer and need a hash
        number = 0
        for j in range(value.shape[0]):
            eligible = value[j] != 0.0
            keep = size[j] >= bound
            number += eligible & keep
            dropped[j] |= np.uint8(eligible & (size[j] < bound))
            value[j] = value[j] if keep else 0.0
        if bound > np.float32(0.0) and cut[row] != np.uint64(0xFFFFFFFFFFFFFFFF):
            for first in range(0, value.shape[0], TILE):
                some = size[first : first + TILE]
                for j in range(some.shape[0]):
                    flags[j] = np.uint8((some[j] == bound) & (value[first + j] != 0.0))
                for place in range(select(flags, some.shape[0], first, table, places, 0)):
                    j = np.uint64(places[place])
                    lost = hash64(keys[row], np.uint64(start + where[j])) > cut[row]
                    value[j] = 0.0 if lost else value[j]
                    dropped[j] |= np.uint8(lost)
                    number -= lost
        kept[k] += number


@kernel
def kept_norms(values, order, total):
    """Adds Σ|v| (order 1) or Σv² (order 2), per row of fp64[E, m] in eight interleaved lanes, to total fp64[E]."""
    lane = np.empty(8, np.float64)
    for k in range(values.shape[0]):
        value = values[k]
        even = value.shape[0] - value.shape[0] % 8
        lane[:] = 0.0
        if order == 1:
            for i in range(0, even, 8):
                for j in range(8):
                    lane[j] += abs(value[i + j])
        else:
            for i in range(0, even, 8):
                for j in range(8):
                    lane[j] += value[i + j] * value[i + j]
        rest = 0.0
        for i in range(even, value.shape[0]):
            rest += abs(value[i]) if order == 1 else value[i] * value[i]
        total[k] += in_pairs(lane) + rest


@kernel
def ramp(score, rank, low, high, keys, start, where, values, inverse, kept, dropped):
    """MAGPRUNE: keeps an eligible coordinate with a probability linear in the mid-rank of its score (DELLA, eq. 3).

    rank fp64[K, 65536] is the mid-rank in [0, 1] of a coarse bin; the probability is low[k] + (high[k] - low[k])·rank.
    With `inverse` a survivor is divided by its probability. Otherwise as `trim`.
    """
    shared = score.shape[0] == 1
    bits = score.view(np.uint32)
    for k in range(values.shape[0]):
        row = 0 if shared else k
        for j in range(score.shape[1]):
            if values[k, j] == 0.0:
                continue
            word = bits[row, j]
            keep = False
            chance = 1.0
            if word != np.uint32(0):
                chance = low[row] + (high[row] - low[row]) * rank[row, word >> np.uint32(15)]
                uniform = np.float64(hash64(keys[row], np.uint64(start + where[j])) >> np.uint64(11)) * 2.0**-53
                keep = uniform < chance
            if keep:
                kept[k] += 1
                if inverse:
                    values[k, j] = values[k, j] / chance
            else:
                values[k, j] = 0.0
                dropped[j] = 1
