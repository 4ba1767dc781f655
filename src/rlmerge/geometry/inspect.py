"""`rlmerge inspect` as a function: opens base and experts, measures what is asked, and judges."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlmerge.disk_errors import disk_errors
from rlmerge.downloads import with_downloads
from rlmerge.errors import MissingExtraError, RecipeError
from rlmerge.kernels import Backend
from rlmerge.plan import Plan
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.recipe_flags import recipe_from_parts
from rlmerge.settings import as_recipes, check_run, default_threads
from rlmerge.stages import Stages
from rlmerge.version import VERSION

from .coordinates import CoordinateSettings, Reading, dtypes_of, measure_coordinates, measured_tensors, piece_bytes
from .document import SCHEMA, Document
from .matrix_figures import SpectraSettings
from .spectra import SpectraStep, check_spectra, measure_spectra
from .spectra_types import Spectra
from .storage import predict_survival
from .verdict import judge

if TYPE_CHECKING:
    from .function import FunctionSettings  # needs torch
    from .function_types import Function

FIXED = 250 * 2**20
"""Bytes for Python and the kernels, as in `settings.limit_threads`."""


@disk_errors()
def inspect(
    base: Path | str,
    experts: Path | str | Sequence[Path | str],
    *,
    names: Sequence[str] = (),
    null: bool = True,
    storage: bool = True,
    trajectory: bool = False,
    spectra: SpectraSettings | bool = False,
    data: Path | str | Mapping[str, Path | str] | None = None,
    function: FunctionSettings | None = None,
    recipe: Path | str | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    kernels: Backend = "auto",
    download: bool = False,
    progress: Callable[[Reading], None] = lambda step: None,
) -> Document:
    """What training did to make these experts of this base: the document that `rlmerge inspect` writes.

    experts     folders, delta packs, LoRA folders, 'model+adapter', ids of the hub: what a recipe takes; one or several
    names       what they are called, one for each; without, their references
    null        with the null model, which takes a quarter of the time
    storage     predicts what average, sum, TIES and SAR would keep in bf16; the last two take readings of their own
    trajectory  the experts are checkpoints of one run, in their order
    spectra     decomposes every matrix, as set or as usual (True): minutes to hours
    data        sequences for measures of function space (extra `model`): a .jsonl or a task, or one by expert
    function    how closely function space is measured
    recipe      where the recommended recipe is written
    memory      bytes, which lower the number of threads; no number depends on either
    Raises a subclass of RlmergeError for what a user can mend.
    """
    check_run(threads, kernels, 10**9)
    experts = [experts] if isinstance(experts, (str, Path)) else list(experts)
    make = _maker(str(base), [str(expert) for expert in experts], names)
    opened = _open(make, download, progress)
    with opened.located():
        plan = make_plan(opened)
    order = _order(opened, experts, names) if trajectory else ()
    measure = _function(base, plan, opened, data, function, download, progress) if data is not None else None
    if recipe is not None:
        _check_out(Path(recipe))
    threads = _limit(threads or default_threads(), memory, plan)
    matrices = _spectra_settings(spectra, memory, plan)
    # first, as only its first step knows what of the data the models cannot take
    function_space = measure() if measure is not None else None
    settings = CoordinateSettings(null, storage, seed, order=order)
    coordinates, stored = measure_coordinates(plan, settings, threads, kernels, progress)
    found: Document = {**_heading(plan, settings), "coordinates": coordinates}
    if stored is not None:
        if len(plan.experts) > 1:
            stored["merges"] += predict_survival(
                lambda method, chosen: _fetched(make(method, chosen), opened), threads, memory, kernels, progress
            )
        found["storage"] = stored
    if matrices is not None:
        found["spectra"] = _measure_spectra(plan, matrices, threads, kernels, progress)
    if function_space is not None:
        found["function"] = function_space
    folder = Path(recipe).parent if recipe is not None else None
    found["verdict"] = judge(
        coordinates, stored, found.get("spectra"), lambda method: recipe_text(opened, method, folder)
    )
    if recipe is not None:
        Path(recipe).write_text(_commented(found), encoding="utf-8")
    return found


Make = Callable[[str, Mapping[str, Any]], Recipe]


def _maker(base: str, experts: list[str], names: Sequence[str]) -> Make:
    """What makes a recipe over these models. Raises RecipeError for names that do not fit."""
    if not experts:
        raise RecipeError("inspect: no expert is given. Write the base and one or more experts: BASE EXPERT …")
    for expert in experts:
        if expert == base or (Path(expert).is_dir() and Path(expert).resolve() == Path(base).resolve()):
            raise RecipeError(f"inspect: {expert} is the base itself. Write what was trained from it.")
        if not names and experts.count(expert) > 1:
            raise RecipeError(f"inspect: {expert} is given twice. Leave one out, or give each a --name.")
    if names and len(names) != len(experts):
        raise RecipeError(
            f"--name is given {len(names)} times for {len(experts)} experts: give one name for each, in their order, "
            "or none."
        )

    def make(method: str, settings: Mapping[str, Any]) -> Recipe:
        return recipe_from_parts(base, experts, method, settings, names=names)

    return make


def _open(make: Make, download: bool, progress: Callable[[Reading], None]) -> Recipe:
    """The recipe over the models, with what is on the hub fetched."""
    recipe = make("task_arithmetic", {"weight": 1.0})
    if isinstance(as_recipes(recipe), Stages):
        raise RecipeError(
            f"{recipe.base_model}: is a model with an adapter on it, which is no stored base. Merge it into a folder "
            "first (`merge_method: linear` with this one model) and write that folder."
        )
    return with_downloads(recipe, tell=lambda text: progress(Reading(0, 0, text))) if download else recipe


def _fetched(recipe: Recipe, opened: Recipe) -> Recipe:
    return recipe.with_fetched(dict(opened.fetched)) if opened.fetched else recipe


def _order(recipe: Recipe, experts: Sequence[Path | str], names: Sequence[str]) -> tuple[str, ...]:
    """The keys of the experts as they were given."""
    keys = {entry.model: entry.key for entry in recipe.models}
    order = tuple(names) or tuple(keys[str(expert)] for expert in experts)
    if len(order) < 2:
        raise RecipeError("--trajectory: one checkpoint is no trajectory. Write several of one run, in their order.")
    return order


def _limit(threads: int, memory: int | None, plan: Plan) -> int:
    """Threads that fit in `memory` bytes. Raises RecipeError if not even one does."""
    if memory is None:
        return threads
    each = piece_bytes(plan)
    if FIXED + each > memory:
        raise RecipeError(
            f"--memory {memory / 1e6:.0f} MB is less than one thread needs: {(FIXED + each) / 1e6:.0f} MB "
            f"({FIXED / 1e6:.0f} for Python and the kernels, {each / 1e6:.0f} for its buffers)."
        )
    return max(1, min(threads, (memory - FIXED) // each))


def _heading(plan: Plan, settings: CoordinateSettings) -> Document:
    base, given, _ = dtypes_of(plan)
    assert plan.base is not None
    return {
        "schema": SCHEMA,
        "rlmerge": VERSION,
        "base": {
            "reference": plan.base.reference,
            "dtype": base,
            "coordinates": sum(plan.tensors[t].size for t in measured_tensors(plan)),
        },
        "experts": [
            {"key": key, "reference": model.reference, "dtype": dtype}
            for key, model, dtype in zip(plan.experts, plan.models, given, strict=True)
        ],
        "settings": {
            "null": settings.null,
            "seed": settings.seed,
            "run": settings.run,
            "trajectory": bool(settings.order),
        },
    }


# -- what others measure -----------------------------------------------------------------------------------------------


def _spectra_settings(asked: SpectraSettings | bool, memory: int | None, plan: Plan) -> SpectraSettings | None:
    """Settings as far as matrices are measured at all; looked at before any weight is read."""
    if asked is False:
        return None
    settings = SpectraSettings() if asked is True else asked
    if memory is not None and settings.memory is None:
        settings = replace(settings, memory=memory - FIXED)
    check_spectra(plan, settings)
    return settings


def _measure_spectra(
    plan: Plan, settings: SpectraSettings, threads: int, kernels: Backend, progress: Callable[[Reading], None]
) -> Spectra:
    def tell(step: SpectraStep) -> None:
        progress(Reading(step.done, step.total, step.message, "matrices"))

    return measure_spectra(plan, settings, threads, tell, kernels)


def _function(
    base: Path | str, plan: Plan, recipe: Recipe, data: Path | str | Mapping[str, Path | str],
    settings: FunctionSettings | None, download: bool, progress: Callable[[Reading], None],
) -> Callable[[], Function]:  # fmt: skip
    """What measures function space; extra, data and settings are looked at now, before any weight is read."""
    try:
        from .function import check_function, measure_function
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge inspect --data", error.name or "torch", "model") from None
    models = {entry.key: entry.model for entry in recipe.experts}
    experts = {key: models[key] for key in plan.experts}
    check_function(experts, data, settings)

    def measure() -> Function:
        tell = lambda text: progress(Reading(0, 0, text))  # noqa: E731
        heard = lambda step: progress(Reading(step.done, step.total, "", f"passes, {step.what}"))  # noqa: E731
        return measure_function(base, experts, data, settings, heard, tell=tell, download=download)

    return measure


# -- the recipe --------------------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe, method: str, folder: Path | None = None) -> str:
    """A recipe over the inspected models as YAML; paths are as given, or relative to the `folder` it is written in."""
    parameters: dict[str, dict[str, Any]] = {
        "sar": {"sensitivity": "delta2"},
        "ties": {"weight": 1.0, "density": 0.2},
        "task_arithmetic": {"weight": 1.0, "lambda": 1.0},
    }
    text = {
        "merge_method": method,
        "base_model": _seen_from(recipe.base_model or "", folder),
        "models": [
            {"model": _seen_from(entry.model, folder), **({"name": entry.name} if entry.name else {})}
            for entry in recipe.models
        ],
        "parameters": parameters[method],
    }
    return yaml.safe_dump(text, sort_keys=False, allow_unicode=True, width=120)


def _seen_from(reference: str, folder: Path | None) -> str:
    """A reference for a recipe in another folder: parts that are relative paths here are so from there."""
    if folder is None:
        return reference
    parts = [reference] if Path(reference).exists() else reference.split("+")
    return "+".join(
        os.path.relpath(part, folder) if not os.path.isabs(part) and Path(part).exists() else part for part in parts
    )


def _check_out(path: Path) -> None:
    """Raises RecipeError, before anything is measured, where the recipe cannot be written."""
    if path.suffix not in (".yml", ".yaml"):
        raise RecipeError(f"--recipe {path}: a recipe is a YAML file. Write a name that ends in .yml.")
    if path.exists():
        raise RecipeError(f"--recipe {path}: exists already, and what it holds may be yours. Write another name.")
    if not path.parent.is_dir():
        raise RecipeError(f"--recipe {path}: there is no folder {path.parent}. Make it, or write another name.")


def _commented(found: Document) -> str:
    assert "verdict" in found
    verdict = found["verdict"]
    lines = [f"{verdict['looks']} experts, by rlmerge inspect.", *verdict["recommended"]["reasons"]]
    return "".join(f"# {line}\n" for line in lines) + verdict["recommended"]["recipe"]
