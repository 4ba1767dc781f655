"""The demo's picture, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"math": "#4477aa", "code": "#cc6677"}


def write_picture(data: dict[str, Any], out: Path) -> bool:
    """Bars with 95 % intervals: base, both experts, their merges, in both domains. False without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    rows = _rows(data)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for shift, domain in ((-0.2, "math"), (0.2, "code")):
        found = [accuracies[domain] for _, accuracies in rows]
        values = [100 * one["value"] for one in found]
        below = [100 * (one["value"] - one["low"]) for one in found]
        above = [100 * (one["high"] - one["value"]) for one in found]
        places = [place + shift for place in range(len(rows))]
        axes.bar(places, values, 0.38, yerr=[below, above], label=domain, color=COLOURS[domain], ecolor="#555555")
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=30, ha="right", fontsize=8)
    axes.axvline(2.5, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(ncols=2, loc="upper left", fontsize=8)
    axes.set_title("Base, experts, and merges of the two experts", fontsize=10)
    figure.patch.set_facecolor("white")
    with mpl.rc_context({"svg.hashsalt": "rlmerge"}):
        FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})
    return True


def _rows(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    models = {row["model"]: row for row in data["models"]}
    rows = [(label, models[name]) for label, name in (("base", "base"), ("math expert", "rlvr-math-1"),
                                                      ("code expert", "rlvr-code-1"))]  # fmt: skip
    group = data["groups"]["rlvr-fusion-1"]
    merged: dict[str, dict[str, Any]] = {}
    for domain in COLOURS:
        for row in group[domain]:
            if row["role"] == "merged":
                merged.setdefault(row["model"], {})[domain] = row["accuracy"]
    return [*rows, *merged.items()]
