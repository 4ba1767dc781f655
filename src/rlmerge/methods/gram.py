"""What geodesics and Model Stock share: inner products of experts, angles, and the vectors that they speak of.

All these methods are linear combinations of experts whose coefficients follow from a K×K Gram matrix, so nothing
larger is ever held: a stage adds the matrix up in fp64, block by block, and the merge combines blocks.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Average, Block, Change, Merged, Result, Stage, Summary, Task, kept_patches

F64 = NDArray[np.float64]

NOISE = 2.0**-40
"""|u + v|² of unit vectors below which rounding decides where their geodesic runs: they are taken as opposite."""


class GramOfDeltas(Stage):
    """⟨δi, δj⟩ of a tensor; without a base the reference is zero, so these are the products of the weights."""

    name = "gram"

    def empty(self, count: int) -> Summary:
        """Zeros fp64[K, K]."""
        return {"gram": np.zeros((count, count))}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Patch by patch: nobody else has an update where one expert alone has."""
        for patch in kept_patches(block):
            found = np.zeros((1, len(patch.experts), len(patch.experts)))
            block.kernels.gram_rows(patch.delta[:, None, :], found)
            summary["gram"][np.ix_(patch.experts, patch.experts)] += found[0]

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """The matrix as nested lists."""
        return {"gram": total["gram"].tolist()}


class GramOfWeights(Stage):
    """⟨θi, θj⟩ of a tensor; a single expert is joined by the base, as the first of two."""

    name = "gram"

    def empty(self, count: int) -> Summary:
        """Zeros fp64[K, K]; [2, 2] for one expert."""
        return {"gram": np.zeros((max(2, count), max(2, count)))}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """A run of coordinates is one row."""
        block.kernels.gram_rows(weights_of(block)[:, None, :], summary["gram"][None])

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """The matrix as nested lists."""
        return {"gram": total["gram"].tolist()}


class GramOfColumns(Stage):
    """⟨δi, δj⟩ along the first dimension of a tensor: one matrix for each place in the others."""

    name = "columns"

    def empty(self, count: int) -> Summary:
        """Nothing yet: the number of columns is the tensor's."""
        return {}

    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """One coordinate after the other, in fp64."""
        count = len(task.experts)
        total = summary.setdefault("gram", np.zeros((columns_of(task), count, count)))
        block.kernels.gram_columns(dense_deltas(block, task), block.start, total)

    def combine(self, total: Summary, part: Summary) -> None:
        """Sums."""
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value

    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """The bytes of fp64[C, K, K] in base64: JSON of so many numbers would take three times the room."""
        found = total.get("gram", np.zeros((0, len(task.experts), len(task.experts))))
        return {"gram": base64.b64encode(found.astype("<f8").tobytes()).decode()}


def columns_of(task: Task) -> int:
    """Vectors along the first dimension."""
    return max(1, int(np.prod(task.shape[1:], dtype=np.int64)))


def gram_of_columns(result: Result, count: int) -> F64:
    """What `GramOfColumns` found: fp64[C, K, K]."""
    return _numbers(np.frombuffer(base64.b64decode(result["gram"]), "<f8").reshape(-1, count, count))


def gram_of(results: Mapping[str, Result]) -> F64:
    """What one of the other two found: fp64[K, K]."""
    return _numbers(np.array(results["gram"]["gram"], np.float64))


def _numbers(gram: F64) -> F64:
    """Where inputs that are no number are allowed in, their products are quiet NaN: the cast finds what they make."""
    return np.where(np.isfinite(gram), gram, np.nan)


# -- vectors -----------------------------------------------------------------------------------------------------------


def weights_of(block: Block) -> NDArray[Any]:
    """The weights of a block, fp32[K, n] (fp64 where an expert is stored as its delta); [2, n] for base and one."""
    values = block.expert
    if block.additive.any():
        values = values.astype(np.float64) + block.additive[:, None] * block.base.astype(np.float64)
    return values if len(values) > 1 else np.stack([block.base.astype(values.dtype), values[0]])


def dense_deltas(block: Block, task: Task) -> F64:
    """All deltas of a block, fp64[K, n]."""
    out = np.zeros((len(task.experts), block.size))
    for patch in block.patches:
        out[patch.experts[:, None], patch.where] = patch.delta
    return out


