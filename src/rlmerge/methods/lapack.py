"""Eigenvectors of a symmetric matrix in the memory of two: LAPACK as NumPy has loaded it, without NumPy's copies.

`numpy.linalg.eigh` takes five times the matrix: its argument, a copy, work space of two, and the result. LAPACK's
`dsyevr` needs the matrix and the vectors. It is called in the library that NumPy itself is linked with; where none is
found (another build, another system), or its vectors are not orthonormal, NumPy does it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
NAMES = (
    "scipy_dsyevr_64_", "dsyevr_64_", "dsyevr$NEWLAPACK$ILP64", "scipy_dsyevr_", "dsyevr$NEWLAPACK", "dsyevr_",
)  # fmt: skip
"""Names that builds of NumPy give the routine. A name does not say whether its integers have 32 or 64 bits, so they are
given as 64 bits that begin as zeros: on a little-endian machine a routine of 32 reads and fills their lower halves."""
SLACK = 1e-9
"""Most that a unit vector may lose or gain in the frame of vectors that is taken; 1e-12 is usual."""


@cache
def _routine() -> Any | None:
    """`dsyevr`; None where NumPy's library has none by a known name. Its calls release the GIL."""
    if sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(import_module("numpy.linalg._umath_linalg").__file__))
    except (ImportError, OSError):
        return None
    for name in NAMES:
        if hasattr(library, name):
            routine = getattr(library, name)
            routine.restype = None
            return routine
    return None


def work_arrays() -> int:
    """Arrays of the matrix's size that `eigenvectors` takes, with what it returns."""
    return 5 if _routine() is None else 2


def eigenvectors(make: Callable[[], F64]) -> tuple[F64, F64]:
    """Eigenvalues fp64[n], ascending, of the symmetric matrix that `make` makes, and its vectors, rows of fp64[n, n].

    `make` is asked once more where LAPACK fails, for it overwrites the matrix.
    """
    found = _routine()
    if found is not None:
        solved = _dsyevr(make(), found)
        if solved is not None and _orthonormal(solved[1]):
            return solved
    values, vectors = np.linalg.eigh(make())
    return values, np.ascontiguousarray(vectors.T)


def _dsyevr(matrix: F64, routine: Any) -> tuple[F64, F64] | None:
    """All eigenvalues and vectors, or None if LAPACK failed; overwrites the matrix, which is its own transpose."""
    n = len(matrix)
    vectors, values, support = np.empty((n, n)), np.empty(n), np.zeros(2 * n, np.int64)
    size, found, info = (np.array([value], np.int64) for value in (n, 0, 0))
    nothing, first = np.zeros(1), np.ones(1, np.int64)
    work, whole = np.empty(1), np.zeros(1, np.int64)
    for ask in (True, False):
        lengths = [np.array([-1 if ask else len(one)], np.int64) for one in (work, whole)]
        arrays = (
            size, matrix, size, nothing, nothing, first, size, nothing, found, values, vectors, size, support, work,
            lengths[0], whole, lengths[1], info,
        )  # fmt: skip
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        # Fortran's hidden lengths of the three letters come last
        one = ctypes.c_size_t(1)
        routine(b"V", b"A", b"L", *pointers, one, one, one)
        if info.view(np.int32)[0] != 0:  # negative ones fill only 32 bits of it where the routine's integers do
            return None
        if ask:
            work, whole = np.empty(int(work[0])), np.zeros(int(whole[0]), np.int64)
    return (values, vectors) if found[0] == n else None


def _orthonormal(vectors: F64) -> bool:
    """Whether a vector that lies along none of them keeps its components, going through the frame and back."""
    probe = np.cos(np.arange(1.0, len(vectors) + 1.0) ** 2)
    lost = np.abs(vectors.T @ (vectors @ probe) - probe).max()
    return bool(lost <= SLACK)
