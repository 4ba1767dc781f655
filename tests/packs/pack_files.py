"""Small bases and experts for the tests of delta packs, given as stored words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.checkpoint.checkpoint_files import header_bytes

KINDS: dict[str, Any] = {
    "BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.float64, "I64": np.int64, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
Stored = dict[str, tuple[str, np.ndarray]]


def write_words(file: Path, tensors: Stored, metadata: Any = None) -> Path:
    """A safetensors file of name -> (dtype, words)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header_bytes(header) + data)
    return file


def words(seed: int, shape: tuple[int, ...], dtype: str = "BF16", scale: float = 1.0) -> np.ndarray:
    """Stored words of normal values."""
    values = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)


def changed(stored: np.ndarray, seed: int, density: float = 0.15, steps: int = 3) -> np.ndarray:
    """The words with some moved by one to three neighbours (no sign is crossed, nothing becomes infinite)."""
    rng = np.random.default_rng(seed)
    moved = rng.integers(1, steps + 1, stored.shape).astype(stored.dtype)
    low = np.iinfo(stored.dtype).max >> 1
    safe = ((stored & low) > 100) & (rng.random(stored.shape) < density)
    return np.where(safe, np.where(rng.random(stored.shape) < 0.5, stored + moved, stored - moved), stored)


SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.q_proj.weight": (24, 24),
    "model.layers.0.up_proj.weight": (700, 120),
    "model.layers.1.q_proj.weight": (24, 24),
    "model.norm.weight": (24,),
}
CONFIG = {"vocab_size": 50, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def write_set(folder: Path, count: int = 3, base_dtype: str = "BF16", dtypes: tuple[str, ...] = ("BF16",)) -> Path:
    """base, and experts e0, e1, … of it, expert k in dtype k; up_proj has more than two chunks."""
    base = {name: (base_dtype, words(n, shape, base_dtype, 0.05)) for n, (name, shape) in enumerate(SHAPES.items())}
    write_words(folder / "base" / "model.safetensors", base, {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps(CONFIG))
    for k in range(count):
        dtype = dtypes[k % len(dtypes)]
        own = {n: (dtype, words(i, shape, dtype, 0.05)) for i, (n, shape) in enumerate(SHAPES.items())}
        expert = {name: (dtype, changed(value, 100 * k + i)) for i, (name, (_, value)) in enumerate(own.items())}
        write_words(folder / f"e{k}" / "model.safetensors", expert, {"format": "pt"})
        (folder / f"e{k}" / "config.json").write_text(json.dumps(CONFIG))
    return folder


def sha256s(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
