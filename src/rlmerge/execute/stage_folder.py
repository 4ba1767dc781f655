"""The folder of intermediate merges, OUT.stages: which of them are whole and unchanged, and how it goes at the end.

FOLDER/stages.json     by stage: digests of its plan and its small files, and times of its inputs, written before it is
                       begun; times of its files, written when it is whole
FOLDER/NAME            a whole stage: it was made by what stages.json says, and appeared in one rename
FOLDER/NAME.unfinished, FOLDER/NAME.removed    one that is being made; one that is being removed
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.errors import CheckpointError, OutputError
from rlmerge.plan import Plan
from rlmerge.small_files import PROVENANCE, given_files
from rlmerge.version import VERSION

from .folder import foreign_to, is_unfinished
from .inputs import stamps_of
from .leftovers import busy, is_finished_but_untidy, standing_output, tidy, work_folder
from .safe_files import close_quietly, take_lock, write_inside

LIST = "stages.json"


class StageFolder:
    """Where the stages of a merge to OUT lie: in OUT.stages until OUT is whole, or where the user keeps them."""

    def __init__(self, out: Path, folder: Path | None = None) -> None:
        self.out = Path(os.path.abspath(out))
        self.temporary = folder is None
        self.folder = self.out.with_name(self.out.name + ".stages") if folder is None else Path(os.path.abspath(folder))

    def place(self, name: str) -> Path:
        """The folder of a stage."""
        return self.folder / name

    # -- before ---------------------------------------------------------------------------------------------------

    def check(self, names: Iterable[str]) -> None:
        """Raises OutputError where stages cannot be made there; touches nothing.

        names   of stages that are to be made, perhaps in the place of others
        """
        for taken in (self.out, work_folder(self.out)):
            if self.folder == taken or self.folder in taken.parents or taken in self.folder.parents:
                raise OutputError(f"{self.folder}: the stages cannot lie here beside the output {self.out}, in it or "
                                  "around it. Choose another folder with --stages.")  # fmt: skip
        if self.folder.is_symlink():
            raise OutputError(f"{self.folder}: is a symbolic link. Write the folder that it leads to: --stages FOLDER.")
        if self.folder.exists() and not self._is_ours():
            raise OutputError(
                f"{self.folder}: is in the way: stages are made here, and rlmerge did not make it. Move it away, or "
                "choose another folder with --stages."
            )
        for name in names:
            self._refuse_foreign(name)

    def _is_ours(self) -> bool:
        if not self.folder.is_dir():
            return False
        return self._read() is not None or all(path.name in ("lock", f"{LIST}.part") for path in self.folder.iterdir())

    def _refuse_foreign(self, name: str) -> None:
        folder, work = self.place(name), work_folder(self.place(name))
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{folder}: is in the way of a stage, and rlmerge did not make it. Move it away.")
        if folder.is_dir() and (foreign := foreign_to(folder)) is not None:
            raise OutputError(
                f"{folder}: this stage must be made again, but its folder holds {foreign}, which rlmerge did not "
                "write. Move that away."
            )
        if work.is_symlink() or (work.exists() and not is_unfinished(work)):
            raise OutputError(f"{work}: is in the way of a stage, and is not an unfinished merge. Move it away.")

    def is_made(self, name: str, plan: Plan) -> bool:
        """Whether a stage is whole, and made by this plan of inputs that were not touched since; reads only headers."""
        folder = self.place(name)
        record = self._records().get(name)
        if record is None or not (folder / "rlmerge.json").is_file() or is_finished_but_untidy(folder):
            return False
        try:
            same = self._record(plan).items() <= record.items()
            made = self._made(name, plan)
        except CheckpointError:
            return False
        if not same or ("made" in record and record["made"] != made):
            return False
        for file, (size, _) in zip(plan.outputs, made):
            with (folder / file.name).open("rb") as opened:
                if size != file.size or opened.read(len(file.header)) != file.header:
                    return False
        return True

    # -- making ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds its lock, so that one merge at a time works in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.folder)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written: {error.strerror}.") from error
        if lock is None:
            raise busy(self.folder)
        try:
            yield
        finally:
            close_quietly(lock)

    def tidy(self, names: Iterable[str], keep: bool) -> None:
        """Puts right what a merge that was killed in the last moments of a stage or of the output left.

        Stages of an output that is whole are removed, unless they are to be kept.
        """
        try:
            tidy(self.out)
            for name in names:
                tidy(self.place(name))
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be tidied: {error.strerror}.") from error
        if self.temporary and not keep:
            self._tidy_finished()

    def begin(self, name: str, plan: Plan) -> None:
        """Notes what a stage is about to be made of; removes what was made of something else."""
        record, known = self._record(plan), self._records()
        self._refuse_foreign(name)
        try:
            self._drop(self.place(name))
            # what is there of the weights stays good when only small files change: they are written last
            if any(known.get(name, {}).get(key) != record[key] for key in ("plan", "stamps")):
                self._drop(work_folder(self.place(name)))
        except OSError as error:
            raise OutputError(f"{self.place(name)}: cannot be removed: {error.strerror}.") from error
        self._write({**known, name: record})

    def done(self, name: str, plan: Plan) -> None:
        """Notes what a whole stage looks like, so that a change of its files is seen."""
        known = self._records()
        self._write({**known, name: {**known[name], "made": self._made(name, plan)}})

    def _made(self, name: str, plan: Plan) -> list[list[int]]:
        """The stamps of what a stage gives to those that are made of it, weights first."""
        names = [*(file.name for file in plan.outputs), *given_files(plan), PROVENANCE]
        return stamps_of(self.place(name) / file for file in names)

    def finishing(self) -> None:
        """Notes that all stages are whole, and OUT is next: when OUT is there, they may go."""
        self._write(self._records(), finishing=True)

    def _record(self, plan: Plan) -> dict[str, Any]:
        small = xxhash.xxh3_128()
        for name, data in given_files(plan).items():
            small.update(f"{name}\0{len(data)}\0".encode() + data)
        stamps = stamps_of(entry.path for entry in plan.files)
        return {"plan": plan.digest(), "small": small.hexdigest(), "stamps": stamps}

    def _records(self) -> dict[str, Any]:
        return (self._read() or {}).get("stages", {})

    def _read(self) -> dict[str, Any] | None:
        """The list of stages; None if there is none."""
        try:
            if (self.folder / LIST).is_symlink():
                return None
            said = json.loads((self.folder / LIST).read_bytes())
        except (OSError, ValueError):
            return None
        ours = isinstance(said, dict) and "finishing" in said and isinstance(said.get("stages"), dict)
        plain = ours and all("/" not in name and not name.startswith(".") for name in said["stages"])
        return said if plain and all(isinstance(record, dict) for record in said["stages"].values()) else None

    def _write(self, stages: dict[str, Any], finishing: bool = False) -> None:
        said = {"rlmerge": VERSION, "note": f"intermediate merges for {self.out.name}", "finishing": finishing}
        try:
            write_inside(self.folder, LIST, (json.dumps({**said, "stages": stages}, indent=1) + "\n").encode())
        except OSError as error:
            raise OutputError(f"{self.folder / LIST}: cannot be written: {error.strerror}.") from error

    # -- the end --------------------------------------------------------------------------------------------------

    def _tidy_finished(self) -> None:
        """Removes the stages of an OUT that is whole, if a merge was killed before it did that itself."""
        whole = standing_output(self.out) == self.out and self.out.is_dir() and any(self.out.iterdir())
        if not whole or work_folder(self.out).exists() or self.folder.is_symlink():
            return
        said = self._read()
        if said["finishing"] if said is not None else self.folder.is_dir() and self._is_ours():
            with self.locked():
                self.remove()

    def remove(self) -> str | None:
        """Removes the stages. What rlmerge did not make stays, and so does the folder then: returns why, or None."""
        try:
            for name in self._records():
                folder = self.place(name)
                if folder.is_dir() and not folder.is_symlink() and foreign_to(folder) is None:
                    self._drop(folder)
                if work_folder(folder).is_dir() and is_unfinished(work_folder(folder)):
                    self._drop(work_folder(folder))
                self._drop_removed(folder)
            left = sorted(path.name for path in self.folder.iterdir() if path.name not in ("lock", LIST))
            if left:
                return f"{self.folder}: stays, as it holds {left[0]}, which rlmerge did not make"
            for name in (LIST, "lock"):  # the lock last: it says that somebody is at it
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:
            return f"{self.folder}: could not be removed: {error.strerror}"
        return None

    def _drop(self, folder: Path) -> None:
        """Removes a folder so that it is never seen in part."""
        if os.path.lexists(folder):
            self._drop_removed(folder)
            folder.rename(self._removed(folder))
        self._drop_removed(folder)

    def _removed(self, folder: Path) -> Path:
        return folder.with_name(folder.name.removesuffix(".unfinished") + ".removed")

    def _drop_removed(self, folder: Path) -> None:
        removed = self._removed(folder)
        if removed.is_dir() and not removed.is_symlink():
            shutil.rmtree(removed)
