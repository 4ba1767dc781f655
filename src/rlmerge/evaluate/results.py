"""The results file: one JSONL file of one model on one task; a header line, then one line for every sample.

    {"format": 1, "kind": "rlmerge results", "model": "merged", "task": "gsm8k", "settings": {…}, "problems": 1319}
    {"id": "gsm8k/17", "sample": 0, "correct": true, "reason": "equal", "completion": "…", "tokens": 212}

Lines are appended as samples are verified: an interrupted run is a shorter file, and the next one continues it. A last
line without its end was torn by a kill: readers ignore it, the writer cuts it off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from rlmerge.errors import RlmergeError

FORMAT = 1
KIND = "rlmerge results"
ROLES = ("", "base", "expert", "merged")


class ResultsError(RlmergeError):
    """A results file that cannot be read, belongs to another run, or cannot be compared with another."""


@dataclass(frozen=True)
class Header:
    """What was evaluated, and how.

    model      what was evaluated: a folder or a hub's name
    task       name of the task; results of one task are compared with each other
    settings   all that decides the samples: prompt, temperature, samples, most tokens, the sampling `seed`, …;
               a file is continued only with the same settings, and compared only with the same but for `seed`
    problems   how many there are, so that an unfinished file shows
    role       'base', 'expert', 'merged', or '' where that is not known
    name       what to call the model; models of one name and several seeds are one row. '' for `model`
    seed       training seed of the model, where there are several models trained alike
    identity   what tells the model from others of its path or name, such as a digest of its weights
    """

    model: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    problems: int | None = None
    role: str = ""
    name: str = ""
    seed: int | None = None
    identity: str = ""

    @property
    def label(self) -> str:
        """What to call the model."""
        return self.name or self.model

    def as_dict(self) -> dict[str, Any]:
        """The first line of the file."""
        return {"format": FORMAT, "kind": KIND} | self.__dict__


@dataclass(frozen=True)
class Sample:
    """One verified completion.

    id          of the problem
    sample      0, 1, … among the samples of the problem
    tokens      length of the completion
    more        further keys of the line, such as 'answer'
    """

    id: str
    sample: int
    correct: bool
    reason: str = ""
    completion: str = ""
    tokens: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A line of the file."""
        plain = {key: value for key, value in self.__dict__.items() if key != "more"}
        return self.more | plain


@dataclass(frozen=True)
class Scores:
    """Per problem, sorted by id: n samples and c right ones."""

    ids: tuple[str, ...]
    n: tuple[int, ...]
    c: tuple[int, ...]


@dataclass(frozen=True)
class Results:
    """A results file whose header is read. Samples are read when they are asked for, one at a time."""

    path: Path
    header: Header

    @classmethod
    def load(cls, path: Path | str) -> Results:
        """Reads the header. Raises ResultsError."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                line = file.readline()
        except OSError as error:
            raise ResultsError(f"{path}: cannot be read: {error.strerror}.") from None
        return cls(path, _header(path, line))

    def __iter__(self) -> Iterator[Sample]:
        """The samples in the order of the file. Raises ResultsError for a line that is none, and for a second one."""
        with self.path.open("rb") as file:
            for sample, _ in _samples(self.path, file):
                yield sample


def scores(results: Results) -> Scores:
    """How many samples of each problem there are, and how many are right. Raises ResultsError if there are none."""
    found: dict[str, list[int]] = {}
    for sample in results:
        counts = found.setdefault(sample.id, [0, 0])
        counts[0] += 1
        counts[1] += sample.correct
    if not found:
        raise ResultsError(f"{results.path}: holds no samples yet. Run the evaluation to its end first.")
    ids = sorted(found)
    return Scores(tuple(ids), tuple(found[i][0] for i in ids), tuple(found[i][1] for i in ids))


class ResultsWriter:
    """Appends samples to a results file, and knows which are there: `done` holds (problem id, sample) pairs.

    with ResultsWriter.open(path, header) as writer:
        ...
        writer.append(Sample("gsm8k/17", 0, True, "equal", completion, 212))
    """

    def __init__(self, path: Path, file: BinaryIO, done: set[tuple[str, int]]) -> None:
        self.path = path
        self.done = done
        self._file = file

    @classmethod
    def open(cls, path: Path | str, header: Header) -> ResultsWriter:
        """Starts a file, or continues one that has this header. Raises ResultsError, and OSError."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = _line(header.as_dict())
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultsError(f"{path}: another run is writing it. Wait for it, or write elsewhere.") from None
            done = _continue(path, file, header, line)
        except BaseException:
            file.close()
            raise
        return cls(path, file, done)

    def append(self, sample: Sample) -> None:
        """Writes one line, whole and at once. Raises ResultsError for a sample that is there."""
        key = (sample.id, sample.sample)
        if key in self.done:
            raise ResultsError(f"{self.path}: sample {sample.sample} of problem {sample.id!r} is there already.")
        self._file.write(_line(sample.as_dict()))
        self._file.flush()
        self.done.add(key)

    def close(self) -> None:
        """Makes the file durable and lets go of it."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _continue(path: Path, file: BinaryIO, header: Header, line: bytes) -> set[tuple[str, int]]:
    """Which samples an open file holds; it is left at its end, with a header and without a torn line."""
    first = file.readline()
    if not first.endswith(b"\n"):
        if not line.startswith(first):
            raise ResultsError(f"{path}: is no results file. Write elsewhere, or remove it.")
        file.seek(0)
        file.truncate()
        file.write(line)
        file.flush()
        return set()
    there = _header(path, first)
    wanted = json.loads(line)
    if there.as_dict() != wanted:
        what = "\n".join(f"  {text}" for text in differences(there.as_dict(), wanted, "there", "this run"))
        raise ResultsError(f"{path}: holds the results of another run:\n{what}\nWrite elsewhere, or remove it.")
    file.seek(0)
    found = list(_marks(path, file))
    file.seek(found[-1][1] if found else len(first))
    file.truncate()
    return {key for key, _ in found}


def _marks(path: Path, file: BinaryIO) -> Iterator[tuple[tuple[str, int], int]]:
    """Of each sample, problem and number, and where its line ends; not its text, of which there may be much."""
    return (((sample.id, sample.sample), end) for sample, end in _samples(path, file))


def differences(one: dict[str, Any], other: dict[str, Any], first: str, second: str, place: str = "") -> list[str]:
    """Which keys differ, nested ones by their path: 'settings.temperature: 0 (there), 1 (this run)'."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, first, second, f"{place}{key}.")
        elif a != b or (key in one) != (key in other):
            words = [json.dumps(side[key]) if key in side else "nothing" for side in (one, other)]
            found.append(f"{place}{key}: {words[0]} ({first}), {words[1]} ({second})")
    return found


