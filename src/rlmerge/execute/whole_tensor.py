"""Whole tensors for methods that decompose matrices, put together from blocks whenever they are asked for; whole Gram
matrices of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import GramError
from rlmerge.methods.base import Whole
from rlmerge.plan import TensorPlan

from .blocks import InputBlock
from .inputs import Hashes, Inputs

SKEW = 1e-5
"""What Gij and Gji may differ by, relative to √(Gii·Gjj): a thousand roundings of fp32."""


class WholeTensor(Whole):
    """A tensor of a plan. `blocks` reads all its blocks anew, in order; what it yields is valid until the next.

    A delta is taken from the same patches that other methods see, so every mixture of dtypes, LoRA, packs and
    `min_change` mean the same here. Reading all experts for one of them costs little beside a decomposition.
    Only the product of an adapter is not rounded to fp32: rounding would give it directions that it does not have.
    """

    def __init__(
        self, shape: tuple[int, ...], experts: int, blocks: Callable[[], Iterator[InputBlock]],
        gram: Callable[[int], NDArray[np.float64]],
    ) -> None:  # fmt: skip
        self.shape = shape
        self._experts = experts
        self._blocks = blocks
        self._gram = gram

    @cached_property
    def _found(self) -> tuple[NDArray[np.bool_], bool]:
        changed, finite = np.zeros(self._experts, np.bool_), True
        for block in self._blocks():
            for patch in block.patches:
                changed[patch.experts] |= (patch.delta != 0.0).any(axis=1)
                finite &= bool(np.isfinite(patch.delta).all())
        return changed, finite

    @property
    def changed(self) -> NDArray[np.bool_]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Read on first use."""
        return self._found[0]

    @property
    def finite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Read on first use."""
        return self._found[1]

    def gram(self, expert: int) -> NDArray[np.float64]:
        """Read whole and checked."""
        return self._gram(expert)

    def base(self) -> NDArray[np.float64]:
        """Decoded block by block."""
        out = np.empty(self.shape)
        flat = out.reshape(-1)
        for block in self._blocks():
            flat[block.start : block.start + block.size] = block.base
        return out

    def expert(self, expert: int) -> NDArray[np.float64]:
        """Block by block: no second array is needed."""
        only = np.zeros(self._experts)
        only[expert] = 1.0
        return self._sum(only, based=True)

    def combine(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Patch by patch, in fp64."""
        return self._sum(coefficients, based=False)

    def _sum(self, coefficients: NDArray[np.float64], based: bool) -> NDArray[np.float64]:
        """Σ c[i]·δi, on the base or by itself."""
        out = np.empty(self.shape)
        flat = out.reshape(-1)
        for block in self._blocks():
            run = flat[block.start : block.start + block.size]
            run[:] = block.base if based else 0.0
            lost = {k: block.lost(k) for k in np.flatnonzero(coefficients).tolist()}
            for patch in block.patches:
                total = np.zeros(patch.where.size)
                for row, k in enumerate(patch.experts.tolist()):
                    if coefficients[k] != 0.0:
                        total += coefficients[k] * _exact(patch.delta[row], lost[k], patch.where)
                run[patch.where] += total
        return out


def _exact(
    delta: NDArray[np.float64], lost: NDArray[np.float64] | None, where: NDArray[np.int32]
) -> NDArray[np.float64]:
    """A delta with what rounding took from it; no update where there was none (`min_change`)."""
    return delta if lost is None else np.where(delta != 0.0, delta + lost[where], 0.0)


def read_gram(inputs: Inputs, tensor: TensorPlan, expert: int, hashes: Hashes) -> NDArray[np.float64]:
    """fp64[in, in] of one expert's inputs. Raises GramError for what is no Gram matrix, or not that of gram.json."""
    place = tensor.grams[expert]
    raw = np.empty(place.nbytes, np.uint8)
    inputs.read_into(place, 0, raw)
    number = 1 + len(tensor.experts) + len(tensor.fishers) + expert
    hashes.update(number, hashes.start, hashes.start + 1, raw.data)
    where = f"{inputs.plan.files[place.file].path}: the Gram matrix of {tensor.name!r}"
    if tensor.gram_digests and hashes.digests(number + 1)[number] != tensor.gram_digests[expert]:
        raise GramError(
            f"{where} is not the one of which the gram.json beside it speaks. Nothing was delivered. The file was "
            "changed after gram.json was written, or belongs to another: estimate again (rlmerge gram)."
        )
    side = tensor.shape[0 if tensor.gram_first else -1]
    with np.errstate(invalid="ignore"):  # what is no number is looked for below
        gram = raw.view(np.float32).reshape(side, side).astype(np.float64)
    del raw
    diagonal = np.diagonal(gram)
    wrong = ""
    if not np.isfinite(diagonal).all() or not all(np.isfinite(row).all() for row in gram):
        wrong = "holds numbers that are infinite or none"
    elif (diagonal < 0.0).any():
        wrong = f"has {diagonal.min():.3g} on its diagonal, where squares are added up"
    elif (skew := _skew(gram)) > SKEW:
        wrong = f"is not symmetric (entries and their mirror images differ by up to {skew:.2g} of what they may be)"
    if wrong:
        raise GramError(f"{where} {wrong}. Estimate it again (rlmerge gram), in fp32.")
    return gram


def _skew(gram: NDArray[np.float64]) -> float:
    """The largest |Gij - Gji| / √(Gii·Gjj), some rows at a time; infinite where an entry stands beside a zero."""
    scale, found = np.sqrt(np.diagonal(gram)), 0.0
    for start in range(0, len(gram), 256):
        rows = slice(start, start + 256)
        bound = np.outer(scale[rows], scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(gram[rows] - gram[:, rows].T) / bound
        found = max(found, float(np.nanmax(ratio, initial=0.0)))
    return found
