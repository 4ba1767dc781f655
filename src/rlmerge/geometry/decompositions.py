"""Leading singular triplets of whole matrices in fp64, with bounds on their errors: exact, or from a random sketch.

The exact way is the eigendecomposition of the Gram matrix of the shorter side (a third of the time of an SVD). It
loses values below √ε of the largest, which no figure here rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlmerge.kernels.plain.hash import hash64

F64 = NDArray[np.float64]
Make = Callable[[], F64]
"""Makes the matrix fp64[m, n] anew; it is asked twice, so that it need not be held beside LAPACK's arrays."""

POWERS = 3
"""Times that the sketch is multiplied by A·Aᵀ; every product stays in the basis (block Krylov)."""
SPARE = 8
"""Columns of a sketch beyond half of the wanted triplets."""
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Spectrum:
    """Singular values and leading vectors of a matrix.

    values      fp64[r], descending: all min(m, n) of them where `exact`, else leading ones, never above the true ones
    errors      fp64[r]: a singular value lies within so much of each
    left, right fp64[m, k] and fp64[n, k], orthonormal columns
    square      the sum of all squared singular values, ‖A‖²
    blur        the perturbation, in the units of `_gap`, behind the errors: of the Gram matrix, or the residual
    """

    values: F64
    errors: F64
    left: F64
    right: F64
    square: float
    exact: bool
    blur: float

    @property
    def top(self) -> float:
        """‖A‖₂."""
        return float(self.values[0])

    @property
    def rank(self) -> int:
        """Values above what rounding makes of 0."""
        return int(np.count_nonzero(self.values > self.errors))

    def gap(self, k: int) -> float:
        """σk − σk+1 (σk where there is no other), relative to σ1; 0 for a zero matrix."""
        after = self.values[k] if k < len(self.values) else 0.0
        return float((self.values[k - 1] - after) / self.top) if self.top > 0.0 else 0.0

    def blurred(self, k: int) -> float:
        """Radians that the leading k-dimensional subspaces may be off, at most (Davis and Kahan's bound); π/2: all.

        The gap is that of the values found, which a sketch may miss a little.
        """
        power = 2 if self.exact else 1
        after = float(self.values[k]) if k < len(self.values) else 0.0
        gap = float(self.values[k - 1]) ** power - after**power
        return float(np.arcsin(min(1.0, self.blur / gap))) if gap > 0.0 else np.pi / 2


def exact_spectrum(make: Make, k: int) -> Spectrum:
    """All singular values and the leading k pairs of vectors, by the Gram matrix of the shorter side."""
    matrix = make()
    rows, columns = matrix.shape
    wide = rows < columns
    square = float(np.einsum("ij,ij", matrix, matrix))
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    del matrix
    if k == 0:
        squares, near = np.linalg.eigvalsh(gram)[::-1], np.empty((len(gram), 0))
    else:
        squares, vectors = np.linalg.eigh(gram)
        squares, near = squares[::-1], vectors[:, ::-1][:, :k].copy()
        del vectors
    del gram
    values = np.sqrt(np.maximum(squares, 0.0))
    blur = max(rows, columns) * EPSILON * float(values[0]) ** 2
    errors = np.minimum(blur / np.maximum(values, np.finfo(np.float64).tiny), np.sqrt(blur))
    if k == 0:
        far = np.empty((max(rows, columns), 0))
    else:
        far = _orthonormal(make().T @ near if wide else make() @ near, values[:k])
    left, right = (near, far) if wide else (far, near)
    return Spectrum(values, errors, left, right, square, True, blur)


def sketched_spectrum(make: Make, k: int, key: int) -> Spectrum:
    """The leading k triplets from a random block Krylov space, with residuals ‖A·v − σ·u‖ as errors.

    Source: Musco and Musco, arXiv 1504.05477. The sketch is of signs, counter-based under `key`.
    """
    matrix = make()
    rows, columns = matrix.shape
    wide = rows < columns
    # the basis stands on the shorter side
    tall = matrix.T if wide else matrix
    square = float(np.einsum("ij,ij", matrix, matrix))
    short = min(rows, columns)
    width = min(short, k // 2 + SPARE)
    block = np.linalg.qr(tall.T @ _signs(key, max(rows, columns), width))[0]
    blocks = [block]
    while len(blocks) <= POWERS and len(blocks) * width < short:
        block = np.linalg.qr(tall.T @ (tall @ block))[0]
        blocks.append(block)
    joined = np.hstack(blocks)
    del blocks, block
    basis = np.linalg.qr(joined)[0]
    del joined
    far, values, turned = np.linalg.svd(tall @ basis, full_matrices=False)
    far, near = far[:, :k].copy(), basis @ turned[:k].T
    del basis, turned
    floor = max(rows, columns) * EPSILON * float(values[0])
    # A·v = σ·u holds by construction on one side; what it lacks on the other is the error
    residual = tall.T @ far
    residual -= near * values[:k]
    errors = np.sqrt(np.einsum("ij,ij->j", residual, residual)) + floor
    blur = float(np.sqrt(np.einsum("ij,ij", residual, residual))) + floor
    # one value more than vectors, for the gap
    kept = values[: k + 1]
    errors = np.append(errors, np.full(len(kept) - len(errors), errors.max()))
    left, right = (near, far) if wide else (far, near)
    return Spectrum(kept, errors, left, right, square, False, blur)


def _orthonormal(products: F64, values: F64) -> F64:
    """A·V fp64[n, k] made orthonormal, its columns being σ·u but for rounding.

    By a Cholesky factor, in a fifth of the time of Householder's QR, unless small values have lost their directions.
    """
    if values[-1] <= 1e-6 * values[0]:
        found, triangle = np.linalg.qr(products)
        return found * np.where(np.diagonal(triangle) < 0.0, -1.0, 1.0)
    products /= values
    factor = np.linalg.cholesky(products.T @ products)
    return products @ np.linalg.inv(factor).T


def _signs(key: int, rows: int, columns: int) -> F64:
    """±1, fp64[rows, columns], the same under the same key everywhere."""
    bits = hash64(np.uint64(key), np.arange(rows * columns, dtype=np.uint64)) >> np.uint64(63)
    return (bits.astype(np.float64) * 2.0 - 1.0).reshape(rows, columns)


# -- figures of one spectrum -------------------------------------------------------------------------------------------


def stable_rank(spectrum: Spectrum) -> float | None:
    """‖A‖²/‖A‖₂²; None for a zero matrix."""
    return spectrum.square / spectrum.top**2 if spectrum.top > 0.0 else None


def effective_rank(spectrum: Spectrum) -> float | None:
    """exp of the entropy of σ/Σσ (Roy and Vetterli 2007); None for a zero matrix, or where not all values are known."""
    values = spectrum.values[: spectrum.rank]
    if not spectrum.exact or not len(values):
        return None
    share = values / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def energy(spectrum: Spectrum, k: int) -> float | None:
    """Σ of the leading k σ² over ‖A‖²; None for a zero matrix or where k values are not known."""
    if spectrum.square <= 0.0 or k > len(spectrum.values):
        return None
    return min(1.0, float(np.sum(spectrum.values[:k] ** 2)) / spectrum.square)


def energy_error(spectrum: Spectrum, k: int) -> float | None:
    """What `energy` may be off, by the errors of the values."""
    if spectrum.square <= 0.0 or k > len(spectrum.values):
        return None
    values, errors = spectrum.values[:k], spectrum.errors[:k]
    return float(np.sum((values + errors) ** 2 - values**2)) / spectrum.square
