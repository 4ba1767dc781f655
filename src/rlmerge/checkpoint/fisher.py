"""Opens a Fisher folder by its headers: one sensitivity per coordinate, under the names that the base's files use.

`fisher.json` may record each tensor's sum, which saves a merge a pass over the Fishers, and the digest of its bytes:
{"tensors": {NAME: {"sum": SUM, "count": NUMBER OF COORDINATES, "xxh3_128": HEXADECIMAL DIGEST}}}. The merge compares
digests, or else sums, with what it reads: a file that was changed afterwards does not pass.

A tensor NAME may be stored compactly: 'sparse', as NAME#positions (I32 or I64, ascending flat coordinates) and
NAME#values, with its sum in fisher.json; or 'factored', as NAME#rows and NAME#columns, sums of which the outer product,
divided by the total, stands for the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.folder import Checkpoint, read_json_object, read_weights
from rlmerge.checkpoint.header import Header, TensorInfo, read_header
from rlmerge.checkpoint.names import HEAD
from rlmerge.errors import CheckpointError, FisherError, did_you_mean

FISHER_DTYPES = frozenset({"F32", "BF16"})
COMPACT = {"sparse": ("#positions", "#values"), "factored": ("#rows", "#columns")}
"""The two stored parts of a tensor by their suffixes."""


@dataclass(frozen=True)
class FisherFolder:
    """An opened diagonal Fisher: `tensors` under the base's names, `meta` is fisher.json or {}.

    `sums` and `digests` are those that fisher.json records. `compact` has the kind and the parts of tensors that are
    not stored whole; in `tensors` these have the base's shape.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    headers: tuple[Header, ...]
    meta: dict[str, Any]
    sums: dict[str, float]
    digests: dict[str, str]
    compact: dict[str, tuple[str, TensorInfo, TensorInfo]] = field(default_factory=dict)


def open_fisher(folder: Path, base: Checkpoint) -> FisherFolder:
    """Open a Fisher folder, or one .safetensors file, and check it against the base.

    It may cover fewer tensors than the base. A head that the tied base does not store is left out. Values (negative,
    all zero, not finite) are not looked at here. Raises FisherError, naming the file and the tensor.
    """
    try:
        headers, meta = _read(folder)
    except FisherError:
        raise
    except CheckpointError as error:
        raise FisherError(f"Fisher: {error}") from error
    stored = {name: info for header in headers for name, info in header.tensors.items()}
    if not stored:
        raise FisherError(
            f"{headers[0].file}: holds no tensor, so it says nothing about any weight. Estimate it again."
        )
    stored, compact = _unfold(stored, base)
    tensors = {name: info for name, info in stored.items() if name in base.tensors or not _is_tied_head(info, base)}
    for info in tensors.values():
        _check(info, base)
    if not tensors:
        raise FisherError(f"{headers[0].file}: holds only a tied head, which {base.folder} does not store.")
    home = folder if folder.is_dir() else folder.parent
    sums, digests = _read_records(home / "fisher.json", meta, stored)
    lacking = next((name for name, (kind, *_) in compact.items() if kind == "sparse" and name not in sums), None)
    if lacking is not None:
        raise FisherError(
            f"{home}: tensor {lacking!r} is stored at some coordinates only, and no fisher.json says what all add up "
            "to, which the scale of sensitivities needs. Restore it, or estimate again."
        )
    return FisherFolder(home, tensors, headers, meta, sums, digests, compact)


