"""What is counted and summed of a piece of a tensor, coordinate by coordinate: arrays with names, which add up.

Experts are numbered in the order of their keys. Everything is an integer or an fp64 sum in the order of coordinates;
pieces are added in order, so that the bits do not depend on threads or kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.execute.blocks import InputBlock, reads_words, reference_of
from rlmerge.execute.inputs import Inputs, cast
from rlmerge.execute.memory import Space
from rlmerge.methods.base import Patch
from rlmerge.plan import TensorPlan

Tally = dict[str, NDArray[Any]]
"""The arrays of a scope, for K experts:

size       int64[1]      coordinates
support    int64[K]      changed coordinates
alone      int64[K]      those that nobody else changed
squares    fp64[K]       Σ δ²
changers   int64[K + 1]  coordinates by how many experts changed them; [0] is filled in by `finish`
agreement  int64[1]      coordinates that several changed, all in one direction
overlap, conflict   int64[K, K]   of pairs (a < b)
pairs      fp64[K, K, 7]  of pairs: see the kernel
looked     int64[1]      coordinates that were looked at, where not all were; made by `finish`, which scales the rest
chance     fp64[K, K]    Σ over tensors of |Ma|·|Mb|/n: the overlap of independent supports; made by `finish`
Of the models only, not of the null model:
base       fp64[1]       Σ θ0²
cast       int64[K]      coordinates that differ after both are cast to bf16
above      int64[K, A + B]   changes above the thresholds
steps      int64[K, 34]  changes by steps: see the kernel
survival, direction   int64[2, 2], fp64[2, 3]   of the average and of the sum, stored in bf16: see the kernel `realised`
"""

ABSOLUTE = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
RELATIVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FORMS = {"BF16": 0, "F16": 1, "F32": 2}
AVERAGE, SUM = 0, 1


def add(total: Tally, part: Mapping[str, NDArray[Any]]) -> None:
    """Adds by name."""
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def count_patches(patches: Sequence[Patch], size: int, experts: int, kernels: ModuleType) -> Tally:
    """What supports, overlaps and deltas say of a piece, for models and null model alike."""
    tally = _shared(size, experts)
    for patch in patches:
        kernels.kept_norms(patch.delta, 2, squares := np.zeros(len(patch.experts)))
        tally["squares"][patch.experts] += squares
        if patch.alone:
            tally["support"][patch.experts] += patch.where.size
            tally["alone"][patch.experts] += patch.where.size
            tally["changers"][1] += patch.where.size
            continue
        sign, regions = np.ones(experts, np.int64), np.zeros(4, np.int64)
        pairs = np.zeros((2, experts, experts), np.int64)
        kernels.census(patch.delta, sign, tally["support"], regions, *pairs)
        kernels.pairs(patch.delta, tally["overlap"], tally["conflict"], tally["pairs"])
        kernels.changers(patch.delta, tally["changers"], tally["agreement"])
    return tally


def _shared(size: int, experts: int) -> Tally:
    return {
        "size": np.array([size]),
        "support": np.zeros(experts, np.int64),
        "alone": np.zeros(experts, np.int64),
        "squares": np.zeros(experts),
        "changers": np.zeros(experts + 1, np.int64),
        "agreement": np.zeros(1, np.int64),
        "overlap": np.zeros((experts, experts), np.int64),
        "conflict": np.zeros((experts, experts), np.int64),
        "pairs": np.zeros((experts, experts, 7)),
    }


def count_sizes(inputs: Inputs, plan: TensorPlan, block: InputBlock, space: Space, storage: bool) -> Tally:
    """How large the changes of a piece are, in numbers and in steps; what a stored average or sum would keep."""
    experts, kernels = len(plan.experts), inputs.kernels
    tally: Tally = {
        "base": np.zeros(1),
        "cast": np.zeros(experts, np.int64),
        "above": np.zeros((experts, len(ABSOLUTE) + len(RELATIVE)), np.int64),
        "steps": np.zeros((experts, 34), np.int64),
    }
    kernels.gram_rows(block.base.reshape(1, 1, -1), total := np.zeros((1, 1, 1)))
    tally["base"] += total[0, 0]
    if storage:
        tally |= {"survival": np.zeros((2, 2), np.int64), "direction": np.zeros((2, 3))}
    bounds = np.array(ABSOLUTE), np.array(RELATIVE)
    for patch in block.patches:
        base = block.base_at(patch.where)
        for row, k in enumerate(patch.experts.tolist()):
            dtype, old, new = _stored(inputs, plan, block, patch, row, base, space)
            form, delta = FORMS[dtype], patch.delta[row]
            tally["cast"][k] += kernels.sizes(old, new, delta, form, *bounds, tally["above"][k], tally["steps"][k])
        if storage:
            _survive(patch, base, experts, kernels, space, tally, reads_words(plan))
    return tally


def stored_dtype(plan: TensorPlan, expert: int) -> str:
    """The dtype of an expert's stored values; of a delta (LoRA) that of the base, in which its sum would be stored."""
    source = plan.experts[expert]
    assert plan.base is not None
    return source.place.dtype if source.kind == "tensor" and source.place is not None else plan.base.dtype


