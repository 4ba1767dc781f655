"""What a kill in the last moments of a merge leaves behind, and how the next command puts it right.

The last moments of a merge to OUT, in their order:

    OUT → OUT.unfinished/.replaced      only with --overwrite: the earlier output waits inside the new one
    OUT.unfinished → OUT                from here on the new output counts
    OUT/journal.jsonl, OUT/.replaced, OUT/lock are removed

Stopped before the second, the earlier output is put back; stopped after it, what is left over is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from rlmerge.errors import OutputError

from .safe_files import close_quietly, take_lock

JOURNAL = "journal.jsonl"
REPLACED = ".replaced"
JOURNAL_START = b'{"plan": "'
"""How a journal of ours begins."""


def work_folder(out: Path) -> Path:
    """Where a merge to OUT is made."""
    return out.with_name(out.name + ".unfinished")


def is_journal(path: Path) -> bool:
    """Whether a file is a journal that rlmerge wrote, or the beginning of one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        start = os.read(handle, len(JOURNAL_START)) if stat.S_ISREG(os.fstat(handle).st_mode) else b"?"
    finally:
        close_quietly(handle)
    return JOURNAL_START.startswith(start)


def standing_output(out: Path) -> Path:
    """Where the output called OUT lies: in its place, or set aside by a merge that was stopped."""
    aside = work_folder(out) / REPLACED
    return aside if _is_folder(aside) and _is_free(out) else out


def tidy(out: Path) -> None:
    """Puts right what a killed merge to OUT left; nothing to do is the rule. OutputError while another one runs."""
    if is_finished_but_untidy(out):
        with _locked(out, out):
            remove_leftovers(out)
    work = work_folder(out)
    if standing_output(out) != out and not work.is_symlink():
        with _locked(work, out):
            restore(out)


def restore(out: Path) -> None:
    """Puts the earlier output back in its place; whoever calls this has the lock of OUT.unfinished."""
    aside = standing_output(out)
    if aside != out:
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        aside.rename(out)


def remove_leftovers(out: Path) -> None:
    """Removes what only an unfinished folder has; the lock last, for it says that there may be something to do."""
    if is_journal(out / JOURNAL):
        (out / JOURNAL).unlink()
    if _is_folder(out / REPLACED):
        shutil.rmtree(out / REPLACED)
    (out / "lock").unlink(missing_ok=True)


def is_finished_but_untidy(out: Path) -> bool:
    """Whether OUT is whole and still has the lock of the merge that made it."""
    with contextlib.suppress(OSError):
        status = os.lstat(out / "lock")
        empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
        return empty and not out.is_symlink() and any(map(_is_whole, (out, *sorted(out.iterdir()))))
    return False


def _is_whole(folder: Path) -> bool:
    """Whether a folder, or a point of a sweep, has what is written last."""
    return folder.name != REPLACED and (folder / "rlmerge.json").is_file()


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    handle = take_lock(folder)
    if handle is None:
        raise busy(out)
    try:
        yield
    finally:
        close_quietly(handle)


def busy(out: Path) -> OutputError:
    """Somebody else holds the lock."""
    return OutputError(f"{out}: another rlmerge is writing it at this moment. Wait for it, or stop it.")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_free(path: Path) -> bool:
    """Whether nothing, or an empty folder, is there."""
    return not os.path.lexists(path) or (_is_folder(path) and not any(path.iterdir()))
