"""Values rounded once, put where they belong and compared, in NumPy (definitions: `compiled.settle`)."""

from __future__ import annotations

import numpy as np

from .codec import decode_bf16, decode_f16, encode_bf16, encode_f16, encode_f32
from .combine import linear
from .lanes import sum_in_lanes

RESIDUE = 2.0**-48


def realised(base, stored_base, intended, stored, counts, sums):
    """Compares intended updates with those that the stored values make."""
    with np.errstate(invalid="ignore", over="ignore"):
        update = intended - base
        update[~(np.abs(update) > RESIDUE * np.abs(base))] = 0.0
        real = stored.astype(np.float64) - stored_base
        counts += np.array([np.count_nonzero(update), np.count_nonzero((update != 0) & (real != 0))])
        for place, terms in enumerate((update * update, real * real, update * real)):
            sums[place] += sum_in_lanes(terms)


def _settle(encode, decode, base, intended, values, where, out, counts, sums):
    words = np.empty(values.shape, out.dtype)
    bad = encode(values, words)
    out[where] = words
    stored = words
    if decode is not None:
        stored = np.empty(values.shape, np.float32)
        decode(words, stored)
    realised(base, base, intended, stored, counts, sums)
    return bad


def settle_bf16(base, intended, values, where, out, counts, sums):
    """Stores new values as bf16 words, and says what is left of the updates."""
    return _settle(encode_bf16, decode_bf16, base, intended, values, where, out, counts, sums)


def add_bf16(update, gain, scale, where, out, counts, sums):
    """Adds scale·(gain·t) to bf16 words, rounding once."""
    single = np.empty(update.shape, np.float32)
    decode_bf16(out[where], single)
    old = single.astype(np.float64)
    new = old + scale * (gain * update)
    return settle_bf16(old, new, new, where, out, counts, sums)


def linear_bf16(words, weight, out):
    """Σ weight[k]·θk of stored words, as words."""
    values, total = np.empty(words.shape, np.float32), np.empty(out.shape)
    bad = decode_bf16(words, values)
    with np.errstate(invalid="ignore", over="ignore"):
        linear(None, values, np.zeros(len(words), np.bool_), weight, total)
    return bad + encode_bf16(total, out)


def settle_f16(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for fp16."""
    return _settle(encode_f16, decode_f16, base, intended, values, where, out, counts, sums)


def settle_f32(base, intended, values, where, out, counts, sums):
    """As `settle_bf16`, for fp32."""
    return _settle(encode_f32, None, base, intended, values, where, out, counts, sums)
