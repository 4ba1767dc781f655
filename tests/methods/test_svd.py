"""Decompositions by Gram matrices against LAPACK's, what they hold in memory, and what is done where LAPACK fails."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from rlmerge.methods import lapack
from rlmerge.methods.base import Task, Whole
from rlmerge.methods.iso_merger import IsoMerger
from rlmerge.methods.resmerge import ResMerge
from rlmerge.methods.rewiring import SubspaceRewiring
from rlmerge.methods.singular import IsoC, IsoCts, TsvMerge
from rlmerge.methods.spectral import noise
from rlmerge.methods.svd import svd, work_bytes


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def graded(rng, n, decades):
    return (orthogonal(rng, n) * np.logspace(0, -decades, n)) @ orthogonal(rng, n)


def few_rows(rng, n):
    out = rng.standard_normal((n, n))
    out[5:] = 0.0
    return out


MATRICES = {
    "random": lambda rng: rng.standard_normal((150, 150)),
    "tall": lambda rng: rng.standard_normal((300, 70)),
    "wide": lambda rng: rng.standard_normal((70, 300)),
    "orthogonal": lambda rng: orthogonal(rng, 140),
    "low rank": lambda rng: rng.standard_normal((140, 16)) @ rng.standard_normal((16, 90)),
    "low rank, spread": lambda rng: (
        (rng.standard_normal((140, 16)) * np.logspace(0, -4, 16)) @ rng.standard_normal((16, 140))
    ),
    "6 decades": lambda rng: graded(rng, 140, 6),
    "15 decades": lambda rng: graded(rng, 140, 15),
    "few rows": lambda rng: few_rows(rng, 140),
    "one": lambda rng: np.array([[-3.0]]),
    "small numbers": lambda rng: 1e-30 * rng.standard_normal((20, 30)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_decompositions_are_lapacks(kind):
    """Ranks, values and products to 1e-13 of the largest value; vectors orthonormal to what one level loses."""
    matrix = MATRICES[kind](np.random.default_rng(1))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.count_nonzero(values > noise(matrix.shape) * values[0]))
    found = svd(matrix.copy, matrix.shape, noise(matrix.shape))
    u, s, vt = found.triplets(matrix.copy)
    assert len(s) == rank
    np.testing.assert_allclose(s, values[:rank], rtol=0, atol=1e-13 * values[0])
    product = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose((u * s) @ vt, product, rtol=0, atol=2e-13 * values[0])
    for frame in (u.T, vt):
        np.testing.assert_allclose(frame @ frame.T, np.eye(rank), rtol=0, atol=2e-11)
    np.testing.assert_allclose(
        svd(matrix.copy, matrix.shape, noise(matrix.shape)).polar(matrix.copy), u @ vt, atol=1e-9
    )


@pytest.mark.parametrize("kind", [*MATRICES, "zeros"])
def test_all_directions_are_orthonormal(kind):
    """Also those that the matrix has not; and the longer side's can be freed and made again, the same every time."""
    matrix = np.zeros((9, 7)) if kind == "zeros" else MATRICES[kind](np.random.default_rng(2))
    found = svd(matrix.copy, matrix.shape, 0.0)
    count, top = min(matrix.shape), np.linalg.norm(matrix, 2)
    assert len(found.values) == count
    for _ in range(2):
        u, s, vt = found.triplets(matrix.copy)
        for frame in (u.T, vt):
            np.testing.assert_allclose(frame @ frame.T, np.eye(count), rtol=0, atol=1e-9)
        np.testing.assert_allclose((u * s) @ vt, matrix, rtol=0, atol=2e-13 * top)
        found.release()
    assert np.array_equal(found.far(matrix.copy), found.far(matrix.copy))


def test_leading_directions_and_floors():
    matrix = graded(np.random.default_rng(3), 100, 5)
    values = np.linalg.svd(matrix, compute_uv=False)
    for count in (1, 30, 95, 200):
        found = svd(matrix.copy, matrix.shape, 0.0, count)
        np.testing.assert_allclose(found.values, values[:count], rtol=0, atol=1e-14)
    for floor in (1e-1, 1e-4):
        found = svd(matrix.copy, matrix.shape, noise(matrix.shape), None, floor)
        assert len(found.values) == np.count_nonzero(values > floor)
    assert not len(svd(matrix.copy, matrix.shape, noise(matrix.shape), None, 2.0).values)
    assert not len(svd(lambda: np.zeros((4, 3)), (4, 3), noise((4, 3))).values)


