"""Figures of the section `function` of a geometry document: paths, planes, sharpness, robustness, divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.report.figure import Figure, Section, heat_map, lines, rows_of_table

Function = Mapping[str, Any]


def function_section(function: Function, names: Mapping[str, str]) -> Section:
    """The section of a page."""
    makers = {"paths": _paths, "planes": _planes, "sharpness": _sharpness, "robustness": _robustness,
              "divergence": _divergence}  # fmt: skip
    figures = [make(function, names) for part, make in makers.items() if function.get(part)]
    sets = ", ".join(f"{one['name']} ({one['problems']} problems)" for one in function["sets"])
    return Section("Function", figures, f"Measured on {sets}. Losses are nats per token.")


def _name(key: str | None, names: Mapping[str, str]) -> str:
    return "base" if not key else names.get(key, key)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _interval(one: Mapping[str, Any]) -> str:
    if one.get("low") is None:
        return _number(one["value"])
    return f"{_number(one['value'])} ({_number(one['low'])} to {_number(one['high'])})"


MEASURES = {"loss": "loss (nats per token)", "failure": "1 − pass rate"}


def _paths(function: Function, names: Mapping[str, str]) -> Figure:
    rows, table = [], [["path", "on", "measure", "barrier (95 % interval)", "at α"]]
    worst: tuple[float, str, Mapping[str, Any]] | None = None
    for path in function["paths"]:
        name = f"{_name(path['from'], names)} → {_name(path['to'], names)}"
        for curve in path["curves"]:
            label = MEASURES.get(curve["measure"], curve["measure"])
            for alpha, value in zip(path["alphas"], curve["values"]):
                row = {"path": name, "measure": label, "α": alpha, "on": curve["set"], "value": value["value"]}
                band = {end: value[end] for end in ("low", "high") if value[end] is not None}
                rows.append(row | band)
            barrier = curve["barrier"]
            table.append([name, curve["set"], label, _interval(barrier), _number(barrier["at"])])
            if worst is None or barrier["value"] > worst[0]:
                worst = barrier["value"], f"{name} on {curve['set']} ({label})", barrier
    assert worst is not None
    sure = worst[2].get("low") is not None and worst[2]["low"] > 0
    return Figure(
        "paths", "Straight from model to model",
        f"The highest barrier is {_interval(worst[2])}, {worst[1]}" + ("." if sure else ": not distinguishable from none."),
        "Without a barrier the middle is as good as the ends, and averaging is safe; with one, it is not.",
        lines(rows, "Lines of loss along straight paths", x="α", series="on", y_title="value",
              choices={"path": "Path", "measure": "Show"}),
        table,
    )  # fmt: skip


def _planes(function: Function, names: Mapping[str, str]) -> Figure:
    rows = []
    for plane in function["planes"]:
        for losses in plane["losses"]:
            for a, values in zip(plane["grid"], losses["values"]):
                for b, value in zip(plane["grid"], values):
                    rows.append(
                        {"plane": f"{_name(plane['a'], names)} (down) and {_name(plane['b'], names)} (across)",
                         "on": losses["set"], "a": a, "b": b, "value": value}
                    )  # fmt: skip
    best = min(rows, key=lambda row: row["value"])
    return Figure(
        "planes", "The plane through base and two experts",
        f"θ0 + a·δA + b·δB; the lowest loss measured is {_number(best['value'])} at a = {best['a']:g}, b = {best['b']:g}, "
        f"on {best['on']}.",
        "The best a and b are weights to try in task_arithmetic; a corner at (1, 1) that is low favours the sum.",
        heat_map(rows, "Heat map of loss over shares of two deltas", x="b", y="a",
                 choices={"plane": "Plane", "on": "Loss on"}, percent=False),
        rows_of_table(rows, ["plane", "on", "a", "b", "value"], percent=False),
    )  # fmt: skip


def _sharpness(function: Function, names: Mapping[str, str]) -> Figure:
    rows = [
        {"σ": step["sigma"], "model": f"{_name(one['model'], names)} on {one['set']}", "value": step["rise"],
         **({"low": step["rise"] - step["deviation"], "high": step["rise"] + step["deviation"]}
            if step["deviation"] is not None else {})}
        for one in function["sharpness"]
        for step in one["sigmas"]
    ]  # fmt: skip
    largest = max(row["σ"] for row in rows)
    most = max((row for row in rows if row["σ"] == largest), key=lambda row: row["value"])
    return Figure(
        "sharpness", "Random moves of the weights",
        f"At σ = {largest:g} of each tensor's norm, {most['model']} loses most: {_number(most['value'])} nats per token.",
        "A flat model forgives a merge's rounding and sparsifying; bands are one standard deviation over directions.",
        lines(rows, "Lines of the rise of loss over the size of random moves", x="σ", series="model",
              y_title="rise of loss", log_x=True),
        rows_of_table(rows, ["model", "σ", "value"], percent=False),
    )  # fmt: skip


def _robustness(function: Function, names: Mapping[str, str]) -> Figure:
    table = [["expert", "moved along", "by", "loss rises", "along shuffled updates", "standard deviation"]]
    pairs = []
    for one in function["robustness"]:
        for step in one["scales"]:
            control = step["control"]
            cells = [f"{step['scale']:g}", *map(_number, (step["rise"], control["rise"], control["deviation"]))]
            table.append([_name(one["expert"], names), _name(one["along"], names), *cells])
            pairs.append((step["rise"] - control["rise"], one, step))
    _, one, step = max(pairs, key=lambda pair: pair[0])
    more = "more" if step["rise"] > step["control"]["rise"] else "no more"
    return Figure(
        "robustness", "One expert moved along another's update",
        f"{_name(one['expert'], names)} plus {step['scale']:g} of {_name(one['along'], names)}'s update: loss rises by "
        f"{_number(step['rise'])}, {more} than along updates of the same norm and support that were shuffled "
        f"({_number(step['control']['rise'])}).",
        "If the other's update hurts more than its shuffled twin, the experts interfere: resolve conflicts.",
        None, table,
    )  # fmt: skip


def _divergence(function: Function, names: Mapping[str, str]) -> Figure:
    table = [["expert", "on", "KL(expert ‖ base)", "KL(base ‖ expert)", "entropy", "entropy of the base"]]
    for one in function["divergence"]:
        cells = [_interval(one[key]) for key in ("kl_expert_base", "kl_base_expert", "entropy", "entropy_base")]
        table.append([_name(one["expert"], names), one["set"], *cells])
    far = max(function["divergence"], key=lambda one: one["kl_expert_base"]["value"])
    return Figure(
        "divergence", "How far answers moved from the base",
        f"{_name(far['expert'], names)} is farthest: {_interval(far['kl_expert_base'])} nats per token on {far['set']}.",
        "Small divergence beside large gains is typical of RLVR; nats per token, with 95 % intervals over problems.",
        None, table,
    )  # fmt: skip
