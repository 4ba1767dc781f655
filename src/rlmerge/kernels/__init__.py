"""Loops over coordinates: `compiled` (numba, without the GIL) and `plain` (its NumPy twin, the same bits, slowly).

Both have the same functions with the same signatures; every sum runs in the same order in both, so that a result does
not depend on which of them made it. A method finds the one in use as `block.kernels`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import xxhash

Backend = Literal["auto", "numba", "numpy"]

skip_blas = False
"""Set by the command line, whose process is ours alone. Where scipy is installed, numba loads it (a tenth of a second)
for a BLAS that no kernel uses; in somebody else's process other functions may want it."""

CANCELS = 1e-12
"""|Σw| / Σ|w| up to which a sum of weights is 0 but for rounding (0.1 + 0.2 - 0.3 is 6e-17), with room."""

SMALL, SMALL_AT_FIRST = 2**24, 2**28
"""Stored values up to which NumPy is done before numba has loaded its kernels, or compiled them in a first run."""


def choose(backend: Backend, values: int) -> Backend:
    """'auto' made definite for a merge that reads so many stored values: what is done first (the bits are the same)."""
    if backend != "auto":
        return backend
    return "numpy" if values <= SMALL or (values <= SMALL_AT_FIRST and not is_compiled()) else "numba"


def load_kernels(backend: Backend, values: int = 2**62) -> ModuleType:
    """The module of compiled or plain kernels, for 'auto' by how many values are read."""
    if choose(backend, values) == "numpy":
        return importlib.import_module("rlmerge.kernels.plain")
    from numba.core import config

    config.CACHE_DIR = str(cache_folder())  # pyright: ignore[reportAttributeAccessIssue]
    if skip_blas:
        _load_without_blas()
    return importlib.import_module("rlmerge.kernels.compiled")


def _load_without_blas() -> None:
    """Loads the part of numba that looks for scipy's BLAS, without letting it find any."""
    if "scipy.linalg" not in sys.modules:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # what Python takes for "there is none"
        try:
            importlib.import_module("numba.np.arraymath")
        finally:
            del sys.modules["scipy.linalg"]


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR or the user's cache, in a folder named by their source.

    numba itself looks only at the file that a kernel stands in, and would go on using a kernel whose helper in another
    file has changed. It needs no place inside the package, which may be read-only.
    """
    state = xxhash.xxh3_64()
    for path in sorted((Path(__file__).parent / "compiled").glob("*.py")):
        state.update(path.read_bytes())
    home = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else Path(os.path.expanduser("~")) / ".cache"
    folder = root / "rlmerge" / f"kernels-{state.hexdigest()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    # no home to write to: compile for this run only (a shared folder would let others put code there)
    return Path(tempfile.mkdtemp(prefix="rlmerge-"))


def is_compiled() -> bool:
    """Whether an earlier run left compiled kernels in the cache (a first run takes some seconds to compile)."""
    return next(cache_folder().rglob("*.nbi"), None) is not None
