"""Matrices with planted spectra and frames."""

from __future__ import annotations

import numpy as np

F64 = np.ndarray


def frame(rows: int, columns: int, seed: int) -> F64:
    """Random orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def planted(rows: int, columns: int, values: F64, seed: int = 0) -> tuple[F64, F64, F64]:
    """A matrix with these singular values, and its frames U, V."""
    left, right = frame(rows, len(values), seed), frame(columns, len(values), seed + 1)
    return (left * values) @ right.T, left, right


def bf16(array: F64) -> F64:
    """The nearest bf16 values, ties to even, as fp32."""
    word = np.asarray(array, np.float32).view(np.uint32)
    word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return word.view(np.float32)
