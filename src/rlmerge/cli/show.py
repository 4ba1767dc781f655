"""How results look on a terminal: progress with bytes per second, tables of statistics, sizes and times in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlmerge.errors import plain
from rlmerge.figures import as_text, size, statistics_table

if TYPE_CHECKING:
    from rlmerge.api import Step
    from rlmerge.geometry.coordinates import Reading
    from rlmerge.packs.write import Packing


def duration(seconds: float) -> str:
    """'4.2 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def warn(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {plain(text)}", file=sys.stderr)


def told(quiet: bool) -> Callable[[str], None]:
    """What tells a user on stderr how a download goes."""
    return lambda text: None if quiet else print(text, file=sys.stderr, flush=True)


class _Line:
    """One line on a terminal, rewritten; elsewhere a plain line every ten seconds."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty()
        self.started = time.monotonic()
        self.last = self.started if not self.live else 0.0
        self.drawn = False

    def rate(self, count: int) -> str | None:
        """Bytes per second in words, or None while the last line is fresh."""
        now = time.monotonic()
        if self.quiet or now - self.last < (0.1 if self.live else 10.0):
            return None
        self.last = now
        return f"{size(count / max(now - self.started, 1e-9))}/s"

    def draw(self, text: str) -> None:
        """Shows a line in the place of the last one."""
        if self.live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self.drawn = True
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the live line."""
        if self.drawn:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


class ProgressLine(_Line):
    """How far a merge is."""

    def __call__(self, step: Step) -> None:
        """Shows a step; called from worker threads, often."""
        if step.message and not self.quiet:
            print(step.message, file=sys.stderr, flush=True)
        elif not step.message and (rate := self.rate(step.bytes_read)) is not None:
            self.draw(f"{size(step.bytes_read)} read, {rate}, {step.units} of {step.total_units} units written")


class PackingLine(_Line):
    """How far a pack is."""

    def __call__(self, step: Packing) -> None:
        """Shows a step."""
        if (rate := self.rate(step.done)) is not None:
            self.draw(f"{size(step.done)} of {size(step.total)}, {rate}")


class ReadingLine(_Line):
    """How far an inspection is."""

    def __call__(self, step: Reading) -> None:
        """Shows a step; called from worker threads, often."""
        if step.message and not self.quiet:
            print(step.message, file=sys.stderr, flush=True)
            self.started = time.monotonic()
        elif not step.message and (rate := self.rate(step.done)) is not None:
            if step.unit != "bytes":
                self.draw(f"{step.done} of {step.total} {step.unit}")
                return
            self.draw(f"{size(step.done)}{f' of {size(step.total)}' if step.total else ' read'}, {rate}")


def show_statistics(title: str, total: dict[str, Any]) -> None:
    """Prints what a merge did: a row a quantity, a column an expert where it has one."""
    print(f"{title}\n\n{as_text(statistics_table(total))}\n")
