"""What a method made of a block, stored: rounded once, checked, and compared with what was intended.

Where the base has the output's dtype, its words are copied and changed in place, so that what no expert touched stays
bit for bit; an average of stored words needs no decoded values at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.errors import NonFiniteError
from rlmerge.methods.base import Average, Block, Change, Merged, Summary, Update
from rlmerge.plan import Plan, TensorPlan
from rlmerge.plugins import origin_of

from .blocks import InputBlock
from .inputs import Inputs, cast, decode_words
from .memory import Space

FORMATS = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126)}
"""Fraction bits and smallest exponent, for stochastic rounding."""


class Storing:
    """Blocks to bytes, for all variants of a plan. Threads share it."""

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self._plan, self._inputs, self._kernels = plan, inputs, inputs.kernels

    def encode(
        self, plan: TensorPlan, variant: int, block: InputBlock, merged: Merged, space: Space
    ) -> tuple[NDArray[np.uint8], Summary]:
        """The bytes of a block for one variant, and what of its update they kept; valid until the next block."""
        counts, sums = np.zeros(2, np.int64), np.zeros(3)
        if isinstance(merged.values, Average):
            if (words := self._average(plan, variant, block, merged.values, space)) is not None:
                return words.view(np.uint8), {}
            merged.values = merged.values.applied(block)
        if isinstance(merged.values, list) and (plan.dtype != "BF16" or self._inputs.allow_nonfinite):
            merged.values = [change.applied(block) for change in merged.values]
        if isinstance(merged.values, list) and plan.base is not None and plan.base.dtype == plan.dtype:
            out, bad = self._change(plan, variant, block, merged.values, counts, sums, space)
        else:
            out, bad = self._replace(plan, variant, block, merged.values, counts, sums, space)
        if bad:
            self._refuse(plan, block, out, merged)
        return out.view(np.uint8), {} if plan.base is None else {"survival": counts, "direction": sums}

    def _average(
        self, plan: TensorPlan, variant: int, block: InputBlock, average: Average, space: Space
    ) -> NDArray[np.uint16] | None:
        """Stored words from stored words; None where others are stored, a base is compared, or some are no number."""
        if plan.dtype != "BF16" or self._plan.variants[variant].rounding != "nearest":
            return None
        if (words := block.expert_words()) is None:
            return None
        out = space.get("averaged words", (block.size,), np.uint16)
        bad = self._kernels.linear_bf16(words, average.weight, out)
        return None if bad else words[0] if average.is_copy else out

    def _change(
        self, plan: TensorPlan, variant: int, block: InputBlock, changes: list[Change | Update], counts: Any, sums: Any,
        space: Space,
    ) -> tuple[NDArray[Any], int]:  # fmt: skip
        """The stored base, changed in some places: what no expert touched is copied bit for bit."""
        bad = 0
        if plan.dtype == "F32":
            out = space.get("stored", (block.size,), np.float32)
            out[:] = block.base
        else:
            out = space.get("stored words", (block.size,), np.uint16)
            out[:] = block.words(0)
        settle = {"BF16": "settle_bf16", "F16": "settle_f16", "F32": "settle_f32"}[plan.dtype]
        for change in changes:
            if isinstance(change, Update):
                if self._plan.variants[variant].rounding == "nearest":
                    values = change.update, change.gain, change.scale
                    bad += self._kernels.add_bf16(*values, change.where, out, counts, sums)
                    continue
                change = change.applied(block)
            values = self._rounded(plan, variant, block, change.values, change.where)
            settled = getattr(self._kernels, settle)
            bad += settled(change.old, change.values, values, change.where, out, counts, sums)
        if self._inputs.allow_nonfinite:
            # the base itself may hold some, where nobody changed it
            stored = out if plan.dtype == "F32" else decode_words(out, plan.dtype, self._kernels)
            bad = self._kernels.count_nonfinite(stored)
        return out, bad

    def _replace(
        self, plan: TensorPlan, variant: int, block: InputBlock, values: list[Change | Update] | NDArray[np.float64],
        counts: Any, sums: Any, space: Space,
    ) -> tuple[NDArray[Any], int]:  # fmt: skip
        """Every coordinate anew: another dtype than the base's, or a method that changes all."""
        stored = space.get("stored", (block.size,), np.float32)
        if isinstance(values, list):
            dense = block.base.astype(np.float64)
            for change in values:
                change = change.applied(block)
                dense[change.where] = change.values
        else:
            dense = values
        every = np.arange(block.size, dtype=np.int32)
        raw, bad = cast(self._rounded(plan, variant, block, dense, every), plan.dtype, self._kernels, space, stored)
        if plan.base is not None:
            old = block.base.astype(np.float64)
            stored_base = old
            if plan.dtype not in ("F32", plan.base.dtype):
                raw = raw.copy()  # the cast below uses the same buffer
                single = space.get("stored_base", (block.size,), np.float32)
                cast(old, plan.dtype, self._kernels, space, single)
                stored_base = single.astype(np.float64)
            self._kernels.realised(old, stored_base, dense, stored, counts, sums)
        return raw.view(np.float32 if plan.dtype == "F32" else np.uint16), bad

    def _rounded(
        self, plan: TensorPlan, variant: int, block: Block, values: NDArray[np.float64], where: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        recipe = self._plan.variants[variant]
        if recipe.rounding != "stochastic":
            return values
        values = values.copy()
        key = np.uint64(hash_key(recipe.seed, "rounding", "", plan.known_as))
        self._kernels.round_stochastically(values, where, block.start, key, *FORMATS[plan.dtype])
        return values

    def _refuse(self, plan: TensorPlan, block: Block, out: NDArray[Any], merged: Merged) -> None:
        stored = out if plan.dtype == "F32" else decode_words(out, plan.dtype, self._kernels)
        where = int(np.flatnonzero(~np.isfinite(stored))[0])
        value = merged.values[where] if isinstance(merged.values, np.ndarray) else np.nan
        for change in merged.values if isinstance(merged.values, list) else ():
            change = change.applied(block)
            if (change.where == where).any():
                value = change.values[change.where == where][-1]
        advice = "Check the inputs."
        if plan.dtype == "F16":
            advice = "Write `out_dtype: float32` (fp16 ends at 65504)."
        elif (home := origin_of(self._plan.recipe.method)) is not None:
            advice = f"Check method {self._plan.recipe.merge_method!r} of {home.file or 'a plugin'}, then the inputs."
        raise NonFiniteError(
            f"the merged tensor {plan.name!r} holds {stored[where]} at coordinate {block.start + where} (value "
            f"{value:.6g} before the cast to {plan.dtype}). Nothing was delivered.\n  {advice}"
        )


def hash_key(seed: int, method: str, expert: str, tensor: str) -> int:
    """The 64-bit key of the random numbers of one expert and tensor: xxh3-64 of (seed, method, expert, tensor)."""
    return xxhash.xxh3_64_intdigest("\0".join((str(seed), method, expert, tensor)).encode())
