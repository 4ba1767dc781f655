"""Delta packs in NumPy (definitions: `compiled.steps`)."""

from __future__ import annotations

import numpy as np

CHUNK = 2**15
GAP_WIDTH = 15


def weigh(words, start):
    """Σ word·weight(coordinate) modulo 2⁶⁴; adds up over any cutting."""
    with np.errstate(over="ignore"):
        place = np.uint32(start & 0xFFFFFFFF) + np.arange(words.size, dtype=np.uint32)
        weight = place * np.uint32(0x9E3779B1) | np.uint32(1)
        return np.sum(words.astype(np.uint64) * weight.astype(np.uint64), dtype=np.uint64)


def _rank(words, half):
    word = words.astype(np.int64)
    return np.where(word < half, word, half - 1 - word)


def _bits(values):
    """Binary digits of numbers below 2⁵³."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _zeros(values, golomb, k):
    return _bits(values + (1 << k)) - 1 - k if golomb else values >> k


def _fixed_words(count, k):
    """Words that numbers of k bits take: as many in each as fit whole."""
    return -(-count // (64 // k)) if k else 0


def _choose(values, width, golomb_too):
    """The code and parameter of the fewest words among those near the mean size: (golomb, k, unary words, words)."""
    middle = int(_bits(values).sum()) // max(values.size, 1)
    best = None
    for golomb in range(2 if golomb_too else 1):
        for k in range(max(0, middle - 3), min(middle + 3, width)):
            zeros = int(_zeros(values, golomb, k).sum())
            unary = (zeros + values.size + 63) >> 6
            total = unary + ((zeros + values.size * k + 63) >> 6 if golomb else _fixed_words(values.size, k))
            if best is None or total < best[3]:
                best = golomb, k, unary, total
    assert best is not None
    return best


def _put(values, golomb, k, unary, data):
    """Writes values to the words of data: `unary` words of ones, then the lower parts."""
    zeros = _zeros(values, golomb, k)
    bits = np.zeros(64 * unary, np.uint8)
    bits[np.cumsum(zeros + 1) - 1] = 1
    data[:unary] = np.packbits(bits, bitorder="little").view(np.uint64)
    if not golomb:
        if k:
            each = 64 // k
            low = np.zeros((data.size - unary) * each, np.uint64)
            low[: values.size] = values & ((1 << k) - 1)
            shift = np.arange(each, dtype=np.uint64) * np.uint64(k)
            data[unary:] = np.bitwise_or.reduce(low.reshape(-1, each) << shift, axis=1)
        return
    size = k + zeros
    at = 64 * unary + np.cumsum(size) - size
    part = (values + (1 << k)).astype(np.uint64) & ((np.uint64(1) << size.astype(np.uint64)) - np.uint64(1))
    place, shift = at >> 6, (at & 63).astype(np.uint64)
    used = size > 0
    np.bitwise_or.at(data, place[used], (part << shift)[used])
    over = at + size > (place + 1) * 64
    np.bitwise_or.at(data, place[over] + 1, part[over] >> (np.uint64(64) - shift[over]))


def encode_steps(old, new, data, table):
    """Differences of words as chunks: fills data and table. Returns the words used."""
    width = old.itemsize * 8
    half = 1 << (width - 1)
    used = 0
    for chunk in range(table.shape[0]):
        before, after = old[chunk * CHUNK : (chunk + 1) * CHUNK], new[chunk * CHUNK : (chunk + 1) * CHUNK]
        where = np.flatnonzero(before != after)
        gaps = np.diff(where, prepend=-1) - 1
        step = _rank(after[where], half) - _rank(before[where], half)
        steps = 2 * (np.abs(step) - 1) + (step < 0)
        _, gap_k, gap_ones, gap_words = _choose(gaps, GAP_WIDTH, False)
        golomb, step_k, step_ones, step_words = _choose(steps, width + 2, True)
        plain = (before.size * width + 63) >> 6
        table[chunk] = used, where.size, 0, 1 << 17
        if gap_words + step_words < plain:
            table[chunk, 2:] = gap_ones | step_ones << 16, gap_k | step_k << 8 | golomb << 16
            _put(gaps, 0, gap_k, gap_ones, data[used : used + gap_words])
            _put(steps, golomb, step_k, step_ones, data[used + gap_words : used + gap_words + step_words])
            used += gap_words + step_words
        else:
            data[used : used + plain].view(old.dtype)[: after.size] = after
            used += plain
    return used


def _zeros_of(data, first, last, count):
    """The zeros before each one in words first … last - 1, int64[count]; None where there are other than `count`."""
    ones = np.flatnonzero(np.unpackbits(data[first:last].view(np.uint8), bitorder="little"))
    return np.diff(ones, prepend=-1) - 1 if ones.size == count else None


def _fixed(data, first, count, k):
    """`count` numbers of k bits, int64."""
    if k == 0:
        return np.zeros(count, np.int64)
    shift = np.arange(64 // k, dtype=np.uint64) * np.uint64(k)
    words = data[first : first + _fixed_words(count, k), None] >> shift & (
        (np.uint64(1) << np.uint64(k)) - np.uint64(1)
    )
    return words.reshape(-1)[:count].astype(np.int64)


def _steps(data, first, end, zeros, golomb, k, width):
    """The steps of a chunk, int64, from the zeros before their ones and their lower parts; None where they are none."""
    if not golomb:
        if _fixed_words(zeros.size, k) != end - first:
            return None
        number = zeros << k | _fixed(data, first, zeros.size, k)
    else:
        size = zeros + k
        if (zeros.size and int(size.max()) > width + 1) or (int(size.sum()) + 63) >> 6 != end - first:
            return None
        at = np.cumsum(size) - size
        place, shift = first + (at >> 6), (at & 63).astype(np.uint64)
        window = data[place] >> shift | (data[place + 1] << np.uint64(1)) << (np.uint64(63) - shift)
        top = np.uint64(1) << size.astype(np.uint64)
        number = ((window & (top - np.uint64(1))) + top).astype(np.int64) - (1 << k)
    return np.where(number & 1, -1, 1) * ((number >> 1) + 1)


def _add(places, steps, start, old, words):
    """Puts words where old ones take the steps; False where one leaves the range of words."""
    half = 1 << (words.itemsize * 8 - 1)
    inside = (places + start >= 0) & (places + start < words.size)
    at = places[inside] + start
    rank = _rank(old[at], half) + steps[inside]
    words[at] = np.where(rank >= 0, rank, half - 1 - rank).astype(words.dtype)
    return bool(((rank >= -half) & (rank < half)).all())


def apply_steps(data, table, skip, total, old, words, room):
    """Fills words of the expert, from old ones of the reference. Returns 0, or which chunk is none (from 1)."""
    width, begins = words.itemsize * 8, int(table[0, 0])
    for chunk in range(table.shape[0] - 1):
        start, size = chunk * CHUNK - skip, min(CHUNK, total - chunk * CHUNK)
        first, count, ones, parameters = table[chunk].tolist()
        first, last = first - begins, int(table[chunk + 1, 0]) - begins
        gap_k, step_k, golomb = parameters & 255, parameters >> 8 & 255, parameters >> 16 & 1
        if first < 0 or first > last or last > data.size - 2 or count > size or parameters >> 18:
            return chunk + 1
        begin, stop = max(0, start), min(start + size, words.size)
        if parameters >> 17:
            if last - first != (size * width + 63) >> 6:
                return chunk + 1
            words[begin:stop] = data[first:last].view(words.dtype)[begin - start : stop - start]
            continue
        if gap_k >= GAP_WIDTH or step_k >= width + 2:
            return chunk + 1
        gap_low = first + (ones & 0xFFFF)
        step_ones = gap_low + _fixed_words(count, gap_k)
        step_low = step_ones + (ones >> 16)
        if step_low > last or (gap_low - first) * 64 > count + (CHUNK >> gap_k) + 64:
            return chunk + 1
        gaps, high = _zeros_of(data, first, gap_low, count), _zeros_of(data, step_ones, step_low, count)
        if gaps is None or high is None:
            return chunk + 1
        places = np.cumsum((gaps << gap_k | _fixed(data, gap_low, count, gap_k)) + 1) - 1
        steps = _steps(data, step_low, last, high, golomb, step_k, width)
        if (places.size and places[-1] >= size) or steps is None:
            return chunk + 1
        words[begin:stop] = old[begin:stop]
        if not _add(places, steps, start, old, words):
            return chunk + 1
    return 0
