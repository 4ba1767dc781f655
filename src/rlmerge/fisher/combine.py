"""Puts shares of one Fisher together: many machines, one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlmerge.checkpoint.folder import read_json_object
from rlmerge.errors import FisherError

from .store import begin_folder, replace_folder, save_tensors, write_fisher

SAME = ("weights", "source", "data", "choice", "reduce", "compute", "storage", "only", "model", "format")
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
    units = [meta["units"] for meta in metas]
    unfinished = begin_folder(out, overwrite)
    weights = [count / sum(units) for count in units]
    values = {name: _mean([path for _, path in found], name, weights) for name in first["tensors"]}
    meta = {key: value for key, value in first.items() if key not in ("tensors", "dtype", "log_probability")}
    meta |= {
        "units": sum(units),
        "part": [1, 1] if not missing else [place for place, _ in parts] + [parts[0][1]],
        "sequences": sum(meta["sequences"] for meta in metas),
        "tokens": sum(meta["tokens"] for meta in metas),
        "combined": [list(part) for part in parts],
        "notes": [*first["notes"], *([f"parts {missing} of {parts[0][1]} are missing"] if missing else [])],
    }
    write_fisher(unfinished, values, meta, first["dtype"])
    _combine_halves([path for _, path in found], unfinished)
    replace_folder(unfinished, out)
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
    if not (folder / "fisher.json").exists():
        raise FisherError(f"{folder}: has no fisher.json, which says what a share is worth.")
    meta = read_json_object(folder / "fisher.json")
    for key in ("units", "part", "tensors", "weights"):
        if key not in meta:
            raise FisherError(f"{folder / 'fisher.json'}: has no {key!r}: only what `rlmerge fisher` made is combined.")
    return meta


def _mean(folders: Sequence[Path], name: str, weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for folder, weight in zip(folders, weights, strict=True):
        value = read_tensor(folder, name).double() * weight
        total = value if total is None else total + value
    assert total is not None
    return total.float()


def read_tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a Fisher folder, sharded or not."""
    index = folder / "fisher.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "fisher.safetensors"
    with safe_open(folder / file, "pt") as opened:
        return opened.get_tensor(name)