def _unfold(
    stored: dict[str, TensorInfo], base: Checkpoint
) -> tuple[dict[str, TensorInfo], dict[str, tuple[str, TensorInfo, TensorInfo]]]:
    """Tensors by their own names and in the base's shapes, and the parts of compact ones."""
    whole, compact = dict(stored), {}
    for kind, (first, second) in COMPACT.items():
        for label in [name for name in stored if name.endswith((first, second))]:
            name = label.rpartition("#")[0]
            a, b, twin = stored.get(name + first), stored.get(name + second), base.tensors.get(name)
            whole.pop(label)
            if a is None or b is None or name in stored or twin is None:
                raise FisherError(
                    f"{stored[label].file}: {label!r} is one part of a compact tensor, and "
                    + ("its other part is missing." if a is None or b is None else "")
                    + (f"{name!r} is also stored whole." if name in stored else "")
                    + (f"the base {base.reference} has no {name!r}." if twin is None else "")
                    + " Estimate it again."
                )
            sizes = (b.size, b.size) if kind == "sparse" else (twin.shape[0], twin.size // max(1, twin.shape[0]))
            kinds = ({"I32", "I64"}, FISHER_DTYPES) if kind == "sparse" else ({"F32"}, {"F32"})
            if (a.size, b.size) != sizes or a.dtype not in kinds[0] or b.dtype not in kinds[1] or b.size > twin.size:
                raise FisherError(
                    f"{a.file}: {name!r} is stored as {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}, which "
                    f"is no {kind} form of {list(twin.shape)}. Estimate it again."
                )
            compact[name] = (kind, a, b)
            whole[name] = TensorInfo(name, "F32", twin.shape, a.file, a.start, a.nbytes + b.nbytes)
    return whole, compact


def _read(folder: Path) -> tuple[tuple[Header, ...], dict[str, Any]]:
    if folder.is_file():
        meta = folder.parent / "fisher.json"
        read_meta = folder.name == "fisher.safetensors" and meta.exists()
        return (read_header(folder),), read_json_object(meta) if read_meta else {}
    if not folder.is_dir():
        raise FisherError(
            f"{folder}: there is no such Fisher folder. Write the folder that holds fisher.safetensors, or estimate it."
        )
    headers = read_weights(folder, "fisher")
    if not headers:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise FisherError(
            f"{folder}: holds no fisher.safetensors (found: {found}). A Fisher folder holds fisher.safetensors, "
            "or its shards with fisher.safetensors.index.json."
        )
    meta = folder / "fisher.json"
    return headers, read_json_object(meta) if meta.exists() else {}


def _read_records(
    file: Path, meta: dict[str, Any], stored: dict[str, TensorInfo]
) -> tuple[dict[str, float], dict[str, str]]:
    """The recorded sums and digests. Raises FisherError where they cannot be those of the stored tensors."""
    entries = meta.get("tensors", {})
    if not isinstance(entries, dict):
        raise FisherError(f"{file}: 'tensors' is not an object of tensor names. Remove the file, or estimate again.")
    sums: dict[str, float] = {}
    digests: dict[str, str] = {}
    for name, entry in entries.items():
        if name not in stored or not isinstance(entry, dict) or "sum" not in entry:
            continue
        total, count = entry["sum"], entry.get("count", stored[name].size)
        known = type(total) is float or (type(total) is int and total.bit_length() < 1000)
        if not known or not math.isfinite(total) or total < 0 or count != stored[name].size:
            raise FisherError(
                f"{file}: tensor {name!r} has sum {total!r} and count {count!r}, but {stored[name].file.name} holds "
                f"{stored[name].size:,} values, and a Fisher's sum is no negative number. The two files do not belong "
                "together: remove fisher.json (it is not required), or estimate again."
            )
        sums[name] = float(total)
        if isinstance(entry.get("xxh3_128"), str):
            digests[name] = entry["xxh3_128"].lower()
    return sums, digests


def _check(info: TensorInfo, base: Checkpoint) -> None:
    twin = base.tensors.get(info.name)
    if twin is None:
        raise FisherError(
            f"{info.file}: tensor {info.name!r} is not in the base {base.reference}, so nothing can be weighed by it."
            f"{did_you_mean(info.name, base.tensors)} Names must be those of the base's own files."
        )
    if info.shape != twin.shape:
        raise FisherError(
            f"{info.file}: tensor {info.name!r} is {list(info.shape)}, but in the base {twin.file} it is "
            f"{list(twin.shape)}. A Fisher has one value per weight: estimate it on a model of this base."
        )
    if info.dtype not in FISHER_DTYPES:
        raise FisherError(
            f"{info.file}: tensor {info.name!r} is {info.dtype}, which is not a type for a Fisher. Store F32 or BF16."
        )


def _is_tied_head(info: TensorInfo, base: Checkpoint) -> bool:
    """Whether an unknown tensor is the head of a base that stores head and embedding as one tensor."""
    tied = base.setting("tie_word_embeddings", not any(HEAD.search(name) for name in base.tensors))
    return (
        tied is True
        and HEAD.search(info.name) is not None
        and any(info.shape == other.shape and len(other.shape) == 2 for other in base.tensors.values())
    )
