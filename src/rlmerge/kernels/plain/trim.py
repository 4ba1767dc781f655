"""Exact top-k without sorting, in NumPy (see `compiled.trim` for the definitions)."""

from __future__ import annotations

import numpy as np

from .hash import hash64
from .lanes import sum_in_lanes


def _places(start, where):
    return where.astype(np.uint64) + np.uint64(start)


def coarse(score, rows, count, low, high):
    """Adds scores to the coarse histogram and to the extremes of the fine bins."""
    for k, row in zip(rows, score):
        words = row.view(np.uint32)
        words = words[words != 0]
        bins = words >> np.uint32(15)
        rest = (words & np.uint32(0x7FFF)).astype(np.uint16)
        count[k] += np.bincount(bins, minlength=65536)
        np.minimum.at(low[k], bins, rest)
        np.maximum.at(high[k], bins, rest)


def fine(score, rows, bin_, count):
    """Adds the scores of one coarse bin to its fine histogram."""
    for k, row in zip(rows, score):
        if bin_[k] >= 0:
            words = row.view(np.uint32)
            words = words[(words != 0) & (words >> np.uint32(15) == np.uint32(bin_[k]))]
            count[k] += np.bincount(words & np.uint32(0x7FFF), minlength=32768)


def count_updates(values, experts, count):
    """Adds the non-zero values of each row."""
    count[experts] += np.count_nonzero(values, axis=1)


def coarse_norms(score, values, experts, order, norm):
    """Adds |t| or t² by coarse bin."""
    for e, value in enumerate(values):
        words = score[0 if score.shape[0] == 1 else e].view(np.uint32)
        bins = np.where(words != 0, words >> np.uint32(15), np.uint32(65536))
        terms = np.abs(value) if order == 1 else value * value
        half = len(value) // 2
        np.add.at(norm[0, experts[e]], bins[:half], terms[:half])
        np.add.at(norm[1, experts[e]], bins[half:], terms[half:])


def fine_norms(score, values, experts, bin_, order, norm):
    """Adds |t| or t² by fine bin, for the scores of one coarse bin."""
    for e, value in enumerate(values):
        own = 0 if score.shape[0] == 1 else e
        if bin_[own] >= 0:
            words = score[own].view(np.uint32)
            here = (words != 0) & (words >> np.uint32(15) == np.uint32(bin_[own]))
            terms = np.abs(value) if order == 1 else value * value
            np.add.at(norm[experts[e]], words[here] & np.uint32(0x7FFF), terms[here])


def tie_hashes(score, threshold, key, start, where, out):
    """The hashes of the coordinates whose score equals the threshold, and how many they are."""
    found = hash64(key, _places(start, where[score == threshold]))
    out[: found.size] = found
    return found.size


def sift(score, threshold, cut, key, start, where, values, left, kept):
    """What a cut leaves of the updates of one expert: coordinates, updates, and how many."""
    tied = (score == threshold) & (hash64(key, _places(start, where)) <= cut)
    stays = ((score > threshold) | tied) & (score > 0)
    number = np.count_nonzero(stays)
    left[:number] = where[stays]
    kept[:number] = values[stays]
    return number


def compact(values, where, left, kept):
    """Coordinates where some value is not 0, and their values."""
    some = (values != 0.0).any(axis=0)
    number = int(np.count_nonzero(some))
    left[:number] = where[some]
    kept[: len(values) * number] = values[:, some].reshape(-1)
    return number


def trim(score, threshold, cut, keys, start, where, values, kept, dropped):
    """Zeroes the values of eligible coordinates that are not kept."""
    places = _places(start, where)
    for k in range(values.shape[0]):
        row = 0 if score.shape[0] == 1 else k
        eligible = values[k] != 0.0
        tied = (score[row] == threshold[row]) & (score[row] > 0)
        keep = (score[row] > threshold[row]) | (tied & (hash64(keys[row], places) <= cut[row]))
        kept[k] += np.count_nonzero(keep & eligible)
        dropped[eligible & ~keep] = 1
        values[k, ~keep] = 0.0


def kept_norms(values, order, total):
    """Adds Σ|v| or Σv² per expert, in eight interleaved lanes."""
    for k, value in enumerate(values):
        total[k] += sum_in_lanes(np.abs(value) if order == 1 else value * value)


def ramp(score, rank, low, high, keys, start, where, values, inverse, kept, dropped):
    """MAGPRUNE: keeps an eligible coordinate with a probability linear in the mid-rank of its score."""
    places = _places(start, where)
    for k in range(values.shape[0]):
        row = 0 if score.shape[0] == 1 else k
        words = score[row].view(np.uint32)
        chance = low[row] + (high[row] - low[row]) * rank[row, words >> np.uint32(15)]
        uniform = (hash64(keys[row], places) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        eligible = values[k] != 0.0
        keep = (words != 0) & (uniform < chance)
        kept[k] += np.count_nonzero(keep & eligible)
        dropped[eligible & ~keep] = 1
        values[k, ~keep] = 0.0
        if inverse:
            survivors = keep & eligible
            values[k, survivors] = values[k, survivors] / chance[survivors]
