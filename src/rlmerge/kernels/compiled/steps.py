"""Delta packs: where stored words differ and by how many steps, as bits and back. Format: docs/packs.md.

A chunk is CHUNK coordinates: gaps between changed coordinates, and steps. Of every number the upper part is written in
unary and the lower one in binary, each in a stream of its own: so many numbers are read at once, and none waits for the
one before it. Words are uint16 or uint32, as stored.
"""

from __future__ import annotations

import numpy as np

from ._jit import helper, inlined, kernel
from .select import bit_places

CHUNK = 2**15
"""Coordinates of a chunk: what must be decoded to read one of them."""
GAP_WIDTH = 15
ROOM = CHUNK + 72
"""Numbers of a chunk, and what is stored beyond them: of a word of ones 64, of a byte 8."""


@kernel
def weigh(words, start):
    """Σ word·weight(coordinate) modulo 2⁶⁴ over words[n] from coordinate `start`; adds up over any cutting."""
    total = np.uint64(0)
    first = np.uint32(start & 0xFFFFFFFF)
    for i in range(words.shape[0]):
        weight = (first + np.uint32(i)) * np.uint32(0x9E3779B1) | np.uint32(1)
        total += np.uint64(np.uint32(words[i])) * np.uint64(np.uint32(weight))
    return total


@inlined
def _rank(word, half):
    """Neighbouring floats have neighbouring ranks; −0 is −1, +0 is 0."""
    return np.int64(word) if np.int64(word) < half else half - 1 - np.int64(word)


@inlined
def _bits(value):
    """Binary digits of a number."""
    count = 0
    while value >> count:
        count += 1
    return count


