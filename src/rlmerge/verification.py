"""Whether an output is still what the merge wrote: every byte against the digests in its `rlmerge.json`."""

from __future__ import annotations

import contextlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.header import read_header
from rlmerge.checkpoint.layout import WIDTH, hash_range
from rlmerge.checkpoint.reading import read_file
from rlmerge.disk_errors import disk_errors
from rlmerge.errors import CheckpointError, HeaderError, OutputError
from rlmerge.execute.leftovers import tidy, work_folder

PROVENANCE = "rlmerge.json"
MOST = 4 * 10**9
"""Bytes of a provenance, at most: it has a line for every tensor."""


@disk_errors()
def verify(out: Path | str) -> dict[str, Any]:
    """Reads a merged folder again and compares every byte with what rlmerge.json says was written.

    Returns {'files': n, 'tensors': n, 'bytes': n}. Raises OutputError naming the first files and tensors that differ,
    CheckpointError for what cannot be read. What a merge that was killed in its last moments left over is put right
    first, where that can be written.
    """
    folder = Path(out)
    with contextlib.suppress(OSError, OutputError):
        tidy(folder)
    weights, units, files = _read_provenance(folder)
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif _digest(path) != digest:
            problems.append(f"{name}: was changed")
    total = 0
    known = {entry["file"] for entry in weights}
    strays = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in known]
    problems += [f"{name}: was added; a loader may prefer it to what the merge wrote" for name in strays]
    for entry in weights:
        problems += _verify_weights(folder / entry["file"], entry, units)
        total += entry["size"]
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise OutputError(f"{folder}: is not what the merge wrote:\n  {shown}")
    return {"files": len(files) + len(weights), "tensors": len(units), "bytes": total}


def _read_provenance(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """What was written: weights, units of each tensor, digests of the small files; looked at before it is believed."""
    source = folder / PROVENANCE
    if not folder.is_dir() and not work_folder(folder).exists():
        raise OutputError(f"{folder}: there is no such folder. Write an output of rlmerge merge.")
    if not os.path.lexists(source):
        hint = " It is unfinished: run its merge command again." if work_folder(folder).exists() else ""
        raise OutputError(f"{folder}: has no {PROVENANCE}, so it is not a finished output of rlmerge.{hint}")
    raw = read_file(source, MOST)
    try:
        said = json.loads(raw)
        weights, units, files = said["weights"], said["units"], said["files"]
        plain = all(_is_inside(name) and isinstance(digest, str) for name, digest in files.items())
        for entry in weights:
            plain &= "/" not in entry["file"] and _is_inside(entry["file"])
            plain &= type(entry["size"]) is int and isinstance(entry["header"], str)
        for ranges in units.values():
            for start, stop, digest in ranges:
                plain &= type(start) is int and type(stop) is int and isinstance(digest, str)
        if not plain:
            raise ValueError("it names files outside of its folder, or digests that are none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise OutputError(f"{source}: cannot be read as provenance of a merge: {why}") from None
    return weights, units, files


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not name.startswith("/") and "\0" not in name and not {"", ".", ".."} & set(parts)


def _digest(path: Path) -> str:
    """xxh3-128 of a file."""
    try:
        with path.open("rb", buffering=0) as file:
            return hash_range(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _verify_weights(path: Path, entry: dict[str, Any], units: dict[str, Any]) -> list[str]:
    try:
        header = read_header(path)
    except HeaderError as error:
        return [f"{path.name}: {error}"]
    if header.digest != entry["header"] or header.size != entry["size"]:
        return [f"{path.name}: has another header or size"]
    problems = []
    try:
        with path.open("rb", buffering=0) as file:
            for name, info in header.tensors.items():
                ranges, width = units.get(name, []), WIDTH.get(info.dtype, 0)
                if not _covers(ranges, info.size) or width == 0:
                    problems.append(f"{path.name}: tensor {name!r} has no digests of all of it in {PROVENANCE}")
                    continue
                for start, stop, digest in ranges:
                    if hash_range(file.fileno(), info.start + start * width, info.start + stop * width) != digest:
                        problems.append(f"{path.name}: tensor {name!r}, coordinates {start} to {stop}, was changed")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return problems


def _covers(ranges: list[Any], size: int) -> bool:
    """Whether [start, stop) ranges follow each other from 0 to the end of a tensor."""
    ends = [0, *(stop for _, stop, _ in ranges)]
    return ends[-1] == size and [start for start, *_ in ranges] == ends[:-1] and all(a <= b for a, b in pairwise(ends))
