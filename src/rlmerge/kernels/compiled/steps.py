"""Delta packs: where stored words differ and by how many steps, as bits and back. Format: docs/packs.md.

A chunk is CHUNK coordinates with two bit streams, gaps between changed coordinates and steps, each in Rice or
exponential Golomb codes whose parameter the writer chooses. Words are uint16 or uint32, as stored.
"""

from __future__ import annotations

import numpy as np

from ._jit import helper, inlined, kernel

CHUNK = 2**15
"""Coordinates of a chunk: what must be decoded to read one of them."""
ESCAPE = 24
"""This many zeros announce a number that stands there as it is."""
GAP_WIDTH = 15
LOOK, LOOK_STEPS = 11, 9
"""Bits of the gaps, and of the steps, that are looked up at once."""
STEP_TABLES = 8
"""Step parameters from here on are not looked up: one code would fill the table."""
SCRATCH = (GAP_WIDTH + 2 * STEP_TABLES + 2) * (2**LOOK + 1)


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
def _length(value, golomb, k, width):
    """Bits of a number's code."""
    zeros = _bits(value + (np.int64(1) << k)) - 1 - k if golomb else value >> k
    if zeros >= ESCAPE:
        return ESCAPE + 1 + width
    return zeros + 1 + k + (zeros if golomb else 0)


@helper
def _choose(values, count, width, golomb_too):
    """The code and parameter of the fewest bits among those near the mean size: (golomb, k, bits)."""
    digits = np.int64(0)
    for i in range(count):
        digits += _bits(values[i])
    middle = digits // max(count, 1)
    best, best_golomb, best_k = np.int64(-1), 0, 0
    for golomb in range(2 if golomb_too else 1):
        for k in range(max(0, middle - 3), min(middle + 3, width)):
            total = np.int64(0)
            for i in range(count):
                total += _length(values[i], golomb, k, width)
            if best < 0 or total < best:
                best, best_golomb, best_k = total, golomb, k
    return best_golomb, best_k, best


@helper
def _put(values, count, golomb, k, width, data, first):
    """Writes the codes of values int64[count] to data uint64 from word `first`."""
    at = np.int64(first) * 64
    for i in range(count):
        value = values[i]
        shifted = value + (np.int64(1) << k)
        zeros = _bits(shifted) - 1 - k if golomb else value >> k
        size = k + zeros if golomb else k
        if zeros >= ESCAPE:
            zeros, size, shifted = ESCAPE, width, value
        elif not golomb:
            shifted = value
        rest = np.uint64(shifted) & ((np.uint64(1) << np.uint64(size)) - np.uint64(1))
        code = (rest << np.uint64(1) | np.uint64(1)) << np.uint64(zeros)
        place, shift = at >> 6, np.uint64(at & 63)
        data[place] |= code << shift
        at += zeros + 1 + size
        if at > (place + 1) * 64:
            data[place + 1] |= code >> (np.uint64(64) - shift)


