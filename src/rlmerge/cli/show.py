"""How results look on a terminal: progress with bytes per second, tables of statistics, sizes and times in words."""

from __future__ import annotations

import io
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

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


def percent(share: dict[str, Any] | None) -> str:
    """'12.3 %' of a counted share, '-' where there was nothing to count."""
    return f"{100 * share['share']:.1f} %" if share and "share" in share else "-"


def statistics_table(title: str, total: dict[str, Any]) -> None:
    """Prints what a merge did: a row a quantity, a column an expert where it has one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    experts = list(total.get("support", {}))
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    table.add_column("all", justify="right")
    for key in short_names(experts):
        table.add_column(key, justify="right", overflow="fold")
    rows = [
        ("support (of coordinates)", "changed", "support"),
        ("unique (of changed)", "unique", None),
        ("overlap (of changed)", "overlap", None),
        ("conflict (of overlap)", "conflict", None),
        ("draws (of conflicts)", "draws", None),
        ("wins (of conflicts)", None, "wins"),
        ("winner as under δ² (both decide)", "winner_agrees_with_delta2", None),
        ("kept", None, "kept"),
        ("cancelled (of updates)", "cancelled", None),
        ("ignored changes (of support)", None, "ignored"),
        ("survival after the cast", "survival", None),
    ]
    for name, one, each in rows:
        if (one in total) or (each in total):
            cells = [percent(total.get(one)) if one in total else ""]
            cells += [percent(total[each].get(key)) if each in total else "" for key in experts]
            table.add_row(name, *cells)
    if "realised_cosine" in total:
        table.add_row("cosine intended / stored", f"{total['realised_cosine']:.4f}", *[""] * len(experts))
    if "rescale" in total:
        factors = total["rescale"]
        table.add_row("rescale factor, mean", f"{factors['mean']:.4f}", *[""] * len(experts))
    buffer = io.StringIO()
    Console(file=buffer, width=shutil.get_terminal_size((120, 24)).columns, highlight=False, markup=False).print(table)
    print("\n".join(row.rstrip() for row in buffer.getvalue().splitlines()).rstrip())


def short_names(keys: list[str]) -> list[str]:
    """The last component of each path, where that tells them apart."""
    last = [key.rstrip("/").rsplit("/", 1)[-1] for key in keys]
    return last if len(set(last)) == len(keys) and all(last) else keys
