"""What a disk says in the middle of something, as one message instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rlmerge.errors import CheckpointError


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raises CheckpointError for an OSError that names a file: a folder that cannot be listed, a file that is gone.

    What is read and written is told more exactly where it happens; this is for all the rest. Errors of plugins pass.
    """
    try:
        yield
    except OSError as error:
        plugins = sys.modules.get("rlmerge.plugins")
        if error.filename is None or (plugins is not None and plugins.blame(error)):
            raise
        raise CheckpointError(f"{error.filename}: cannot be used: {error.strerror or error}.") from error
