"""Reads blocks of the inputs of a plan: pread into reused buffers, decode to fp32, deltas of adapters on the fly.

Memory is bounded by one block per thread whatever the model's size. Nothing is mapped, so a file that is cut short
while we read it is an error and not a crash.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH
from rlmerge.errors import CheckpointError, NonFiniteError
from rlmerge.methods.base import Block
from rlmerge.plan import BLOCK, ExpertSource, Place, Plan, TensorPlan

NOTHING = np.empty((0, 0), np.float32)


class Space:
    """The buffers of one thread, grown on demand and used again for every block."""

    def __init__(self) -> None:
        self._flat: dict[str, NDArray[Any]] = {}
        self.factors: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64], bytes]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A C-contiguous array with undefined content; valid until the same name is asked for again."""
        size = prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            flat = self._flat[name] = np.empty(size, dtype)
        return flat[:size].reshape(shape)


@dataclass(slots=True)
class Hashes:
    """Running xxh3-128 of the bytes that a unit reads: base, experts, Fishers."""

    states: list[Any] = field(default_factory=list)

    def update(self, place: int, data: Any) -> None:
        """Adds bytes of input number `place`."""
        while len(self.states) <= place:
            self.states.append(xxhash.xxh3_128())
        self.states[place].update(data)

    def digests(self) -> list[str]:
        """Hexadecimal digests, in the order of the inputs."""
        return [state.hexdigest() for state in self.states]


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

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def stamps(self) -> list[list[int]]:
        """Size and modification time (ns) of every input file: what a resumed run compares."""
        found = []
        for entry in self.plan.files:
            status = os.stat(entry.path)
            found.append([status.st_size, status.st_mtime_ns])
        return found

    def read_into(self, place: Place, first: int, data: memoryview | NDArray[np.uint8]) -> None:
        """Fills `data` with bytes of a stored tensor from byte `first` of it."""
        handle = self._handle(place.file)
        view = memoryview(data).cast("B")
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
                    f"{self.plan.files[place.file].path}: ends at byte {offset + done}, where its header promised more: "
                    "it was changed while rlmerge was reading it. Start again when nobody writes it."
                )
            done += count
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
        self, tensor: int, start: int, stop: int, wanted: frozenset[str], space: Space, hashes: Hashes | None = None
    ) -> Block:
        """Coordinates [start, stop) of a tensor, decoded; only what is `wanted` of base, expert, fisher is read."""
        plan = self.plan.tensors[tensor]
        count, size = len(plan.experts), stop - start
        base = space.get("base", (size,), np.float32)
        expert = fisher = NOTHING
        where, delta, owner = np.empty(0, np.int32), np.empty((count, 0)), np.empty(0, np.int32)
        additive = np.zeros(count, np.bool_)
        if "base" in wanted and plan.base is not None:
            self._decode(plan, plan.base, start, base, space, hashes, 0)
        elif "expert" in wanted:
            base[:] = 0.0
        if "expert" in wanted:
            expert = space.get("expert", (count, size), np.float32)
            for k, source in enumerate(plan.experts):
                self._expert(plan, tensor, source, start, base, expert[k], space, hashes, 1 + k)
                additive[k] = source.kind == "low_rank"
            if plan.base is not None:
                where, delta, owner = self._changes(plan, base, expert, additive, space)
        if "fisher" in wanted and plan.fishers:
            fisher = space.get("fisher", (count, size), np.float32)
            for k, place in enumerate(plan.fishers):
                self._decode(plan, place, start, fisher[k], space, hashes, 1 + count + k)
        return Block(base, expert, additive, fisher, where, delta, owner, start, self.kernels)

    def _changes(
        self,
        plan: TensorPlan,
        base: NDArray[np.float32],
        expert: NDArray[np.float32],
        additive: NDArray[np.bool_],
        space: Space,
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32]]:
        """The coordinates that some expert changed, the deltas there, and who owns them."""
        reference, which = self._references(plan, base, space)
        where = space.get("where", base.shape, np.int32)
        found = self.kernels.changed(base, expert, reference, which, additive, self.min_change, where)
        where = where[:found]
        delta = space.get("delta", (expert.shape[0], found), np.float64)
        owner = space.get("owner", (found,), np.int32)
        self.kernels.deltas(base, expert, reference, which, additive, self.min_change, where, delta, owner)
        return where, delta, owner

    def _decode(
        self,
        tensor: TensorPlan,
        place: Place,
        start: int,
        out: NDArray[np.float32],
        space: Space,
        hashes: Hashes | None,
        number: int,
    ) -> None:
        width = WIDTH[place.dtype]
        if place.dtype == "F32":
            raw = out.view(np.uint8)
            self.read_into(place, start * width, raw)
            bad = self.kernels.count_nonfinite(out)
        else:
            words = space.get("raw", (out.shape[0],), np.uint16)
            raw = words.view(np.uint8)
            self.read_into(place, start * width, raw)
            decode = self.kernels.decode_bf16 if place.dtype == "BF16" else self.kernels.decode_f16
            bad = decode(words, out)
        if hashes is not None:
            hashes.update(number, raw)
        if bad and not self.allow_nonfinite:
            self._refuse(tensor, place, start, out)

    def _refuse(self, tensor: TensorPlan, place: Place, start: int, values: NDArray[np.float32]) -> None:
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        entry = self.plan.files[place.file]
        raise NonFiniteError(
            f"{entry.path}: tensor {tensor.name!r} holds {values[where]} at coordinate {start + where}. A merge would "
            "spread it.\n  Repair or leave out this model, or exclude the tensor (`exclude:`); `allow_nonfinite: true` "
            "lets inputs pass where the result stays finite."
        )

    def _expert(
        self,
        plan: TensorPlan,
        tensor: int,
        source: ExpertSource,
        start: int,
        base: NDArray[np.float32],
        out: NDArray[np.float32],
        space: Space,
        hashes: Hashes | None,
        number: int,
    ) -> None:
        if source.kind == "base":
            out[:] = base
        elif source.place is not None:
            self._decode(plan, source.place, start, out, space, hashes, number)
        else:
            a, b, raw = self._factors(tensor, number, source, plan, space)
            if hashes is not None:
                hashes.update(number, raw)
            row = prod(plan.shape[1:])
            first, last = start // row, -(-(start + out.shape[0]) // row)
            rows = a[:, first:last].T @ b.T if source.transposed else b[first:last] @ a
            offset = start - first * row
            # fp32 of the fp64 product, never rounded to the storage dtype (design, section 5)
            out[:] = (source.scale * rows).reshape(-1)[offset : offset + out.shape[0]]

    def _factors(
        self, tensor: int, number: int, source: ExpertSource, plan: TensorPlan, space: Space
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], bytes]:
        """A and B in fp64, read whole once a tensor and thread; and the digest of their bytes."""
        key = (tensor, number)
        if key not in space.factors:
            space.factors = {k: v for k, v in space.factors.items() if k[0] == tensor}
            loaded = []
            digest = xxhash.xxh3_128()
            for place in (source.a, source.b):
                assert place is not None
                raw = np.empty(place.nbytes, np.uint8)
                self.read_into(place, 0, raw)
                digest.update(raw)
                out = np.empty(place.nbytes // WIDTH[place.dtype], np.float32)
                bad = self._decode_all(place.dtype, raw, out)
                if bad and not self.allow_nonfinite:
                    self._refuse(plan, place, 0, out)
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

    def _references(
        self, plan: TensorPlan, base: NDArray[np.float32], space: Space
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Row 0 is the base; further rows are the base cast to an expert's narrower dtype, or zeros for adapters."""
        kinds = ["base"]
        which = []
        for source in plan.experts:
            kind = "base"
            if source.kind == "low_rank":
                kind = "zeros"
            elif (
                source.place is not None
                and plan.base is not None
                and source.place.dtype not in ("F32", plan.base.dtype)
            ):
                kind = source.place.dtype
            if kind not in kinds:
                kinds.append(kind)
            which.append(kinds.index(kind))
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


def cast(
    values: NDArray[np.float64], dtype: str, kernels: ModuleType, space: Space, out: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], int]:
    """Rounds fp64[n] to a dtype and back into out fp32[n]. Returns the stored bytes and the number of NaN and Inf."""
    if dtype == "F32":
        bad = kernels.encode_f32(values, out)
        return out.view(np.uint8), bad
    words = space.get("words", (values.shape[0],), np.uint16)
    encode, decode = (
        (kernels.encode_bf16, kernels.decode_bf16) if dtype == "BF16" else (kernels.encode_f16, kernels.decode_f16)
    )
    bad = encode(values, words)
    decode(words, out)
    return words.view(np.uint8), bad


def blocks_of(tensor: TensorPlan, unit: int) -> list[tuple[int, int]]:
    """The blocks [start, stop) of a unit, in order."""
    start, stop = tensor.units[unit]
    return [(first, min(first + tensor.block, stop)) for first in range(start, stop, tensor.block)]


__all__ = ["BLOCK", "Hashes", "Inputs", "Space", "blocks_of", "cast"]
