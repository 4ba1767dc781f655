"""A folder that appears whole: made as OUT.unfinished, renamed at the end; what was begun and failed is removed.

For packs and what is unpacked of them, which take seconds: nothing is continued.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlmerge.errors import OutputError

from .safe_files import close_quietly, put_back, put_in_place, take_lock, write_inside

LOCK, MARK = "lock", ".made-in-one-go"
"""Files of OUT.unfinished; the second says that whatever else is in it may be thrown away. They go last of all."""


@contextlib.contextmanager
def whole_folder(out: Path, inputs: Sequence[Path], overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """OUT.unfinished, empty and locked; it becomes OUT if all goes well.

    inputs     folders that must not be touched
    is_ours    whether an existing OUT may be replaced with `overwrite`
    Raises OutputError before anything is written, and for a disk that does not take it.
    """
    out = Path(os.path.abspath(out))
    work, old = out.with_name(f"{out.name}.unfinished"), out.with_name(f"{out.name}.replaced")
    _put_right(out, work, old, is_ours)
    _check(out, work, old, inputs, overwrite, is_ours)
    lock: int | None = None
    whole = False
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = take_lock(work)
        if lock is None:
            raise OutputError(f"{work}: another process is working there. Wait for it, or stop it.")
        _clear(work)
        write_inside(work, MARK, b"")
        yield work
        put_in_place(work, out, old)
        whole = True
    except OSError as error:
        if error.filename is not None and not os.path.abspath(str(error.filename)).startswith(str(out)):
            raise  # of an input
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}. Nothing was kept.") from error
    finally:
        if lock is not None:
            if whole:
                _tidy(out, old)
            else:
                shutil.rmtree(work, ignore_errors=True)
            close_quietly(lock)


def _put_right(out: Path, work: Path, old: Path, is_ours: Callable[[Path], bool]) -> None:
    """What a kill in the last moments left: an output that was set aside goes back, or away if it is replaced."""
    if is_ours(old):
        put_back(work, out, old)
    if (out / MARK).is_file() and not (out / MARK).is_symlink():
        _tidy(out, old)


def _tidy(out: Path, old: Path) -> None:
    """Removes what was replaced, then the marks. The folder is whole: what cannot be removed waits for the next run."""
    with contextlib.suppress(OSError):
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        for name in (LOCK, MARK):
            (out / name).unlink(missing_ok=True)


def _check(
    out: Path, work: Path, old: Path, inputs: Sequence[Path], overwrite: bool, is_ours: Callable[[Path], bool]
) -> None:
    for place in (out, work, old):
        if place.is_symlink():
            raise OutputError(f"{place}: is a symbolic link. Write the folder that it points to, or another one.")
    for folder in {path.resolve() for path in inputs}:
        for target in (out.resolve(), work.resolve()):
            if target == folder or folder in target.parents or target in folder.parents:
                raise OutputError(
                    f"{out}: would write into, or replace, the input folder {folder}. Inputs are never written: choose "
                    "another folder."
                )
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose another folder.")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise OutputError(f"{out}: exists and is not empty. Choose another folder, or add --overwrite.")
        if not is_ours(out):
            raise OutputError(f"{out}: holds what rlmerge did not write there, so --overwrite does not replace it.")
    if old.exists():
        raise OutputError(f"{old}: is in the way. It is what an earlier run replaced: remove it.")
    beginning = (LOCK, f"{MARK}.part")
    if work.exists() and any(entry.name not in beginning for entry in work.iterdir()) and not (work / MARK).is_file():
        raise OutputError(f"{work}: is in the way, and rlmerge did not make it. Move it away.")


def _clear(work: Path) -> None:
    """Removes what an earlier run that was killed left, but for the lock."""
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (LOCK, MARK):
            entry.unlink()
