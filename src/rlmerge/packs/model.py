"""A pack as a loaded model: base and steps make its tensors in memory, nothing of them is written to disk.

Needs torch and transformers, which take the tensors as they take those of a folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlmerge.checkpoint.pack import find_base
from rlmerge.settings import default_threads

from .restore import Reader, open_packed, small_files

TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip

Load = Callable[[Path, dict[str, torch.Tensor]], Any]


def load_packed(pack: Path, base: Path | str | None, load: Load) -> Any:
    """What `load` makes of a folder with the expert's small files, which is gone afterwards, and of its tensors.

    Raises PackError for a damaged pack or a base that is not found, MismatchError for another base.
    """
    packed = open_packed(pack)
    found = find_base(packed, base)
    reader = Reader(packed, found)
    with tempfile.TemporaryDirectory(prefix="rlmerge-") as home:
        for name, data in small_files(reader.pack, found, prose=False):
            file = Path(home) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return load(Path(home), read_tensors(reader))


def read_tensors(reader: Reader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of the expert (all, or some) by the names in its files."""
    found: dict[str, torch.Tensor] = {}
    parts: list[np.ndarray] = []
    for stretch in reader.stretches(default_threads(), names):
        parts.append(stretch.raw)
        if stretch.last:
            info = reader.pack.tensors[stretch.name]
            raw = torch.from_numpy(np.concatenate(parts))
            found[stretch.name] = raw.view(TORCH[info.dtype]).reshape(info.shape)
            parts.clear()
    return found
