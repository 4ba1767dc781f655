"""Writes a Fisher folder: fisher.safetensors (or shards with an index), fisher.json, and the sample that judges it.

A Fisher is published, so its folder appears whole: files are written beside it and get their names at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlmerge.checkpoint.fisher import COMPACT
from rlmerge.errors import FisherError, OutputError
from rlmerge.small_files import json_lines

SHARD = 5 * 10**9
"""Bytes of a file, at most."""
SAMPLE = 2**19
"""Coordinates of which the halves and the course of the estimate are kept, about."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_fisher(
    folder: Path, values: Mapping[str, Tensor], meta: Mapping[str, Any], dtype: str, storage: str = "full",
    positions: Mapping[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Writes the values, cast to fp32 or bf16, and fisher.json with the sum, count and digest of each tensor.

    storage     'full', or 'factored': matrices by their row and column sums, the rest as it is
    positions   name → int64[m]: only these coordinates of a tensor are stored; its sum is that of all
    Raises FisherError where a value is negative, infinite or no number, or if all of them are 0.
    """
    stored: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for name, value in values.items():
        parts, total = _parts(name, value.detach(), dtype, storage, None if positions is None else positions[name])
        records[name] = {"sum": total, "count": value.numel()}
        if name in parts:
            records[name] = record_of(parts[name])
        stored |= parts
    write_parts(folder, stored, records, {**meta, "dtype": dtype})


def record_of(whole: Tensor) -> dict[str, Any]:
    """Sum, count and digest of a tensor that is stored whole."""
    raw = whole.view(-1).view(torch.uint8).numpy()
    return {
        "sum": float(whole.sum(dtype=torch.float64)),
        "count": whole.numel(),
        "xxh3_128": xxhash.xxh3_128_hexdigest(raw.data),
    }


def _parts(
    name: str, value: Tensor, dtype: str, storage: str, positions: np.ndarray | None
) -> tuple[dict[str, Tensor], float]:
    """What is stored of a tensor, by the names of `checkpoint.fisher.COMPACT`, and the sum that is recorded."""
    if positions is not None:
        _check(name, value)
        chosen = value.reshape(-1)[torch.from_numpy(positions)].to(DTYPES[dtype])
        first, second = COMPACT["sparse"]
        narrow = positions.astype(np.int32) if value.numel() < 2**31 else positions
        # the sum is that of what a whole Fisher of this dtype would hold, so that both merge alike
        total = float(value.to(DTYPES[dtype]).sum(dtype=torch.float64))
        return {name + first: torch.from_numpy(narrow), name + second: chosen}, total
    if storage == "factored" and value.dim() > 1:
        _check(name, value)
        matrix = value.reshape(value.shape[0], -1).double()
        rows, columns = matrix.sum(1).float(), matrix.sum(0).float()
        first, second = COMPACT["factored"]
        # what the outer product, divided by the total of the rows, adds up to
        return {name + first: rows, name + second: columns}, float(columns.double().sum())
    whole = value.to(DTYPES[dtype]).contiguous()
    _check(name, whole)
    return {name: whole}, float(whole.double().sum())


def write_parts(
    folder: Path, stored: Mapping[str, Tensor], records: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Writes tensors as they are to one file or to shards, and fisher.json."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, value in stored.items():
        if shards[-1] and size + value.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
        total += value.nbytes
    if not any(record["sum"] > 0.0 for record in records.values()):
        raise FisherError(
            "the Fisher is zero everywhere: no sequence has a gradient, so it could arbitrate nothing. Are the "
            "completions empty, or is every group of one reward?"
        )
    if len(shards) == 1:
        save_tensors(shards[0], folder / "fisher.safetensors")
    else:
        placed = {}
        for number, shard in enumerate(shards, 1):
            file = f"fisher-{number:05d}-of-{len(shards):05d}.safetensors"
            save_tensors(shard, folder / file)
            placed |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "fisher.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "fisher.json").write_text(json_lines({**meta, "bytes": total, "tensors": records}, 2) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file that others may read as they may read what else is written here."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{file}: cannot be written: {error}. What was done is kept.") from None
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _check(name: str, stored: Tensor) -> None:
    if not bool(torch.isfinite(stored).all()):
        raise FisherError(
            f"the Fisher of {name!r} has entries that are infinite or no number: the model's gradients overflow. "
            "Compute in fp32, and look at its weights."
        )
    if bool((stored < 0).any()):
        raise FisherError(f"the Fisher of {name!r} has negative entries, which no mean of squares can have.")


class Course:
    """What is kept of an estimate's course, at a sample of the coordinates: both halves, and sums along the way.

    positions    name → int64[m], the sampled coordinates of a tensor, the same for every model of these shapes
    halves       name → fp64[2, m], sums over the even and the odd chunks
    along        number of units → name → fp32[m], the sum over so many units
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        stride = sample_stride(sizes.values())
        self.positions = {name: sample_positions(name, size, stride) for name, size in sizes.items()}
        self.halves = {name: np.zeros((2, len(place))) for name, place in self.positions.items()}
        self.along: dict[int, dict[str, np.ndarray]] = {}
        self._last = {name: np.zeros(len(place)) for name, place in self.positions.items()}

    def add(self, total: Mapping[str, Tensor], chunk: int, units: int) -> None:
        """After chunk number `chunk`, when the sums are over so many units in all."""
        now = {
            name: total[name].view(-1)[torch.from_numpy(place)].double().numpy()
            for name, place in self.positions.items()
        }
        for name, value in now.items():
            self.halves[name][chunk % 2] += value - self._last[name]
        self._last = now
        newest = max(self.along, default=0)
        if units >= 2 * newest:
            self.along[units] = {name: value.astype(np.float32) for name, value in now.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        found = {f"halves/{name}": torch.from_numpy(value) for name, value in self.halves.items()}
        found |= {f"last/{name}": torch.from_numpy(value) for name, value in self._last.items()}
        for units, values in self.along.items():
            found |= {f"after-{units}/{name}": torch.from_numpy(value) for name, value in values.items()}
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `to_tensors` gave."""
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "halves":
                self.halves[name] = value.numpy()
            elif kind == "last":
                self._last[name] = value.numpy()
            elif kind.startswith("after-"):
                self.along.setdefault(int(kind.removeprefix("after-")), {})[name] = value.numpy()


def sample_stride(sizes: Iterable[int]) -> int:
    """The length of the runs of which one coordinate each is in the sample, for tensors of these sizes."""
    return max(1, sum(sizes) // SAMPLE)


def sample_positions(name: str, size: int, stride: int) -> np.ndarray:
    """One coordinate of every run of `stride`, at a place that looks random but depends on tensor and run alone."""
    starts = np.arange(0, size, stride, dtype=np.int64)
    if stride == 1:
        return starts
    word = starts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    word ^= word >> np.uint64(29)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(32)
    places = starts + (word % np.uint64(stride)).astype(np.int64)
    return places[places < size]
