"""Where merged bytes go: a folder that is visibly unfinished until one rename makes it whole.

OUT.unfinished holds plan digest, journal, and the shards at their final size; it becomes OUT in one rename when every
unit is written and every small file is there. A killed run leaves OUT.unfinished, which the same command continues.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH, hash_range
from rlmerge.errors import ClusterError, OutputError
from rlmerge.figures import size
from rlmerge.plan import Plan

from .journal import Journal
from .leftovers import (
    JOURNAL,
    REPLACED,
    busy,
    is_journal,
    remove_leftovers,
    restore,
    standing_output,
    tidy,
    work_folder,
)
from .safe_files import close_quietly, open_inside, take_lock, write_inside


class OutputFolder:
    """The output of one plan on disk: one folder, or for a sweep one below it for each variant.

    names    the sub-folder of each variant; a single '' for the folder itself
    """

    def __init__(self, plan: Plan, out: Path, names: tuple[str, ...], overwrite: bool = False, fsync: bool = False):
        self.plan = plan
        self.out = Path(os.path.abspath(out))
        self.work = work_folder(self.out)
        self.names = names
        self.overwrite = overwrite
        self.fsync = fsync
        self._handles: dict[tuple[int, int], int] = {}
        self._units = set(plan.unit_list())
        self._file_of = {name: i for i, file in enumerate(plan.outputs) for name in file.offsets}
        self._lock: int | None = None

    # -- beginning ------------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Puts right what a merge that was killed in its last moments left; OutputError while one is running."""
        try:
            tidy(self.out)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be tidied: {error.strerror}.") from error

    def check(self) -> None:
        """Raises OutputError where the output cannot go there; touches nothing."""
        paths = [Path(entry.path) for entry in self.plan.files]
        # both where a file lies and where the link to it lies (the hub's cache is made of links)
        inputs = {path.resolve().parent for path in paths} | {path.parent.resolve() for path in paths}
        for folder, target in ((folder, path.resolve()) for folder in sorted(inputs) for path in (self.out, self.work)):
            if target == folder or folder in target.parents or target in folder.parents:
                raise OutputError(
                    f"{self.out}: would write into, or replace, the input folder {folder}. Inputs are never written: "
                    "choose another output folder."
                )
        if self.out.is_symlink() or self.work.is_symlink():
            link = self.out if self.out.is_symlink() else self.work
            raise OutputError(f"{link}: is a symbolic link. Write the folder that it points to, or another one.")
        if self.work.exists() and not is_unfinished(self.work):
            raise OutputError(f"{self.work}: exists, but is not an unfinished merge. Move it away.")
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: is a file. Choose another output folder.")
        self._check_earlier(standing_output(self.out))
        near = nearest(self.out.parent)
        if not near.is_dir() or (near != self.out.parent and not os.access(near, os.W_OK)):
            raise OutputError(f"{self.out}: cannot be made, because {near} cannot be written.")

    def _check_earlier(self, earlier: Path) -> None:
        """An earlier output is replaced only with --overwrite, and only if a merge wrote all of it."""
        if not earlier.is_dir() or not any(earlier.iterdir()):
            return
        if not self.overwrite:
            raise OutputError(f"{self.out}: exists and is not empty. Choose another folder, or add --overwrite.")
        if (foreign := foreign_to(earlier)) is not None:
            raise OutputError(
                f"{self.out}: holds {foreign}, which rlmerge did not write, so --overwrite does not replace it. "
                "Move that away, or choose another folder."
            )

    def is_begun(self) -> bool:
        """Whether there is an unfinished merge to continue."""
        return is_journal(self.work / JOURNAL)

    def check_space(self) -> None:
        """Raises OutputError where the disk is too small for what is still to be written; touches nothing."""
        free = shutil.disk_usage(nearest(self.work)).free
        needed = self.needed_bytes()
        if needed > free:
            raise OutputError(
                f"{self.out}: needs {size(needed)} more, and {size(free)} are free on that disk. Nothing was written."
            )

    def needed_bytes(self) -> int:
        """Disk that the output will take and that an unfinished run has not taken yet."""
        total = 0
        for name in self.names:
            for file in self.plan.outputs:
                path = self.work / name / file.name
                total += file.size - (path.lstat().st_blocks * 512 if os.path.lexists(path) else 0)
        return max(0, total)

    def open(self, digest: str, stamps: list[list[int]]) -> Journal:
        """Makes or continues the unfinished folder: lock, journal, space. Returns the journal."""
        self.check()
        try:
            return self._open(digest, stamps)
        except OSError as error:
            self.close()
            raise OutputError(f"{self.work}: cannot be written: {error.strerror}.") from error
        except BaseException:
            self.close()
            raise

    def _open(self, digest: str, stamps: list[list[int]]) -> Journal:
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.work)
        if self._lock is None:
            raise busy(self.out)
        restore(self.out)
        journal_path = self.work / JOURNAL
        if self.overwrite and journal_path.exists():
            # --overwrite continues its own plan, and throws away the unfinished work of another
            try:
                journal = Journal(journal_path, digest, stamps, self.fsync)
            except OutputError:
                self._clear()
                journal = Journal(journal_path, digest, stamps, self.fsync)
        else:
            journal = Journal(journal_path, digest, stamps, self.fsync)
        self._reserve()
        journal.forget({key for key, record in journal.units.items() if not self._is_written(key, record.written)})
        return journal

    def _clear(self) -> None:
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _reserve(self) -> None:
        """Makes every shard at its final size, so that a full disk is known now and not after an hour."""
        self.check_space()
        for variant, name in enumerate(self.names):
            for place, file in enumerate(self.plan.outputs):
                handle = open_inside(self.work, f"{name}/{file.name}" if name else file.name, os.O_RDWR)
                self._handles[variant, place] = handle
                if os.fstat(handle).st_size != file.size:
                    os.ftruncate(handle, file.size)
                    reserve = getattr(os, "posix_fallocate", None)
                    try:
                        if reserve is not None:
                            reserve(handle, 0, file.size)
                    except OSError as error:
                        # some file systems cannot reserve; then the free space that was checked above must do
                        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                            raise
                os.pwrite(handle, file.header, 0)

    # -- writing --------------------------------------------------------------------------------------------------

    def write(self, variant: int, tensor: int, start: int, data: NDArray[np.uint8]) -> None:
        """Writes bytes of a tensor from coordinate `start` on."""
        plan = self.plan.tensors[tensor]
        place = self._file_of[plan.name]
        offset = self.plan.outputs[place].offsets[plan.name] + start * WIDTH[plan.dtype]
        view, done = data.data.cast("B"), 0
        while done < len(view):
            try:
                done += os.pwrite(self._handles[variant, place], view[done:], offset + done)
            except OSError as error:
                raise OutputError(
                    f"{self.work}: cannot be written: {error.strerror}. What is done is kept; the same command "
                    "continues."
                ) from error

    def join(self, digest: str) -> None:
        """Opens the shards of the unfinished folder that another process, on another machine perhaps, made and locked.

        Raises ClusterError where this machine does not see them.
        """
        try:
            with open(self.work / JOURNAL, "rb") as journal:
                found = json.loads(journal.readline())["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        try:
            if found != digest:
                raise FileNotFoundError(errno.ENOENT, "the journal of this merge is not there")
            for variant, name in enumerate(self.names):
                for place, file in enumerate(self.plan.outputs):
                    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._handles[variant, place] = os.open(self.work / name / file.name, flags)
        except OSError as error:
            self.close()
            raise ClusterError(
                f"{self.work}: {socket.gethostname()} cannot write there: {error.strerror}. Every machine must see the "
                "output under the same path: choose a folder on a shared file system."
            ) from None

    def sync(self, tensor: int) -> None:
        """Waits until what was written of a tensor is where a lost machine cannot take it along."""
        place = self._file_of[self.plan.tensors[tensor].name]
        try:
            for variant in range(len(self.names)):
                os.fsync(self._handles[variant, place])
        except OSError as error:
            raise OutputError(
                f"{self.work}: cannot be written: {error.strerror}. What is done is kept; the same command continues."
            ) from error

    def _is_written(self, key: tuple[int, int], digests: list[str]) -> bool:
        if key not in self._units or len(digests) != len(self.names):
            return False  # a damaged journal
        tensor = self.plan.tensors[key[0]]
        place = self._file_of[tensor.name]
        start, stop = tensor.units[key[1]]
        width = WIDTH[tensor.dtype]
        offset = self.plan.outputs[place].offsets[tensor.name]
        ranges = (offset + start * width, offset + stop * width)
        handles = [self._handles[variant, place] for variant in range(len(self.names))]
        return all(hash_range(handle, *ranges) == digest for handle, digest in zip(handles, digests, strict=True))

    def write_small(self, variant: int, name: str, data: bytes) -> None:
        """Writes one small file of an output, whole."""
        path = f"{self.names[variant]}/{name}" if self.names[variant] else name
        try:
            write_inside(self.work, path, data)
        except OSError as error:
            raise OutputError(
                f"{self.work / path}: cannot be written: {error.strerror}. What is done is kept; the same command "
                "continues."
            ) from error

    # -- end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Makes the folder whole: the journal goes, the folder gets its name."""
        try:
            # some disks, network disks above all, say only now that something was not written
            for key in list(self._handles):
                handle = self._handles[key]
                if self.fsync:
                    os.fsync(handle)
                del self._handles[key]
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"{self.work}: cannot be written: {error.strerror}. The same command compares what is there, and "
                "continues."
            ) from error
        # what was true at the start may have changed in an hour
        self.check()
        try:
            self._take_place()
        except OSError as error:
            with contextlib.suppress(OSError):
                restore(self.out)
            raise OutputError(
                f"{self.out}: cannot be put in its place: {error.strerror}. The merge is whole; the same command "
                "finishes it."
            ) from error
        self._tidy_up()
        self.close()

    def _take_place(self) -> None:
        """The renames of the last moments, see `leftovers`."""
        if self.out.is_dir() and any(self.out.iterdir()):
            if (self.work / REPLACED).is_dir():
                shutil.rmtree(self.work / REPLACED)
            self.out.rename(self.work / REPLACED)
        elif self.out.is_dir():
            self.out.rmdir()
        # a run that is stopped before this line has its journal and is continued, after it is finished
        self.work.rename(self.out)

    def _tidy_up(self) -> None:
        """The output is there and counts; but as long as it has a journal, it looks unfinished."""
        try:
            remove_leftovers(self.out)
        except OSError as error:
            raise OutputError(
                f"{self.out}: is whole, but what says that it is unfinished cannot be removed: {error.strerror}. "
                "`rlmerge verify` does it when the disk is well again."
            ) from error
        if not self.fsync:
            return
        try:
            handle = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                close_quietly(handle)
        except OSError as error:
            raise OutputError(
                f"{self.out}: is whole, but the disk does not say that it will be there after a loss of power: "
                f"{error.strerror}."
            ) from error

    def close(self) -> None:
        """Gives up the lock and closes what is open."""
        for handle in self._handles.values():
            close_quietly(handle)
        self._handles.clear()
        if self._lock is not None:
            close_quietly(self._lock)
            self._lock = None


