"""How every kernel is compiled: IEEE arithmetic as written (no fastmath). `images` calls them, without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba
from numba.core import config

# groups of eight neighbours become vector operations (numba leaves this part of LLVM off; sums keep their order)
config.SLP_VECTORIZE = 1  # pyright: ignore[reportAttributeAccessIssue]

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """What `images` compiles and keeps. No fastmath: sums keep their order, hence their bits."""
    return numba.njit(error_model="numpy")(function)  # type: ignore[return-value]


def inlined(function: F) -> F:
    """A helper that kernels call per coordinate."""
    return numba.njit(error_model="numpy", forceinline=True)(function)  # type: ignore[return-value]


def helper(function: F) -> F:
    """A function that rare paths of a kernel call: compiled once, where inlining it everywhere would take seconds."""
    return numba.njit(error_model="numpy")(function)  # type: ignore[return-value]
