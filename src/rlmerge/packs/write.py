"""Makes a delta pack of an expert and its base: in pieces, in threads, in memory that does not grow with the model."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.copied import other_files
from rlmerge.checkpoint.folder import DELTA, MERGED_DTYPES, NOTE, Checkpoint, open_checkpoint
from rlmerge.checkpoint.header import TensorInfo, equal_bytes
from rlmerge.checkpoint.layout import WIDTH
from rlmerge.checkpoint.pack import CHUNK, FORMAT, ROW_BYTES, identify, read_bytes
from rlmerge.checkpoint.pack_steps import WORDS, reference_words
from rlmerge.checkpoint.reading import read_file
from rlmerge.disk_errors import disk_errors
from rlmerge.errors import CheckpointError, MismatchError, PackError
from rlmerge.execute.inputs import changed, stamps_of
from rlmerge.execute.safe_files import write_inside
from rlmerge.execute.whole_folder import whole_folder
from rlmerge.kernels import Backend, load_kernels
from rlmerge.settings import check_run, default_threads
from rlmerge.version import VERSION

PIECE = 2**20
"""Coordinates that a thread handles at once: whole chunks."""
INDEX = "model.safetensors.index.json"
METADATA = {"format": "rlmerge-pack"}


@dataclass(frozen=True)
class Packing:
    """How far a pack is: bytes read of base and expert, and in all."""

    done: int
    total: int


@dataclass(frozen=True)
class Packed:
    """A finished pack.

    bytes, expert_bytes   of the pack's files, and of the expert's weights and small files
    coordinates, changed  of the tensors that are stored as steps from the base, and how many of them differ
    step_bytes            what these take
    whole                 tensors that are stored as they are, with the reason
    """

    out: Path
    bytes: int
    expert_bytes: int
    coordinates: int
    changed: int
    step_bytes: int
    whole: dict[str, str]
    seconds: float

    @property
    def bits_per_change(self) -> float | None:
        """Bits that a changed coordinate takes, position and step."""
        return 8 * self.step_bytes / self.changed if self.changed else None


@disk_errors()
def pack(
    expert: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    kernels: Backend = "auto",
    progress: Callable[[Packing], None] = lambda step: None,
) -> Packed:
    """Writes what training changed in `base` to make `expert` into the folder `out`, which appears whole.

    `unpack` makes every byte of the expert's weights and small files of it again. `overwrite` replaces an earlier pack.
    Raises MismatchError for models that have nothing in common, PackError for what is no full model, OutputError for
    the folder.
    """
    started = time.monotonic()
    check_run(threads, kernels, 10**9)
    old, new = _open(base, "base"), _open(expert, "expert")
    kinds, reasons = _sort(old, new)
    target = Path(os.path.abspath(out))
    inputs = [header.file for model in (old, new) for header in model.headers]
    stamps = stamps_of(inputs)
    with whole_folder(target, [new.folder, old.folder], overwrite, lambda folder: (folder / NOTE).is_file()) as folder:
        note = {
            "format": FORMAT,
            "rlmerge": VERSION,
            "base": {"reference": _seen_from(target, old.folder), "hash": identify(old)},
            "weights": [header.file.name for header in new.headers],
            "files": _write_small_files(old, new, folder),
        }
        run = _Run(old, new, kinds, load_kernels(kernels, 2 * sum(info.size for info in new.tensors.values())))
        note["tensors"] = run.write(folder / DELTA, threads or default_threads(), progress)
        for path, before, now in zip(inputs, stamps, stamps_of(inputs), strict=True):
            if before != now:
                raise CheckpointError(changed(path))
        write_inside(folder, NOTE, (json.dumps(note, indent=1, ensure_ascii=False) + "\n").encode())
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    small = sum((new.folder / name).stat().st_size for name in note["files"])
    whole = sum(header.size for header in new.headers) + small
    steps = [new.tensors[name].size for name, kind in kinds.items() if kind in ("steps", "same")]
    return Packed(target, size, whole, sum(steps), run.changed, run.step_bytes, reasons, time.monotonic() - started)


def _seen_from(pack: Path, base: Path) -> str:
    """The relative path from a pack to its base past the links on either way: `..` goes up where things lie."""
    return os.path.relpath(base.resolve(), pack.parent.resolve() / pack.name)


def _open(folder: Path | str, role: str) -> Checkpoint:
    found = open_checkpoint(Path(folder))
    if found.adapter:
        raise PackError(f"{folder}: is a LoRA adapter, which is small as it is. Recipes take it beside packs.")
    if found.pack is not None:
        raise PackError(f"{folder}: is a delta pack already. Write the full {role} (rlmerge unpack makes it).")
    return found


def _sort(base: Checkpoint, expert: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """How each tensor of the expert is stored ('steps', 'same', 'whole', 'copy NAME'), and why the whole ones are."""
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, info in expert.tensors.items():
        if "#" in name:
            raise PackError(
                f"{info.file}: tensor {name!r}: a pack has a meaning of its own for '#'. Rename the tensor."
            )
        twin = base.tensors.get(name)
        if twin is not None and twin.shape == info.shape and {twin.dtype, info.dtype} <= MERGED_DTYPES and info.size:
            kinds[name] = "steps"
        elif twin is not None and (twin.shape, twin.dtype) == (info.shape, info.dtype) and equal_bytes(info, twin):
            kinds[name] = "same"
        elif (first := _tied_to(info, base, expert)) is not None:
            kinds[name] = f"copy {first}"
        else:
            kinds[name] = "whole"
            reasons[name] = (
                "not in the base" if twin is None else f"{info.dtype} {list(info.shape)}, another in the base"
            )
            if twin is not None and (twin.shape, twin.dtype) == (info.shape, info.dtype):
                reasons[name] = f"{info.dtype} has no steps"
    if not any(kind in ("steps", "same") for kind in kinds.values()):
        raise MismatchError(
            f"{expert.reference}: has no tensor in common with {base.reference} ({next(iter(expert.tensors))!r} and "
            f"{next(iter(base.tensors))!r}), so it was not trained from it. Write the base that it was trained from."
        )
    return kinds, reasons


def _tied_to(info: TensorInfo, base: Checkpoint, expert: Checkpoint) -> str | None:
    """The tensor of the expert that a matrix which the base does not have repeats: a tied head, as a rule."""
    if info.name in base.tensors or len(info.shape) != 2:
        return None
    for name, other in expert.tensors.items():
        if name in base.tensors and (other.shape, other.dtype) == (info.shape, info.dtype) and equal_bytes(info, other):
            return name
    return None


def _write_small_files(base: Checkpoint, expert: Checkpoint, folder: Path) -> dict[str, dict[str, str]]:
    """Copies the expert's small files that the base has not, and says of all where they are."""
    files = other_files(expert.folder)
    files += [file for name in ("README.md", INDEX) if (file := expert.folder / name).is_file()]
    said = {}
    for file in files:
        name, data = file.relative_to(expert.folder).as_posix(), read_file(file, None)
        if name in (NOTE, DELTA):
            raise PackError(f"{file}: a pack has a file of this name itself. Rename the expert's.")
        twin = base.folder / name
        same = twin.is_file() and twin.stat().st_size == len(data) and read_file(twin, None) == data
        said[name] = {"xxh3_128": xxhash.xxh3_128_hexdigest(data), "in": "base" if same else "pack"}
        if not same:
            write_inside(folder, name, data)
    return said


