"""Delta packs in NumPy (definitions: `compiled.steps`)."""

from __future__ import annotations

import numpy as np

CHUNK = 2**15
ESCAPE = 24
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


def _choose(values, width, golomb_too):
    middle = int(_bits(values).sum()) // max(values.size, 1)
    best = None
    for golomb in range(2 if golomb_too else 1):
        for k in range(max(0, middle - 3), min(middle + 3, width)):
            zeros = _zeros(values, golomb, k)
            lengths = np.where(zeros >= ESCAPE, ESCAPE + 1 + width, zeros + 1 + k + (zeros if golomb else 0))
            total = int(lengths.sum())
            if best is None or total < best[2]:
                best = golomb, k, total
    assert best is not None
    return best


def _put(values, golomb, k, width, data):
    zeros = _zeros(values, golomb, k)
    escaped = zeros >= ESCAPE
    size = np.where(escaped, width, k + (zeros if golomb else 0))
    shifted = np.where(escaped, values, values + (1 << k) if golomb else values)
    zeros = np.minimum(zeros, ESCAPE)
    rest = shifted.astype(np.uint64) & ((np.uint64(1) << size.astype(np.uint64)) - np.uint64(1))
    code = (rest << np.uint64(1) | np.uint64(1)) << zeros.astype(np.uint64)
    length = zeros + 1 + size
    at = np.cumsum(length) - length
    place, shift = at >> 6, (at & 63).astype(np.uint64)
    np.bitwise_or.at(data, place, code << shift)
    over = at + length > (place + 1) * 64
    np.bitwise_or.at(data, place[over] + 1, code[over] >> (np.uint64(64) - shift[over]))


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
        _, gap_k, gap_bits = _choose(gaps, GAP_WIDTH, False)
        golomb, step_k, step_bits = _choose(steps, width + 2, True)
        gap_words, step_words = (gap_bits + 63) >> 6, (step_bits + 63) >> 6
        plain = (before.size * width + 63) >> 6
        table[chunk] = used, where.size, 0, 1 << 17
        if gap_words + step_words < plain:
            table[chunk, 2:] = gap_words, gap_k | step_k << 8 | golomb << 16
            _put(gaps, 0, gap_k, GAP_WIDTH, data[used : used + gap_words])
            _put(steps, golomb, step_k, width + 2, data[used + gap_words : used + gap_words + step_words])
            used += gap_words + step_words
        else:
            data[used : used + plain].view(old.dtype)[: after.size] = after
            used += plain
    return used


def _numbers(data, first, end, count, golomb, k, width):
    """The `count` numbers of a stream in the words first … end - 1; None where it is none."""
    bits = np.unpackbits(data[first : end + 1].view(np.uint8), bitorder="little")
    bits = np.concatenate([bits, np.zeros(64, np.uint8)])
    stop, never = (end - first) * 64, bits.size
    every = np.arange(never, dtype=np.int32)
    ones = np.where(bits, every, 2 * never)
    zeros = np.minimum.accumulate(ones[::-1])[::-1] - every  # to the next one, from every bit
    size = np.where(zeros == ESCAPE, width, k + (zeros if golomb else 0))
    following = every + zeros + 1 + size
    following[(zeros > ESCAPE) | (every >= stop)] = never  # where no code begins, the walk ends
    steps, at, found = np.append(following, never).tolist(), 0, []
    for _ in range(count):
        found.append(at)
        at = steps[at]
    if at > stop:
        return None
    starts = np.array(found, np.int64)
    place, shift = first + (starts >> 6), (starts & 63).astype(np.uint64)
    window = data[place] >> shift | (data[place + 1] << np.uint64(1)) << (np.uint64(63) - shift)
    zeros, size = zeros[starts].astype(np.int64), size[starts]
    mask = (np.uint64(1) << size.astype(np.uint64)) - np.uint64(1)
    rest = (window >> (zeros + 1).astype(np.uint64) & mask).astype(np.int64)
    escaped = zeros == ESCAPE
    zeros = np.where(escaped, 0, zeros)
    return np.where(escaped, rest, rest + ((1 << (k + zeros)) - (1 << k) if golomb else zeros << k))


def _add(gaps, steps, start, size, words):
    """Adds steps to the words that they belong to; False where one leaves the chunk or the range of words."""
    half = 1 << (words.itemsize * 8 - 1)
    places = np.cumsum(gaps + 1) - 1
    if places.size and places[-1] >= size:
        return False
    inside = (places + start >= 0) & (places + start < words.size)
    at, number = places[inside] + start, steps[inside]
    rank = _rank(words[at], half) + np.where(number & 1, -1, 1) * ((number >> 1) + 1)
    words[at] = np.where(rank >= 0, rank, half - 1 - rank).astype(words.dtype)
    return bool(((rank >= -half) & (rank < half)).all())


def apply_steps(data, table, skip, total, words, scratch):
    """Turns words of the reference into those of the expert, in place. Returns 0, or which chunk is none (from 1)."""
    width = words.itemsize * 8
    for chunk in range(table.shape[0] - 1):
        start, size = chunk * CHUNK - skip, min(CHUNK, total - chunk * CHUNK)
        first, count, gap_words, parameters = table[chunk].tolist()
        last = int(table[chunk + 1, 0])
        gap_k, step_k, golomb = parameters & 255, parameters >> 8 & 255, parameters >> 16 & 1
        if first > last or last >= data.size or count > size or gap_words > last - first or parameters >> 18:
            return chunk + 1
        if parameters >> 17:
            if last - first != (size * width + 63) >> 6:
                return chunk + 1
            low, high = max(0, -start), min(size, words.size - start)
            words[start + low : start + high] = data[first:last].view(words.dtype)[low:high]
            continue
        if gap_k >= GAP_WIDTH or step_k >= width + 2:
            return chunk + 1
        gaps = _numbers(data, first, first + gap_words, count, 0, gap_k, GAP_WIDTH)
        steps = _numbers(data, first + gap_words, last, count, golomb, step_k, width + 2)
        if gaps is None or steps is None or not _add(gaps, steps, start, size, words):
            return chunk + 1
    return 0
