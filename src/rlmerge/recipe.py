"""The recipe: mergekit's YAML dialect, extended and strict. Every mistake that a recipe alone can show is raised here.

`dtype` is the dtype of the output unless `out_dtype` is given; arithmetic is always wide, whatever either says.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.methods.base import Method
from rlmerge.parameters import Resolver, show
from rlmerge.recipe_checks import ENTRY_KEYS, SETTINGS, TOP_KEYS, Checker, Source, find_method
from rlmerge.yaml_lines import MAX_BYTES, Dumper, Place, read_yaml

MAX_SWEEP = 10_000


# ---- The models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelEntry:
    """One model of the recipe: where it is, what it is called, its Fisher, its own parameters.

    The Fisher is a folder, or what to estimate one from: {'data': …, 'source': …}, see `fisher.on_demand`.
    """

    model: str
    name: str | None = None
    fisher: str | dict[str, Any] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What reports, hashes and the order of processing know the model by: its name, else the path as written."""
        return self.name or self.model


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; made by `load_recipe`, `parse_recipe` or `recipe_from_parts`, which know the method's rules.

    Parameters are in canonical form (numbers are floats, filters have both keys); paths are as written.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    name: str | None = None
    base_model: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    min_change: float = 0.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_mismatch: Literal["error", "base"] = "error"
    allow_nonfinite: bool = False
    seed: int = 0

    _method: Method | None = field(default=None, repr=False, compare=False)
    _folder: Path | None = field(default=None, repr=False, compare=False)
    _source: Source = field(default=Source("recipe"), repr=False, compare=False)
    _estimated: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)
    _warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def method(self) -> Method:
        """The merge method."""
        return self._method or find_method(self.merge_method, None)

    @property
    def source_name(self) -> str:
        """What messages call the recipe: its path, or 'the command line'."""
        return self._source.name

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the recipe says that has no effect."""
        return self._warnings

    @property
    def output_dtype(self) -> str | None:
        """`out_dtype`, else `dtype`; None keeps what each tensor has."""
        return self.out_dtype or self.dtype

    @property
    def experts(self) -> tuple[ModelEntry, ...]:
        """The models in the order of processing: by key if the order means nothing to the method, else as written
        (where it starts at the base, a base that is listed comes first).
        """
        if self.method.symmetric:
            return tuple(sorted(self.models, key=lambda entry: entry.key))
        if self.method.base_entry == "first" and self.base_model is not None:
            base = os.path.normpath(self.base_model)
            return tuple(sorted(self.models, key=lambda entry: os.path.normpath(entry.model) != base))
        return self.models

    @property
    def base_path(self) -> Path | None:
        """The folder of the base."""
        return None if self.base_model is None else self._find(self.base_model, ("base_model",))

    @property
    def model_paths(self) -> dict[str, Path]:
        """The folder of each model by its key, in the order of `experts`."""
        return {entry.key: self._find(entry.model, self._place(entry, "model")) for entry in self.experts}

    @property
    def fisher_paths(self) -> dict[str, Path | None]:
        """The Fisher folder of each model by its key, in the order of `experts`.

        Raises RecipeError for one that must be estimated first (`fisher.on_demand.with_estimates`).
        """
        return {entry.key: self._fisher_path(entry) for entry in self.experts}

    @property
    def to_estimate(self) -> tuple[ModelEntry, ...]:
        """The models whose Fishers are still to be estimated."""
        return tuple(e for e in self.experts if isinstance(e.fisher, dict) and e.key not in self._estimated)

    def with_estimates(self, folders: Mapping[str, Path]) -> Recipe:
        """The same recipe, with the folders of Fishers that were estimated, by key."""
        return replace(self, _estimated={**self._estimated, **folders})

    def resolve(self, reference: str) -> Path:
        """The path that a reference means: in the recipe's folder, else in the working directory; it must exist."""
        return self._find(reference, ())

    def at(self, place: Place) -> str:
        """How a message names a place: 'recipe.yml:12: models[1].parameters.density', or the flag that set it."""
        return self._source.at(place)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Adds file and line to a RecipeError that knows only its place in the recipe."""
        try:
            yield
        except RecipeError as error:
            if not error.place:
                raise
            raise RecipeError(f"{self._source.head(error.place)}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe: every key and every default written out, in a fixed order; paths as written."""
        data = {key: copy.deepcopy(value) for key in TOP_KEYS if (value := getattr(self, key)) is not None}
        data["models"] = [{key: value for key in ENTRY_KEYS if (value := getattr(e, key))} for e in data["models"]]
        given = data["parameters"]
        defaults = {spec.name: given.get(spec.name, spec.default) for spec in self.method.parameters}
        data["parameters"] = {key: value for key, value in defaults.items() if value is not None}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def to_yaml(self) -> str:
        """`to_dict` as YAML that `parse_recipe` reads back to the same recipe."""
        return yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """A new recipe with these `--set` values: top-level scalars (`SETTINGS`) or parameters of the method.

        A parameter set so holds for all models: it replaces the global value and every model's own.
        """
        source, data = self._source, self.to_dict()
        for entry in data["models"]:
            own = entry.get("parameters", {})
            entry["parameters"] = {key: value for key, value in own.items() if key not in settings}
        flags = _apply_settings(data, settings)
        source = Source(source.name, source.lines, {**source.flags, **flags})
        recipe = _build(data, source, self._folder, None if self._method is None else {self.merge_method: self._method})
        warnings = tuple(dict.fromkeys((*self.warnings, *recipe.warnings)))
        return replace(recipe, _warnings=warnings, _estimated=self._estimated)

    def _fisher_path(self, entry: ModelEntry) -> Path | None:
        if entry.fisher is None:
            return None
        if isinstance(entry.fisher, str):
            return self._find(entry.fisher, self._place(entry, "fisher"))
        if entry.key not in self._estimated:
            raise RecipeError(f"{self.at(self._place(entry, 'fisher'))}: is not estimated yet; a merge does that.")
        return self._estimated[entry.key]

    def _place(self, entry: ModelEntry, key: str) -> Place:
        return ("models", self.models.index(entry), key)

    def _find(self, reference: str, place: Place) -> Path:
        try:
            path = Path(reference).expanduser()
        except RuntimeError:
            path = Path(reference)
        folders = [Path.cwd()] if path.is_absolute() or self._folder is None else [self._folder, Path.cwd()]
        tried = list(dict.fromkeys(folder / path for folder in folders))
        for candidate in tried:
            if os.path.exists(candidate):
                return candidate
        where = self.at(place) + ": " if place else ""
        places = list(dict.fromkeys(os.path.abspath(candidate) for candidate in tried))
        missing = f"there is {'neither' if len(places) > 1 else 'no'} {' nor '.join(places)}."
        message = f"{where}{show(reference)} does not exist: {missing}"
        raise RecipeError(message + _path_hint(reference, tried))


