"""Figures of the pilot: learning curves of all runs, and what every set's merges lose, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUANTITIES = ("reward", "entropy", "kl", "length")
"""Panels of the learning curves."""
SHOWN = (("sum", "#ddaa33"), ("mean", "#bb5566"), ("ties", "#66ccee"), ("ram", "#4477aa"), ("sar", "#228833"))
"""Merges, and their colours."""


def write_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], regimes: Mapping[str, Sequence[str]], out: Path
) -> None:
    """Writes an SVG: a row a regime, a panel a quantity, a line a run; runs that log nothing of it have none."""
    rows = {
        regime: [name for name in names if name in curves and "reward" in curves[name][-1]]
        for regime, names in regimes.items()
    }
    rows = {regime: names for regime, names in rows.items() if names}
    figure, panels = _figure(max(1, len(rows)), len(QUANTITIES), 2.0)
    for line, (regime, names) in zip(panels, rows.items()):
        for axes, quantity in zip(line, QUANTITIES):
            for name in names:
                points = curves[name]
                axes.plot([one["step"] for one in points], [one[quantity] for one in points], linewidth=1.2, label=name)
            axes.set_title(f"{regime}: {quantity}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        line[0].legend(fontsize=6)
    _write(figure, out)


def write_losses(sets: Mapping[str, Any], out: Path) -> None:
    """Writes an SVG: for every set the points that its merges, kept in fp32, lose against the single experts."""
    figure, panels = _figure(1, 1, 1.0 + 0.45 * max(1, len(sets)), 8.0)
    axes = panels[0][0]
    for place, one in enumerate(sets.values()):
        for number, (label, colour) in enumerate(SHOWN):
            loss = one["merges"]["fp32"].get(label, {"loss": {}})["loss"].get("greedy")
            if loss is None:
                continue
            height = place + 0.14 * (number - (len(SHOWN) - 1) / 2)
            axes.plot([100 * loss["low"], 100 * loss["high"]], [height] * 2, color=colour, linewidth=1.2)
            axes.plot([100 * loss["value"]], [height], "o", color=colour, markersize=4)
    for label, colour in SHOWN:
        axes.plot([], [], "o-", color=colour, markersize=4, label=label)
    axes.axvline(0, color="#777777", linewidth=0.8)
    axes.axvline(5, color="#777777", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(sets)), list(sets), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points lost against the single experts on their own tasks (dotted: the gate)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    _write(figure, out)


def _figure(rows: int, columns: int, height: float, width: float = 11.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    figure.patch.set_facecolor("white")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _write(figure: Any, out: Path) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with mpl.rc_context({"svg.hashsalt": "rlmerge", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})
