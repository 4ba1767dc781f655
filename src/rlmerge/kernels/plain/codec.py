"""Bytes to fp32 and fp64 to bytes, in NumPy."""

from __future__ import annotations

import numpy as np

from .hash import hash64

EXPONENT = np.uint32(0x7F800000)


def count_nonfinite(values):
    """The number of NaN and infinities in fp32[n]."""
    return int(np.count_nonzero((values.view(np.uint32) & EXPONENT) == EXPONENT))


def decode_bf16(raw, out):
    """bf16 as uint16[n] → fp32[n], exact. Returns the number of NaN and infinities."""
    out.view(np.uint32)[:] = raw.astype(np.uint32) << np.uint32(16)
    return count_nonfinite(out)


def decode_f16(raw, out):
    """fp16 as uint16[n] → fp32[n], exact. Returns the number of NaN and infinities."""
    out[:] = raw.view(np.float16)
    return count_nonfinite(out)


def encode_f32(values, out):
    """fp64[n] → fp32[n], nearest, ties to even. Returns the number of NaN and infinities in the result."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[:] = values.astype(np.float32)
    return count_nonfinite(out)


def encode_bf16(values, out):
    """fp64[n] → bf16 as uint16[n], nearest, ties to even, through a rounding to odd (see `compiled.codec`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    word = single.view(np.uint32).copy()
    back = single.astype(np.float64)
    inexact = (back != values) & ~np.isnan(values)
    word[inexact & (np.abs(back) > np.abs(values))] -= np.uint32(1)
    word[inexact] |= np.uint32(1)
    word = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
    word[np.isnan(values)] = np.uint32(0x7FC00000)
    out[:] = (word >> np.uint32(16)).astype(np.uint16)
    return int(np.count_nonzero((word & EXPONENT) == EXPONENT))


def encode_f16(values, out):
    """fp64[n] → fp16 as uint16[n], nearest, ties to even (NumPy converts in one rounding)."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half = values.astype(np.float16)
    half[np.isnan(values)] = np.float16("nan")
    out[:] = half.view(np.uint16)
    return int(np.count_nonzero((out & np.uint16(0x7C00)) == np.uint16(0x7C00)))


def round_stochastically(values, where, start, key, fraction_bits, smallest_exponent):
    """Rounds fp64[m] in place to neighbours in a format, up with the probability of the distance from below."""
    with np.errstate(all="ignore"):
        exponent = ((values.view(np.uint64) >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64) - 1023
        quantum = np.ldexp(1.0, np.maximum(exponent, smallest_exponent) - fraction_bits)
        scaled = values / quantum
        below = np.floor(scaled)
        rest = scaled - below
        hashes = hash64(key, where.astype(np.uint64) + np.uint64(start))
        uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
        moved = np.isfinite(values) & (values != 0.0) & (rest != 0.0)
        values[moved] = ((below + (uniform < rest)) * quantum)[moved]
