"""Writes Gram matrices, and the sums that they come of, to safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import OutputError

CODES = {"float32": "F32", "float64": "F64", "int64": "I64"}
SHARD = 5 * 10**9
"""Bytes of a file, at most."""


def write_arrays(file: Path, arrays: Mapping[str, tuple[tuple[int, ...], str, Callable[[], NDArray[Any]]]]) -> None:
    """A safetensors file of name → (shape, NumPy's name of the dtype, what makes the array when its turn comes).

    Raises OutputError for a disk that does not take it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    # widest first, so that every array is aligned
    order = sorted(arrays, key=lambda name: -np.dtype(arrays[name][1]).itemsize)
    for name in order:
        shape, dtype, _ = arrays[name]
        stop = place + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                shape, dtype, make = arrays[name]
                out.write(np.ascontiguousarray(make(), dtype).reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}. What was done is kept.") from None


def plan_shards(groups: Iterable[Sequence[tuple[str, int]]]) -> list[list[list[str]]]:
    """For each group of tensors (name, bytes) its shards, which no other group has; a larger tensor stands alone."""
    found = []
    for group in groups:
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in group:
            if shards[-1] and filled + size > SHARD:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        found.append(shards)
    return found


def shard_names(count: int) -> list[str]:
    """Names of so many files."""
    return (
        ["gram.safetensors"]
        if count == 1
        else [f"gram-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    )
