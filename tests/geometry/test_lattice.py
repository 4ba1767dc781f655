"""Quantised weights are told from others, also after training has moved part of them."""

from __future__ import annotations

import numpy as np
import pytest
from tests.geometry.planted import bf16

from rlmerge.geometry.lattice import look_for_lattice


def weights() -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal((256, 512))).astype(np.float32)


def quantised(bits: int, affine: bool = False) -> np.ndarray:
    """Rounded to 2^bits levels a block of 32, symmetric or affine, as bf16."""
    blocks = weights().reshape(-1, 32)
    if affine:
        least = blocks.min(axis=1, keepdims=True)
        step = (blocks.max(axis=1, keepdims=True) - least) / (2**bits - 1)
        blocks = np.round((blocks - least) / step) * step + least
    else:
        step = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        blocks = np.round(blocks / step) * step
    return bf16(blocks).reshape(256, 512)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_lattices(bits: int) -> None:
    found = look_for_lattice(quantised(bits))
    assert found.found
    assert found.distinct <= min(31, 2**bits + 8)


def test_affine_lattice_half_trained() -> None:
    found = look_for_lattice(quantised(4, affine=True))
    assert found.found
    assert 10 <= found.distinct <= 16
    moved = np.where(np.random.default_rng(1).random((256, 512)) < 0.4, bf16(weights() * 1.01), quantised(4, True))
    assert look_for_lattice(moved).found


@pytest.mark.parametrize("round_to", [bf16, lambda w: w.astype(np.float16).astype(np.float32), lambda w: w])
def test_ordinary_weights(round_to) -> None:
    found = look_for_lattice(round_to(weights()))
    assert not found.found
    assert found.distinct >= 31
    assert found.distance == pytest.approx(0.25, abs=0.02)


def test_pruned_and_odd_shapes_say_nothing_wrong() -> None:
    for share in (0.2, 0.6):
        pruned = np.where(np.random.default_rng(1).random((256, 512)) < share, np.float32(0.0), bf16(weights()))
        assert look_for_lattice(pruned).distinct == 32.0
    assert look_for_lattice(np.zeros((64, 64), np.float32)).distinct is None
    assert not look_for_lattice(np.ones((4, 30), np.float32)).found
