"""Reads rows of embeddings and heads in the order of a new vocabulary: runs of neighbours in one read, nothing whole.

A row from another model is given in the dtype of the model that gets it, as if that had been saved with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH
from rlmerge.checkpoint.row_maps import MEAN, ZERO, RowMap, RowTable
from rlmerge.plan import GatheredPlace, Place

PIECE = 2**20
"""Bytes of one model's rows that are held at once where rows are averaged or converted."""

Read = Callable[[Place, int, NDArray[np.uint8]], None]
"""read(place, first byte, buffer): fills the buffer with bytes of a stored tensor."""


class RowReader:
    """Reads through the maps of a plan. Threads share it; what it gives depends on files and maps only."""

    def __init__(self, table: RowTable, kernels: ModuleType, read: Read) -> None:
        self._table = table
        self._kernels = kernels
        self._read = read
        self._means: dict[tuple[tuple[Place | None, ...], str, int], NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def read_into(self, place: GatheredPlace, first: int, data: NDArray[np.uint8]) -> None:
        """Fills data uint8[n] with the bytes [first, first + n) of the tensor that the map makes."""
        chosen = self._table.maps[place.rows]
        row = place.nbytes // chosen.row.size
        top, end = first // row, -(-(first + data.size) // row)
        for start, stop, origin, source in runs(chosen, top, end):
            low, high = max(first, start * row), min(first + data.size, stop * row)
            part, within = data[low - first : high - first], low - start * row
            if origin == ZERO:
                part[:] = 0
            elif origin == MEAN:
                self._repeat(self._mean(place, source, row), within, part)
            else:
                self._rows(_stored(place, origin), place.dtype, source, within, row, part)

    def _rows(self, stored: Place, dtype: str, source: int, within: int, row: int, out: NDArray[np.uint8]) -> None:
        """Consecutive rows from number `source` on, `within` bytes into the first, in this dtype."""
        if stored.dtype == dtype:
            self._read(stored, source * row + within, out)
            return
        width, own = WIDTH[dtype], WIDTH[stored.dtype]
        first = (source * row + within) // width
        for start in range(0, out.size // width, PIECE // 8):
            count = min(PIECE // 8, out.size // width - start)
            values = self._values(stored, (first + start) * own, count)
            out[start * width : (start + count) * width] = self._encode(values, dtype)

    def _values(self, stored: Place, first: int, count: int) -> NDArray[np.float64]:
        raw = np.empty(count * WIDTH[stored.dtype], np.uint8)
        self._read(stored, first, raw)
        if stored.dtype == "F32":
            return raw.view(np.float32).astype(np.float64)
        values = np.empty(count, np.float32)
        decode = self._kernels.decode_bf16 if stored.dtype == "BF16" else self._kernels.decode_f16
        decode(raw.view(np.uint16), values)
        return values.astype(np.float64)

    def _encode(self, values: NDArray[np.float64], dtype: str) -> NDArray[np.uint8]:
        out = np.empty(values.size, np.float32 if dtype == "F32" else np.uint16)
        encode = {"F32": "encode_f32", "BF16": "encode_bf16", "F16": "encode_f16"}[dtype]
        getattr(self._kernels, encode)(values, out)
        return out.view(np.uint8)

    def _mean(self, place: GatheredPlace, number: int, row: int) -> NDArray[np.uint8]:
        """One row in the place's dtype: the fp64 mean of the members in their order, rounded once."""
        key = (place.origins, place.dtype, number)
        if key not in self._means:
            members = self._table.means[number]
            size = row // WIDTH[place.dtype]
            total = np.zeros(size)
            for start, stop, origin, source in runs(members, 0, members.row.size):
                stored = _stored(place, origin)
                each = size * WIDTH[stored.dtype]
                step = max(1, PIECE // each)
                for top in range(0, stop - start, step):
                    count = min(step, stop - start - top)
                    values = self._values(stored, (source + top) * each, count * size).reshape(count, size)
                    for line in values:  # one after the other: the same sum however the rows are read
                        total += line
            with self._lock:
                self._means[key] = self._encode(total / members.row.size, place.dtype)
        return self._means[key]

    @staticmethod
    def _repeat(line: NDArray[np.uint8], within: int, out: NDArray[np.uint8]) -> None:
        done = 0
        while done < out.size:
            count = min(line.size - within, out.size - done)
            out[done : done + count] = line[within : within + count]
            done, within = done + count, 0


def runs(chosen: RowMap, top: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows [top, end) of a map as (start, stop, origin, first row of it): neighbours stay together.

    Zeros and repetitions of one mean are runs, too.
    """
    origin, row = chosen.origin[top:end], chosen.row[top:end]
    if not origin.size:
        return
    step = np.where(origin[1:] >= 0, 1, 0)
    cut = (np.diff(origin) != 0) | ((np.diff(row) != step) & (origin[1:] != ZERO))
    edges = [0, *(np.flatnonzero(cut) + 1).tolist(), origin.size]
    for start, stop in pairwise(edges):
        yield top + start, top + stop, int(origin[start]), int(row[start])


def _stored(place: GatheredPlace, origin: int) -> Place:
    stored = place.origins[origin]
    assert stored is not None, "the planner refuses rows of a tensor that a model does not have"
    return stored