def _path_hint(reference: str, tried: list[Path]) -> str:
    for candidate in tried:
        if os.path.lexists(candidate):
            return f"\n  {candidate} is a symbolic link that leads nowhere."
    if "+" in reference:
        return "\n  'model+lora' is not read: write the path of the LoRA folder, and its base as base_model."
    for candidate in tried:
        try:
            siblings = sorted(os.listdir(candidate.parent))[:1000]
        except (OSError, ValueError):
            continue
        if hint := did_you_mean(candidate.name, siblings):
            return f"\n {hint}"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", reference):
        return (
            "\n  It looks like a Hugging Face id: nothing is downloaded. Fetch it first, "
            f"'hf download {reference} --local-dir FOLDER', and write that folder."
        )
    return ""


# ---- Making a recipe --------------------------------------------------------------------------------------------


def load_recipe(path: Path | str, methods: Mapping[str, Method] | None = None) -> Recipe:
    """Reads and checks a recipe file; relative paths in it start at its folder. `methods` replaces the registry."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe.{_path_hint(path.name, [path])}") from None
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}.") from None
    return parse_recipe(text, str(path), path.parent, methods)


def parse_recipe(
    text: str, source: str = "recipe", folder: Path | None = None, methods: Mapping[str, Method] | None = None
) -> Recipe:
    """Checks the text of a recipe; `source` is its name in messages, `folder` where its relative paths start."""
    data, lines = read_yaml(text, source)
    return _build(data, Source(source, lines), folder, methods)


def recipe_from_parts(
    base: str | None,
    experts: Sequence[str],
    method: str,
    settings: Mapping[str, Any] | None = None,
    *,
    fishers: Sequence[str] = (),
    folder: Path | None = None,
    methods: Mapping[str, Method] | None = None,
) -> Recipe:
    """The recipe of `--base --expert --fisher --method --set`; messages name the flag."""
    if fishers and len(fishers) != len(experts):
        raise RecipeError(
            f"--fisher is given {len(fishers)} times and --expert {len(experts)} times: "
            "give one Fisher folder for each expert, in the same order, or none."
        )
    models = [{"model": expert} for expert in experts]
    for entry, fisher in zip(models, fishers):
        entry["fisher"] = fisher
    data: dict[str, Any] = {"merge_method": method, "base_model": base, "models": models}
    flags: dict[Place, str] = {("merge_method",): "--method", ("base_model",): "--base", ("models",): "--expert"}
    flags |= {("models", k): f"--expert {expert}" for k, expert in enumerate(experts)}
    flags |= {("models", k, "fisher"): f"--fisher {fisher}" for k, fisher in enumerate(fishers)}
    flags |= _apply_settings(data, settings or {})
    return _build(data, Source("the command line", {}, flags), folder, methods)


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


def _apply_settings(data: dict[str, Any], settings: Mapping[str, Any]) -> dict[Place, str]:
    """Puts the settings into the recipe's data; the flags by the places they went to."""
    flags: dict[Place, str] = {}
    for key, value in settings.items():
        if key in SETTINGS:
            data[key], place = value, (key,)
        else:
            data.setdefault("parameters", {})[key], place = value, ("parameters", key)
        flags[place] = f"--set {key}"
    return flags


def _build(data: Any, source: Source, folder: Path | None, methods: Mapping[str, Method] | None) -> Recipe:
    """The checked recipe; one RecipeError lists every mistake, by line."""
    checker = Checker(source)
    method = checker.check(data, methods)
    checker.finish()
    entries = tuple(ModelEntry(**entry) for entry in checker.data.pop("models"))
    recipe = Recipe(models=entries, **checker.data, _method=method, _folder=folder, _source=source)
    kept = checker.fit(recipe, method)
    source = source if len(kept) == len(entries) else source.keeping(list(kept))
    recipe = replace(recipe, models=tuple(kept.values()), _source=source, _warnings=tuple(checker.warnings))
    resolver = Resolver(recipe, method, layers=1)
    if resolver.constant:
        resolver.resolve("")
    return recipe
