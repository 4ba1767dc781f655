"""How results look on a terminal: progress with bytes per second, tables of statistics, sizes and times in words."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rlmerge.figures import as_text, statistics_table

if TYPE_CHECKING:
    from rlmerge.api import Step


def size(count: float) -> str:
    """'1.23 GB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def warn(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {text}", file=sys.stderr)


class ProgressLine:
    """One line on a terminal, rewritten; elsewhere a plain line every ten seconds."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty()
        self.started = time.monotonic()
        self.last = self.started if not self.live else 0.0
        self.drawn = False

    def __call__(self, step: Step) -> None:
        """Shows a step; called from worker threads, often."""
        if self.quiet:
            return
        if step.message:
            print(step.message, file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else 10.0):
            return
        self.last = now
        rate = step.bytes_read / max(now - self.started, 1e-9)
        text = f"{size(step.bytes_read)} read, {size(rate)}/s, {step.units} of {step.total_units} units written"
        if self.live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self.drawn = True
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the live line."""
        if self.drawn:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def show_statistics(title: str, total: dict[str, Any]) -> None:
    """Prints what a merge did: a row a quantity, a column an expert where it has one."""
    print(f"{title}\n\n{as_text(statistics_table(total))}\n")
