"""The folder of a Fisher (or of Gram matrices) while it is made: locked, continued or begun, never somebody else's.

Work goes on in OUT.unfinished, which gets its name at the end. `run.json` in it says what is being made; a folder
without one is not ours, whatever lies in it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.errors import FisherError, OutputError, RlmergeError
from rlmerge.execute.safe_files import close_quietly, put_back, put_in_place, take_lock, write_inside

NOTE, LOCK, SEQUENCES = "run.json", "lock", "sequences.jsonl"
SUMS = frozenset({"sums.safetensors", "sums.part", "groups.json", "groups.part", f"{NOTE}.part"})
CHUNK = re.compile(r"sums-(\d+)-\w+\.(safetensors|part-.*)")
"""Sums of a chunk of sequences that a process of a cluster has made."""
ONCE = {"made": "in one go"}


@dataclass(frozen=True)
class Kind:
    """What a folder holds: its files are STEM.safetensors or shards, STEM.json and `others`.

    word     how messages call it
    error    what is raised
    """

    stem: str
    word: str
    error: type[RlmergeError]
    others: frozenset[str] = frozenset()

    @property
    def files(self) -> frozenset[str]:
        """What such a folder may hold beside weights."""
        return self.others | {f"{self.stem}.json", f"{self.stem}.safetensors.index.json", SEQUENCES, NOTE, LOCK}

    def stranger(self, folder: Path, unfinished: bool = False) -> str | None:
        """The name of something in a folder that none of this kind has."""
        for file in sorted(folder.iterdir()):
            weights = file.name.startswith(self.stem) and file.suffix == ".safetensors"
            sums = unfinished and (file.name in SUMS or CHUNK.fullmatch(file.name))
            if file.is_dir() or not (weights or sums or file.name in self.files):
                return file.name
        return None


FISHER = Kind("fisher", "Fisher", FisherError, frozenset({"course.safetensors"}))


class RunFolder:
    """OUT and OUT.unfinished. Raises the kind's error, before anything is made, for an output not to be replaced."""

    def __init__(self, out: Path | str, overwrite: bool, kind: Kind = FISHER) -> None:
        self.kind = kind
        self.out = Path(out).absolute()
        self.path = self.out.with_name(f"{self.out.name}.unfinished")
        self.overwrite = overwrite
        self._old = self.out.with_name(f"{self.out.name}.replaced")
        self._lock: int | None = None
        for place in (self.out, self.path, self._old):
            if place.is_symlink():
                raise self.kind.error(f"{place}: is a link; name a folder of its own.")
        if (self._old / f"{self.kind.stem}.json").is_file() and self.kind.stranger(self._old) is None:
            put_back(self.path, self.out, self._old)
        if self.out.exists():
            self._check_output()
        if self._old.exists():
            raise self.kind.error(f"{self._old}: is in the way. It is what an earlier run replaced: remove it.")
        if not self.out.parent.is_dir():
            raise self.kind.error(f"{self.out.parent}: there is no such folder to put {self.out.name} into.")

    def _check_output(self) -> None:
        if not self.out.is_dir():
            raise self.kind.error(f"{self.out}: is a file; a {self.kind.word} needs a folder of its own.")
        stranger = self.kind.stranger(self.out)
        if stranger is not None:
            raise self.kind.error(
                f"{self.out}: holds {stranger!r}, which no {self.kind.word} has. Name another folder."
            )
        if any(self.out.iterdir()) and not self.overwrite:
            raise self.kind.error(
                f"{self.out}: holds a {self.kind.word} already. Name another folder, or add --overwrite."
            )

    @contextlib.contextmanager
    def opened(self, said: dict[str, Any] | None = None, wait: bool = False) -> Iterator[Path]:
        """OUT.unfinished, locked: as an earlier run of the same `said` left it, or fresh. Renamed if all goes well.

        said    what is made, with what decides its sequences under 'draw'; None: nothing that could be continued
        wait    for another process that makes it, instead of an error
        """
        try:
            self.path.mkdir(exist_ok=True)
            self._take_lock(wait)
            self._prepare(ONCE if said is None else json.loads(json.dumps(said)))
        except OSError as error:
            self._give_up_lock()
            raise OutputError(f"{self.path}: cannot be made: {error.strerror}.") from None
        except BaseException:
            self._give_up_lock()
            raise
        try:
            yield self.path
            self._finish()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written: {error.strerror or error}. What was done is kept; the same command "
                "continues."
            ) from None
        finally:
            self._give_up_lock()

    def _take_lock(self, wait: bool) -> None:
        self._lock = take_lock(self.path, wait)
        if self._lock is None:
            raise self.kind.error(f"{self.path}: another process is working there. Wait for it, or stop it.")
        if not (self.path / LOCK).exists():
            raise self.kind.error(f"{self.out}: another process has just made it.")

    def _give_up_lock(self) -> None:
        if self._lock is not None:
            close_quietly(self._lock)
            self._lock = None

    def _prepare(self, said: dict[str, Any]) -> None:
        """Keeps what can be continued, clears what may be thrown away, refuses the rest."""
        note = self.path / NOTE
        others = [file.name for file in self.path.iterdir() if file.name not in (LOCK, f"{NOTE}.part")]
        if not others:
            self._write_note(said)
            return
        stranger = self.kind.stranger(self.path, unfinished=True)
        if not note.exists() or stranger is not None:
            raise self.kind.error(
                f"{self.path}: is in the way, and is no unfinished {self.kind.word} ({stranger or others[0]}). Move it "
                "elsewhere."
            )
        try:
            before = json.loads(note.read_text())
        except ValueError:
            before = None
        before = before if isinstance(before, dict) else {}
        if before == said and said != ONCE:
            return
        same_draw = "draw" in said and before.get("draw") == said["draw"]
        summed = (self.path / "sums.safetensors").exists() or bool(sums_of_chunks(self.path))
        costly = before != ONCE and (summed or not same_draw)
        if costly and not self.overwrite:
            pairs = ((before, said), (before.get("draw") or {}, said.get("draw") or {}))
            keys = {key for old, new in pairs for key in {*old, *new} - {"draw"} if old.get(key) != new.get(key)}
            raise self.kind.error(
                f"{self.path}: an unfinished {self.kind.word} of another model, other data or other settings (differs "
                f"in {', '.join(sorted(keys))}). Finish it with its own command, or throw it away with --overwrite."
            )
        for file in self.path.iterdir():
            # sequences that the same model drew from the same data serve other settings, too
            if file.name != LOCK and not (same_draw and file.name == SEQUENCES):
                file.unlink()
        self._write_note(said)

    def _write_note(self, said: dict[str, Any]) -> None:
        write_inside(self.path, NOTE, (json.dumps(said) + "\n").encode())

    def _finish(self) -> None:
        for file in (*(self.path / name for name in SUMS), *sums_of_chunks(self.path)):
            file.unlink(missing_ok=True)
        put_in_place(self.path, self.out, self._old)
        with contextlib.suppress(OSError):  # it is there and counts
            if self._old.exists():
                for file in self._old.iterdir():
                    file.unlink()
                self._old.rmdir()
            for name in (NOTE, LOCK):
                (self.out / name).unlink(missing_ok=True)


def sums_of_chunks(folder: Path, before: int | None = None) -> list[Path]:
    """The files of single chunks in a folder, or of those with a smaller number."""
    found = ((CHUNK.fullmatch(file.name), file) for file in folder.iterdir())
    return [file for match, file in found if match and (before is None or int(match[1]) < before)]