@inlined
def _fixed_words(count, k):
    """Words that `count` numbers of k bits take: as many in each as fit whole."""
    return (count + 64 // k - 1) // (64 // k) if k else 0


@helper
def _choose(values, count, width, golomb_too):
    """The code and parameter of the fewest words among those near the mean size: (golomb, k, unary words, words)."""
    digits = np.int64(0)
    for i in range(count):
        digits += _bits(values[i])
    middle = digits // max(count, 1)
    best, best_unary, best_golomb, best_k = np.int64(-1), np.int64(0), 0, 0
    for golomb in range(2 if golomb_too else 1):
        for k in range(max(0, middle - 3), min(middle + 3, width)):
            zeros = np.int64(0)
            for i in range(count):
                zeros += _bits(values[i] + (np.int64(1) << k)) - 1 - k if golomb else values[i] >> k
            unary = (zeros + count + 63) >> 6
            total = unary + ((zeros + count * k + 63) >> 6 if golomb else _fixed_words(count, k))
            if best < 0 or total < best:
                best, best_unary, best_golomb, best_k = total, unary, golomb, k
    return best_golomb, best_k, best_unary, best


@helper
def _put(values, count, golomb, k, unary, data, first):
    """Writes values int64[count] to data uint64 from word `first`: `unary` words of ones, then the lower parts."""
    one, at, low = np.int64(first) * 64 - 1, (np.int64(first) + unary) * 64, np.int64(first) + unary
    each = 64 // k if k else 1
    for i in range(count):
        shifted = values[i] + (np.int64(1) << k) if golomb else values[i]
        zeros = _bits(shifted) - 1 - k if golomb else shifted >> k
        size = k + zeros if golomb else k
        one += zeros + 1
        data[one >> 6] |= np.uint64(1) << np.uint64(one & 63)
        part = np.uint64(shifted) & ((np.uint64(1) << np.uint64(size)) - np.uint64(1))
        if golomb:
            place, shift = at >> 6, np.uint64(at & 63)
            data[place] |= part << shift
            at += size
            if at > (place + 1) * 64:
                data[place + 1] |= part >> (np.uint64(64) - shift)
        elif k:
            data[low + i // each] |= part << np.uint64(i % each * k)


@kernel
def encode_steps(old, new, data, table):
    """Differences of words old[n], new[n] as chunks: fills data uint64 (zeros before) and table uint32[chunks, 4].

    data has room for the words themselves, whole chunks. A row of the table: first word in data, changed coordinates,
    words of ones (gaps, 16 bits; steps, 16), and parameters (gap k, 8 bits; step k, 8; 1 bit golomb; 1 bit stored).
    Returns the words used.
    """
    width = old.itemsize * 8
    half = np.int64(1) << (width - 1)
    gaps, steps = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    used = 0
    for chunk in range(table.shape[0]):
        first = chunk * CHUNK
        size = min(CHUNK, old.shape[0] - first)
        count, last = 0, -1
        for i in range(size):
            if old[first + i] != new[first + i]:
                step = _rank(new[first + i], half) - _rank(old[first + i], half)
                gaps[count] = i - last - 1
                steps[count] = 2 * (abs(step) - 1) + (step < 0)
                last = i
                count += 1
        _, gap_k, gap_ones, gap_words = _choose(gaps, count, GAP_WIDTH, False)
        golomb, step_k, step_ones, step_words = _choose(steps, count, width + 2, True)
        table[chunk, 0], table[chunk, 1] = used, count
        if gap_words + step_words < (size * width + 63) >> 6:
            table[chunk, 2] = gap_ones | step_ones << 16
            table[chunk, 3] = gap_k | step_k << 8 | golomb << 16
            _put(gaps, count, 0, gap_k, gap_ones, data, used)
            _put(steps, count, golomb, step_k, step_ones, data, used + gap_words)
            used += gap_words + step_words
        else:
            table[chunk, 2] = 0
            table[chunk, 3] = 1 << 17
            for i in range(size):
                bit = i * width
                data[used + (bit >> 6)] |= np.uint64(new[first + i]) << np.uint64(bit & 63)
            used += (size * width + 63) >> 6
    return used


@helper
def _ones(data, first, last, count, table, out):
    """Fills out int32[ROOM] with the places of the ones in words first … last - 1; False where they are not `count`."""
    end = np.uint64(0)
    for w in range(first, last):
        if end > np.uint64(count):
            return False
        word, start = data[w], np.int32((w - first) * 64)
        for _ in range(8):
            byte = word & np.uint64(255)
            word >>= np.uint64(8)
            # all eight are read before any is stored, as in `select`
            a, b, c, d = table[byte, 0], table[byte, 1], table[byte, 2], table[byte, 3]
            e, f, g, h = table[byte, 4], table[byte, 5], table[byte, 6], table[byte, 7]
            number = table[byte, 8]
            out[end] = a + start
            out[end + np.uint64(1)] = b + start
            out[end + np.uint64(2)] = c + start
            out[end + np.uint64(3)] = d + start
            out[end + np.uint64(4)] = e + start
            out[end + np.uint64(5)] = f + start
            out[end + np.uint64(6)] = g + start
            out[end + np.uint64(7)] = h + start
            end += np.uint64(number)
            start += np.int32(8)
    return np.int64(end) == count


@helper
def _fixed(data, first, count, k, out):
    """Fills out[count] (and some more) with numbers of k bits."""
    if k == 0:
        out[:count] = 0
        return
    each, mask = 64 // k, (np.uint64(1) << np.uint64(k)) - np.uint64(1)
    words = data[first : first + _fixed_words(count, k)]
    for w in range(words.shape[0]):
        word, some = words[w], out[w * each : w * each + each]
        for j in range(some.shape[0]):
            some[j] = word >> (np.uint64(j) * np.uint64(k) & np.uint64(63)) & mask


@helper
def _places(ones, low, k):
    """Turns the ones of the gaps int32[m] into changed coordinates, with the gaps' lower parts int32[m]."""
    places = np.int32(0)
    for i in range(low.shape[0]):
        places += low[i] + np.int32(1)
        low[i] = places
    shift = np.uint32(k) & np.uint32(31)
    for i in range(low.shape[0]):
        ones[i] = ((ones[i] - np.int32(i)) << shift) + low[i] - np.int32(1)


@helper
def _steps(data, first, end, ones, golomb, k, width, out):
    """Fills out int64[m] with the steps of a chunk, from their ones int32[m] and the words of their lower parts.

    Returns False where these are none. out[m] and some more are overwritten.
    """
    count = ones.shape[0]
    before = np.int32(-1)
    for i in range(count):
        zeros = ones[i] - before - np.int32(1)
        before = ones[i]
        ones[i] = zeros
    if not golomb:
        if _fixed_words(count, k) != end - first:
            return False
        _fixed(data, first, count, k, out)
        some, shift = out[:count], np.uint64(k) & np.uint64(63)
        for i in range(count):
            some[i] = _step(np.int64(ones[i]) << shift | some[i])
        return True
    bits, most = np.int64(count) * k, np.int32(0)
    for i in range(count):
        bits += ones[i]
        most = max(most, ones[i])
    if most + k > width + 1 or (bits + 63) >> 6 != end - first:
        return False
    at, some = np.uint64(first) * np.uint64(64), out[:count]
    for i in range(count):
        size = np.uint64(ones[i] + k)
        place, shift = at >> np.uint64(6), at & np.uint64(63)
        window = data[place] >> shift | (data[place + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - shift)
        top = np.uint64(1) << size
        some[i] = _step(np.int64((window & (top - np.uint64(1))) + top) - (np.int64(1) << k))
        at += size
    return True


@inlined
def _step(number):
    """The step that is coded as this number: 1, −1, 2, −2, …"""
    sign = -(number & 1)
    return (((number >> 1) + 1) ^ sign) - sign


@helper
def _copy(old, words):
    """A loop, where numba's assignment of slices goes element by element."""
    for i in range(words.shape[0]):
        words[i] = old[i]


@helper
def _add(places, steps, taken, old, words):
    """Puts words at places int32[m] where old ones take steps int64[m]; False where one leaves the range of words.

    taken[m] has the type of words. Reading, reckoning and writing are loops of their own: the second one is done many
    at once, and no reading waits to see whether it reads what was written.
    """
    half = np.int64(1) << (words.itemsize * 8 - 1)
    spot = places.view(np.uint32)
    for j in range(spot.shape[0]):
        taken[j] = old[spot[j]]
    wrong = np.int64(0)
    for j in range(spot.shape[0]):
        word = np.int64(taken[j])
        signed = word - ((word & half) << 1)
        rank = (signed ^ ((signed >> 63) & (half - 1))) + steps[j]
        wrong |= rank + half
        taken[j] = rank ^ ((rank >> 63) & (half - 1))
    for j in range(spot.shape[0]):
        words[spot[j]] = taken[j]
    return wrong >> (words.itemsize * 8) == 0


@kernel
def apply_steps(data, table, skip, total, old, words, room):
    """Fills words[n] of the expert, from old[n] of the reference. Returns 0, or which chunk is none (from 1).

    data uint64 holds the chunks from the first to the last that words touch, and two words more. table uint32[c + 1, 4]
    has their rows, the first of which begins where data does, and one with the end. The first chunk begins `skip`
    coordinates before words, and `total` coordinates before the tensor's end. room int64[4, ROOM] is
    overwritten. With a chunk that is none, words are neither.
    """
    width = words.itemsize * 8
    places, ones, low = room[0, : ROOM // 2].view(np.int32), room[0, ROOM // 2 :].view(np.int32), room[1].view(np.int32)
    steps, taken = room[2], room[3].view(words.dtype)
    bits, begins = bit_places(), np.int64(table[0, 0])
    for chunk in range(table.shape[0] - 1):
        start = chunk * CHUNK - skip
        size = min(CHUNK, total - chunk * CHUNK)
        first, last = np.int64(table[chunk, 0]) - begins, np.int64(table[chunk + 1, 0]) - begins
        count, parameters = np.int64(table[chunk, 1]), np.int64(table[chunk, 3])
        gap_k, step_k, golomb = parameters & 255, parameters >> 8 & 255, parameters >> 16 & 1
        if first < 0 or first > last or last > data.shape[0] - 2 or count > size or parameters >> 18:
            return chunk + 1
        begin, stop = max(0, start), min(start + size, words.shape[0])
        if parameters >> 17:
            if last - first != (size * width + 63) >> 6:
                return chunk + 1
            for i in range(begin, stop):
                bit = (i - start) * width
                words[i] = data[first + (bit >> 6)] >> np.uint64(bit & 63)
            continue
        if gap_k >= GAP_WIDTH or step_k >= width + 2:
            return chunk + 1
        gap_low = first + (np.int64(table[chunk, 2]) & 0xFFFF)
        step_ones = gap_low + _fixed_words(count, gap_k)
        step_low = step_ones + (np.int64(table[chunk, 2]) >> 16)
        # gaps within a chunk have no more zeros than that: places stay small numbers
        if step_low > last or (gap_low - first) * 64 > count + (CHUNK >> gap_k) + 64:
            return chunk + 1
        if not _ones(data, first, gap_low, count, bits, places) or not _ones(
            data, step_ones, step_low, count, bits, ones
        ):
            return chunk + 1
        _fixed(data, gap_low, count, gap_k, low)
        _places(places, low[:count], gap_k)
        if count and places[count - 1] >= size:
            return chunk + 1
        if not _steps(data, step_low, last, ones[:count], golomb, step_k, width, steps):
            return chunk + 1
        _copy(old[begin:stop], words[begin:stop])
        inside, high = np.int64(0), count
        while inside < count and places[inside] + start < 0:
            inside += 1
        while high > inside and places[high - 1] + start >= words.shape[0]:
            high -= 1
        where = places[inside:high]
        where += np.int32(start)
        if not _add(where, steps[inside:high], taken, old, words):
            return chunk + 1
    return 0