@dataclass
class _Piece:
    """What a thread made of [start, stop) of a tensor."""

    raw: bytes
    data: NDArray[np.uint64]
    table: NDArray[np.uint32]
    base_sum: int


@dataclass
class _Tensor:
    """A tensor while its pieces come."""

    info: TensorInfo
    kind: str
    table: list[NDArray[np.uint32]] = field(default_factory=list)
    words: int = 0
    changed: int = 0
    base_sum: int = 0
    digest: Any = field(default_factory=xxhash.xxh3_128)


class _Run:
    """One pack on its way to delta.safetensors."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, kinds: dict[str, str], kernels: ModuleType) -> None:
        self.base = base
        self.expert = expert
        self.kinds = kinds
        self.kernels = kernels
        self.changed = 0
        self.step_bytes = 0

    def write(self, path: Path, threads: int, progress: Callable[[Packing], None]) -> dict[str, Any]:
        """Writes the streams behind room for the header, then the header. Returns what pack.json says of tensors."""
        said: dict[str, Any] = {}
        done, total = 0, sum(info.nbytes for info in self.expert.tensors.values())
        with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
            out = _DeltaFile(file, _room(self.expert, self.kinds))
            for tensor, piece, last in self._pieces(pool, threads):
                info = tensor.info
                tensor.digest.update(piece.raw)
                done += len(piece.raw)
                if tensor.kind == "whole":
                    out.append(info.name, info.dtype, info.shape, memoryview(piece.raw), last)
                elif tensor.kind == "steps":
                    used = piece.data.size
                    piece.table[:, 0] += np.uint32(tensor.words)
                    tensor.words += used
                    tensor.changed += int(piece.table[:, 1].sum(dtype=np.int64))
                    tensor.base_sum += piece.base_sum
                    tensor.table.append(piece.table)
                    out.append(f"{info.name}#steps", "U64", (tensor.words,), piece.data.view(np.uint8).data, False)
                if last:
                    said[info.name] = self._finish(tensor, out)
                progress(Packing(done, total))
            for header in self.expert.headers:
                out.append(f"{header.file.name}#header", "U8", None, memoryview(_raw_header(header.file)), True)
            out.finish()
        return said

    def _finish(self, tensor: _Tensor, out: _DeltaFile) -> dict[str, Any]:
        info, digest = tensor.info, tensor.digest.hexdigest()
        if tensor.kind.startswith("copy "):
            return {"kind": "copy", "of": tensor.kind.removeprefix("copy ")}
        if tensor.kind != "steps":
            return {"kind": tensor.kind, "xxh3_128": digest}
        found = {"xxh3_128": digest, "base_sum": f"{tensor.base_sum % 2**64:016x}"}
        if tensor.changed == 0:
            out.drop(f"{info.name}#steps")
            return {"kind": "same", **found}
        if tensor.words >= 2**32:
            raise PackError(f"{info.file}: tensor {info.name!r} is too large: its steps take more than 32 GiB.")
        table = np.concatenate(tensor.table)
        out.append(f"{info.name}#chunks", "U32", table.shape, table.reshape(-1).view(np.uint8).data, True)
        self.changed += tensor.changed
        self.step_bytes += tensor.words * 8 + table.nbytes
        return {"kind": "steps", "changed": tensor.changed, **found}

    def _pieces(self, pool: ThreadPoolExecutor, threads: int) -> Iterator[tuple[_Tensor, _Piece, bool]]:
        """All pieces of all tensors, in order, some of them made ahead; and whether it is the last of its tensor."""
        waiting: deque[tuple[_Tensor, Future[_Piece], bool]] = deque()
        try:
            for name, kind in self.kinds.items():
                tensor = _Tensor(self.expert.tensors[name], kind)
                ranges = range(0, max(tensor.info.size, 1), PIECE)
                for start in ranges:
                    stop = min(start + PIECE, tensor.info.size)
                    job = pool.submit(self._make, tensor, start, stop)
                    waiting.append((tensor, job, start == ranges[-1]))
                    if len(waiting) > threads + 1:
                        one, job, last = waiting.popleft()
                        yield one, job.result(), last
            while waiting:
                one, job, last = waiting.popleft()
                yield one, job.result(), last
        finally:
            for _, job, _ in waiting:
                job.cancel()

    def _make(self, tensor: _Tensor, start: int, stop: int) -> _Piece:
        info, width = tensor.info, WIDTH[tensor.info.dtype]
        raw = read_bytes(info, start * width, (stop - start) * width)
        empty = np.empty(0, np.uint64), np.empty((0, 4), np.uint32)
        if tensor.kind != "steps":
            return _Piece(raw, *empty, 0)
        twin = self.base.tensors[info.name]
        wide = WIDTH[twin.dtype]
        stored = np.frombuffer(read_bytes(twin, start * wide, (stop - start) * wide), WORDS[twin.dtype])
        new = np.frombuffer(raw, WORDS[info.dtype])
        old = reference_words(stored, twin.dtype, info.dtype, self.kernels)
        chunks = -(-new.size // CHUNK)
        data = np.zeros(chunks * CHUNK * width // 8 + 1, np.uint64)
        table = np.zeros((chunks, ROW_BYTES // 4), np.uint32)
        used = self.kernels.encode_steps(old, new, data, table)
        return _Piece(raw, data[:used].copy(), table, int(self.kernels.weigh(stored, start)))


class _DeltaFile:
    """delta.safetensors while it grows: room for the header first, then tensors one after the other."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room
        self._at = 0
        self._entries: dict[str, Any] = {}
        file.truncate(room)
        file.seek(room)

    def append(self, name: str, dtype: str, shape: tuple[int, ...] | None, data: Any, last: bool) -> None:
        """More bytes of a tensor; no other one may come between. Shape None: as many bytes as there are."""
        entry = self._entries.setdefault(name, {"dtype": dtype, "shape": [], "data_offsets": [self._at, self._at]})
        self._file.write(data)
        self._at += len(data)
        entry["data_offsets"][1] = self._at
        entry["shape"] = [len(data)] if shape is None else list(shape)

    def drop(self, name: str) -> None:
        """Forgets the tensor that came last and takes no more room than it must."""
        start, _ = self._entries.pop(name)["data_offsets"]
        self._at = start
        self._file.seek(self._room + start)
        self._file.truncate()

    def finish(self) -> None:
        """Writes the header into its room."""
        text = json.dumps({"__metadata__": METADATA, **self._entries}, ensure_ascii=False).encode()
        text += b" " * (self._room - 8 - len(text))
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)


