"""Blocks as methods see them: read when asked for, sorted into patches, decoded only where somebody looks.

Models that are bf16 throughout are compared as stored words; every other mixture is decoded to fp32 first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.methods.base import Block, Kept, Patch
from rlmerge.plan import ExpertSource, Place, TensorPlan

from .memory import Memo, Space

if TYPE_CHECKING:
    from .inputs import Hashes, Inputs

NOTHING = np.empty((0, 0), np.float32)
NONE = np.empty((0, 0))
PIECE = 2**18
"""Coordinates of a Fisher that are read at once where only some are wanted: fp32 in half of a second-level cache."""
KEPT_EACH = 16
"""Bytes that stages keep of a coordinate, at most (RL updates are sparse)."""


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
        # stored words show what differs, not by how much, nor what is no number
        plain = inputs.min_change == 0.0 and not inputs.allow_nonfinite
        self._by_words = plain and reads_words(self._plan)
        self._experts_by_words = not inputs.allow_nonfinite and are_words(self._plan)
        self._read: set[int] = set()
        self._made: dict[str, NDArray[np.float32]] = {}
        self._patches: list[Patch] | None = None

    # -- stored words ---------------------------------------------------------------------------------------------

    def words(self, number: int) -> NDArray[np.uint16]:
        """Row `number` (0 base, 1 … K experts) as stored, of an input with 16 bits a value."""
        shape = (1 + len(self._plan.experts), self.size)
        rows = self._space.get("words", shape, np.uint16)
        if number not in self._read:
            place = self._plan.base if number == 0 else self._plan.experts[number - 1].place
            assert place is not None
            self._inputs.read_row(
                self._plan, place, self.start, rows[number], self._hashes, number, self._base_of(place)
            )
            self._read.add(number)
        return rows[number]

    def expert_words(self) -> NDArray[np.uint16] | None:
        """uint16[K, n] where all experts are bf16, in models without a base; else None."""
        if self._plan.base is not None or not self._experts_by_words:
            return None
        for number in range(1, 1 + len(self._plan.experts)):
            self.words(number)
        return self._space.get("words", (1 + len(self._plan.experts), self.size), np.uint16)[1:]

    def _base_of(self, place: Place) -> NDArray[Any] | None:
        """The base's words, where an expert is stored as steps from them."""
        if place.kind != "packed":
            return None
        assert self._plan.base is not None
        return self.base.view(np.uint32) if self._plan.base.dtype == "F32" else self.words(0)

    def _all_words(self) -> NDArray[np.uint16]:
        for number in range(1 + len(self._plan.experts)):
            self.words(number)
        return self._space.get("words", (1 + len(self._plan.experts), self.size), np.uint16)

    # -- decoded values -------------------------------------------------------------------------------------------

    @property
    def base(self) -> NDArray[np.float32]:
        """Read on first use."""
        if "base" not in self._made:
            out = self._space.get("base", (self.size,), np.float32)
            if self._plan.base is None:
                out[:] = 0.0
            else:
                self._decode(0, self._plan.base, out)
            self._made["base"] = out
        return self._made["base"]

    @property
    def expert(self) -> NDArray[np.float32]:
        """Read on first use."""
        if "expert" not in self._made:
            out = self._space.get("expert", (len(self._plan.experts), self.size), np.float32)
            for k, source in enumerate(self._plan.experts):
                if source.kind == "base":
                    out[k] = self.base
                elif source.place is None:
                    self._inputs.low_rank(self._tensor, k, self.start, out[k], self._space, self._hashes)
                elif source.kind == "sum":
                    out[k] = self._add_up(k, source.place)
                else:
                    self._decode(1 + k, source.place, out[k])
            self._made["expert"] = out
        return self._made["expert"]

    def _add_up(self, k: int, place: Place) -> NDArray[np.float32]:
        """Stored values plus scale·B·A of expert number k; both stay in the space, for deltas that are not rounded."""
        stored, update = (self._space.get(f"{part} {k}", (self.size,), np.float32) for part in ("stored", "update"))
        fresh = self._hashes is not None and self._hashes.is_new(1 + k, self.start)
        self._decode(1 + k, place, stored)
        digest = self._inputs.low_rank(self._tensor, k, self.start, update, self._space, None)
        if fresh and self._hashes is not None:
            self._hashes.states[1 + k].update(digest)
        return stored + update

    def lost(self, k: int) -> NDArray[np.float64] | None:
        """What rounding to fp32 took from scale·B·A of expert number k, fp64[n]; None where it is no adapter."""
        if self._plan.experts[k].kind not in ("low_rank", "sum"):
            return None
        product = self._inputs.product(self._tensor, k, self.start, self.size, self._space)
        with np.errstate(over="ignore", invalid="ignore"):
            return product - product.astype(np.float32)

    def _decode(self, number: int, place: Place, out: NDArray[np.float32]) -> None:
        if place.dtype == "F32":
            base = self._base_of(place)
            self._inputs.decode(self._plan, place, self.start, out, self._space, self._hashes, number, base)
            return
        decode = self.kernels.decode_bf16 if place.dtype == "BF16" else self.kernels.decode_f16
        if decode(self.words(number), out) and not self._inputs.allow_nonfinite:
            self._inputs.refuse(self._plan, place, self.start, out)

    @property
    def fisher(self) -> NDArray[np.float32]:
        """Read on first use."""
        if not self._plan.fishers:
            return NOTHING
        if "fisher" not in self._made:
            count = len(self._plan.fishers)
            out = self._space.get("fisher", (count, self.size), np.float32)
            for k in range(count):
                self._read_fisher(k, 0, out[k])
            self._made["fisher"] = out
        return self._made["fisher"]

    @property
    def additive(self) -> NDArray[np.bool_]:
        """From the plan."""
        return np.array([source.kind == "low_rank" for source in self._plan.experts], np.bool_)

    @property
    def comparable(self) -> NDArray[np.bool_]:
        """From the plan."""
        experts = self._plan.experts
        return np.array([s.kind != "sum" and reference_of(self._plan, s) == "base" for s in experts], np.bool_)

    # -- what changed ---------------------------------------------------------------------------------------------

    @property
    def patches(self) -> list[Patch]:
        """Found on first use."""
        if self._patches is None:
            experts = np.arange(len(self._plan.experts))
            places = self._space.get("places", (len(experts) + 1, self.size + 8), np.int32)
            counts = np.zeros(len(experts) + 1, np.int64)
            find = self._deltas_of_words if self._by_words else self._deltas_of_values
            deltas = find(places, counts)
            groups = [*(experts[k : k + 1] for k in experts), experts]
            self._patches = [
                self._patch(group, places[row, : counts[row]], deltas[row])
                for row, group in enumerate(groups)
                if counts[row]
            ]
        return self._patches

    def _deltas_of_words(self, places: NDArray[np.int32], counts: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """Fills places and counts; the deltas of each patch, fp64[E, m]."""
        count = len(self._plan.experts)
        alone = self._space.get("alone", (count, self.size), np.float64)
        several = self._space.get("several", (count * self.size,), np.float64)
        if self.kernels.patches_bf16(self._all_words(), places, counts, alone, several):
            # some number is none: decoding finds it and says where
            _ = (self.base, self.expert)
        together = several[: count * counts[-1]].reshape(count, -1) if counts[-1] else NONE
        return [*(alone[k : k + 1, : counts[k]] for k in range(count)), together]

    def _deltas_of_values(self, places: NDArray[np.int32], counts: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """As `_deltas_of_words`, for every other mixture of dtypes."""
        compared, count = self._compared(), len(self._plan.experts)
        self.kernels.changes(*compared, places, counts)
        found = []
        for row, number in enumerate(counts.tolist()):
            experts = np.arange(count) if row == count else np.arange(row, row + 1)
            delta = self._space.get(f"delta{row}", (len(experts), number), np.float64)
            self.kernels.deltas(*compared, experts, places[row, :number], delta)
            found.append(delta)
        return found

    def _compared(self) -> tuple[object, ...]:
        reference, which = self._inputs.references(self._plan, self.base, self._space)
        compared = self.base, self.expert, reference, which, self.additive, self._inputs.min_change
        sums = [k for k, source in enumerate(self._plan.experts) if source.kind == "sum"]
        return self._apart(sums, *compared) if sums else compared

    def _apart(
        self, sums: list[int], base: NDArray[np.float32], expert: NDArray[np.float32], reference: NDArray[np.float32],
        which: NDArray[np.int64], additive: NDArray[np.bool_], min_change: float,
    ) -> tuple[object, ...]:  # fmt: skip
        """What `_compared` returns, where updates were added to stored values: δ = update − (reference − stored).

        The sum in fp32 would cost small updates their last digits.
        """
        count, rows = expert.shape[0], reference.shape[0]
        apart = self._space.get("apart", (count + rows + len(sums), self.size), np.float32)
        values, references, which, additive = apart[:count], apart[count:], which.copy(), additive.copy()
        values[:], references[:rows] = expert, reference
        for row, k in enumerate(sums, rows):
            stored, update = (self._space.get(f"{part} {k}", (self.size,), np.float32) for part in ("stored", "update"))
            values[k] = update
            np.subtract(reference[which[k]], stored, references[row])
            which[k], additive[k] = row, True
        return base, values, references, which, additive, min_change

    def _patch(self, experts: NDArray[np.int64], where: NDArray[np.int32], delta: NDArray[np.float64]) -> Patch:
        return Patch(experts, where.copy(), delta.copy()) if self._keeps else Patch(experts, where, delta)

    def base_at(self, where: NDArray[np.int32]) -> NDArray[np.float64]:
        """Taken from the stored words where all are bf16."""
        out = np.empty(where.size)
        if self._by_words:
            self.kernels.take_bf16(self.words(0), where, out)
        else:
            self.kernels.take(self.base, where, out)
        return out

    def stored_at(self, experts: NDArray[np.int64], where: NDArray[np.int32]) -> NDArray[np.float64]:
        """Taken from the stored words where all are bf16."""
        out = np.empty((len(experts), where.size))
        for row, k in enumerate(experts.tolist()):
            if self._by_words:
                self.kernels.take_bf16(self.words(1 + k), where, out[row])
            else:
                self.kernels.take(self.expert[k], where, out[row])
        return out

    def fisher_at(self, experts: NDArray[np.int64], where: NDArray[np.int32]) -> NDArray[np.float32]:
        """Taken from the decoded block if there is one, else from pieces of it that stay in the cache."""
        out = np.empty((len(experts), where.size), np.float32)
        for row, k in enumerate(experts.tolist()):
            if "fisher" in self._made:
                self.kernels.take(self.fisher[k], where, out[row])
            else:
                self._take_fisher(k, where, out[row])
            if self._plan.fisher_sums and where.size and not (out[row].min() >= 0.0 and out[row].max() < np.inf):
                # nobody has looked at every entry yet; and a digest tells that the file is what it was, not that it
                # ever was a Fisher
                self._inputs.refuse_fisher(self._plan, k, self.start, self.fisher[k])
        return out

    def _take_fisher(self, k: int, where: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Fisher number k at some coordinates, through a buffer that is much smaller than the block."""
        firsts = range(0, self.size, PIECE)
        edges = [*np.searchsorted(where, np.array(firsts)).tolist(), where.size]
        for first, low, high in zip(firsts, edges, edges[1:]):
            piece = self._space.get("piece", (min(PIECE, self.size - first),), np.float32)
            self._read_fisher(k, first, piece)
            self.kernels.take(piece, where[low:high] - np.int32(first), out[low:high])

    def _read_fisher(self, k: int, first: int, out: NDArray[np.float32]) -> None:
        """Fills out fp32[m] with Fisher number k from coordinate `first` of the block."""
        start, number = self.start + first, 1 + len(self._plan.experts) + k
        fresh = self._hashes is not None and self._hashes.is_new(number, start)
        if self._plan.fishers[k].kind != "dense":
            self._inputs.expand_fisher(self._tensor, k, start, out, self._space, self._hashes)
            if self._plan.fishers[k].kind == "sparse":
                return  # its sum is not that of what is stored
        else:
            place = self._plan.fishers[k]
            self._inputs.decode(self._plan, place, start, out, self._space, self._hashes, number)
        if fresh and self._hashes is not None and self._plan.fisher_sums and not self._plan.fisher_digests:
            self._inputs.add_fisher(self._plan, k, start, out, self._hashes)

    # -- between stages -------------------------------------------------------------------------------------------

    @property
    def roomy(self) -> bool:
        """Small tensors, as far as the memory of this run goes."""
        return self._memo is not None and self._plan.size * KEPT_EACH <= self._memo.budget

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """From memory if it is there."""
        if self._memo is None:
            return make()
        kept = self._memo.get(self._tensor, self.start, key)
        if kept is None:
            kept = make()
            if self._keeps:
                # a tensor that does not fit as a whole must not crowd out those that do
                self._memo.put(self._tensor, self.start, key, kept, spare=not self.roomy)
        return kept

    def read_all(self) -> None:
        """Reads what no stage has asked for, so that its bytes are in the provenance."""
        assert self._hashes is not None
        by_words = self._by_words or (self._plan.base is None and self._experts_by_words)
        for number in range(int(self._plan.base is None), 1 + len(self._plan.experts) + len(self._plan.fishers)):
            if self._hashes.reached.get(number, self._hashes.start) <= self.start:
                if number > len(self._plan.experts):
                    _ = self.fisher
                elif by_words:
                    self.words(number)
                else:
                    _ = (self.base, self.expert)


def reads_words(plan: TensorPlan) -> bool:
    """Whether base and experts are bf16 throughout, so that stored words say what changed."""
    return plan.base is not None and plan.base.dtype == "BF16" and are_words(plan)


def are_words(plan: TensorPlan) -> bool:
    """Whether all experts are stored as bf16, and nothing is added to them."""
    places = [source.place for source in plan.experts if source.kind == "tensor"]
    return 0 < len(places) == len(plan.experts) and all(place is not None and place.dtype == "BF16" for place in places)


def reference_of(plan: TensorPlan, source: ExpertSource) -> str:
    """What an expert is compared with: 'base', 'zeros' (it is a delta), or the narrower dtype to cast the base to."""
    if source.kind == "low_rank":
        return "zeros"
    if source.place is not None and plan.base is not None and source.place.dtype not in ("F32", plan.base.dtype):
        return source.place.dtype
    return "base"
