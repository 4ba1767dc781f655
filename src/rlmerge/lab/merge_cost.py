"""What a merge costs: its time and memory in a process that does nothing else."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL = 0.002
"""Seconds between two looks at the anonymous memory."""


def merge_and_measure(recipe: Path, out: Path, repeats: int) -> dict[str, Any]:
    """Merges by a recipe to the folder `out`, on one thread; for a new process, which then has merged nothing else.

    Returns what the merge did (`statistics`, as in rlmerge.json) and what it took:
    seconds, cpu_seconds    of the fastest of `repeats` merges, without the start of the process and a first merge
    peak_mb, anonymous_mb   most resident memory of the process, and of that what no file backs; None without /proc
    start_mb                resident memory before the first merge: Python, NumPy and our modules
    """
    from rlmerge.api import merge_to_folder

    before = _memory()
    watch = _Watch()
    watch.start()
    try:
        first = merge_to_folder(recipe, out, overwrite=True, threads=1)
        times = []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            merge_to_folder(recipe, out, overwrite=True, threads=1)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
    finally:
        watch.ended.set()
        watch.join()
    seconds, cpu_seconds = min(times)
    return {
        "statistics": first.report["total"],
        "seconds": round(seconds, 4),
        "cpu_seconds": round(cpu_seconds, 4),
        "peak_mb": _memory().get("VmHWM"),
        "anonymous_mb": watch.most,
        "start_mb": before.get("VmRSS"),
    }


def _memory() -> dict[str, float]:
    """VmHWM, VmRSS and RssAnon of this process in MB. (`getrusage` would begin with the peak of the parent.)"""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text, re.MULTILINE)
    return {key: round(int(kb) * 1024 / 1e6, 1) for key, kb in found}


class _Watch(threading.Thread):
    """Looks at the anonymous memory of this process until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: float | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        """Looks at once, then every INTERVAL."""
        while True:
            seen = _memory().get("RssAnon")
            if seen is not None:
                self.most = max(seen, self.most or 0.0)
            if self.ended.wait(INTERVAL):
                return