def _line(entry: dict[str, Any]) -> bytes:
    # ASCII: a completion may hold half a surrogate pair, and other readers may split lines at U+2028
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _header(path: Path, line: bytes) -> Header:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or entry.get("kind") != KIND:
        raise ResultsError(f'{path}: is no results file: its first line is not a header with "kind": "{KIND}".')
    if entry.get("format") != FORMAT:
        raise ResultsError(f"{path}: has format {entry.get('format')!r}; this rlmerge reads {FORMAT}.")
    types: dict[str, Any] = {
        "model": str, "task": str, "settings": dict, "problems": int | None,
        "role": str, "name": str, "seed": int | None, "identity": str,
    }  # fmt: skip
    given = {key: entry[key] for key in types if key in entry}
    wrong = [key for key, value in given.items() if not isinstance(value, types[key]) or isinstance(value, bool)]
    wrong += [key for key in ("model", "task") if not given.get(key)]
    if wrong or given.get("role", "") not in ROLES:
        raise ResultsError(f"{path}: line 1: {(wrong or ['role'])[0]!r} is missing or has a wrong value.")
    return Header(**given)


def _samples(path: Path, file: BinaryIO) -> Iterator[tuple[Sample, int]]:
    """The samples, each with the position of its end; a torn last line is no sample."""
    end, seen = len(file.readline()), set()
    for number, line in enumerate(file, start=2):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        sample = _sample(path, number, line)
        if (sample.id, sample.sample) in seen:
            raise ResultsError(f"{path}: line {number}: sample {sample.sample} of {sample.id!r} stands there twice.")
        seen.add((sample.id, sample.sample))
        yield sample, end


def _sample(path: Path, number: int, line: bytes) -> Sample:
    types = {"id": str, "sample": int, "correct": bool, "reason": str, "completion": str, "tokens": int}
    try:
        entry = json.loads(line)
    except ValueError:
        raise ResultsError(f"{path}: line {number}: is not JSON. The file was damaged; evaluate again.") from None
    if not isinstance(entry, dict):
        raise ResultsError(f"{path}: line {number}: is not an object.")
    for key, kind in types.items():
        value = entry.get(key)
        missing = key in ("id", "sample", "correct") if key not in entry else not isinstance(value, kind)
        if missing or (kind is int and isinstance(value, bool)):
            raise ResultsError(f"{path}: line {number}: {key!r} is missing or is no {kind.__name__}.")
    more = {key: value for key, value in entry.items() if key not in types}
    return Sample(**{key: entry[key] for key in types if key in entry}, more=more)
