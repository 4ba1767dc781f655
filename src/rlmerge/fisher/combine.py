"""Puts shares of one Fisher together: many machines, one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlmerge.checkpoint.fisher import COMPACT
from rlmerge.checkpoint.folder import read_json_object, read_weights
from rlmerge.errors import FisherError

from .folder import RunFolder
from .store import record_of, save_tensors, write_parts

SAME = (
    "weights",
    "small_files",
    "source",
    "sampling",
    "taken",
    "reduce",
    "compute",
    "storage",
    "dtype",
    "only",
    "format",
)
"""Keys of fisher.json in which shares must agree."""


def combine_fishers(folders: Sequence[Path | str], out: Path | str, *, overwrite: bool = False) -> dict[str, Any]:
    """Σ n·F / Σ n over the shares, n their units, in fp64, rounded once. Returns fisher.json of the result.

    Shares are put in the order of their part, so that the order of the arguments means nothing. Raises FisherError for
    shares of different Fishers, the same share twice, or missing records.
    """
    out, paths = Path(out), [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise FisherError("--combine takes two folders or more.")
    found = sorted(((_meta(path), path) for path in paths), key=lambda entry: (entry[0]["part"], str(entry[1])))
    metas = [meta for meta, _ in found]
    first, where = found[0]
    for meta, path in found[1:]:
        different = [key for key in SAME if meta.get(key) != first.get(key)]
        if meta["data"].get("problems") != first["data"].get("problems"):  # its name may be another machine's path
            different.append("data")
        if different:
            raise FisherError(
                f"{path} and {where}: differ in {', '.join(different)}, so they are not shares of one Fisher."
            )
        if meta["tensors"].keys() != first["tensors"].keys():
            raise FisherError(f"{path} and {where}: hold different tensors.")
    parts = [tuple(meta["part"]) for meta in metas]
    twice = [part for part in set(parts) if parts.count(part) > 1]
    if twice or len({total for _, total in parts}) > 1:
        listed = ", ".join(f"{path} is part {meta['part'][0]} of {meta['part'][1]}" for meta, path in found)
        raise FisherError(f"shares of one division are needed, each once: {listed}.")
    missing = sorted(set(range(1, parts[0][1] + 1)) - {place for place, _ in parts})
    if missing:
        raise FisherError(f"parts {', '.join(map(str, missing))} of {parts[0][1]} are missing: give all folders.")
    units = [meta["units"] for meta in metas]
    folder = RunFolder(out, overwrite)
    weights = [count / sum(units) for count in units]
    raw = [_tensor_files(path) for _, path in found]
    if any(part.keys() != raw[0].keys() for part in raw):
        raise FisherError(f"{', '.join(str(path) for _, path in found)}: hold different tensors.")
    values = {name: _mean(raw, name, weights, where) for name in raw[0]}
    records = {
        name: {"sum": sum(w * m["tensors"][name]["sum"] for w, m in zip(weights, metas)), "count": entry["count"]}
        for name, entry in first["tensors"].items()
    }
    for name, value in values.items():
        if name in records:  # stored whole: sum and digest are those of what is stored
            records[name] = record_of(value)
    meta = {key: value for key, value in first.items() if key not in ("tensors", "dtype", "log_probability")}
    meta |= {
        "units": sum(units),
        "part": [1, 1],
        "sequences": sum(meta["sequences"] for meta in metas),
        "tokens": sum(meta["tokens"] for meta in metas),
        "combined": [list(part) for part in parts],
    }
    with folder.opened() as unfinished:
        write_parts(unfinished, values, records, {**meta, "dtype": first["dtype"]})
        _combine_halves([path for _, path in found], unfinished)
    return read_json_object(out / "fisher.json")


def _combine_halves(folders: Sequence[Path], out: Path) -> None:
    """Sums of the even and of the odd chunks of all shares, where all kept them."""
    files = [folder / "course.safetensors" for folder in folders]
    if all(file.exists() for file in files):
        total: dict[str, Tensor] = {}
        for file in files:
            for key, value in load_file(file).items():
                if key.startswith("halves/"):
                    total[key] = total[key] + value if key in total else value
        save_tensors(total, out / "course.safetensors")


def _meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.unfinished").is_dir()
        raise FisherError(f"{folder}: there is no such folder{'; it is unfinished' if begun else ''}.")
    if not (folder / "fisher.json").exists():
        raise FisherError(f"{folder}: has no fisher.json, which says what a share is worth.")
    meta = read_json_object(folder / "fisher.json")
    for key in ("units", "part", "tensors", "weights", "data", "sequences", "tokens", "dtype"):
        if key not in meta:
            raise FisherError(f"{folder / 'fisher.json'}: has no {key!r}: only what `rlmerge fisher` made is combined.")
    return meta


def _mean(raw: Sequence[Mapping[str, Path]], name: str, weights: Sequence[float], where: Path) -> Tensor:
    """The weighted mean of a stored tensor, in its dtype; row and column sums and chosen values are means, too."""
    values = [_read(files[name], name) for files in raw]
    if not values[0].is_floating_point():
        if any(not torch.equal(value, values[0]) for value in values):
            raise FisherError(f"{where}: {name!r} differs between the shares: they were made for different recipes.")
        return values[0]
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        total += value.double() * weight
    return total.to(values[0].dtype)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Where each stored tensor of a Fisher folder lies."""
    return {name: header.file for header in read_weights(folder, "fisher") for name in header.tensors}


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def read_tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a Fisher folder as a matrix has it, factored or not. Raises FisherError for one stored in part."""
    files = _tensor_files(folder)
    if name in files:
        return _read(files[name], name)
    rows, columns = (name + suffix for suffix in COMPACT["factored"])
    if rows not in files:
        raise FisherError(f"{folder}: holds {name!r} at some coordinates only (--sparse); a whole one is needed.")
    r, c = _read(files[rows], rows).double(), _read(files[columns], columns).double()
    return torch.outer(r / max(float(r.sum()), 1e-300), c).float()
