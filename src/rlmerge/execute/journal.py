"""The journal of a run: one JSON line for each finished stage and each written unit, so that nothing is done twice.

A line is appended after the bytes it speaks of are written, in one `write`; a line that was cut off by a kill is
ignored. No fsync is needed for a killed process, only for a lost machine (`--fsync`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.errors import OutputError
from rlmerge.methods.base import Result

from .leftovers import is_journal
from .safe_files import close_quietly, open_inside
from .work import UnitRecord


class Results:
    """Results of finished stages: by group and tensor ('' for the whole model), then by stage name."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], dict[str, Result]] = {}

    def put(self, group: int, tensor: str, stage: str, result: Result) -> None:
        """Keeps a result."""
        self._found.setdefault((group, tensor), {})[stage] = result

    def of(self, group: int, tensor: str) -> dict[str, Result]:
        """All results that a tensor sees: the model's and its own."""
        return {**self._found.get((group, ""), {}), **self._found.get((group, tensor), {})}

    def listed(self, tensor: str) -> list[tuple[int, str, Result]]:
        """The results of a tensor as (group, stage, result)."""
        found = ((group, stages) for (group, name), stages in self._found.items() if name == tensor)
        return [(group, stage, result) for group, stages in found for stage, result in stages.items()]


def signed(line: bytes) -> bytes:
    """A line of JSON with its own xxh3 as the last key, for a flipped bit in a number is a number, too."""
    return line[:-1] + b', "xxh3": "%s"}\n' % xxhash.xxh3_64_hexdigest(line).encode()


def is_signed(raw: bytes) -> bool:
    """Whether a line is as it was written."""
    line, _, signature = raw.rpartition(b', "xxh3": "')
    return signature == b'%s"}\n' % xxhash.xxh3_64_hexdigest(line + b"}").encode()


class Journal:
    """An append-only file of JSON lines; in memory only when there is no path."""

    def __init__(self, path: Path | None, digest: str, stamps: list[list[int]], fsync: bool = False) -> None:
        self.path = path
        self.results = Results()
        self.units: dict[tuple[int, int], UnitRecord] = {}
        self._lock = threading.Lock()
        self._fsync = fsync
        self._handle: int | None = None
        if path is None:
            return
        if path.exists() and not is_journal(path):
            raise OutputError(f"{path}: is not a journal that rlmerge wrote, so it is not written over. Move it away.")
        self._handle = open_inside(path.parent, path.name, os.O_RDWR)
        try:
            kept = self._load(self._handle, path, digest, stamps)
            os.ftruncate(self._handle, kept)
            os.lseek(self._handle, kept, os.SEEK_SET)
        except BaseException:
            self.close()
            raise
        if kept == 0:
            self._append({"plan": digest, "stamps": stamps, "started": time.time()})

    def stage(self, group: int, tensor: str, stage: str, result: Result) -> None:
        """A stage is finished for a tensor, or for the model ('')."""
        with self._lock:
            self.results.put(group, tensor, stage, result)
            self._append({"stage": stage, "group": group, "tensor": tensor, "result": result})

    def unit(self, record: UnitRecord) -> None:
        """A unit is merged and its bytes are written."""
        with self._lock:
            self.units[record.tensor, record.unit] = record
            self._append({"unit": {entry.name: getattr(record, entry.name) for entry in fields(record)}})

    def forget(self, keys: set[tuple[int, int]]) -> None:
        """Units whose bytes are not what the journal says are done again."""
        for key in keys:
            del self.units[key]

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            close_quietly(self._handle)
            self._handle = None

    def _append(self, line: dict[str, Any]) -> None:
        if self._handle is None:
            return
        data = signed(json.dumps(line).encode())
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            if self._fsync:
                os.fsync(self._handle)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written: {error.strerror}. What is done is kept; the same command continues."
            ) from error

    def _load(self, handle: int, path: Path, digest: str, stamps: list[list[int]]) -> int:
        """Reads the whole lines of an earlier run. Returns how many bytes of the file are good."""
        good = 0
        with open(handle, "rb", closefd=False) as file:
            for number, raw in enumerate(file):
                try:
                    line = json.loads(raw) if raw.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict):
                    break
                if number == 0:
                    self._check(path, line, digest, stamps)
                # damaged: what follows is done again
                if not is_signed(raw) or (number > 0 and not self._take(line)):
                    break
                good += len(raw)
        return good

    def _take(self, line: dict[str, Any]) -> bool:
        """One line of an earlier run; False if it is none of ours."""
        try:
            if "stage" in line:
                self.results.put(line["group"], line["tensor"], line["stage"], dict(line["result"]))
            else:
                record = UnitRecord(**line["unit"])
                self.units[int(record.tensor), int(record.unit)] = record
        except (KeyError, TypeError, ValueError):
            return False
        return True

    @staticmethod
    def _check(path: Path, line: dict[str, Any], digest: str, stamps: list[list[int]]) -> None:
        if line.get("plan") != digest:
            raise OutputError(
                f"{path.parent}: an unfinished merge of another recipe, other inputs, another plugin or another "
                "version of rlmerge.\n"
                "  Finish it with its own command, or throw it away with --overwrite."
            )
        if line.get("stamps") != stamps:
            raise OutputError(
                f"{path.parent}: the input files were changed since this merge was begun, so it cannot be continued.\n"
                "  Start again with --overwrite."
            )
