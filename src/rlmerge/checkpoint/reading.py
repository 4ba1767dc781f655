"""Reads the small files of a model folder: regular files of a sensible size and nothing else, and one error for all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from rlmerge.errors import CheckpointError

MOST = 100_000_000
"""Bytes of a JSON file, at most: more than any tokenizer has."""
DEEPEST = 100
"""Objects and lists within each other, at most: what reads them again is not to run out of its stack."""


def read_file(file: Path, most: int | None = MOST) -> bytes:
    """The bytes of a file. Raises CheckpointError, naming it, if it is missing, unreadable, no regular file (a pipe
    would never end) or larger than `most`.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(handle, "rb") as opened:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file}: is not a regular file. Restore it from the original model.")
            if most is not None and status.st_size > most:
                raise CheckpointError(f"{file}: has {status.st_size} bytes, more than such a file of a model ever has.")
            return opened.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def leads_out(file: Path, folder: Path | None = None) -> Path | None:
    """Where a link leads that leaves the folder of its model (that of the file, by default) and the hub's cache."""
    home, target = (folder or file.parent).resolve(), file.resolve()
    beside = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    of_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return None if home in target.parents or beside or of_cache else target


def refuse_outside(file: Path, folder: Path | None = None) -> None:
    """Raises CheckpointError for such a link, where the output would get a copy of what it leads to."""
    target = leads_out(file, folder)
    if target is not None:
        raise CheckpointError(
            f"{file}: is a link to {target}, outside of the model's folder and of the hub's cache, and the output "
            "would get a copy of that.\n  If it belongs to the model, put the file in the place of the link; else "
            "remove it."
        )


def parse_json(text: str | bytes) -> Any:
    """JSON as plain data. ValueError for what is none (a RecursionError is made one), or is nested too deeply."""
    try:
        parsed = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [parsed], 0
    while level := [entry for entry in level if isinstance(entry, (dict, list))]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        level = [value for entry in level for value in (entry.values() if isinstance(entry, dict) else entry)]
    return parsed


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: as it reads best, or all in ASCII where a string has half a character."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
