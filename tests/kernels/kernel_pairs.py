"""Numbers that break loops, and the comparison of a compiled kernel with its plain twin: every bit of every array."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlmerge.kernels import compiled, load_kernels

PLAIN = load_kernels("numpy")
COMPILED = load_kernels("numba")
SIZES = (0, 1, 2, 7, 8, 9, 33)

# zeros of both signs, the smallest subnormal, the largest subnormal, the smallest normal, bf16 steps, the largest value
FP32 = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 2.0**-9, -(2.0**-9), 2.0**-10, 0.5, -0.5, 1.0, -1.0]
FP32 += [1.00390625, 3.0, -3.0, 1 / 3, 1e-5, -1e-5, 65504.0, 3.4028235e38, -3.4028235e38]
FP32 = [float(np.float32(value)) for value in FP32]
FP64 = [*FP32, 5e-324, -5e-324, 1e-300, 1e-160, 6.8e38, -6.8e38, 0.1, -0.1]


def fp32(*shape: int, least: float | None = None) -> st.SearchStrategy[Any]:
    """fp32 arrays, mostly of the awkward values above, so that ties and cancellations are common."""
    pool = [value for value in FP32 if least is None or value >= least]
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=least)
    return hnp.arrays(np.float32, shape, elements=st.one_of(st.sampled_from(pool), st.sampled_from(pool), floats))


def grid(*shape: int) -> st.SearchStrategy[Any]:
    """fp32 arrays of a few small integers: sums cancel and relative thresholds are met exactly, all the time."""
    return hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 4.0]))


def fp64(*shape: int) -> st.SearchStrategy[Any]:
    """fp64 arrays, as `fp32`, up to the sizes that deltas of fp32 values can have."""
    floats = st.floats(-7e38, 7e38, allow_nan=False)
    return hnp.arrays(np.float64, shape, elements=st.one_of(st.sampled_from(FP64), st.sampled_from(FP32), floats))


def shapes() -> st.SearchStrategy[tuple[int, int]]:
    """(K, n): one to five experts; empty, single and odd blocks."""
    return st.tuples(st.integers(1, 5), st.sampled_from(SIZES))


def words(size: int) -> st.SearchStrategy[Any]:
    """uint64 arrays over the whole range."""
    return hnp.arrays(np.uint64, size, elements=st.integers(0, 2**64 - 1))


def names_of(kernels: Any, name: str) -> list[str]:
    function = getattr(kernels if kernels is PLAIN else compiled, name)
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


def agree(name: str, **arguments: Any) -> dict[str, Any]:
    """Calls both twins of a kernel with copies of those arguments that it takes, and compares what they leave.

    Returns the arguments as the plain one left them, and its 'result'.
    """
    names = names_of(PLAIN, name)
    assert names == names_of(COMPILED, name)
    found = []
    for kernels in (PLAIN, COMPILED):
        copies = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in arguments.items()}
        result = getattr(kernels, name)(*(copies[key] for key in names))
        found.append({"result": result} | copies)
    for key, plain in found[0].items():
        compiled = found[1][key]
        if isinstance(plain, np.ndarray):
            assert plain.dtype == compiled.dtype
            assert plain.tobytes() == compiled.tobytes(), f"{name}, {key}:\n{plain!r}\n{compiled!r}"
        else:
            assert plain == compiled, f"{name}, {key}: {plain} {compiled}"
    return found[0]
