"""Runs code that a model wrote so that it can reach nothing: Linux namespaces, a system call filter, limits.

    isolation = require(unsafe=False)              # SandboxError where there is none
    with Pool(isolation, Limits(wall=2)) as pool:
        ...                                        # see `python_verifier`

Read `docs/sandbox.md` first. Then from outside in: `pool` and `client` (rlmerge's own process), `worker` (a prepared
process, already shut in), `rooms`, `kernel` and `callfilter` (how), `harness` (what runs next to tested code), `judge`
(what asks it). `values` is what crosses.
"""

from __future__ import annotations

from .client import Client, Outcome, Process
from .errors import SandboxError
from .isolation import Isolation, available, require
from .limits import Limits
from .pool import Pool

__all__ = ["Client", "Isolation", "Limits", "Outcome", "Pool", "Process", "SandboxError", "available", "require"]