def _stored(
    inputs: Inputs, plan: TensorPlan, block: InputBlock, patch: Patch, row: int, base: NDArray[np.float64], space: Space
) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """Values before and after, fp64[m], as they are stored in a dtype, and that dtype."""
    expert = int(patch.experts[row])
    source, dtype = plan.experts[expert], stored_dtype(plan, expert)
    if source.kind == "tensor":
        reference = reference_of(plan, source)
        old = base if reference == "base" else _cast(base, reference, inputs, space)
        return dtype, old, block.stored_at(patch.experts[row : row + 1], patch.where)[0]
    return dtype, base, _cast(base + patch.delta[row], dtype, inputs, space)


def _cast(values: NDArray[np.float64], dtype: str, inputs: Inputs, space: Space) -> NDArray[np.float64]:
    out = np.empty(values.size, np.float32)
    cast(values, dtype, inputs.kernels, space, out)
    return out.astype(np.float64)


def _survive(
    patch: Patch, base: NDArray[np.float64], experts: int, kernels: ModuleType, space: Space, tally: Tally,
    in_bf16: bool,
) -> None:  # fmt: skip
    """Adds what average and sum of the deltas become in bf16, as `task_arithmetic` with λ = 1/K and 1 would store them.

    Source: the merge itself (`execute.work`): one sum in fp64, one rounding.
    """
    weight = np.ones(len(patch.experts))
    words = space.get("survival words", base.shape, np.uint16)
    stored = space.get("survival stored", base.shape, np.float32)
    was = space.get("survival was", base.shape, np.float64)
    kernels.encode_bf16(base, words)
    kernels.decode_bf16(words, stored)
    was[:] = stored
    intended = space.get("survival intended", base.shape, np.float64)
    for method, scale in ((AVERAGE, 1.0 / experts), (SUM, 1.0)):
        if method == SUM and patch.alone and in_bf16:
            # the sum is the one expert's stored value
            kernels.kept_norms(patch.delta, 2, squares := np.zeros(1))
            tally["survival"][method] += patch.where.size
            tally["direction"][method] += squares[0]
            continue
        kernels.task_arithmetic(base, patch.delta, weight, scale, intended)
        kernels.encode_bf16(intended, words)
        kernels.decode_bf16(words, stored)
        kernels.realised(base, was, intended, stored, tally["survival"][method], tally["direction"][method])


def finish(tally: Tally, size: int) -> None:
    """Completes the tally of a tensor of `size` coordinates, whose pieces are all in.

    Where only a part was looked at, counts and sums are scaled up to the whole; `looked` says how much it was.
    """
    looked = int(tally["size"][0])
    tally["changers"][0] = looked - int(tally["changers"][1:].sum())
    if looked != size:
        for name, value in tally.items():
            tally[name] = value * (size / looked)
    tally["size"], tally["looked"] = np.array([size]), np.array([looked])
    support = tally["support"].astype(np.float64)
    tally["chance"] = np.outer(support, support) / max(size, 1)
