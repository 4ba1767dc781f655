"""Writes small safetensors files and model folders for the tests of `rlmerge.checkpoint`, without any library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1"}


def encode(values: Any, dtype: str) -> bytes:
    array = np.asarray(values)
    if dtype == "BF16":
        return (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype(NUMPY[dtype]).tobytes()


def header_bytes(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, tensors: dict[str, Any], dtype: str = "F32", metadata: Any = None) -> Path:
    """A safetensors file of name -> array, or name -> (array, dtype)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, dtype)
        raw = encode(array, kind)
        header[name] = {
            "dtype": kind, "shape": list(np.shape(array)), "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header_bytes(header) + data)
    return file


def write_model(folder: Path, tensors: dict[str, Any], config: Any = None, dtype: str = "F32") -> Path:
    write_tensors(folder / "model.safetensors", tensors, dtype, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, shards: list[dict[str, Any]], stem: str = "model") -> Path:
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards):
        write_tensors(folder / name, tensors)
    placed = {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}
    write_index(folder, placed, stem)
    return folder


def write_index(folder: Path, placed: Any, stem: str = "model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
