"""Files that are written into an output folder: made below it and nowhere else, whatever somebody put there meanwhile.

No symbolic link is followed, no file with a second name is written, and a folder is locked while somebody works in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rlmerge.errors import OutputError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# not blocking: a pipe in the place of a file would otherwise wait for a reader for ever
FILE = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
LINK_ERRORS = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR)


def open_inside(folder: Path, name: str, flags: int) -> int:
    """Opens the file folder/name, made where it is missing with the folders on the way. Returns its handle.

    Raises OutputError for a symbolic link below `folder`, and for what is no regular file with this one name.
    """
    with _inner_folder(folder, name) as (inner, last):
        return _open_regular(folder / name, last, flags, inner)


def write_inside(folder: Path, name: str, data: bytes) -> None:
    """Writes the file folder/name so that it appears whole. Raises OutputError as `open_inside` does, and OSError."""
    with _inner_folder(folder, name) as (inner, last):
        part = f"{last}.part"
        handle = _open_regular(folder / f"{name}.part", part, os.O_WRONLY | os.O_TRUNC, inner)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
        finally:
            os.close(handle)
        os.replace(part, last, src_dir_fd=inner, dst_dir_fd=inner)


def take_lock(folder: Path, wait: bool = False) -> int | None:
    """The handle of the lock of an output folder, or None when somebody else holds it and nobody waits."""
    handle = open_inside(folder, "lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _inner_folder(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """A handle of the folder that holds folder/name, and the last part of the name."""
    *before, last = name.split("/")
    handle = os.open(folder, FOLDER)
    path = folder
    try:
        for part in before:
            path = path / part
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o777, dir_fd=handle)
            try:
                inner = os.open(part, FOLDER, dir_fd=handle)
            except OSError as error:
                if error.errno in LINK_ERRORS:
                    raise _refusal(path, "a symbolic link, or no folder") from None
                raise
            os.close(handle)
            handle = inner
        yield handle, last
    finally:
        os.close(handle)


def _open_regular(path: Path, name: str, flags: int, inner: int) -> int:
    """Opens a file of the folder `inner`; truncates only after it was looked at."""
    try:
        handle = os.open(name, FILE | (flags & ~os.O_TRUNC), 0o666, dir_fd=inner)
    except OSError as error:
        if error.errno in LINK_ERRORS:
            raise _refusal(path, "a symbolic link") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise _refusal(path, "no regular file") from None
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        kind = "a file with other names (hard links)" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise _refusal(path, kind)
    if flags & os.O_TRUNC:
        os.ftruncate(handle, 0)
    return handle


def _refusal(path: Path, kind: str) -> OutputError:
    return OutputError(
        f"{path}: is {kind}, which rlmerge did not make; writing there would change something else. Remove it, then "
        "give the same command again."
    )
