"""`fisher: {data: …, source: …}` in a recipe, or `gram:`: estimated when a merge needs it, kept by content, used again.

Nothing here needs torch until something must be estimated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.checkpoint.folder import is_pack
from rlmerge.checkpoint.hub import has_headers_only
from rlmerge.checkpoint.layout import hash_range
from rlmerge.errors import FisherError, GramError, MissingExtraError, RecipeError
from rlmerge.recipe import ModelEntry, Recipe
from rlmerge.version import VERSION

from .data import SequenceChoice, check_choice, load_data

WORDS = {"fisher": "Fisher", "gram": "Gram matrices"}
CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model folder that decide its Fisher."""


def with_estimates(recipe: Recipe, tell: Callable[[str], None] = lambda text: None) -> Recipe:
    """The recipe with every Fisher and Gram folder that it describes by data estimated, or found where an earlier
    merge left it.

    Raises FisherError or GramError for what cannot be estimated, MissingExtraError without the extra `model`.
    """
    found: dict[tuple[str, str], Path] = {}
    if recipe.to_estimate:
        with_kept(recipe)  # everything that can be known before hours of work
    for kind, entry in recipe.to_estimate:
        data, request = _data_of(recipe, entry, kind), getattr(entry, kind)
        folder = kept_at(recipe, entry, data, kind)
        if not (folder / f"{kind}.json").exists():
            tell(f"estimating the {WORDS[kind]} of {entry.key} on {request['data']}: once, kept in {folder}")
            estimate = _estimate if kind == "fisher" else _estimate_gram
            estimate(recipe, entry, data, folder, tell)
        found[kind, entry.key] = folder
    return recipe.with_estimates(found) if found else recipe


def check_given(recipe: Recipe) -> None:
    """Raises for folders that a recipe names and that are not there, before others are estimated."""
    for kind in dict.fromkeys(kind for kind, _ in recipe.to_estimate):
        for entry in recipe.experts:
            given = getattr(entry, kind)
            if isinstance(given, str):
                recipe.resolve(given)
            elif given is None and kind == "fisher":
                raise FisherError(
                    f"model {entry.key!r} has no `fisher:`, the others have one: give all models a Fisher, or "
                    f"{recipe.method.fisherless}."
                )
            elif given is None:
                raise GramError(f"model {entry.key!r} has no `gram:`, the others have one: give it to all models.")


def with_kept(recipe: Recipe, unmade: Collection[Path] = ()) -> tuple[Recipe, list[str]]:
    """The recipe with estimates that are there already, and for the others a note; nothing is estimated.

    unmade  model folders that do not exist yet, of which no estimate can be there
    With some missing, all are left out and sensitivities are those that need none: for who looks at headers.
    """
    found: dict[tuple[str, str], Path] = {}
    notes = []
    if recipe.to_estimate:
        check_given(recipe)
    for kind, entry in recipe.to_estimate:
        data, request = _data_of(recipe, entry, kind), getattr(entry, kind)
        needed = [path for path in (recipe.model_paths[entry.key], recipe.base_path) if path is not None]
        there = not any(path in unmade or has_headers_only(path) for path in needed)
        folder = kept_at(recipe, entry, data, kind) if there else None
        if folder is not None and (folder / f"{kind}.json").exists():
            found[kind, entry.key] = folder
        else:
            _check_request(request, data)
            notes.append(f"the {WORDS[kind]} of {entry.key} will be estimated on {request['data']} by the merge, first")
    return (without_fishers(recipe), notes) if notes else (recipe.with_estimates(found), [])


def check_extra() -> None:
    """Raises MissingExtraError where nothing can be estimated, before hours of other work."""
    if (missing := next((name for name in ("torch", "transformers") if find_spec(name) is None), None)) is not None:
        raise MissingExtraError("`fisher: {data: …}` or `gram:`", missing, "model")


def without_fishers(recipe: Recipe) -> Recipe:
    """The same recipe for who looks at headers and deltas only: no estimate is there yet, and none is asked for."""
    bare = replace(recipe, models=tuple(replace(entry, fisher=None, gram=None) for entry in recipe.models), bare=True)
    known = {spec.name for spec in recipe.method.parameters}
    settings = {"sensitivity": "delta2"} if "sensitivity" in known else {}
    if recipe.parameters.get("sparsify") == "fisher_magnitude":
        settings["sparsify"] = "magnitude"
    return bare.with_settings(settings) if settings else bare


