"""Reads the small files of a model folder: regular files of a sensible size and nothing else, and one error for all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rlmerge.errors import CheckpointError

MOST = 100_000_000
"""Bytes of a JSON file, at most: more than any tokenizer has."""


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
