"""What the table of all methods tries of each method: its defaults and up to seven other settings, chosen beforehand.

A setting is what a user would write in a recipe. Beside parameters it may hold `onto`: the expert that a method of one
model begins with, in place of the base. A pair of numbers is for the math expert and the code expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rlmerge.lab.contenders import required
from rlmerge.lab.presets import DOMAINS
from rlmerge.methods import get_method, method_names

MOST = 8
"""Settings of a method, its defaults included."""

Setting = dict[str, Any]
Axes = dict[str, tuple[Any, ...]]

_DENSITY = (1.0, 0.8, 0.5, 0.2)
_SHARES = tuple((share, round(1 - share, 2)) for share in (0.2, 0.3, 0.4, 0.45, 0.55, 0.6, 0.7))
_AVERAGE: Axes = {"density": _DENSITY, "lambda": (1.0, 1.5)}
_SUM: Axes = {"density": _DENSITY, "lambda": (1.0, 0.7)}
"""Where updates that agree are averaged, the factor above 1 is tried; where they are added, the one below."""

GRIDS: dict[str, Axes | tuple[Axes, ...]] = {
    "arcee_fusion": {"onto": DOMAINS, "epsilon": (1e-8, 1e-6, 1e-4, 1e-2)},
    "breadcrumbs": _SUM,
    "breadcrumbs_ties": _SUM,
    "dare_linear": _SUM,
    "dare_ties": _SUM,
    "della": _AVERAGE,
    "della_linear": _SUM,
    "dots": {"density": (0.3, 0.1, 0.5, 0.8), "lambda": (1.0, 0.7)},
    "fisher": ({"floor": (1e-3, 1e-2, 0.1, 1.0)}, {"weight": ((0.3, 0.7), (0.4, 0.6), (0.6, 0.4), (0.7, 0.3))}),
    "iso_c": {"scaling": (1.0, 0.5, 0.7, 0.8, 1.2, 1.5, 2.0, 2.5)},
    "iso_cts": {"scaling": (1.0, 0.7, 1.4, 2.0), "common_space_fraction": (0.8, 0.5)},
    "iso_merger": {"keep": (0.9, 0.5, 0.7, 1.0), "clip": (1.5, 1.0)},
    "karcher": {},
    "linear": {"weight": _SHARES},
    "model_stock": {"filter_wise": (False, True)},
    "multislerp": {"weight": _SHARES},
    "nearswap": {"onto": DOMAINS, "t": (1.0, 3e-3, 1e-3, 3e-4)},
    "nuslerp": {"weight": _SHARES},
    "ota": {"density": (0.4, 0.2, 0.7, 1.0), "power": (0.5, 1.0)},
    "passthrough": {"scale": (1.0, 0.9, 0.95, 0.98, 0.99, 1.01, 1.02, 1.05)},
    "ram": {"epsilon": (1e-5, 0.0, 1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3)},
    "ramplus": {"r": (0.2, 0.5, 1.0, 2.0), "epsilon": (1e-5, 1e-3)},
    "ramplus_tl": {"r": (0.1, 0.5, 1.0, 2.0), "epsilon": (1e-5, 1e-3)},
    "regmean": ({"alpha": (0.9, 0.0, 0.5, 0.99)}, {"weight": ((0.3, 0.7), (0.4, 0.6), (0.6, 0.4), (0.7, 0.3))}),
    "resmerge": {"rank": (1, 2, 4, 8), "rho": (0.2, 0.5)},
    "sar": {"density": (0.8, 1.0, 0.5, 0.2), "lambda": (1.0, 1.5)},
    "sce": {"select_topk": (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05)},
    "slerp": {"t": (0.5, 0.2, 0.3, 0.4, 0.45, 0.55, 0.6, 0.7)},
    "subspace_rewiring": {"delta_rank_fraction": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)},
    "task_arithmetic": {"lambda": (1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)},
    "ties": _AVERAGE,
    "tsv_m": {"scaling": (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5)},
}
"""The values of each parameter, all combined with all; several of them are tried one after the other.

Parameters that shape the result most, and not what says how exactly it is computed: karcher has nothing but the latter.
"""


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    settings   the first is the method's own defaults, at which nothing is written but what must be
    only       the domain of the one expert that it takes; '' for both
    """

    label: str
    method: str
    settings: tuple[Setting, ...]
    only: str = ""


def entries(labels: Sequence[str] = ()) -> list[Entry]:
    """All rows, or those of these labels, in the order of their names, which says nothing about their worth.

    A method of one model takes one expert onto the other, where its grid says so; else it has a row for each expert.
    """
    found = []
    for name in method_names():
        settings = settings_of(name)
        if get_method(name).arity.maximum == 1 and "onto" not in settings[0]:
            found += [Entry(f"{name}-{domain}", name, settings, domain) for domain in DOMAINS]
        else:
            found.append(Entry(name, name, settings))
        if name == "sar":
            data_free = tuple(setting | {"sensitivity": "delta2"} for setting in settings)
            found.append(Entry("sar-delta2", name, data_free))
    return [entry for entry in found if not labels or entry.label in labels]


def settings_of(name: str) -> tuple[Setting, ...]:
    """The settings that are tried of a method, each once, its defaults first; they hold what is not default."""
    method, grids = get_method(name), _grids(name)
    needed = required(method) | ({"onto": DOMAINS[0]} if any("onto" in axes for axes in grids) else {})
    standing = {parameter.name: parameter.default for parameter in method.parameters} | needed
    found = [needed]
    for axes in grids:
        for values in product(*axes.values()):
            changed = {key: value for key, value in zip(axes, values) if standing[key] != value}
            if needed | changed not in found:
                found.append(needed | changed)
    return tuple(found)


def _grids(name: str) -> tuple[Axes, ...]:
    grid = GRIDS.get(name, {})
    return (grid,) if isinstance(grid, dict) else grid


def at_end(entry: Entry, chosen: int) -> bool:
    """Whether the chosen setting has the least or largest of three or more numbers that are tried of a parameter, which
    could go on there: a wider grid might have found a better one.
    """
    parameters = {parameter.name: parameter for parameter in get_method(entry.method).parameters}
    for axes in _grids(entry.method):
        for key, values in axes.items():
            value = entry.settings[chosen].get(key)
            if len(values) < 3 or not isinstance(value, float | int):
                continue
            known = parameters[key]
            if value in (min(values), max(values)) and value not in (known.minimum, known.maximum):
                return True
    return False


def said(setting: Setting) -> str:
    """'density 0.5, lambda 1.5'; 'weight 0.3 : 0.7' for math and code."""
    parts = []
    for key, value in setting.items():
        if key == "onto":
            other = next(domain for domain in DOMAINS if domain != value)
            parts.append(f"{other} onto {value}")
        else:
            parts.append(f"{key} {_number(value)}")
    return ", ".join(parts) or "-"


def grid_said(name: str) -> str:
    """'density 1, 0.8 × lambda 1, 0.7': what is tried of a method, beside its defaults."""
    parts = []
    for axes in _grids(name):
        parts.append(" × ".join(f"{key} {', '.join(map(_number, values))}" for key, values in axes.items()))
    return "; ".join(parts) or "-"


def _number(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " : ".join(map(_number, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