def foreign_to(out: Path) -> str | None:
    """The name of something in a folder that no merge wrote there, or None: an output, a sweep, or an empty folder."""
    children = [child for child in sorted(out.iterdir()) if child.name != REPLACED]
    if children and all(child.is_dir() and (child / "rlmerge.json").is_file() for child in children):
        found = ((child.name, foreign_to(child)) for child in children)
        return next((f"{name}/{inner}" for name, inner in found if inner is not None), None)
    known = {"rlmerge.json", "run.log", JOURNAL, "lock"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads((out / "rlmerge.json").read_bytes())
        known |= {*said["files"], *(entry["file"] for entry in said["weights"])}
    return next((name for name in _names_below(out) if name not in known), None)


def _names_below(out: Path) -> Iterator[str]:
    """Every file below a folder by its path in it, and what is empty or neither file nor folder; links are files."""
    for folder, inner, files in os.walk(out):
        here = Path(folder)
        if here == out and REPLACED in inner:
            inner.remove(REPLACED)
        inner.sort()
        links = [name for name in inner if (here / name).is_symlink()]
        names = sorted([*files, *links]) if files or inner or here == out else [""]
        yield from (str((here / name).relative_to(out)) for name in names)


def is_unfinished(work: Path) -> bool:
    """Whether a folder is an unfinished merge, or the beginning of one."""
    if not work.is_dir():
        return False
    return is_journal(work / JOURNAL) or all(path.name == "lock" for path in work.iterdir())


def nearest(folder: Path) -> Path:
    """The folder itself, or the first one around it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
