"""Reads blocks of the inputs of a plan: pread into reused buffers, decode to fp32, deltas of adapters on the fly.

Memory is bounded by one block per thread whatever the model's size. Nothing is mapped, so a file that is cut short
while we read it is an error and not a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH
from rlmerge.errors import CheckpointError, NonFiniteError
from rlmerge.methods.base import Block, Kept
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


class Hashes:
    """Running xxh3-128 of what a unit reads of each input: base, experts, Fishers, in the order of coordinates.

    Several stages read the same bytes; each input is hashed the first time that it is read from the start.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.states: dict[int, Any] = {}
        self.reached: dict[int, int] = {}

    def update(self, number: int, start: int, stop: int, data: Any) -> None:
        """Adds the bytes of coordinates [start, stop) of input `number`, unless they were added before."""
        if self.reached.get(number, self.start) == start:
            self.states.setdefault(number, xxhash.xxh3_128()).update(data)
            self.reached[number] = stop

    def digests(self, count: int) -> list[str]:
        """Hexadecimal digests of inputs 0 … count - 1; '' for one that was never read."""
        return [self.states[number].hexdigest() if number in self.states else "" for number in range(count)]


class Memo:
    """What stages keep of blocks for the next stage of the same tensor, within a number of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: dict[int, dict[tuple[int, Hashable], Any]] = {}
        self._bytes: dict[int, int] = {}
        self._lock = threading.Lock()

    def get(self, tensor: int, start: int, key: Hashable) -> Any:
        """What is kept, or None."""
        return self._held.get(tensor, {}).get((start, key))

    def put(self, tensor: int, start: int, key: Hashable, value: Any) -> bool:
        """Keeps a value if there is room."""
        size = bytes_of(value)
        with self._lock:
            if sum(self._bytes.values()) + size > self.budget:
                return False
            self._held.setdefault(tensor, {})[start, key] = value
            self._bytes[tensor] = self._bytes.get(tensor, 0) + size
            return True

    def drop(self, tensor: int) -> None:
        """Forgets a tensor."""
        with self._lock:
            self._held.pop(tensor, None)
            self._bytes.pop(tensor, None)


def bytes_of(value: Any) -> int:
    """Bytes of the arrays in a value: an array, a tuple or dict of values, an object with __dict__."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(bytes_of, value))
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return bytes_of(vars(value)) if hasattr(value, "__dict__") else 32