def combine_weights(block: Block, coefficients: F64) -> Merged:
    """Σ c[i]·θi, the base first where there is one expert."""
    own = Average(coefficients[-block.additive.size :])
    if own.weight.size == len(coefficients) or coefficients[0] == 0.0:
        return Merged(own)
    return Merged(own.applied(block) + coefficients[0] * block.base.astype(np.float64))


def combine_deltas(block: Block, coefficients: F64) -> Merged:
    """θ0 + Σ c[i]·δi."""
    changes: list[Any] = []
    for patch in kept_patches(block):
        old, out = block.base_at(patch.where), np.empty(patch.where.size)
        block.kernels.task_arithmetic(old, patch.delta, coefficients[patch.experts], 1.0, out)
        changes.append(Change(patch.where, old, out))
    return Merged(changes)


def combine_vectors(block: Block, vector: NDArray[np.int64], coefficients: F64) -> Merged:
    """θ0 + Σ c[v, i]·δi where coordinate x of the block belongs to vector v = vector[x]; c is fp64[V, K]."""
    changes: list[Any] = []
    for patch in block.patches:
        old = block.base_at(patch.where)
        own, total = coefficients[vector[patch.where]], np.zeros(patch.where.size)
        for row, k in enumerate(patch.experts.tolist()):
            # a coefficient of 0 removes an expert, whatever it holds
            total += np.where(own[:, k] == 0.0, 0.0, own[:, k] * patch.delta[row])
        changes.append(Change(patch.where, old, old + total))
    return Merged(changes)


def rows_of(block: Block, task: Task) -> tuple[F64, NDArray[np.int64]]:
    """Gram matrices fp64[R, K, K] of the deltas in each row of a block of whole rows; the row of each coordinate."""
    length = task.shape[-1] if task.shape else 1
    deltas = dense_deltas(block, task)
    deltas = deltas.reshape(len(deltas), -1, length)
    total = np.zeros((deltas.shape[1], len(deltas), len(deltas)))
    block.kernels.gram_rows(deltas, total)
    return _numbers(total), np.arange(block.size) // length


# -- geometry ----------------------------------------------------------------------------------------------------------


def norms_of(gram: F64) -> F64:
    """Lengths fp64[..., K] of the vectors of Gram matrices fp64[..., K, K]."""
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


def cosines_of(gram: F64) -> F64:
    """Gram matrices of the unit vectors; 0 beside a vector of length 0. The diagonal is exactly 1 elsewhere."""
    norms = norms_of(gram)
    product = norms[..., :, None] * norms[..., None, :]
    # not yet a quotient where a product of lengths underflows
    cosines = np.divide(gram, product, out=np.zeros_like(gram), where=product > 0.0)
    place = np.arange(gram.shape[-1])
    cosines[..., place, place] = norms > 0.0
    return np.clip(cosines, -1.0, 1.0)


def geodesic(gram: F64, t: F64 | float, threshold: float = 1.0) -> F64:
    """Coefficients fp64[..., 2] of the point at share t of the way from the first of two vectors to the second.

    gram        fp64[..., 2, 2]
    threshold   |cos| above which the straight line is taken, as it is between opposite vectors

    A vector of length 0 stands at a right angle to every other one, as in mergekit.

    The angle comes from chords, 2·atan2(|u - v|, |u + v|): near 0 and π, where most of them are, a cosine has lost it.
    """
    cosine = cosines_of(gram)[..., 0, 1]
    away, along = np.maximum(2.0 - 2.0 * cosine, 0.0), np.maximum(2.0 + 2.0 * cosine, 0.0)
    angle = 2.0 * np.arctan2(np.sqrt(away), np.sqrt(along))
    straight = (away == 0.0) | (along < NOISE)
    if threshold < 1.0:
        straight |= np.abs(cosine) > threshold
    sine = np.where(straight, 1.0, np.sin(angle))
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    # at an end the other expert has no share, whatever it holds
    return np.stack([np.where(t == 1.0, 0.0, first), np.where(t == 0.0, 0.0, second)], axis=-1)
