"""Opens a Gram folder by its headers: for linear layers the Gram matrix of their inputs, under the name of the weight.

`gram.json` says which weights have the same matrix ({"aliases": {NAME: NAME IN THE FILE}}), along which dimension
inputs run where that is the first ({"input_first": [NAMES]}, as in GPT-2; else the last), and may record digests
({"tensors": {NAME: {"xxh3_128": HEXADECIMAL DIGEST}}}), which a merge compares with what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.folder import Checkpoint, read_json_object, read_weights
from rlmerge.checkpoint.header import Header, TensorInfo, read_header
from rlmerge.errors import CheckpointError, GramError, did_you_mean


@dataclass(frozen=True)
class GramFolder:
    """Opened Gram matrices: `tensors` under the names of the weights that they belong to, aliases included.

    first      weights whose inputs run along the first dimension
    digests    xxh3-128 by weight, where gram.json records it
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    headers: tuple[Header, ...]
    meta: dict[str, Any]
    first: frozenset[str]
    digests: dict[str, str]


def open_gram(folder: Path, base: Checkpoint) -> GramFolder:
    """Open a Gram folder, or one .safetensors file, and check it against the base. Values are not looked at here.

    Raises GramError, naming the file and the tensor.
    """
    try:
        headers, meta = _read(folder)
    except GramError:
        raise
    except CheckpointError as error:
        raise GramError(f"Gram matrices: {error}") from error
    home = folder if folder.is_dir() else folder.parent
    stored = {name: info for header in headers for name, info in header.tensors.items()}
    if not stored:
        raise GramError(f"{headers[0].file}: holds no Gram matrix. Estimate it again.")
    tensors = {**stored, **_aliases(home / "gram.json", meta, stored)}
    first = meta.get("input_first", [])
    if not isinstance(first, list) or not all(isinstance(name, str) and name in tensors for name in first):
        raise GramError(f"{home / 'gram.json'}: 'input_first' is not a list of names from the file. Estimate it again.")
    for name, info in tensors.items():
        _check(name, info, base, name in first)
    records = meta.get("tensors", {})
    records = records if isinstance(records, dict) else {}
    digests = {}
    for name, info in tensors.items():
        record = records.get(info.name)
        if isinstance(record, dict) and isinstance(record.get("xxh3_128"), str):
            digests[name] = record["xxh3_128"].lower()
    return GramFolder(home, tensors, headers, meta, frozenset(first), digests)


def _read(folder: Path) -> tuple[tuple[Header, ...], dict[str, Any]]:
    if folder.is_file():
        return (read_header(folder),), {}
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.unfinished").is_dir()
        raise GramError(
            f"{folder}: there is no such Gram folder{'; it is unfinished' if begun else ''}. Write the folder that "
            "holds gram.safetensors, or estimate it (rlmerge gram)."
        )
    headers = read_weights(folder, "gram")
    if not headers:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise GramError(f"{folder}: holds no gram.safetensors, or shards of it (found: {found}).")
    meta = folder / "gram.json"
    return headers, read_json_object(meta) if meta.exists() else {}


def _aliases(file: Path, meta: dict[str, Any], stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    aliases = meta.get("aliases", {})
    if not isinstance(aliases, dict):
        raise GramError(f"{file}: 'aliases' is not an object of names. Estimate it again.")
    for name, leader in aliases.items():
        if not isinstance(leader, str) or leader not in stored or name in stored:
            raise GramError(
                f"{file}: {name!r} is said to have the Gram matrix of {leader!r}, which is "
                + ("not there" if name not in stored else "strange, as it has one of its own")
                + ". The two files do not belong together: estimate again."
            )
    return {name: stored[leader] for name, leader in aliases.items()}


def _check(name: str, info: TensorInfo, base: Checkpoint, first: bool) -> None:
    twin = base.tensors.get(name)
    if twin is None:
        raise GramError(
            f"{info.file}: {name!r} is not in the base {base.reference}, so this is the Gram matrix of another model."
            f"{did_you_mean(name, base.tensors)} Names must be those of the base's own files."
        )
    width = (twin.shape[0] if first else twin.shape[-1]) if len(twin.shape) == 2 else 0
    if info.shape != (width, width):
        what = f"takes {width} inputs" if width else "is no matrix"
        raise GramError(
            f"{info.file}: the Gram matrix of {name!r} is {list(info.shape)}, but that weight, {list(twin.shape)} in "
            f"the base, {what}. Estimate it on a model of this base (rlmerge gram)."
        )
    if info.dtype != "F32":
        raise GramError(
            f"{info.file}: the Gram matrix of {name!r} is {info.dtype}. Store F32: less is no use to solve with."
        )
