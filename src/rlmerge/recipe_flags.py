"""A recipe out of flags of the command line: `--base --expert --method`, and the grid of `--set`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmerge.errors import RecipeError
from rlmerge.methods.base import Method
from rlmerge.recipe import Recipe, apply_settings, build_recipe
from rlmerge.recipe_checks import Source
from rlmerge.yaml_lines import Place, read_yaml

MAX_SWEEP = 10_000


def recipe_from_parts(
    base: str | Path | None,
    experts: str | Path | Sequence[str | Path],
    method: str,
    settings: Mapping[str, Any] | None = None,
    *,
    fishers: str | Path | Sequence[str | Path] = (),
    grams: str | Path | Sequence[str | Path] = (),
    names: Sequence[str] = (),
    folder: Path | None = None,
    methods: Mapping[str, Method] | None = None,
) -> Recipe:
    """The recipe of `--base --expert --fisher --gram --method --set`; messages name the flag.

    A single path stands for a list of one. `names` are what the experts are called, one for each, or none.
    """
    experts, fishers, grams = _paths(experts), _paths(fishers), _paths(grams)
    models = [{"model": expert} for expert in experts]
    for entry, name in zip(models, names):
        entry["name"] = name
    for kind, word, folders in (("fisher", "Fisher", fishers), ("gram", "Gram", grams)):
        if folders and len(folders) != len(experts):
            raise RecipeError(
                f"--{kind} is given {len(folders)} times and --expert {len(experts)} times: "
                f"give one {word} folder for each expert, in the same order, or none."
            )
        for entry, given in zip(models, folders):
            entry[kind] = given
    base = base if base is None else os.fspath(base)
    data: dict[str, Any] = {"merge_method": method, "base_model": base, "models": models}
    flags: dict[Place, str] = {("merge_method",): "--method", ("base_model",): "--base", ("models",): "--expert"}
    flags |= {("models", k): f"--expert {expert}" for k, expert in enumerate(experts)}
    flags |= {("models", k, "fisher"): f"--fisher {fisher}" for k, fisher in enumerate(fishers)}
    flags |= {("models", k, "gram"): f"--gram {gram}" for k, gram in enumerate(grams)}
    flags |= apply_settings(data, settings or {})
    return build_recipe(data, Source("the command line", {}, flags), folder, methods)


def _paths(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [os.fspath(path) for path in ([given] if isinstance(given, (str, os.PathLike)) else given)]


def parse_settings(settings: Iterable[str]) -> list[dict[str, Any]]:
    """The grid of `--set` flags: ['lambda=0.3,1', 'density=0.5'] → two dicts, the last key varying fastest.

    Values are YAML: numbers, true and false, words; a gradient stands in brackets, 't=[0,1]'.
    """
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not (key and equals and value.strip()):
            raise RecipeError(f"--set {setting}: expected key=value, as in 'lambda=0.5' or 'lambda=0.3,0.5,1'.")
        if key in grid:
            raise RecipeError(f"--set {key} is given twice; write one --set {key}=A,B to sweep over values.")
        data, _ = read_yaml(f"[{value}]", f"--set {key}", list)
        grid[key] = data
        if math.prod(map(len, grid.values())) > MAX_SWEEP:
            raise RecipeError(f"--set {key}: the sweep has more than {MAX_SWEEP} points.")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
