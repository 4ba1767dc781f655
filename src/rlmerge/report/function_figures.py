"""Figures of the section `function` of a geometry document: paths, planes, sharpness, robustness, divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.report.figure import Figure, Section, heat_map, lines, number, rows_of_table

Function = Mapping[str, Any]


def function_section(function: Function, names: Mapping[str, str]) -> Section:
    """The section of a page."""
    makers = {
        "paths": _paths,
        "planes": _planes,
        "sharpness": _sharpness,
        "robustness": _robustness,
        "divergence": _divergence,
    }
    figures = [make(function, names) for part, make in makers.items() if function.get(part)]
    sets = ", ".join(f"{one['name']} ({one['problems']} problems)" for one in function["sets"])
    return Section("Function", figures, f"Measured on {sets}. Losses are nats per token.")


def _name(key: str | None, names: Mapping[str, str]) -> str:
    return "base" if not key else names.get(key, key)


def _interval(one: Mapping[str, Any]) -> str:
    if one.get("low") is None:
        return number(one["value"])
    return f"{number(one['value'])} ({number(one['low'])} to {number(one['high'])})"


MEASURES = {"loss": "loss (nats per token)", "failure": "1 − pass rate"}


def _paths(function: Function, names: Mapping[str, str]) -> Figure:
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = [["path", "on", "measure", "barrier (95 % interval)", "at α"]]
    worst: tuple[float, str, Mapping[str, Any]] | None = None
    for path in function["paths"]:
        name = f"{_name(path['start'], names)} → {_name(path['end'], names)}"
        for curve in path["curves"]:
            label = MEASURES[curve["measure"]]
            for alpha, value in zip(path["alphas"], curve["values"]):
                row = {"path": name, "measure": label, "α": alpha, "on": curve["set"], "value": value["value"]}
                band = {end: value[end] for end in ("low", "high") if value[end] is not None}
                rows.append(row | band)
            barrier = curve["barrier"]
            table.append([name, curve["set"], label, _interval(barrier), number(barrier["at"])])
            if worst is None or barrier["value"] > worst[0]:
                worst = barrier["value"], f"{name} on {curve['set']} ({label})", barrier
    assert worst is not None
    sure = worst[2].get("low") is not None and worst[2]["low"] > 0
    said = f"The highest barrier is {_interval(worst[2])}, {worst[1]}" + (
        "." if sure else ": not distinguishable from none."
    )
    if worst[0] <= 0:
        said = "No path has a barrier: none rises above the straight line between its ends."
    return Figure(
        "paths",
        "Straight from model to model",
        said,
        "A barrier is how far a path rises above the straight line between its ends: without one, an average loses "
        "nothing but the way to the middle.",
        lines(
            rows,
            "Lines of loss along straight paths",
            x="α",
            series="on",
            y_title="value",
            choices={"path": "Path", "measure": "Show"},
        ),
        table,
    )


def _planes(function: Function, names: Mapping[str, str]) -> Figure:
    rows = []
    for plane in function["planes"]:
        for losses in plane["losses"]:
            pair = f"{_name(plane['a'], names)} (down) and {_name(plane['b'], names)} (across)"
            for a, values in zip(plane["grid"], losses["values"]):
                for b, value in zip(plane["grid"], values):
                    at = {"a": round(a, 6), "b": round(b, 6)}
                    rows.append({"plane": pair, "on": losses["set"], **at, "value": value})
    first = [row for row in rows if (row["plane"], row["on"]) == (rows[0]["plane"], rows[0]["on"])]
    best = min(first, key=lambda row: row["value"])
    return Figure(
        "planes",
        "The plane through base and two experts",
        f"θ0 + a·δA + b·δB. Of {best['plane']}, the lowest loss on {best['on']} is {number(best['value'])}, at "
        f"a = {best['a']:g}, b = {best['b']:g}.",
        "The best a and b are weights to try in task_arithmetic; a corner at (1, 1) that is low favours the sum.",
        heat_map(
            rows,
            "Heat map of loss over shares of two deltas",
            x="b",
            y="a",
            choices={"plane": "Plane", "on": "Loss on"},
            percent=False,
        ),
        rows_of_table(rows, ["plane", "on", "a", "b", "value"], percent=False),
    )


def _sharpness(function: Function, names: Mapping[str, str]) -> Figure:
    rows = [
        {
            "σ": step["sigma"],
            "model": f"{_name(one['model'], names)} on {one['set']}",
            "value": step["rise"],
            **(
                {"low": step["rise"] - step["deviation"], "high": step["rise"] + step["deviation"]}
                if step["deviation"] is not None
                else {}
            ),
        }
        for one in function["sharpness"]
        for step in one["sigmas"]
    ]
    largest = max(row["σ"] for row in rows)
    most = max((row for row in rows if row["σ"] == largest), key=lambda row: row["value"])
    return Figure(
        "sharpness",
        "Random moves of the weights",
        f"At σ = {largest:g} of each tensor's norm, {most['model']} loses most: {number(most['value'])} nats per "
        f"token.",
        "A flat model forgives a merge's rounding and sparsifying; bands are one standard deviation over directions.",
        lines(
            rows,
            "Lines of the rise of loss over the size of random moves",
            x="σ",
            series="model",
            y_title="rise of loss",
            log_x=True,
        ),
        rows_of_table(rows, ["model", "σ", "value"], percent=False),
    )


def _robustness(function: Function, names: Mapping[str, str]) -> Figure:
    table = [["expert", "moved along", "by", "loss rises", "along shuffled updates", "standard deviation"]]
    pairs = []
    for one in function["robustness"]:
        for step in one["scales"]:
            control = step["control"]
            cells = [f"{step['scale']:g}", *map(number, (step["rise"], control["rise"], control["deviation"]))]
            table.append([_name(one["expert"], names), _name(one["along"], names), *cells])
            pairs.append((step["rise"] - control["rise"], one, step))
    _, one, step = max(pairs, key=lambda pair: pair[0])
    more = "more" if step["rise"] > step["control"]["rise"] else "no more"
    return Figure(
        "robustness",
        "One expert moved along another's update",
        f"{_name(one['expert'], names)} plus {step['scale']:g} of {_name(one['along'], names)}'s update: loss rises by "
        f"{number(step['rise'])}, {more} than along updates of the same norm and support that were shuffled "
        f"({number(step['control']['rise'])}).",
        "If the other's update hurts more than its shuffled twin, the experts interfere: resolve conflicts.",
        None,
        table,
    )


def _divergence(function: Function, names: Mapping[str, str]) -> Figure:
    table = [["expert", "on", "KL(expert ‖ base)", "KL(base ‖ expert)", "entropy", "entropy of the base"]]
    for one in function["divergence"]:
        cells = [_interval(one[key]) for key in ("kl_expert_base", "kl_base_expert", "entropy", "entropy_base")]
        table.append([_name(one["expert"], names), one["set"], *cells])
    far = max(function["divergence"], key=lambda one: one["kl_expert_base"]["value"])
    return Figure(
        "divergence",
        "How far answers moved from the base",
        f"{_name(far['expert'], names)} is farthest: {_interval(far['kl_expert_base'])} nats per token on "
        f"{far['set']}.",
        "It follows learning rate and steps: compare experts that were trained alike. Nats per token, with 95 % "
        "intervals over "
        "problems.",
        None,
        table,
    )