def _room(expert: Checkpoint, kinds: dict[str, str]) -> int:
    """Bytes that the header takes at most, a multiple of 8."""
    most = 10 ** len(str(2 * sum(header.size for header in expert.headers) + 10**6))
    entries: dict[str, Any] = {"__metadata__": METADATA}
    for name, kind in kinds.items():
        if kind == "steps":
            entries[f"{name}#steps"] = {"dtype": "U64", "shape": [most], "data_offsets": [most, most]}
            entries[f"{name}#chunks"] = {"dtype": "U32", "shape": [most, 4], "data_offsets": [most, most]}
        elif kind == "whole":
            shape = list(expert.tensors[name].shape)
            entries[name] = {"dtype": expert.tensors[name].dtype, "shape": shape, "data_offsets": [most, most]}
    for header in expert.headers:
        entries[f"{header.file.name}#header"] = {"dtype": "U8", "shape": [most], "data_offsets": [most, most]}
    return -(-(8 + len(json.dumps(entries, ensure_ascii=False).encode())) // 8) * 8


def _raw_header(file: Path) -> bytes:
    """The header of a safetensors file with its length field."""
    try:
        with file.open("rb") as opened:
            field = opened.read(8)
            return field + opened.read(int.from_bytes(field, "little"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}.") from error