@pytest.mark.parametrize("broken", ["none", "failed", "crooked"])
def test_numpy_steps_in_for_lapack(monkeypatch, broken):
    """Where the routine is not found, fails, or gives vectors that are not orthonormal."""
    if broken == "none":
        monkeypatch.setattr(lapack, "_routine", lambda: None)
    else:
        true = lapack._dsyevr
        spoil = (lambda *args: None) if broken == "failed" else (lambda *args: (true(*args)[0], np.ones((30, 30))))
        monkeypatch.setattr(lapack, "_dsyevr", spoil)
    part = np.random.default_rng(4).standard_normal((30, 30))
    matrix = part + part.T
    values, vectors = lapack.eigenvectors(matrix.copy)
    np.testing.assert_allclose(vectors.T @ (values[:, None] * vectors), matrix, rtol=0, atol=1e-12)
    assert (np.diff(values) >= 0.0).all()


def test_lapack_is_found_here():
    """Of the builds of NumPy that tests run with; without it, methods take more memory."""
    part = np.random.default_rng(5).standard_normal((200, 200))
    matrix = part + part.T
    lapack.eigenvectors(matrix.copy)
    tracemalloc.start()
    lapack.eigenvectors(matrix.copy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lapack.work_arrays() == 2
    assert peak < 2.6 * matrix.nbytes


# -- memory ------------------------------------------------------------------------------------------------------------


class InMemory(Whole):
    """A whole tensor of arrays: bf16 steps of an eighth of the values of a random base."""

    def __init__(self, shape, count):
        rng = np.random.default_rng(6)
        self.start = rng.standard_normal(shape).astype(np.float32)
        self.deltas = [
            (1e-2 * rng.standard_normal(shape) * (rng.random(shape) < 0.13)).astype(np.float32) for _ in range(count)
        ]
        self.changed, self.finite = np.ones(count, bool), True

    def base(self):
        return self.start.astype(np.float64)

    def expert(self, expert):
        out = self.base()
        out += self.deltas[expert]
        return out

    def combine(self, coefficients):
        out = np.zeros(self.start.shape)
        for delta, factor in zip(self.deltas, coefficients):
            if factor:
                out += delta
        return out

    def gram(self, expert):
        raise AssertionError("no spectral method asks for inputs")


ARRAYS = [(TsvMerge, 4.6, 4.6), (IsoC, 2.4, 2.4), (IsoCts, 5.0, 4.6), (IsoMerger, 6.5, 6.0), (ResMerge, 3.3, 3.3),
          (SubspaceRewiring, 2.4, 2.4)]  # fmt: skip
"""Arrays of a square matrix and of one that is three times as long as wide."""


@pytest.mark.parametrize("shape", [pytest.param((640, 640), marks=pytest.mark.long), (900, 300)])
@pytest.mark.parametrize(("method", "square", "tall"), ARRAYS)
def test_arrays_that_methods_hold(method, square, tall, shape):
    """Three experts. The target is six arrays; iso_merger holds those of all experts at once."""
    count = 1 if method is SubspaceRewiring else 3
    tensor, one = InMemory(shape, count), method()
    values = {spec.name: spec.default for spec in one.parameters}
    keys = np.arange(count, dtype=np.uint64)
    task = Task("layers.0.mlp.up.weight", shape, ("e0", "e1", "e2")[:count], values, {}, keys, 0, False)
    tracemalloc.start()
    out = one.update(tensor, task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(out).all()
    assert peak <= (square if shape[0] == shape[1] else tall) * out.nbytes
    foreseen = one.whole_cost("layers.0.mlp.up.weight", shape, values, count)[1]
    # blocks of rows, which are small beside real matrices
    assert peak <= foreseen + 4 * 128 * 8 * shape[1]
    assert foreseen >= work_bytes(shape)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_number_is_no_empty_set_of_directions(value):
    matrix = np.eye(5)
    matrix[2, 3] = value
    with pytest.raises(np.linalg.LinAlgError):
        svd(matrix.copy, (5, 5), 0.0)
