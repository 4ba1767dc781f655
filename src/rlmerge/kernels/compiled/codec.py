"""Bytes to fp32 and fp64 to bytes: with `plain.codec` the only code that knows dtypes. Each value is rounded once."""

from __future__ import annotations

import numpy as np

from ._jit import inlined, kernel
from .hash import hash64

TILE = 2048


@kernel
def decode_bf16(raw, out):
    """bf16 as uint16[n] → fp32[n], exact. Returns the number of NaN and infinities."""
    bits = out.view(np.uint32)
    bad = 0
    for i in range(raw.shape[0]):
        word = np.uint32(raw[i])
        bits[i] = word << np.uint32(16)
        bad += (word & np.uint32(0x7F80)) == np.uint32(0x7F80)
    return bad


@kernel
def decode_f16(raw, out):
    """fp16 as uint16[n] → fp32[n], exact. Returns the number of NaN and infinities.

    Exponent and mantissa are moved into place and multiplied by 2^112, which also normalises subnormals.
    """
    bits = out.view(np.uint32)
    scale = np.float32(2.0**112)
    bad = 0
    for i in range(raw.shape[0]):
        word = np.uint32(raw[i])
        special = (word & np.uint32(0x7C00)) == np.uint32(0x7C00)
        bits[i] = (word & np.uint32(0x7FFF)) << np.uint32(13)
        out[i] = out[i] * scale
        if special:
            bits[i] |= np.uint32(0x7F800000)
            bad += 1
        bits[i] |= (word & np.uint32(0x8000)) << np.uint32(16)
    return bad


@kernel
def count_nonfinite(values):
    """The number of NaN and infinities in fp32[n]."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.shape[0]):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7F800000)))
    bad = 0
    if largest == np.uint32(0x7F800000):
        for i in range(bits.shape[0]):
            bad += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return bad


@kernel
def encode_f32(values, out):
    """fp64[n] → fp32[n], nearest, ties to even. Returns the number of NaN and infinities in the result."""
    bits = out.view(np.uint32)
    bad = 0
    for i in range(values.shape[0]):
        out[i] = np.float32(values[i])
        bad += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return bad


@kernel
def encode_bf16(values, out):
    """fp64[n] → bf16 as uint16[n], nearest, ties to even. Returns the number of NaN and infinities in the result.

    fp64 → fp32 rounds to odd (truncate, then set the last bit if anything was lost), so that the second rounding sees
    which side of a tie it is on and the pair rounds once (Boldo and Melquiond, 2008, "Emulation of FMA").
    """
    single = np.empty(TILE, np.float32)
    bits = single.view(np.uint32)
    bad = 0
    for first in range(0, values.shape[0], TILE):
        some = values[first : first + TILE]
        words = out[first : first + TILE]
        for i in range(some.shape[0]):
            single[i] = np.float32(some[i])
        for i in range(some.shape[0]):
            # no branches: eight values at a time
            value = some[i]
            back = np.float64(single[i])
            word = bits[i] - (np.uint32(1) if abs(back) > abs(value) else np.uint32(0))
            word |= np.uint32(1) if back != value else np.uint32(0)
            word = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
            word = word if value == value else np.uint32(0x7FC00000)
            words[i] = np.uint16(word >> np.uint32(16))
            bad += np.int64((word & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
    return bad


@kernel
def encode_f16(values, out):
    """fp64[n] → fp16 as uint16[n], nearest, ties to even. Returns the number of NaN and infinities in the result."""
    bad = 0
    for i in range(values.shape[0]):
        value = values[i]
        sign = np.uint16(0x8000) if (value < 0.0 or (value == 0.0 and 1.0 / value < 0.0)) else np.uint16(0)
        size = abs(value)
        if size != size:
            word = np.uint16(0x7E00)
        elif size >= 65520.0:
            word = np.uint16(0x7C00)
        elif size < 2.0**-14:
            # subnormal (or rounding up into the first normal): multiples of 2^-24; rint rounds ties to even
            word = np.uint16(np.rint(size * 2.0**24))
        else:
            exponent = 0
            scaled = size
            while scaled >= 2.0:
                scaled *= 0.5
                exponent += 1
            while scaled < 1.0:
                scaled *= 2.0
                exponent -= 1
            # a mantissa that rounds up to 2048 carries into the exponent by itself
            word = np.uint16(((exponent + 14) << 10) + np.int64(np.rint(scaled * 1024.0)))
        out[i] = word | sign
        bad += (word & np.uint16(0x7C00)) == np.uint16(0x7C00)
    return bad


@inlined
def _quantum(bits, fraction_bits, smallest_exponent):
    exponent = np.int64((bits >> np.uint64(52)) & np.uint64(0x7FF)) - 1023
    if exponent < smallest_exponent:
        exponent = smallest_exponent
    return exponent - fraction_bits


@kernel
def round_stochastically(values, where, start, key, fraction_bits, smallest_exponent):
    """Rounds fp64[m], at `where` in the block, in place to neighbours in a format: up with the chance of
    its distance from the one below.

    Formats: bf16 (7, −126), fp16 (10, −14), fp32 (23, −126). Representable values stay. Unbiased: E[result] = value.
    The uniform number is the hash of (key, start + where[i]), so that blocks, threads and order do not matter.
    """
    bits = values.view(np.uint64)
    for i in range(values.shape[0]):
        value = values[i]
        if value == 0.0 or not np.isfinite(value):
            continue
        power = _quantum(bits[i], fraction_bits, smallest_exponent)
        quantum = 2.0**power
        scaled = value / quantum
        below = np.floor(scaled)
        rest = scaled - below
        if rest == 0.0:
            continue
        uniform = np.float64(hash64(key, np.uint64(start + where[i])) >> np.uint64(11)) * 2.0**-53
        values[i] = (below + (1.0 if uniform < rest else 0.0)) * quantum
