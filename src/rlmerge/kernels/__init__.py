"""Loops over coordinates: `compiled` (numba, called through `images`) and `plain` (NumPy twins, same bits, slowly).

Both have the same functions with the same signatures; every sum runs in the same order in both, so that a result does
not depend on which of them made it. A method finds the one in use as `block.kernels`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import shutil
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
"""Stored values up to which NumPy is done before the compiled kernels are loaded, or compiled in a first run."""


def choose(backend: Backend, values: int) -> Backend:
    """'auto' made definite for a merge that reads so many stored values: what is done first (the bits are the same)."""
    if backend != "auto":
        return backend
    return "numpy" if values <= SMALL or (values <= SMALL_AT_FIRST and not is_compiled()) else "numba"


def load_kernels(backend: Backend, values: int = 2**62) -> ModuleType:
    """The module of compiled or plain kernels, for 'auto' by how many values are read."""
    if choose(backend, values) == "numpy":
        return importlib.import_module("rlmerge.kernels.plain")
    return importlib.import_module("rlmerge.kernels.images")


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR or the user's cache, in a folder named by their source.

    By all of it: a kernel may call helpers that stand in other files. No place inside the package is needed, which may
    be read-only.
    """
    state = xxhash.xxh3_64()
    here = Path(__file__).parent
    for path in (*sorted((here / "compiled").glob("*.py")), here / "images.py"):
        state.update(path.read_bytes())
    home = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else Path(os.path.expanduser("~")) / ".cache"
    if root.is_absolute():  # without a home, or with a wrong one, it would be a folder that happens to be here
        folder = root / "rlmerge" / f"kernels-{state.hexdigest()}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or is_filled(folder):
            return folder
    # no home to write to: compile for this run only (a shared folder would let others put code there)
    folder = Path(tempfile.mkdtemp(prefix="rlmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_filled(folder: Path) -> bool:
    """Whether compiled kernels are kept there."""
    return next(folder.glob("*.kernel"), None) is not None


def is_compiled() -> bool:
    """Whether an earlier run left compiled kernels in the cache (a first run takes some seconds to compile)."""
    return is_filled(cache_folder())