@kernel
def encode_steps(old, new, data, table):
    """Differences of words old[n], new[n] as chunks: fills data uint64 (zeros before) and table uint32[chunks, 4].

    data has room for the words themselves, whole chunks. A row of the table: first word in data, changed coordinates,
    words of the gaps, and parameters (gap k, 8 bits; step k, 8; 1 bit golomb; 1 bit stored). Returns the words used.
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
        _, gap_k, gap_bits = _choose(gaps, count, GAP_WIDTH, False)
        golomb, step_k, step_bits = _choose(steps, count, width + 2, True)
        gap_words, step_words = (gap_bits + 63) >> 6, (step_bits + 63) >> 6
        table[chunk, 0], table[chunk, 1] = used, count
        if gap_words + step_words < (size * width + 63) >> 6:
            table[chunk, 2] = gap_words
            table[chunk, 3] = gap_k | step_k << 8 | golomb << 16
            _put(gaps, count, 0, gap_k, GAP_WIDTH, data, used)
            _put(steps, count, golomb, step_k, width + 2, data, used + gap_words)
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
def _read(window, golomb, k, width):
    """The number whose code begins a window of 64 bits, and the length of the code; 0 where none does."""
    zeros = 0
    while zeros <= ESCAPE and not window >> np.uint64(zeros) & np.uint64(1):
        zeros += 1
    if zeros > ESCAPE:
        return np.int64(0), 0
    size = width if zeros == ESCAPE else (k + zeros if golomb else k)
    rest = np.int64(window >> np.uint64(zeros + 1) & ((np.uint64(1) << np.uint64(size)) - np.uint64(1)))
    if zeros == ESCAPE:
        value = rest
    elif golomb:
        value = rest + (np.int64(1) << (k + zeros)) - (np.int64(1) << k)
    else:
        value = rest + (np.int64(zeros) << k)
    return value, zeros + 1 + size


@helper
def _look_up(found, golomb, k, width, many, bits):
    """Fills found uint64[2 ** bits]: what a stream that begins so holds, up to `many` (3 or 4) whole codes.

    Length of the codes, 8 bits; how many, 8; then for gaps (many = 3) the places that they lead to, 16 bits each, the
    last one repeated; for steps (many = 4) the steps, 8 bits each. 0 where not one code is whole, or small enough.
    """
    for beginning in range(1 << bits):
        entry, at, count, place = np.uint64(0), 0, 0, np.int64(0)
        while count < many:
            value, length = _read(np.uint64(beginning | 1 << bits) >> np.uint64(at), golomb, k, width)
            if not length or at + length > bits or (value > 250 and many == 4):
                break
            at += length
            place += value + 1
            entry |= np.uint64(place << (16 + 16 * count) if many == 3 else (_step(value) & 255) << (16 + 8 * count))
            count += 1
        if many == 3 and count:
            for other in range(count, 3):
                entry |= np.uint64(place << (16 + 16 * other))
        if count:
            entry |= np.uint64(at | count << 8)
        found[beginning] = entry


@inlined
def _step(number):
    """The step that is coded as this number: 1, −1, 2, −2, …"""
    sign = -(number & 1)
    return (((number >> 1) + 1) ^ sign) - sign


@inlined
def _window(data, at):
    """64 bits from bit `at`."""
    place, shift = at >> 6, np.uint64(at & 63)
    return data[place] >> shift | (data[place + 1] << np.uint64(1)) << (np.uint64(63) - shift)


@inlined
def _length_of(entry):
    return entry & np.uint64(255)


@inlined
def _count_of(entry):
    return np.int64(entry >> np.uint64(8) & np.uint64(255))


@inlined
def _put_places(entry, place, out, done):
    """Stores three places, of which as many count as the entry says; returns the last one that counts."""
    out[done] = place + np.int64(entry >> np.uint64(16) & np.uint64(0xFFFF))
    out[done + 1] = place + np.int64(entry >> np.uint64(32) & np.uint64(0xFFFF))
    last = place + np.int64(entry >> np.uint64(48))
    out[done + 2] = last
    return last


@helper
def _places(data, at, end, count, k, found, out):
    """Fills out int32[count + 3] with the changed coordinates of a chunk; False where the stream is none."""
    mask = np.uint64(2**LOOK - 1)
    done, place = 0, np.int64(-1)
    while done < count:
        if at >= end:
            return False
        window = _window(data, at)
        if done + 9 <= count:
            # three looks at one window: each waits for the length of the one before, and not for memory
            one = found[window & mask]
            window_2 = window >> _length_of(one)
            two = found[window_2 & mask]
            three = found[window_2 >> _length_of(two) & mask]
            if one and two and three:
                place = _put_places(one, place, out, done)
                done += _count_of(one)
                place = _put_places(two, place, out, done)
                done += _count_of(two)
                place = _put_places(three, place, out, done)
                done += _count_of(three)
                at += np.int64(_length_of(one) + _length_of(two) + _length_of(three))
                continue
        value, length = _read(window, 0, k, GAP_WIDTH)
        if not length:
            return False
        place += value + 1
        out[done] = place
        at += length
        done += 1
    return at <= end


@inlined
def _put_steps(entry, out, done):
    """Stores four steps, of which as many count as the entry says."""
    out[done] = np.int8(entry >> np.uint64(16))
    out[done + 1] = np.int8(entry >> np.uint64(24))
    out[done + 2] = np.int8(entry >> np.uint64(32))
    out[done + 3] = np.int8(entry >> np.uint64(40))


@helper
def _steps(data, at, end, count, golomb, k, width, found, out):
    """Fills out int64[count + 4] with the steps of a chunk; False where the stream is none."""
    mask = np.uint64(2**LOOK_STEPS - 1)
    done = 0
    while done < count:
        if at >= end:
            return False
        window = _window(data, at)
        if k < STEP_TABLES and done + 12 <= count:
            one = found[window & mask]
            window_2 = window >> _length_of(one)
            two = found[window_2 & mask]
            three = found[window_2 >> _length_of(two) & mask]
            if one and two and three:
                _put_steps(one, out, done)
                done += _count_of(one)
                _put_steps(two, out, done)
                done += _count_of(two)
                _put_steps(three, out, done)
                done += _count_of(three)
                at += np.int64(_length_of(one) + _length_of(two) + _length_of(three))
                continue
        value, length = _read(window, golomb, k, width)
        if not length:
            return False
        out[done] = _step(value)
        at += length
        done += 1
    return at <= end


@helper
def _add(places, steps, first, last, start, words):
    """Adds the steps first … last - 1 to the words that they belong to; False where one leaves the range of words."""
    half = np.int64(1) << (words.itemsize * 8 - 1)
    wrong = np.int64(0)
    for j in range(first, last):
        at = np.uint64(start + np.int64(places[j]))
        word = np.int64(words[at])
        signed = word - ((word & half) << 1)
        rank = (signed ^ ((signed >> 63) & (half - 1))) + steps[j]
        wrong |= rank + half
        words[at] = rank ^ ((rank >> 63) & (half - 1))
    return wrong >> (words.itemsize * 8) == 0


@kernel
def apply_steps(data, table, skip, total, words, scratch):
    """Turns words[n] of the reference into those of the expert, in place. Returns 0, or which chunk is none (from 1).

    data uint64 holds the chunks from the first to the last that words touch, and one word more. table uint32[c + 1, 4]
    has their rows, `first word` counted from the beginning of data, and one with the end. The first chunk begins `skip`
    coordinates before words, and `total` coordinates before the tensor's end. scratch uint64[SCRATCH] is zero at first
    and used again by the same thread. With a chunk that is none, words are neither.
    """
    width = words.itemsize * 8
    places, steps = np.empty(CHUNK + 3, np.int32), np.empty(CHUNK + 4, np.int64)
    tables = scratch.reshape(-1, 2**LOOK + 1)
    for chunk in range(table.shape[0] - 1):
        start = chunk * CHUNK - skip
        size = min(CHUNK, total - chunk * CHUNK)
        first, last = np.int64(table[chunk, 0]), np.int64(table[chunk + 1, 0])
        count, gap_words, parameters = np.int64(table[chunk, 1]), np.int64(table[chunk, 2]), np.int64(table[chunk, 3])
        gap_k, step_k, golomb = parameters & 255, parameters >> 8 & 255, parameters >> 16 & 1
        if first > last or last >= data.shape[0] or count > size or gap_words > last - first or parameters >> 18:
            return chunk + 1
        if parameters >> 17:
            if last - first != (size * width + 63) >> 6:
                return chunk + 1
            for i in range(max(0, -start), min(size, words.shape[0] - start)):
                bit = i * width
                words[start + i] = data[first + (bit >> 6)] >> np.uint64(bit & 63)
            continue
        if gap_k >= GAP_WIDTH or step_k >= width + 2:
            return chunk + 1
        gap_table, step_table = tables[gap_k], tables[GAP_WIDTH + min(step_k, STEP_TABLES) * 2 + golomb]
        if not gap_table[-1]:
            _look_up(gap_table, 0, gap_k, GAP_WIDTH, 3, LOOK)
            gap_table[-1] = 1
        if not step_table[-1] and step_k < STEP_TABLES:
            # no number of an entry is so large that the width of a word matters
            _look_up(step_table, golomb, step_k, width + 2, 4, LOOK_STEPS)
            step_table[-1] = 1
        middle, end = (first + gap_words) * 64, last * 64
        if not _places(data, first * 64, middle, count, gap_k, gap_table, places):
            return chunk + 1
        if not _steps(data, middle, end, count, golomb, step_k, width + 2, step_table, steps):
            return chunk + 1
        if count and places[count - 1] >= size:
            return chunk + 1
        low, high = np.int64(0), count
        while low < count and places[low] + start < 0:
            low += 1
        while high > low and places[high - 1] + start >= words.shape[0]:
            high -= 1
        if not _add(places, steps, low, high, start, words):
            return chunk + 1
    return 0
