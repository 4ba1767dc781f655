"""From a pack and its base back to the expert: any range of a tensor, all tensors, or the folder, bit for bit."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.layout import WIDTH
from rlmerge.checkpoint.pack import Pack, find_base, read_bytes
from rlmerge.checkpoint.pack_steps import WORDS, Tables, add_steps, read_table, reference_words
from rlmerge.checkpoint.reading import read_file
from rlmerge.disk_errors import disk_errors
from rlmerge.errors import CheckpointError, MismatchError, PackError
from rlmerge.execute.safe_files import open_inside, write_inside
from rlmerge.execute.whole_folder import whole_folder
from rlmerge.kernels import Backend, load_kernels
from rlmerge.settings import check_run, default_threads

from .write import PIECE, Packing


@dataclass(frozen=True)
class Unpacked:
    """A finished expert: its folder, the bytes of its weights, how many files and tensors."""

    out: Path
    bytes: int
    files: int
    tensors: int
    seconds: float


@dataclass(frozen=True)
class Stretch:
    """Coordinates [start, stop) of a tensor as the expert's file has them; `last` of its tensor or not."""

    name: str
    start: int
    raw: NDArray[np.uint8]
    last: bool


@disk_errors()
def unpack(
    pack: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    threads: int | None = None,
    kernels: Backend = "auto",
    progress: Callable[[Packing], None] = lambda step: None,
) -> Unpacked:
    """Writes the expert that a pack was made of into the new folder `out`: the same bytes in every file.

    base    where the base is, if not where the pack says
    Raises PackError for a damaged pack, MismatchError for another base, OutputError for the folder. All bytes are
    compared with the digests of the pack before the folder appears.
    """
    started = time.monotonic()
    check_run(threads, kernels, 10**9)
    packed = open_packed(Path(pack))
    found = find_base(packed, base)
    reader = Reader(packed, found, kernels)
    places = {info.name: (header.file.name, info) for header in reader.pack.weights for info in header.tensors.values()}
    total, done = sum(info.nbytes for _, info in places.values()), 0
    with whole_folder(Path(out), [packed.folder, found.folder], False, lambda folder: False) as folder:
        handles: dict[str, int] = {}
        try:
            for header in reader.pack.weights:
                name = header.file.name
                handles[name] = open_inside(folder, name, os.O_RDWR)
                os.ftruncate(handles[name], header.size)
                _write_all(handles[name], reader.pack.raw_headers[name], 0)
            for stretch in reader.stretches(threads or default_threads()):
                file, info = places[stretch.name]
                _write_all(handles[file], stretch.raw.data, info.start + stretch.start * WIDTH[info.dtype])
                done += stretch.raw.size
                progress(Packing(done, total))
        finally:
            for handle in handles.values():
                os.close(handle)
        for name, data in small_files(reader.pack, found):
            write_inside(folder, name, data)
        count = len(handles) + len(reader.pack.files)
    return Unpacked(Path(os.path.abspath(out)), total, count, len(places), time.monotonic() - started)


def open_packed(folder: Path) -> Checkpoint:
    """An opened pack. Raises PackError for a folder that is another kind of model."""
    found = open_checkpoint(folder)
    if found.pack is None:
        kind = "a LoRA adapter" if found.adapter else "a full model"
        raise PackError(f"{folder}: is {kind} and no delta pack. `rlmerge pack` makes one.")
    return found


def small_files(pack: Pack, base: Checkpoint, prose: bool = True) -> Iterator[tuple[str, bytes]]:
    """The expert's files beside the weights, from the pack or from the base; compared with their digests.

    prose   model cards and licences too, which no program reads
    """
    for name, said in pack.files.items():
        if not prose and (name.endswith(".md") or name.upper().startswith("LICEN")):
            continue
        path = (base.folder if said.of_base else pack.folder) / name
        try:
            data = read_file(path, None)
        except CheckpointError as error:
            raise PackError(f"{error} The pack says that the expert had this file.") from error
        if xxhash.xxh3_128_hexdigest(data) != said.digest:
            whose = "the base's file was changed since the pack was made" if said.of_base else "the pack is damaged"
            raise PackError(f"{path}: is not what the expert had: {whose}. Restore it.")
        yield name, data