def kept_at(recipe: Recipe, entry: ModelEntry, data: str, kind: str = "fisher") -> Path:
    """Where the Fisher (or the Gram folder) of a model on some data is kept: named by what is in both, and by the
    settings.

    What a LoRA folder or a delta pack makes depends on its base, too.
    """
    request = getattr(entry, kind)
    model, adapter, base = recipe.model_paths[entry.key], recipe.adapter_paths[entry.key], recipe.base_path
    state = xxhash.xxh3_128(VERSION.encode())
    update = (model / "adapter_config.json").exists() or is_pack(model)
    for folder in (model, adapter or (base if update else None)):
        if folder is None:
            continue
        for file in sorted({file for pattern in CONTENT for file in folder.glob(pattern)}):
            state.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                state.update(hash_range(opened.fileno(), 0, file.stat().st_size).encode())
    group = request.get("group", 8) if request.get("source") == "policy" else 1
    task = load_data(data, request.get("sequences", 256), group, request.get("seed", 0))
    settings = {key: value for key, value in request.items() if key != "data"} | {"problems": task.settings["problems"]}
    state.update(json.dumps(settings, sort_keys=True).encode())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "rlmerge" / f"{kind}s" / state.hexdigest()


def _check_request(given: dict[str, Any], data: str) -> None:
    """Raises FisherError for what the data cannot give."""
    outer = ("data", "reduce", "compute", "positions")
    choice = SequenceChoice(**{key: value for key, value in given.items() if key not in outer})
    task = load_data(data, choice.wanted, choice.group if choice.source == "policy" else 1, choice.seed)
    check_choice(choice, task.problems, given["data"])


def _data_of(recipe: Recipe, entry: ModelEntry, kind: str) -> str:
    """The file, looked for where the recipe's other paths are; or the name of a task."""
    named = getattr(entry, kind)["data"]
    try:
        if named.startswith("file:"):
            return f"file:{recipe.resolve(named.removeprefix('file:'))}"
        return str(recipe.resolve(named)) if named.endswith(".jsonl") else named
    except RecipeError as error:
        raise RecipeError(f"{recipe.at(('models', recipe.models.index(entry), kind))}: data: {error}") from None


def _reference(recipe: Recipe, entry: ModelEntry) -> str:
    """The folder of a model, or 'A+B' for A with the adapter B."""
    model, adapter = recipe.model_paths[entry.key], recipe.adapter_paths[entry.key]
    return str(model) if adapter is None else f"{model}+{adapter}"


def _estimate(recipe: Recipe, entry: ModelEntry, data: str, folder: Path, tell: Callable[[str], None]) -> None:
    try:
        from .estimate import FisherSettings, estimate_fisher
        from .given import Progress
    except ModuleNotFoundError as error:
        raise MissingExtraError("`fisher: {data: …}`", error.name or "torch", "model") from None
    assert isinstance(entry.fisher, dict)
    request = {key: value for key, value in entry.fisher.items() if key != "data"}
    outer = {key: request.pop(key) for key in ("reduce", "compute") if key in request}
    folder.parent.mkdir(parents=True, exist_ok=True)

    def progress(step: Progress) -> None:
        tell(f"{entry.key}: {step.what}: {step.done} of {step.total}")

    try:
        estimate_fisher(
            _reference(recipe, entry), data, folder, FisherSettings(SequenceChoice(**request), **outer),
            base=recipe.base_path, overwrite=True, wait=True, progress=progress,
        )  # fmt: skip
    except FisherError as error:
        if (folder / "fisher.json").exists():
            return  # another process was faster
        raise FisherError(f"the Fisher of {entry.key}: {error}") from None


def _estimate_gram(recipe: Recipe, entry: ModelEntry, data: str, folder: Path, tell: Callable[[str], None]) -> None:
    try:
        from rlmerge.gram.estimate import GramSettings, estimate_gram

        from .given import Progress
    except ModuleNotFoundError as error:
        raise MissingExtraError("`gram: {data: …}`", error.name or "torch", "model") from None
    assert isinstance(entry.gram, dict)
    request = {key: value for key, value in entry.gram.items() if key != "data"}
    outer = {"positions": request.pop("positions")} if "positions" in request else {}
    folder.parent.mkdir(parents=True, exist_ok=True)

    def progress(step: Progress) -> None:
        tell(f"{entry.key}: {step.what}: {step.done} of {step.total}")

    try:
        estimate_gram(
            _reference(recipe, entry), data, folder, GramSettings(SequenceChoice(**request), **outer),
            base=recipe.base_path, overwrite=True, wait=True, progress=progress,
        )  # fmt: skip
    except (FisherError, GramError) as error:
        if (folder / "gram.json").exists():
            return  # another process was faster
        raise GramError(f"the Gram matrices of {entry.key}: {error}") from None
