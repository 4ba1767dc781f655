"""Where the time of a merge goes: one thread, clocks around system calls, hashes and kernels.

    python benchmarks/profile_merge.py RECIPE FOLDER [numpy]

It merges into FOLDER/profiled, with compiled kernels or with those of NumPy, prints JSON and deletes the output.

Times are exclusive: a kernel called within another clock stops that one. With one thread they add up to the whole, from
the start of the process to the end of the merge; what no clock sees is the interpreter and NumPy.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DECODE = ("decode_", "take", "patches_", "changes", "deltas", "apply_steps", "spread", "join")
ENCODE = ("encode_", "settle_", "add_bf16", "round_stochastically", "realised")
KINDS = (
    "start",
    "kernel_loading",
    "reading",
    "decoding",
    "arithmetic",
    "encoding",
    "writing",
    "hashing",
    "interpreter",
)
"""start: python, imports, the recipe, the plan, up to the first byte of weights; kernel_loading: first calls of
kernels, which take them from the cache; decoding: words to fp32, comparing, picking out what changed; encoding:
rounding, and what of the updates it left; interpreter: all else."""


class Clocks:
    """Exclusive nanoseconds by kind, over all threads (of which one works)."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(KINDS, 0)
        self.calls = dict.fromkeys(KINDS, 0)
        self.first_read = 0
        self._running = threading.local()

    def wrap(self, kind: str, function: Callable[..., Any], loads: bool = False) -> Callable[..., Any]:
        """The function with a clock around it; `loads`: its first call counts as loading it."""
        fresh = [loads]

        def timed(*arguments: Any, **named: Any) -> Any:
            stack = self._running.__dict__.setdefault("stack", [])
            counted = "kernel_loading" if fresh[0] else kind
            fresh[0] = False
            began = time.perf_counter_ns()
            if kind == "reading" and not self.first_read:
                self.first_read = began
            stack.append(0)
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter_ns() - began
                self.spent[counted] += took - stack.pop()
                self.calls[counted] += 1
                if stack:
                    stack[-1] += took

        return timed


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    if kernel.startswith(DECODE):
        return "decoding"
    return "encoding" if kernel.startswith(ENCODE) else "arithmetic"


class Hash:
    """An xxh3-128 with a clock around `update`."""

    clocks: Clocks
    make: Callable[..., Any]

    def __init__(self, *data: Any) -> None:
        self.state = type(self).make(*data)
        self.update = self.clocks.wrap("hashing", self.state.update)
        self.hexdigest = self.state.hexdigest


def instrument(clocks: Clocks, kernels: ModuleType) -> None:
    """Puts clocks around what reads, writes, hashes and computes."""
    import xxhash

    os.preadv = clocks.wrap("reading", os.preadv)
    os.pwrite = clocks.wrap("writing", os.pwrite)
    Hash.clocks, Hash.make = clocks, staticmethod(xxhash.xxh3_128)
    xxhash.xxh3_128 = Hash  # type: ignore[misc, assignment]
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        if callable(kernel):
            setattr(kernels, name, clocks.wrap(kind_of(name), kernel, loads=True))


def since_start() -> int:
    """Nanoseconds since this process began, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - began) * 1e9)


def profile(recipe: Path, out: Path, kernels: Any = "numba", threads: int = 1) -> dict[str, Any]:
    """Merges with compiled or plain kernels, and returns seconds by kind, calls by kind and the whole."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    before = since_start()
    began = time.perf_counter_ns()
    import rlmerge
    import rlmerge.kernels

    rlmerge.kernels.skip_blas = True
    clocks = Clocks()
    instrument(clocks, rlmerge.kernels.load_kernels(kernels))
    rlmerge.merge_to_folder(recipe, out, threads=threads, kernels=kernels, overwrite=True)
    ended = time.perf_counter_ns()
    clocks.spent["start"] = before + clocks.first_read - began
    total = before + ended - began
    clocks.spent["interpreter"] = total - sum(clocks.spent.values())
    return {
        "total": round(total / 1e9, 3),
        "threads": threads,
        "seconds": {kind: round(spent / 1e9, 3) for kind, spent in clocks.spent.items()},
        "calls": {kind: count for kind, count in clocks.calls.items() if count},
    }


if __name__ == "__main__":
    target = Path(sys.argv[2]) / "profiled"
    try:
        print(json.dumps(profile(Path(sys.argv[1]), target, *sys.argv[3:])))
    finally:
        shutil.rmtree(target, ignore_errors=True)
