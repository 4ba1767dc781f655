"""Learning curves of runs as a plot, by matplotlib."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUANTITIES = ("reward", "loss", "kl", "entropy", "length")
"""What is drawn, where a log has it; a panel each."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def means(lines: Sequence[dict[str, Any]], keys: Sequence[str], width: int = 10) -> list[dict[str, Any]]:
    """Means of so many steps each, as single ones are noise: of each quantity over the lines that have it."""
    found = []
    for start in range(0, len(lines), width):
        some = lines[start : start + width]
        point: dict[str, Any] = {"step": some[-1]["step"] + 1}
        for key in keys:
            values = [line[key] for line in some if key in line]
            if values:
                point[key] = round(sum(values) / len(values), 4)
        found.append(point)
    return found


def write_curve(logs: Sequence[Path], out: Path, names: Sequence[str] = ()) -> None:
    """Writes an SVG with one panel a quantity and one line a log; means over a twentieth of the run."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    read = [read_log(log) for log in logs]
    shown = [name for name in QUANTITIES if any(name in line for lines in read for line in lines)]
    if not shown:
        return
    figure = Figure(figsize=(3.2 * len(shown), 2.6), layout="constrained")
    for place, quantity in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        for number, lines in enumerate(read):
            points = [(line["step"], line[quantity]) for line in lines if quantity in line]
            if points:
                axes.plot(*_smooth(points), label=names[number] if names else None, linewidth=1.2)
        axes.set_title(quantity, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if names and place == 1:
            axes.legend(fontsize=7)
    with mpl.rc_context({"svg.hashsalt": "rlmerge", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})


def _smooth(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    width = max(1, len(points) // 20)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [sum(x for x, _ in g) / len(g) for g in groups], [sum(y for _, y in g) / len(g) for g in groups]
