"""From a base's words to an expert's: what a pack's steps start from, and one range of them read and added."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import PackError

from .pack import CHUNK, ROW_BYTES

WORDS: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
_QUIET = {"BF16": 0x7FC0, "F16": 0x7E00}

SCRATCH = (15 + 2 * 8 + 2) * (2**11 + 1)
"""As in `kernels.compiled.steps`."""
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


def add_steps(
    words: NDArray[Any],
    start: int,
    size: int,
    data_bytes: int,
    read_data: Read,
    read_table: Read,
    kernels: ModuleType,
    where: str,
) -> None:
    """Turns words[n] of the reference, from coordinate `start` of a tensor of `size`, into the expert's, in place.

    Reads the rows of the chunks that the range touches and their part of the stream, and no more. Raises PackError,
    which begins with `where`, for a stream that is none.
    """
    if not words.size:
        return
    first, last, chunks = start // CHUNK, -(-(start + words.size) // CHUNK), -(-size // CHUNK)
    rows = np.zeros((last - first + 1, 4), np.uint32)
    rows[-1, 0] = min(data_bytes // 8, 2**32 - 1)
    there = min(last + 1, chunks) - first
    read_table(first * ROW_BYTES, rows[:there].reshape(-1).view(np.uint8))
    begins = rows[:, 0].astype(np.int64)
    length = np.diff(begins)
    # a chunk is never longer than its words as they are
    if (length < 0).any() or (length > CHUNK * words.itemsize // 8).any() or begins[-1] > data_bytes // 8:
        raise _damaged(where, first)
    data = np.empty(int(begins[-1] - begins[0]) + 1, np.uint64)
    data[-1] = 0
    read_data(int(begins[0]) * 8, data[:-1].view(np.uint8))
    rows[:, 0] -= rows[0, 0]
    wrong = kernels.apply_steps(data, rows, start - first * CHUNK, size - first * CHUNK, words, _scratch())
    if wrong:
        raise _damaged(where, first + int(wrong) - 1)


def _scratch() -> NDArray[np.uint64]:
    """Room of this thread for what the kernel looks up."""
    if not hasattr(_local, "scratch"):
        _local.scratch = np.zeros(SCRATCH, np.uint64)
    return _local.scratch


def _damaged(where: str, chunk: int) -> PackError:
    return PackError(
        f"{where}: the steps from coordinate {chunk * CHUNK} on are damaged: they are no codes, or lead out of the "
        "tensor. Copy or make the pack again."
    )
