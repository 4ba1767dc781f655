"""The plot of the table of all methods: how far each row is from the reference, and how much of that is noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"default": "#bb5566", "tuned": "#004488"}


def write_plot(found: dict[str, Any], out: Path) -> None:
    """Writes an SVG: a panel a pair, a line a row; points with 95 % intervals, filled where beyond noise after Holm."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    labels = [label for label, row in next(iter(found["pairs"].values()))["default"].items() if "difference" in row]
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(found["pairs"]), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (seed, variants) in zip(panels, found["pairs"].items()):
        for shift, (variant, colour) in zip((-0.17, 0.17), COLOURS.items()):
            for place, label in enumerate(labels):
                one = variants[variant][label]["difference"]
                value, low, high = (100 * one[key] for key in ("value", "low", "high"))
                axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.2)
                fill = colour if one["p_holm"] < 0.05 else "white"
                axes.plot([value], [place + shift], "o", color=colour, markerfacecolor=fill, markersize=4)
            axes.plot([], [], "o-", color=colour, markerfacecolor="white", markersize=4, label=variant)
        axes.axvline(0, color="#777777", linewidth=0.8)
        axes.set_title(f"pair {seed}", fontsize=9)
        axes.set_xlabel("mean accuracy of both domains less sar's, points", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].plot([], [], "o", color="#777777", markersize=4, label="filled: beyond noise")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].margins(y=0.02)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7, loc="lower left")
    figure.patch.set_facecolor("white")
    with mpl.rc_context({"svg.hashsalt": "rlmerge", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})
