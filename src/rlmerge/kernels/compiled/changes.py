"""Where anything changed, whose change it is, and by how much: the dense part of every merge of deltas.

RL updates are sparse, so a block is first sorted into patches: the coordinates that one expert alone changed, for each
expert, and those that several changed. Every other coordinate is the base and is never looked at again. bf16 models are
compared word by word, without decoding them.
"""

from __future__ import annotations

import numpy as np

from ._jit import helper, inlined, kernel
from .select import bit_places, select

TILE = 8192
"""A multiple of 8."""
SEVERAL = np.uint8(255)


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


@helper
def _sort_out(code, size, first, flags, table, places, counts):
    """Appends the coordinates of a tile to the list of their owner (row K: several)."""
    for row in range(places.shape[0]):
        own = np.uint8(row + 1) if row + 1 < places.shape[0] else SEVERAL
        for i in range(size):
            flags[i] = np.uint8(code[i] == own)
        counts[row] = select(flags, size, first, table, places[row], counts[row])


@kernel
def changes(base, expert, reference, which, additive, min_change, places, counts):
    """Sorts the coordinates that some expert changed into places int32[K + 1, n + 8], ascending, counts int64[K + 1].

    Row k: changed by expert k alone; row K: by several. A change is expert[k] != reference[which[k]] (so -0 equals +0,
    and equal infinities are none) and, with a filter, |δ| > min_change·max(|θk|, |θ0|).
    """
    code = np.empty(TILE, np.uint8)
    flags = np.empty(TILE, np.uint8)
    table = bit_places()
    counts[:] = 0
    for first in range(0, expert.shape[1], TILE):
        size = min(TILE, expert.shape[1] - first)
        code[:] = 0
        for k in range(expert.shape[0]):
            new = expert[k, first : first + size]
            old = reference[which[k], first : first + size]
            own = np.uint8(k + 1)
            if min_change == 0.0:
                for i in range(size):
                    mark = own if code[i] == np.uint8(0) else SEVERAL
                    code[i] = mark if new[i] != old[i] else code[i]
            else:
                for i in range(size):
                    if new[i] != old[i] and _is_seen(new[i], old[i], base[first + i], additive[k], min_change):
                        code[i] = own if code[i] == np.uint8(0) else SEVERAL
        _sort_out(code, size, first, flags, table, places, counts)


@helper
def _fill(words, expert, where, first, last, bits, value, out, at):
    """Deltas of one expert at where[first:last] to out[at:]: a tile's words are in the cache when this runs."""
    spot = where[first:last].view(np.uint32)
    some = out[at : at + last - first]
    base = words[0]
    new = words[1 + expert]
    for j in range(spot.shape[0]):
        bits[0, j] = np.uint32(base[spot[j]]) << np.uint32(16)
    for j in range(spot.shape[0]):
        bits[1, j] = np.uint32(new[spot[j]]) << np.uint32(16)
    for j in range(spot.shape[0]):
        # + 0.0 makes -0.0 (base +0, expert -0) the 0.0 that means "no change"
        some[j] = (np.float64(value[1, j]) - np.float64(value[0, j])) + 0.0


@kernel
def patches_bf16(words, places, counts, alone, several):
    """As `changes`, from stored words uint16[1 + K, n], base first, with the deltas. Returns how many are not finite.

    alone fp64[K, n]: row k, up to counts[k], the deltas of expert k where it alone changed something. several
    fp64[K·n]: the deltas of all K where several did, as the beginning of an array [K, counts[K]].
    """
    experts = words.shape[0] - 1
    space = words.shape[1]
    code = np.empty(TILE, np.uint8)
    flags = np.empty(TILE, np.uint8)
    before = np.empty(experts + 1, np.int64)
    bits = np.empty((2, TILE), np.uint32)
    value = bits.view(np.float32)
    table = bit_places()
    counts[:] = 0
    bad = 0
    for first in range(0, space, TILE):
        size = min(TILE, space - first)
        old = words[0, first : first + size]
        code[:] = 0
        for k in range(1, words.shape[0]):
            new = words[k, first : first + size]
            own = np.uint8(k)
            for i in range(size):
                mark = own if code[i] == np.uint8(0) else SEVERAL
                differs = (new[i] != old[i]) & (((new[i] | old[i]) & np.uint16(0x7FFF)) != np.uint16(0))
                code[i] = mark if differs else code[i]
        for k in range(words.shape[0]):
            row = words[k, first : first + size]
            largest = np.uint16(0)
            for i in range(size):
                largest = max(largest, np.uint16(row[i] & np.uint16(0x7F80)))
            if largest == np.uint16(0x7F80):
                for i in range(size):
                    bad += (row[i] & np.uint16(0x7F80)) == np.uint16(0x7F80)
        before[:] = counts
        _sort_out(code, size, first, flags, table, places, counts)
        for k in range(experts):
            _fill(words, k, places[k], before[k], counts[k], bits, value, alone[k], before[k])
            _fill(words, k, places[experts], before[experts], counts[experts], bits, value, several,
                  k * space + before[experts])  # fmt: skip
    shared = counts[experts]
    for k in range(1, experts):
        for j in range(shared):
            several[k * shared + j] = several[k * space + j]
    return bad


@kernel
def deltas(base, expert, reference, which, additive, min_change, experts, where, out):
    """Deltas fp64[E, m] of the chosen experts int64[E] at `where`; 0 where that is no change."""
    for row in range(experts.shape[0]):
        k = experts[row]
        new = expert[k]
        old = reference[which[k]]
        delta = out[row]
        for j in range(where.shape[0]):
            i = where[j]
            seen = new[i] != old[i]
            if min_change != 0.0:
                seen = seen and _is_seen(new[i], old[i], base[i], additive[k], min_change)
            # equal infinities are no change, though their difference is not a number
            delta[j] = np.float64(new[i]) - np.float64(old[i]) if seen else 0.0


@kernel
def take(values, where, out):
    """values fp32[n] at `where`, into out fp64[m] or fp32[m]."""
    # unsigned places: numba would look out for negative ones
    spot = where.view(np.uint32)
    for j in range(spot.shape[0]):
        out[j] = np.float64(values[spot[j]])


@kernel
def take_bf16(words, where, out):
    """Stored bf16 words uint16[n] at `where`, as fp64[m]."""
    bits = np.empty(TILE, np.uint32)
    value = bits.view(np.float32)
    for first in range(0, where.shape[0], TILE):
        size = min(TILE, where.shape[0] - first)
        spot = where[first : first + size].view(np.uint32)
        some = out[first : first + size]
        for j in range(size):
            bits[j] = np.uint32(words[spot[j]]) << np.uint32(16)
        for j in range(size):
            some[j] = np.float64(value[j])
