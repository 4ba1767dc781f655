"""A disk that fails at the n-th call: every way in which this process writes to, or reads from, files below a folder.

`os` functions and Python's own files are wrapped, and told apart by the path that they work on; all other files work.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

WRITES = ("open to write", "write", "pwrite", "ftruncate", "truncate", "posix_fallocate", "fsync", "mkdir", "rename",
          "replace", "unlink", "rmdir", "close")  # fmt: skip
READS = ("open to read", "read", "pread", "preadv", "scandir", "listdir", "stat", "lstat", "fstat")


class Disk:
    """Counts calls of some kinds below some folders; the one numbered `fails` (from 0) raises, and those after it too
    if the fault `stays`, as a full disk does.
    """

    def __init__(
        self, folders: list[Path], kinds: tuple[str, ...], number: int, fails: int | None, stays: bool
    ) -> None:
        self.folders = [os.path.realpath(folder) for folder in folders]
        self.kinds = frozenset(kinds)
        self.number = number
        self.fails = fails
        self.stays = stays
        self.calls: list[tuple[str, str]] = []

    def touch(self, kind: str, path: Any) -> None:
        """A call is about to be made; OSError if it is the one that fails."""
        if kind not in self.kinds:
            return
        name = _name_of(path)
        if name is None or not any(name == home or name.startswith((f"{home}/", f"{home}.")) for home in self.folders):
            return
        place = len(self.calls)
        self.calls.append((kind, name))
        if self.fails is not None and (place == self.fails or (self.stays and place > self.fails)):
            raise OSError(self.number, os.strerror(self.number), None if isinstance(path, int) else str(path))


def _name_of(path: Any) -> str | None:
    """The absolute path of a path or an open file; None for what has none."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return None
    folder, rest = os.path.split(os.path.abspath(os.fspath(path)))
    return os.path.join(os.path.realpath(folder), rest)


@contextmanager
def failing_disk(
    folders: list[Path], kinds: tuple[str, ...], number: int = errno.ENOSPC, fails: int | None = None,
    stays: bool = False,
) -> Iterator[Disk]:  # fmt: skip
    """Inside, calls of these kinds on what lies in these folders (or beside them, as FOLDER.unfinished) may fail.

    fails    the number of the call, from 0; None: none fails, and `calls` of the result says which there were
    """
    disk = Disk(folders, kinds, number, fails, stays)
    patches = [mock.patch.object(os, name, _wrapped(disk, name)) for name in dir(os) if name in _OF_OS]
    opened = _opener(disk)
    patches += [mock.patch.object(builtins, "open", opened), mock.patch.object(io, "open", opened)]
    with mock.patch.object(os, "open", _os_open(disk)):
        for patch in patches:
            patch.start()
        try:
            yield disk
        finally:
            for patch in reversed(patches):
                patch.stop()


_OF_OS = {*WRITES, *READS} - {"open to write", "open to read"}
_REAL_OPEN, _REAL_READLINK = os.open, os.readlink


def _wrapped(disk: Disk, name: str) -> Callable[..., Any]:
    original = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        path = arguments[0] if arguments else options.get("path", ".")
        inside = next((options[key] for key in ("dir_fd", "src_dir_fd") if options.get(key) is not None), None)
        if inside is not None and not isinstance(path, int):
            path = os.path.join(_REAL_READLINK(f"/proc/self/fd/{inside}"), os.fspath(path))
        if name == "close":  # closed it is, as on a real disk, whatever was lost
            named = _name_of(path)
            original(path)
            if named is not None and not os.path.isdir(named):
                disk.touch(name, named)
            return None
        disk.touch(name, path)
        return original(*arguments, **options)

    return call


def _os_open(disk: Disk) -> Callable[..., int]:
    def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        whole = path if dir_fd is None else os.path.join(_REAL_READLINK(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        disk.touch("open to write" if flags & os.O_CREAT else "open to read", whole)
        return _REAL_OPEN(path, flags, mode, dir_fd=dir_fd)

    return call


def _opener(disk: Disk) -> Callable[..., Any]:
    """`open` whose files ask the disk before every read and write of theirs."""
    original = io.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.touch("write", self.fileno())
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            disk.touch("truncate", self.fileno())
            return super().truncate(size)

        def readinto(self, buffer: Any) -> int:
            disk.touch("read", self.fileno())
            return super().readinto(buffer)

        def read(self, size: int | None = -1) -> bytes | None:
            disk.touch("read", self.fileno())
            return super().read(-1 if size is None else size)

        def readall(self) -> bytes | None:
            disk.touch("read", self.fileno())
            return super().readall()

    def call(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        writes = bool(set(mode) & set("wax+"))
        if not isinstance(file, int):
            disk.touch("open to write" if writes else "open to read", file)
        if opener is not None:
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = File(file, mode.replace("b", "").replace("t", ""), closefd)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader
        buffered = kind(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)
        text.mode = mode  # type: ignore[misc]
        return text

    return call
