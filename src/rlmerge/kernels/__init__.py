"""Loops over coordinates: `compiled` (numba, without the GIL) and `plain` (its NumPy twin, the same bits, slowly).

Both have the same functions with the same signatures; every sum runs in coordinate order in both, so that a result does
not depend on which of them made it. A method finds the one in use as `block.kernels`.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Literal

Backend = Literal["numba", "numpy"]


def load_kernels(backend: Backend) -> ModuleType:
    """The module of compiled or plain kernels. Imports numba only for 'numba'."""
    if backend == "numpy":
        return importlib.import_module("rlmerge.kernels.plain")
    if not os.access(Path(__file__).parent, os.W_OK) and "NUMBA_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlmerge" / "numba"
        os.environ["NUMBA_CACHE_DIR"] = str(cache)
    return importlib.import_module("rlmerge.kernels.compiled")


def is_compiled() -> bool:
    """Whether an earlier run left compiled kernels in the cache (a first run takes some seconds to compile)."""
    cache = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(cache) if cache else Path(__file__).parent / "compiled" / "__pycache__"
    if not cache and not os.access(Path(__file__).parent, os.W_OK):
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlmerge" / "numba"
    return folder.is_dir() and next(folder.rglob("*.nbi"), None) is not None
