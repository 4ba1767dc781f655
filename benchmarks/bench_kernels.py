"""Times of the compiled kernels on one block as a merge of bf16 RLVR experts has it: `make bench-kernels`.

Three experts change 13 % of a block of 2¹⁹ coordinates each. A kernel that works on patches is timed on the
patch of one expert ("alone") or on that of all ("several"); ns per coordinate of the block is time / 0.52 M.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlmerge.kernels import load_kernels

SIZE = 2**19
NONE = np.empty((0, 0))
NO_FISHER = np.empty((0, 0), np.float32)
ALL = np.arange(3)


class Data:
    """One block: stored words, its patches, Fishers, and arrays for results."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        base = (0.02 * rng.standard_normal(SIZE, dtype=np.float32)).view(np.uint32) >> 16
        self.words = np.stack([base.astype(np.uint16)] * 4)
        for row in self.words[1:]:
            changed = rng.random(SIZE) < 0.13
            row[changed] += (1 - 2 * rng.integers(0, 2, changed.sum())).astype(np.uint16)
        self.places, self.counts = np.empty((4, SIZE + 8), np.int32), np.zeros(4, np.int64)
        kernels = load_kernels("numba")
        self.alone, self.several = np.empty((3, SIZE)), np.empty(3 * SIZE)
        kernels.patches_bf16(self.words, self.places, self.counts, self.alone, self.several)
        self.where = self.places[0, : self.counts[0]].copy()
        self.shared = self.places[3, : self.counts[3]].copy()
        self.delta = self.alone[:1, : self.where.size].copy()
        self.deltas = self.several[: 3 * self.shared.size].reshape(3, -1).copy()
        self.score = np.abs(self.delta).astype(np.float32)
        self.scores = np.abs(self.deltas).astype(np.float32)
        self.fishers = (rng.standard_normal((3, SIZE)) ** 2).astype(np.float32)
        self.fisher = np.ascontiguousarray(self.fishers[:, self.shared])
        self.base = np.empty(self.where.size)
        kernels.take_bf16(self.words[0], self.where, self.base)
        self.threshold = np.float32(np.median(self.score))


def zeros(*shape: int, dtype: Any = np.float64) -> Any:
    """An array for results."""
    return np.zeros(shape, dtype)


def cases(d: Data) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name of a case: the kernel and its arguments."""
    m, o, key, half = d.where.size, d.shared.size, np.uint64(5), np.uint64(2**63)
    histogram = (zeros(3, 65536, dtype=np.int64), zeros(3, 65536, dtype=np.uint16), zeros(3, 65536, dtype=np.uint16))
    resolved = (zeros(3, o), zeros(o, dtype=np.uint8), zeros(3, dtype=np.int64), zeros(4, dtype=np.int64))
    flags = (np.ones(m, np.uint8), zeros(m, dtype=np.uint8))
    sift = (0, d.where, d.delta[0], zeros(m + 1, dtype=np.int32), zeros(m + 1))
    trim = (zeros(3, dtype=np.int64), zeros(o, dtype=np.uint8))
    thresholds = (np.full(3, d.threshold), np.full(3, half), np.full(3, key))
    survival = (zeros(2, dtype=np.int64), zeros(3))
    pairs = (
        zeros(3, dtype=np.int64),
        zeros(4, dtype=np.int64),
        zeros(3, 3, dtype=np.int64),
        zeros(3, 3, dtype=np.int64),
    )
    moved = d.base + d.delta[0]
    return {
        "patches_bf16": ("patches_bf16", (d.words, d.places, d.counts, d.alone, d.several)),
        "scores alone": ("scores", (d.delta, d.delta, NO_FISHER, zeros(0), 0, zeros(1, m, dtype=np.float32))),
        "coarse alone": ("coarse", (d.score, ALL[:1], *histogram)),
        "resolve several": ("resolve", (d.deltas, d.fisher, np.ones(3), 0, 0, *resolved)),
        "census several": ("census", (d.deltas, np.ones(3, np.int64), *pairs)),
        "sift alone": ("sift", (d.score[0], d.threshold, half, key, *sift)),
        "trim several": ("trim", (d.scores, *thresholds, 0, d.shared, d.deltas.copy(), *trim)),
        "kept_norms alone": ("kept_norms", (d.delta, 2, zeros(1))),
        "fisher_sums": ("fisher_sums", (d.fishers, zeros(3), zeros(3, dtype=np.int64))),
        "take_bf16 alone": ("take_bf16", (d.words[0], d.where, zeros(m))),
        "compose alone": ("compose", (d.base, NONE, d.delta, np.ones(1), 1.1, zeros(1, dtype=bool), *flags, zeros(m))),
        "ties alone": ("ties", (d.base, d.delta, np.ones(1), 1.0, True, 0, zeros(m), zeros(2, dtype=np.int64))),
        "settle_bf16 alone": ("settle_bf16", (d.base, moved, moved, d.where, d.words[0].copy(), *survival)),
    }  # fmt: skip


DATA = Data()


@pytest.mark.parametrize("name", cases(DATA))
def test_kernel(benchmark: Any, name: str) -> None:
    """One kernel, compiled and warm."""
    kernel, arguments = cases(DATA)[name]
    function = getattr(load_kernels("numba"), kernel)
    function(*arguments)
    benchmark(function, *arguments)
