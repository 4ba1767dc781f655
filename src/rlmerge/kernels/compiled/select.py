"""Which of many: turns flags into a list of places, eight at a time.

A loop that appends to a list where a flag is set takes a cycle or more for each flag. Here eight flags become one byte,
which looks up the places of its bits in a table; all eight are stored and the list grows by as many as are set.
"""

from __future__ import annotations

import numpy as np

from ._jit import helper

GATHER = np.uint64(0x0102040810204080)
"""Multiplied by eight bytes that are 0 or 1, it moves them into the upper byte."""


@helper
def bit_places():
    """int32[256, 9]: for each byte the places of its bits, ascending, and in the last column how many they are.

    Made anew by each kernel that selects: as a constant of the module, LLVM would look up its columns one by one.
    """
    table = np.zeros((256, 9), np.int32)
    for byte in range(256):
        for bit in range(8):
            if byte >> bit & 1:
                table[byte, table[byte, 8]] = bit
                table[byte, 8] += 1
    return table


@helper
def select(flags, size, first, table, out, at):
    """Writes first + i for every i < size whose flag uint8 is 1 to out int32, from place `at` on; returns the new end.

    flags has at least the next multiple of 8 elements, and out eight more than the list can hold.
    """
    last = (size + 7) // 8
    for i in range(size, last * 8):
        flags[i] = 0
    eights = flags.view(np.uint64)
    end = np.uint64(at)
    for q in range(last):
        byte = (eights[q] * GATHER) >> np.uint64(56)
        start = np.int32(first + 8 * q)
        # all eight are read before any is stored: only then may the compiler do them at once
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
    return np.int64(end)