class Reader:
    """A pack with its base, and the tensors that come of them."""

    def __init__(self, packed: Checkpoint, base: Checkpoint, kernels: Backend = "auto") -> None:
        assert packed.pack is not None
        self.pack: Pack = packed.pack
        self.reference = packed.reference
        self.base = base
        self._tables = Tables()
        self._kernels: ModuleType = load_kernels(kernels, 2 * sum(info.size for info in packed.tensors.values()))

    def stretches(self, threads: int, names: Iterable[str] | None = None) -> Iterator[Stretch]:
        """Tensors (all in the order of the expert's files, or some), in pieces, read by threads; few are in memory.

        Raises PackError or MismatchError at the end of a tensor whose digest is not that of the expert's.
        """
        waiting: deque[tuple[str, int, int, bool, Future[tuple[NDArray[np.uint8], int]]]] = deque()
        state, total = xxhash.xxh3_128(), 0
        with ThreadPoolExecutor(threads) as pool:
            jobs = self._jobs(self.pack.tensors if names is None else names)
            try:
                while True:
                    while len(waiting) <= threads and (job := next(jobs, None)) is not None:
                        waiting.append((*job, pool.submit(self._read, *job[:3])))
                    if not waiting:
                        return
                    name, start, _, last, made = waiting.popleft()
                    raw, part = made.result()
                    state.update(raw.data)
                    total += part
                    if last:
                        self._check(name, state.hexdigest(), total % 2**64)
                        state, total = xxhash.xxh3_128(), 0
                    yield Stretch(name, start, raw, last)
            finally:
                for *_, made in waiting:
                    made.cancel()

    def _jobs(self, names: Iterable[str]) -> Iterator[tuple[str, int, int, bool]]:
        for name in names:
            size = self.pack.tensors[name].size
            ranges = range(0, max(size, 1), PIECE)
            for start in ranges:
                yield name, start, min(start + PIECE, size), start == ranges[-1]

    def _read(self, name: str, start: int, stop: int) -> tuple[NDArray[np.uint8], int]:
        """The bytes of [start, stop) of a tensor, and the weighted sum of the base's words there."""
        info = self.pack.tensors[name]
        if info.kind == "copy":
            info = self.pack.tensors[info.of]
        width = WIDTH[info.dtype]
        if info.kind == "whole":
            return np.frombuffer(read_bytes(info, start * width, (stop - start) * width), np.uint8), 0
        twin = self.base.tensors[info.name]
        wide = WIDTH[twin.dtype]
        stored = np.frombuffer(read_bytes(twin, start * wide, (stop - start) * wide), np.uint8)
        if twin.dtype not in WORDS:
            return stored, 0
        old = stored.view(WORDS[twin.dtype])
        words = reference_words(old, twin.dtype, info.dtype, self._kernels)
        if info.kind == "steps":
            assert info.table is not None
            reference, words = words, np.empty_like(words)
            where = f"{info.file}: tensor {info.name!r}"
            table, width = _reader(info.table), words.itemsize
            rows = self._tables.get(info.name, lambda: read_table(info.size, width, info.nbytes, table, where))
            add_steps(reference, words, start, info.size, rows, _reader(info), self._kernels, where)
        return words.view(np.uint8), int(self._kernels.weigh(old, start))

    def _check(self, name: str, digest: str, total: int) -> None:
        info = self.pack.tensors[name]
        if digest == info.digest:
            return
        if info.base_sum and total != int(info.base_sum, 16):
            raise MismatchError(
                f"{self.base.tensors[name].file}: tensor {name!r} is not that of the base for which {self.reference} "
                f"was made: its words add up to {total:016x}, and those of that base to {info.base_sum}. Write the "
                "base that it was made for."
            )
        raise PackError(
            f"{self.pack.folder}: tensor {name!r} comes out with digest {digest}, and the expert's had "
            f"{info.digest}: the pack is damaged. Copy or make it again."
        )


def _reader(info: TensorInfo) -> Callable[[int, NDArray[np.uint8]], None]:
    def read(first: int, out: NDArray[np.uint8]) -> None:
        out[:] = np.frombuffer(read_bytes(info, first, out.size), np.uint8)

    return read


def _write_all(handle: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, at)
        view, at = view[count:], at + count