class InputBlock(Block):
    """A block that reads what is asked of it, once."""

    def __init__(
        self,
        inputs: Inputs,
        tensor: int,
        start: int,
        stop: int,
        space: Space,
        hashes: Hashes | None,
        memo: Memo | None,
        last: bool,
    ) -> None:
        self.start = start
        self.size = stop - start
        self.kernels = inputs.kernels
        self._inputs = inputs
        self._tensor = tensor
        self._plan = inputs.plan.tensors[tensor]
        self._space = space
        self._hashes = hashes
        self._memo = memo
        self._keeps = memo is not None and memo.budget > 0 and not last
        self._read: dict[str, Any] = {}

    @property
    def base(self) -> NDArray[np.float32]:
        """Read on first use."""
        if "base" not in self._read:
            out = self._space.get("base", (self.size,), np.float32)
            if self._plan.base is None:
                out[:] = 0.0
            else:
                self._inputs.decode(self._plan, self._plan.base, self.start, out, self._space, self._hashes, 0)
            self._read["base"] = out
        return self._read["base"]

    @property
    def expert(self) -> NDArray[np.float32]:
        """Read on first use."""
        if "expert" not in self._read:
            out = self._space.get("expert", (len(self._plan.experts), self.size), np.float32)
            for k, source in enumerate(self._plan.experts):
                if source.kind == "base":
                    out[k] = self.base
                elif source.place is not None:
                    place, number = source.place, 1 + k
                    self._inputs.decode(self._plan, place, self.start, out[k], self._space, self._hashes, number)
                else:
                    self._inputs.low_rank(self._tensor, k, self.start, out[k], self._space, self._hashes)
            self._read["expert"] = out
        return self._read["expert"]

    @property
    def additive(self) -> NDArray[np.bool_]:
        """From the plan."""
        return np.array([source.kind == "low_rank" for source in self._plan.experts], np.bool_)

    @property
    def fisher(self) -> NDArray[np.float32]:
        """Read on first use."""
        if not self._plan.fishers:
            return NOTHING
        if "fisher" not in self._read:
            count = len(self._plan.experts)
            out = self._space.get("fisher", (count, self.size), np.float32)
            for k, place in enumerate(self._plan.fishers):
                number = 1 + count + k
                self._inputs.decode(self._plan, place, self.start, out[k], self._space, self._hashes, number)
            self._read["fisher"] = out
        return self._read["fisher"]

    @property
    def where(self) -> NDArray[np.int32]:
        """Found on first use, or kept from an earlier stage."""
        return self._support()[0]

    @property
    def owner(self) -> NDArray[np.int32]:
        """Found on first use, or kept from an earlier stage."""
        return self._support()[1]

    @property
    def delta(self) -> NDArray[np.float64]:
        """Formed on first use."""
        if "delta" not in self._read:
            self._find_changes()
        return self._read["delta"]

    def _support(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if "support" not in self._read:
            kept = None if self._memo is None else self._memo.get(self._tensor, self.start, "support")
            if kept is not None:
                self._read["support"] = kept
            else:
                self._find_changes()
        return self._read["support"]

    def _find_changes(self) -> None:
        plan, base, expert, space = self._plan, self.base, self.expert, self._space
        reference, which = self._inputs.references(plan, base, space)
        eta, additive = self._inputs.min_change, self.additive
        buffer = space.get("where", base.shape, np.int32)
        found = self.kernels.changed(base, expert, reference, which, additive, eta, buffer)
        where = buffer[:found].copy() if self._keeps else buffer[:found]
        shape = (expert.shape[0], found)
        delta = np.empty(shape, np.float64) if self._keeps else space.get("delta", shape, np.float64)
        owner = np.empty(found, np.int32) if self._keeps else space.get("owner", (found,), np.int32)
        self.kernels.deltas(base, expert, reference, which, additive, eta, where, delta, owner)
        self._read["delta"] = delta
        if "support" not in self._read:
            self._read["support"] = (where, owner)
            if self._keeps and self._memo is not None:
                self._memo.put(self._tensor, self.start, "support", (where, owner))

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """From memory if it is there."""
        if self._memo is None:
            return make()
        kept = self._memo.get(self._tensor, self.start, key)
        if kept is None:
            kept = make()
            if self._keeps:
                self._memo.put(self._tensor, self.start, key, kept)
        return kept

    def read_all(self) -> None:
        """Reads what no stage has asked for, so that its bytes are in the provenance."""
        assert self._hashes is not None
        for number in range(1 + len(self._plan.experts) + len(self._plan.fishers)):
            if self._hashes.reached.get(number, self._hashes.start) <= self.start:
                _ = (self.base, self.expert, self.fisher)
                return


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

    def read_into(self, place: Place, first: int, data: NDArray[np.uint8]) -> None:
        """Fills `data` with bytes of a stored tensor from byte `first` of it."""
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
    ) -> None:
        """Fills out fp32[n] with stored values from coordinate `start`; NonFiniteError unless the recipe allows it."""
        width = WIDTH[place.dtype]
        if place.dtype == "F32":
            raw = out.view(np.uint8)
            self.read_into(place, start * width, raw)
            # bytes that were hashed before were also looked at before
            seen = hashes is not None and hashes.reached.get(number, hashes.start) > start
            bad = 0 if seen else self.kernels.count_nonfinite(out)
        else:
            words = space.get("raw", (out.shape[0],), np.uint16)
            raw = words.view(np.uint8)
            self.read_into(place, start * width, raw)
            decode = self.kernels.decode_bf16 if place.dtype == "BF16" else self.kernels.decode_f16
            bad = decode(words, out)
        if hashes is not None:
            hashes.update(number, start, start + out.shape[0], raw.data)
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

    def low_rank(
        self, tensor: int, k: int, start: int, out: NDArray[np.float32], space: Space, hashes: Hashes | None
    ) -> None:
        """Fills out fp32[n] with scale·B·A (or its transpose) from coordinate `start` of adapter number k."""
        plan = self.plan.tensors[tensor]
        source = plan.experts[k]
        a, b, digest = self._factors(tensor, k, source, plan, space)
        if hashes is not None:
            hashes.update(1 + k, start, start + out.shape[0], digest)
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
                digest.update(raw.data)
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

    def references(
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
