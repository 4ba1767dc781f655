"""Random cuts: ranks of magnitudes within rows, and the draw that keeps an update or drops it."""

from __future__ import annotations

import numpy as np

from ._jit import kernel
from .hash import hash64


@kernel
def draw(values, chance, keys, start, where, inverse, kept):
    """Keeps each value of fp64[E, m], in place, with its chance fp64[E, m] or [E, 1]; what is not kept becomes 0.

    The random number of coordinate start + where[j] of row e is its hash under keys[e], in [0, 1). With `inverse`, what
    is kept is divided by its chance. Adds to kept int64[E] how many non-zero values stay.
    """
    shared = chance.shape[1] == 1
    for e in range(values.shape[0]):
        value = values[e]
        number = 0
        for j in range(value.shape[0]):
            own = chance[e, 0 if shared else j]
            uniform = np.float64(hash64(keys[e], np.uint64(start + where[j])) >> np.uint64(11)) * 2.0**-53
            keep = (value[j] != 0.0) & (uniform < own)
            number += keep
            if keep:
                value[j] = value[j] / own if inverse else value[j]
            else:
                value[j] = 0.0
        kept[e] += number


@kernel
def row_ranks(size, length, stride, of_support, out):
    """Ranks in [0, 1] of the non-zero magnitudes fp64[n] within their rows, into out fp64[n]; 0 elsewhere.

    A row is `length` coordinates at a distance of `stride`; n is a multiple of length·stride. The smallest of a row has
    rank 0, the largest 1; zeros come first, or with `of_support` do not count. Equal magnitudes share the middle of
    their places; a row of one has the rank 1/2.
    """
    place = np.empty(length, np.int64)
    found = np.empty(length, np.float64)
    out[:] = 0.0
    for first in range(0, size.shape[0], length * stride):
        for column in range(stride):
            number = 0
            for i in range(length):
                at = first + column + i * stride
                if size[at] != 0.0:
                    place[number] = at
                    found[number] = size[at]
                    number += 1
            order = np.argsort(found[:number])
            zeros = 0 if of_support else length - number
            steps = (number if of_support else length) - 1
            low = 0
            while low < number:
                high = low
                while high + 1 < number and found[order[high + 1]] == found[order[low]]:
                    high += 1
                rank = (zeros + (low + high) / 2.0) / steps if steps > 0 else 0.5
                for i in range(low, high + 1):
                    out[place[order[i]]] = rank
                low = high + 1
