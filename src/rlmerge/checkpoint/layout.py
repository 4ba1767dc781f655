"""The bytes of an output before there are any: which shard holds which tensor, at which offset, under which header."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import xxhash

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
WIDTH |= {"I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
CHUNK = 2**20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be: its name, header bytes, size, and the absolute offset of each tensor."""

    name: str
    header: bytes
    size: int
    offsets: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the header follows from the rest of the plan."""
        return {"name": self.name, "size": self.size, "offsets": self.offsets}


def plan_files(tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> tuple[OutputFile, ...]:
    """Shards in the order of the tensors (name, dtype, shape), of at most `shard_bytes` unless one tensor is larger.

    One shard is 'model.safetensors'; more are 'model-00001-of-0000N.safetensors', as Hugging Face names them.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return tuple(_plan_file(name, shard) for name, shard in zip(names, shards))


def _plan_file(name: str, tensors: list[tuple[str, str, tuple[int, ...]]]) -> OutputFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # widest first, as safetensors itself writes: every tensor is then aligned to its own width
    for tensor in sorted(tensors, key=lambda tensor: -WIDTH[tensor[1]]):
        end = position + _nbytes(tensor)
        header[tensor[0]] = {"dtype": tensor[1], "shape": list(tensor[2]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    offsets = {key: len(raw) + value["data_offsets"][0] for key, value in header.items() if key != "__metadata__"}
    return OutputFile(name, raw, len(raw) + position, offsets)


def index_json(files: Sequence[OutputFile]) -> str | None:
    """The index of a sharded output, with the true total size of its tensors; None for a single file."""
    if len(files) == 1:
        return None
    total = sum(file.size - len(file.header) for file in files)
    weight_map = {name: file.name for file in files for name in file.offsets}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def hash_range(handle: int, start: int, stop: int) -> str:
    """xxh3-128 of the bytes [start, stop) of an open file."""
    state = xxhash.xxh3_128()
    while start < stop:
        data = os.pread(handle, min(CHUNK, stop - start), start)
        if not data:
            break
        state.update(data)
        start += len(data)
    return state.hexdigest()


def _nbytes(tensor: tuple[str, str, tuple[int, ...]]) -> int:
    return prod(tensor[2]) * WIDTH[tensor[1]]
