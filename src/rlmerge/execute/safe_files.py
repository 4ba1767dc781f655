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
    except BlockingIOError:
        close_quietly(handle)
        return None
    except OSError:
        close_quietly(handle)
        raise
    return handle


def close_quietly(handle: int) -> None:
    """Closes a file of which nothing more is wanted: what the disk says about it would hide what went wrong before."""
    with contextlib.suppress(OSError):
        os.close(handle)


def put_in_place(work: Path, out: Path, old: Path) -> None:
    """`work` becomes `out`, and what was there becomes `old`. Where that fails, everything is as it was: OSError.

    A kill between the two renames leaves `old` and no `out`: see `put_back`.
    """
    replaces = out.exists()
    if replaces:
        os.rename(out, old)
    try:
        os.rename(work, out)
    except BaseException:
        if replaces:
            with contextlib.suppress(OSError):
                os.rename(old, out)
        raise


def put_back(work: Path, out: Path, old: Path) -> None:
    """Undoes half a `put_in_place`, after a kill. OutputError while its process lives, or if the disk refuses.

    Only for an `old` that is known to be one of ours.
    """
    if os.path.lexists(out) or not _is_folder(old):
        return
    handle: int | None = None
    try:
        if _is_folder(work):
            handle = take_lock(work)
            if handle is None:
                raise OutputError(f"{work}: another process is working there. Wait for it, or stop it.")
        os.rename(old, out)
    except OSError as error:
        raise OutputError(f"{old}: cannot be put back to {out}: {error.strerror}.") from error
    finally:
        if handle is not None:
            close_quietly(handle)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def _inner_folder(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """A handle of the folder that holds folder/name, and the last part of the name. An OSError names all of it."""
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
            close_quietly(handle)
            handle = inner
        yield handle, last
    except OSError as error:
        error.filename, error.filename2 = str(folder / name), None
        raise
    finally:
        close_quietly(handle)


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
        close_quietly(handle)
        kind = "a file with other names (hard links)" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise _refusal(path, kind)
    if flags & os.O_TRUNC:
        try:
            os.ftruncate(handle, 0)
        except OSError:
            close_quietly(handle)
            raise
    return handle


def _refusal(path: Path, kind: str) -> OutputError:
    return OutputError(
        f"{path}: is {kind}, which rlmerge did not make; writing there would change something else. Remove it, then "
        "give the same command again."
    )
