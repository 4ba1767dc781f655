"""From a base's words to an expert's: what a pack's steps start from, and one range of them read and added."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import PackError

from .pack import CHUNK, ROW_BYTES

WORDS: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
_QUIET = {"BF16": 0x7FC0, "F16": 0x7E00}

ROOM = CHUNK + 72
"""As in `kernels.compiled.steps`."""
HELD = 64
"""Tables of chunks, a 4096th of a bf16 tensor's bytes each."""
_local = threading.local()

Read = Callable[[int, NDArray[np.uint8]], None]
"""read(first byte, out): fills out with bytes of one stored tensor."""


def reference_words(
    stored: NDArray[Any], base_dtype: str, dtype: str, kernels: ModuleType
) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """The words of a base in the dtype of its expert (design, section 1): its own, or those of the cast.

    stored    uint16[n] or uint32[n], as the base's file has them; returned as they are where the dtypes agree
    """
    if base_dtype == dtype:
        return stored
    if base_dtype == "F32":
        values = stored.view(np.float32)
    else:
        values = np.empty(stored.shape, np.float32)
        (kernels.decode_bf16 if base_dtype == "BF16" else kernels.decode_f16)(stored, values)
    if dtype == "F32":
        return values.view(np.uint32)
    words = np.empty(stored.shape, np.uint16)
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    (kernels.encode_bf16 if dtype == "BF16" else kernels.encode_f16)(wide, words)
    # one NaN, whatever the processor's conversions make of the others
    words[np.isnan(values)] = _QUIET[dtype]
    return words


class Tables:
    """Tables of chunks that were read before; few are held, and threads may share them."""

    def __init__(self) -> None:
        self._held: dict[Hashable, NDArray[np.uint32]] = {}

    def get(self, key: Hashable, make: Callable[[], NDArray[np.uint32]]) -> NDArray[np.uint32]:
        """The table of a stored tensor, from `make` if it is not held."""
        rows = self._held.get(key)
        if rows is None:
            rows = make()
            if len(self._held) >= HELD:
                self._held = {}
            self._held[key] = rows
        return rows


def read_table(size: int, itemsize: int, data_bytes: int, read: Read, where: str) -> NDArray[np.uint32]:
    """The rows of all chunks of a tensor of `size` words, uint32[c + 1, 4], the last one with the end of its stream.

    Raises PackError, which begins with `where`, where they cannot be.
    """
    chunks = -(-size // CHUNK)
    rows = np.zeros((chunks + 1, ROW_BYTES // 4), np.uint32)
    rows[-1, 0] = min(data_bytes // 8, 2**32 - 1)
    read(0, rows[:-1].reshape(-1).view(np.uint8))
    length = np.diff(rows[:, 0].astype(np.int64))
    # a chunk is never longer than its words as they are
    wrong = np.flatnonzero((length < 0) | (length > CHUNK * itemsize // 8))
    if wrong.size:
        raise _damaged(where, int(wrong[0]))
    return rows


def add_steps(
    old: NDArray[Any],
    words: NDArray[Any],
    start: int,
    size: int,
    table: NDArray[np.uint32],
    read: Read,
    kernels: ModuleType,
    where: str,
) -> None:
    """Fills words[n] of the expert, from coordinate `start` of a tensor of `size`, with old[n] of the reference.

    table    of `read_table`; `read` reads the stream
    Reads the part of the stream that the range needs, and no more. Raises PackError, which begins with `where`, for a
    stream that is none.
    """
    if not words.size:
        return
    first, last = start // CHUNK, -(-(start + words.size) // CHUNK)
    rows = table[first : last + 1]
    begin, end = int(rows[0, 0]), int(rows[-1, 0])
    data = _buffer("data", end - begin + 2)
    data[-2:] = 0
    read(begin * 8, data[:-2].view(np.uint8))
    room = _buffer("room", 4 * ROOM).view(np.int64).reshape(4, ROOM)
    wrong = kernels.apply_steps(data, rows, start - first * CHUNK, size - first * CHUNK, old, words, room)
    if wrong:
        raise _damaged(where, first + int(wrong) - 1)


def _buffer(name: str, size: int) -> NDArray[np.uint64]:
    """uint64[size] with undefined content, of this thread, used again."""
    held: NDArray[np.uint64] | None = getattr(_local, name, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint64)
        setattr(_local, name, held)
    return held[:size]


def _damaged(where: str, chunk: int) -> PackError:
    return PackError(
        f"{where}: the steps from coordinate {chunk * CHUNK} on are damaged: they are no codes, or lead out of the "
        "tensor. Copy or make the pack again."
    )
