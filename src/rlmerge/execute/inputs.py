"""Reads the inputs of a plan: pread into reused buffers, decode to fp32, deltas of adapters on the fly.

Nothing is mapped, so a file that is cut short while we read it is an error and not a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.header import read_header
from rlmerge.checkpoint.layout import WIDTH
from rlmerge.checkpoint.pack_steps import WORDS, Read, Tables, add_steps, read_table, reference_words
from rlmerge.errors import CheckpointError, FisherError, NonFiniteError
from rlmerge.plan import GatheredPlace, Place, Plan, TensorPlan

from .blocks import InputBlock, reference_of
from .memory import Memo, Space
from .rows import RowReader
from .safe_files import close_quietly


class Hashes:
    """Running xxh3-128 of what a unit reads of each input: base, experts, Fishers, in the order of coordinates.

    Several stages read the same bytes; each input is hashed the first time that it is read from the start.
    """

    def __init__(self, start: int, fishers: int = 0) -> None:
        self.start = start
        self.sums = np.zeros(fishers)
        """Σ F of what was read of each Fisher."""
        self.base_sum = 0
        """Weighted sum, modulo 2⁶⁴, of what was read of the base, where a pack says what it must be."""
        self.states: dict[int, Any] = {}
        self.reached: dict[int, int] = {}

    def update(self, number: int, start: int, stop: int, data: Any) -> None:
        """Adds the bytes of coordinates [start, stop) of input `number`, unless they were added before."""
        if self.is_new(number, start):
            self.states.setdefault(number, xxhash.xxh3_128()).update(data)
            self.reached[number] = stop

    def is_new(self, number: int, start: int) -> bool:
        """Whether the bytes of input `number` from this coordinate on were not added before."""
        return self.reached.get(number, self.start) == start

    def was_read(self, number: int, start: int) -> bool:
        """Whether the bytes of input `number` at this coordinate were added before."""
        return self.reached.get(number, self.start) > start

    def digests(self, count: int) -> list[str]:
        """Hexadecimal digests of inputs 0 … count - 1; '' for one that was never read."""
        return [self.states[number].hexdigest() if number in self.states else "" for number in range(count)]


class Inputs:
    """The open input files of a plan."""

    def __init__(self, plan: Plan, kernels: ModuleType) -> None:
        self.plan = plan
        self.kernels = kernels
        self.allow_nonfinite = plan.recipe.allow_nonfinite
        self.min_change = plan.recipe.min_change
        self.bytes_read = 0
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        self._tables = Tables()
        table = plan.vocabulary.table if plan.vocabulary else None
        self._rows = RowReader(table, kernels, self.read_into) if table else None

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            for handle in self._handles.values():
                close_quietly(handle)
            self._handles.clear()

    def stamps(self) -> list[list[int]]:
        """Size and modification time (ns) of every input file: what a resumed run compares."""
        return stamps_of(entry.path for entry in self.plan.files)

    def check_unchanged(self, stamps: list[list[int]]) -> None:
        """Raises CheckpointError for an input file that is not the one of which `stamps` and the plan speak."""
        for entry, stamp in zip(self.plan.files, stamps, strict=True):
            path = Path(entry.path)
            if stamps_of([path]) != [stamp] or read_header(path).digest != entry.digest:
                raise CheckpointError(changed(path))

    def read_into(self, place: Place, first: int, data: NDArray[np.uint8]) -> None:
        """Fills `data` with bytes of a stored tensor, or of one in a new vocabulary, from byte `first` of it."""
        if isinstance(place, GatheredPlace):
            assert self._rows is not None
            self._rows.read_into(place, first, data)
            return
        handle = self._handle(place.file)
        view = data.data.cast("B")
        offset, done = place.start + first, 0
        while done < len(view):
            try:
                count = os.preadv(handle, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.plan.files[place.file].path}: cannot be read: {error.strerror}."
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.plan.files[place.file].path}: ends at byte {offset + done}, where its header promised "
                    "more: it was changed while rlmerge was reading it. Start again when nobody writes it."
                )
            done += count
        with self._lock:
            self.bytes_read += len(view)

    def _handle(self, file: int) -> int:
        if file not in self._handles:
            with self._lock:
                if file not in self._handles:
                    path = self.plan.files[file].path
                    try:
                        self._handles[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from error
        return self._handles[file]

    def block(
        self,
        tensor: int,
        start: int,
        stop: int,
        space: Space,
        hashes: Hashes | None = None,
        memo: Memo | None = None,
        last: bool = False,
    ) -> InputBlock:
        """Coordinates [start, stop) of a tensor; valid until the next block is made with the same space.

        In the `last` pass over a tensor nothing more is put into the memo, only taken from it.
        """
        return InputBlock(self, tensor, start, stop, space, hashes, memo, last)

    def decode(
        self,
        tensor: TensorPlan,
        place: Place,
        start: int,
        out: NDArray[np.float32],
        space: Space,
        hashes: Hashes | None,
        number: int,
        base: NDArray[Any] | None = None,
    ) -> None:
        """Fills out fp32[n] with stored values from coordinate `start`; NonFiniteError unless the recipe allows it.

        base    the base's words there, from which a packed expert is made
        """
        width = WIDTH[place.dtype]
        if place.dtype == "F32":
            raw = out.view(np.uint8)
            if base is not None:
                self.unpack(tensor, place, start, out.view(np.uint32), base)
            else:
                self.read_into(place, start * width, raw)
            # bytes that were hashed before were also looked at before; a sum of Fishers shows what is no number
            summed = hashes is not None and place in tensor.fishers[: hashes.sums.size]
            seen = summed or (hashes is not None and hashes.was_read(number, start))
            bad = 0 if seen else self.kernels.count_nonfinite(out)
        else:
            words = space.get("raw", (out.shape[0],), np.uint16)
            raw = words.view(np.uint8)
            self.read_into(place, start * width, raw)
            decode = self.kernels.decode_bf16 if place.dtype == "BF16" else self.kernels.decode_f16
            bad = decode(words, out)
        if hashes is not None:
            self._note(tensor, hashes, number, start, start + out.shape[0], raw)
        if bad and not self.allow_nonfinite:
            self.refuse(tensor, place, start, out)

    def read_row(
        self,
        tensor: TensorPlan,
        place: Place,
        start: int,
        words: NDArray[np.uint16],
        hashes: Hashes | None,
        number: int,
        base: NDArray[Any] | None = None,
    ) -> None:
        """Fills words uint16[n] with stored words from coordinate `start`; `base` as in `decode`."""
        raw = words.view(np.uint8)
        if base is not None:
            self.unpack(tensor, place, start, words, base)
        else:
            self.read_into(place, 2 * start, raw)
        if hashes is not None:
            self._note(tensor, hashes, number, start, start + words.shape[0], raw)

    def _note(
        self, tensor: TensorPlan, hashes: Hashes, number: int, start: int, stop: int, raw: NDArray[np.uint8]
    ) -> None:
        """Adds an input's bytes to its digest, and those of the base to the sum that packs speak of."""
        if number == 0 and tensor.base is not None and tensor.base_sum and hashes.is_new(0, start):
            hashes.base_sum += int(self.kernels.weigh(raw.view(WORDS[tensor.base.dtype]), start))
        hashes.update(number, start, stop, raw.data)

    def unpack(self, tensor: TensorPlan, place: Place, start: int, words: NDArray[Any], base: NDArray[Any]) -> None:
        """Fills words[n] with those of a packed expert from coordinate `start`: the base's, and the steps from them."""
        assert tensor.base is not None
        old = reference_words(base, tensor.base.dtype, place.dtype, self.kernels)
        if not place.parts:
            words[:] = old
            return
        where = f"{self.plan.files[place.file].path}: tensor {tensor.name!r}"
        rows = self._tables.get(
            (place.file, place.start),
            lambda: read_table(tensor.size, words.itemsize, place.nbytes, self._reader(place.parts[0]), where),
        )
        add_steps(old, words, start, tensor.size, rows, self._reader(place), self.kernels, where)

    def _reader(self, place: Place) -> Read:
        return lambda first, out: self.read_into(place, first, out)

    def add_fisher(self, tensor: TensorPlan, k: int, start: int, values: NDArray[np.float32], hashes: Hashes) -> None:
        """Adds a block of Fisher number k to its sum; a negative entry is an error."""
        negative = np.zeros(1, np.int64)
        total = np.zeros(1)
        self.kernels.fisher_sums(values[None], total, negative)
        if negative[0] or not np.isfinite(total[0]):
            self.refuse_fisher(tensor, k, start, values)
        hashes.sums[k] += total[0]

    def expand_fisher(
        self, tensor: int, k: int, start: int, out: NDArray[np.float32], space: Space, hashes: Hashes | None
    ) -> None:
        """Fills out fp32[n] with Fisher number k, which is stored compactly, from coordinate `start`.

        Where a sparse one has no value, the value is no number: whoever asks for it asks for too much.
        """
        plan = self.plan.tensors[tensor]
        first, second, digest = self._compact(tensor, k, plan, space)
        if hashes is not None:
            number = 1 + len(plan.experts) + k
            hashes.update(number, start, start + out.shape[0], digest if hashes.start == start else b"")
        if plan.fishers[k].kind == "sparse":
            low, high = np.searchsorted(first, [start, start + out.shape[0]])
            out[:] = np.nan
            out[first[low:high] - start] = second[low:high]
            return
        row = second.shape[0]
        rows = np.arange(start // row, -(-(start + out.shape[0]) // row))
        offset = start - int(rows[0]) * row
        total = max(float(first.sum()), np.finfo(np.float64).tiny)
        out[:] = np.outer(first[rows] / total, second).reshape(-1)[offset : offset + out.shape[0]]

    def _compact(self, tensor: int, k: int, plan: TensorPlan, space: Space) -> tuple[NDArray[Any], NDArray[Any], bytes]:
        """Both parts of a compact Fisher, read whole once a tensor and thread, and the digest of their bytes."""
        if (tensor, k) not in space.compact:
            space.compact = {key: value for key, value in space.compact.items() if key[0] == tensor}
            place, found, digest = plan.fishers[k], [], xxhash.xxh3_128()
            for part in place.parts:
                raw = np.empty(part.nbytes, np.uint8)
                self.read_into(part, 0, raw)
                digest.update(raw.data)
                if part.dtype in ("I32", "I64"):
                    found.append(raw.view(np.int32 if part.dtype == "I32" else np.int64))
                    continue
                values = np.empty(part.nbytes // WIDTH[part.dtype], np.float32)
                self._decode_all(part.dtype, raw, values)
                found.append(values.astype(np.float64))
            first, second = found
            bad = not ((second >= 0.0) & (second < np.inf)).all()
            if place.kind == "sparse":
                bad |= bool((np.diff(first) <= 0).any()) or not ((first >= 0) & (first < plan.size)).all()
            else:
                bad |= not ((first >= 0.0) & (first < np.inf)).all()
            if bad:
                raise FisherError(
                    f"{self.plan.files[place.file].path}: the {place.kind} Fisher of tensor {plan.name!r} has values "
                    "that are negative or no number, or positions that do not ascend within it. Estimate it again."
                )
            space.compact[tensor, k] = (first, second, digest.digest())
        return space.compact[tensor, k]

    def refuse_fisher(self, tensor: TensorPlan, k: int, start: int, values: NDArray[np.float32]) -> None:
        """Raises FisherError for the first negative entry, or NonFiniteError (unless allowed) for what is no number."""
        if (values < 0).any():
            where = int(np.flatnonzero(values < 0)[0])
            raise FisherError(
                f"{self.plan.files[tensor.fishers[k].file].path}: the Fisher of tensor {tensor.name!r} holds "
                f"{values[where]} at coordinate {start + where}; a diagonal Fisher is a mean of squares. Estimate it "
                f"again, or {self.plan.recipe.method.fisherless}."
            )
        if tensor.fishers[k].kind == "sparse":
            where = start + int(np.flatnonzero(~np.isfinite(values))[0])
            raise FisherError(
                f"{self.plan.files[tensor.fishers[k].file].path}: the Fisher of tensor {tensor.name!r} has no value at "
                f"a coordinate that this merge asks for (near {where}): it was estimated for another recipe. "
                "Estimate it again with --only and this recipe."
            )
        if not self.allow_nonfinite and not np.isfinite(values).all():
            self.refuse(tensor, tensor.fishers[k], start, values)

    def refuse(self, tensor: TensorPlan, place: Place, start: int, values: NDArray[np.float32]) -> None:
        """Raises NonFiniteError for the first value that is none."""
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        entry = self.plan.files[place.file]
        if place in tensor.fishers:
            raise NonFiniteError(
                f"{entry.path}: the Fisher of tensor {tensor.name!r} holds {values[where]} at coordinate "
                f"{start + where}. A Fisher is a mean of squared gradients; these overflowed, or the file is damaged.\n"
                f"  Estimate it again with fp32 gradients, or {self.plan.recipe.method.fisherless}."
            )
        raise NonFiniteError(
            f"{entry.path}: tensor {tensor.name!r} holds {values[where]} at coordinate {start + where}. A merge would "
            "spread it.\n  Repair or leave out this model, or exclude the tensor (`exclude:`); `allow_nonfinite: true` "
            "lets inputs pass where the result stays finite."
        )

    def low_rank(
        self, tensor: int, k: int, start: int, out: NDArray[np.float32], space: Space, hashes: Hashes | None
    ) -> bytes:
        """Fills out fp32[n] with scale·B·A (or its transpose) from coordinate `start` of adapter number k.

        Returns the digest of the bytes of A and B.
        """
        digest = self._factors(tensor, k, space)[2]
        if hashes is not None:
            hashes.update(1 + k, start, start + out.shape[0], digest)
        # fp32 of the fp64 product, never rounded to the storage dtype (design, section 5)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number any more is an error of the result
            out[:] = self.product(tensor, k, start, out.shape[0], space)
        return digest

    def product(self, tensor: int, k: int, start: int, size: int, space: Space) -> NDArray[np.float64]:
        """scale·B·A (or its transpose) of adapter number k from coordinate `start`, fp64[size]."""
        plan = self.plan.tensors[tensor]
        source = plan.experts[k]
        a, b, _ = self._factors(tensor, k, space)
        row = prod(plan.shape[1:])
        first, last = start // row, -(-(start + size) // row)
        offset = start - first * row
        with np.errstate(over="ignore", invalid="ignore"):
            rows = a[:, first:last].T @ b.T if source.transposed else b[first:last] @ a
            return (source.scale * rows).reshape(-1)[offset : offset + size]

    def _factors(
        self, tensor: int, number: int, space: Space
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], bytes]:
        """A and B in fp64, read whole once a tensor and thread; and the digest of their bytes."""
        plan = self.plan.tensors[tensor]
        source = plan.experts[number]
        key = (tensor, number)
        if key not in space.factors:
            space.factors = {k: v for k, v in space.factors.items() if k[0] == tensor}
            loaded = []
            digest = xxhash.xxh3_128()
            for place in (source.a, source.b):
                assert place is not None
                raw = np.empty(place.nbytes, np.uint8)
                self.read_into(place, 0, raw)
                digest.update(raw.data)
                out = np.empty(place.nbytes // WIDTH[place.dtype], np.float32)
                bad = self._decode_all(place.dtype, raw, out)
                if bad and not self.allow_nonfinite:
                    self.refuse(plan, place, 0, out)
                loaded.append(out.astype(np.float64))
            space.factors[key] = (
                loaded[0].reshape(source.rank, -1),
                loaded[1].reshape(-1, source.rank),
                digest.digest(),
            )
        return space.factors[key]

    def _decode_all(self, dtype: str, raw: NDArray[np.uint8], out: NDArray[np.float32]) -> int:
        if dtype == "F32":
            out[:] = raw.view(np.float32)
            return self.kernels.count_nonfinite(out)
        decode = self.kernels.decode_bf16 if dtype == "BF16" else self.kernels.decode_f16
        return decode(raw.view(np.uint16), out)

    def references(
        self, plan: TensorPlan, base: NDArray[np.float32], space: Space
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Row 0 is the base; further rows are the base cast to an expert's narrower dtype, or zeros for adapters."""
        of = [reference_of(plan, source) for source in plan.experts]
        kinds = list(dict.fromkeys(["base", *of]))
        which = [kinds.index(kind) for kind in of]
        if len(kinds) == 1:
            return base.reshape(1, -1), np.array(which, np.int64)
        rows = space.get("reference", (len(kinds), base.shape[0]), np.float32)
        rows[0] = base
        for place, kind in enumerate(kinds[1:], 1):
            if kind == "zeros":
                rows[place] = 0.0
            else:
                cast(base.astype(np.float64), kind, self.kernels, space, rows[place])
        return rows, np.array(which, np.int64)


def changed(path: Path) -> str:
    """The message for an input file that did not stay what it was."""
    return (
        f"{path}: was changed while rlmerge was reading it, so what was read belongs to no one file. Nothing was "
        "delivered. Start again with --overwrite when nobody writes it."
    )


def stamps_of(paths: Iterable[Path | str]) -> list[list[int]]:
    """Size and modification time (ns) of files."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read any more: {error.strerror}.") from error
        found.append([status.st_size, status.st_mtime_ns])
    return found


def cast(
    values: NDArray[np.float64], dtype: str, kernels: ModuleType, space: Space, out: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], int]:
    """Rounds fp64[n] to a dtype and back into out fp32[n]. Returns the stored bytes and the number of NaN and Inf."""
    if dtype == "F32":
        bad = kernels.encode_f32(values, out)
        return out.view(np.uint8), bad
    words = space.get("cast words", (values.shape[0],), np.uint16)
    encode, decode = (
        (kernels.encode_bf16, kernels.decode_bf16) if dtype == "BF16" else (kernels.encode_f16, kernels.decode_f16)
    )
    bad = encode(values, words)
    decode(words, out)
    return words.view(np.uint8), bad


def decode_words(words: NDArray[np.uint16], dtype: str, kernels: ModuleType) -> NDArray[np.float32]:
    """Stored bf16 or fp16 words as fp32."""
    out = np.empty(words.shape, np.float32)
    (kernels.decode_bf16 if dtype == "BF16" else kernels.decode_f16)(words, out)
    return out


def blocks_of(tensor: TensorPlan, unit: int) -> list[tuple[int, int]]:
    """The blocks [start, stop) of a unit, in order."""
    start, stop = tensor.units[unit]
    return [(first, min(first + tensor.block, stop)) for first in range(start, stop, tensor.block)]
