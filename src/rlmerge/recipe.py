"""The recipe: mergekit's YAML dialect, extended and strict. Every mistake that a recipe alone can show is raised here.

`dtype` is the dtype of the output unless `out_dtype` is given; arithmetic is always wide, whatever either says.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.methods.base import Method
from rlmerge.parameters import NUMBER, Resolver, as_integer, as_number, check_value, dead_entries, expected, show

MAX_BYTES = 2**20
MAX_VALUES = 100_000
MAX_DEPTH = 64
MAX_SWEEP = 10_000

DTYPES = ("float32", "bfloat16", "float16")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SETTINGS = ("dtype", "out_dtype", "rounding", "min_change", "on_mismatch", "seed")
"""The top-level keys that `--set key=value` reaches; every other key is a parameter of the method."""
LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")

Place = tuple[str | int, ...]


# ---- The models -------------------------------------------------------------------------------------------------


def _text(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    hint = "; write it in quotes" if isinstance(value, (bool, int, float)) else ""
    raise ValueError("expected text, found nothing" if value == "" else f"expected text, found {show(value)}{hint}")


def _reference(value: Any) -> Any:
    """A path, or mergekit's `{path: ...}` and `{model: {path: ...}}`."""
    if isinstance(value, dict):
        if isinstance(value.get("model"), dict) and set(value) == {"model"}:
            value = value["model"]
        if other := [key for key in value if key != "path"]:
            raise ValueError(f"{other[0]!r} of a model is not supported by this version of rlmerge; write the path alone")
        value = value.get("path")
    return _text(value)


def _fisher(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("a mapping is not supported yet; write the path of a Fisher folder")
    return value if value is None else _text(value)


def _dtype(value: Any) -> Any:
    word = str(value).removeprefix("torch.")
    word = ALIASES.get(word, word)
    if value is None or word in DTYPES:
        return None if value is None else word
    known = f"it is one of: {', '.join(DTYPES)}"
    if word in ("float64", "fp64", "double"):
        raise ValueError(f"{word} is not written by rlmerge (arithmetic is in float64 anyway); {known}")
    raise ValueError(f"{show(value)} is not a dtype that can be written; {known}.{did_you_mean(word, DTYPES)}")


def _patterns(value: Any) -> Any:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)):
        raise ValueError(f"expected a regular expression or a list of them, found {show(value)}")
    for pattern in patterns:
        try:
            re.compile(_text(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{show(pattern)} is not a regular expression: {error}") from None
    return tuple(patterns)


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {show(value)}")
    return value


def _at_least_zero(value: Any) -> Any:
    if (number := as_number(value)) < 0:
        raise ValueError(f"expected a number >= 0, found {show(value)}")
    return number


def _seed(value: Any) -> Any:
    if not 0 <= (number := as_integer(value)) < 2**63:
        raise ValueError(f"expected an integer from 0 to 2**63 - 1, found {show(value)}")
    return number


Text = Annotated[str, BeforeValidator(_text)]
Reference = Annotated[str, BeforeValidator(_reference)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


class ModelEntry(BaseModel):
    """One model of the recipe: where it is, what it is called, its Fisher folder, its own parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Reference
    name: Text | None = None
    fisher: Annotated[str | None, BeforeValidator(_fisher)] = None
    parameters: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """What reports, hashes and the order of processing know the model by: its name, else the path as written."""
        return self.name or self.model


class Recipe(BaseModel):
    """A checked recipe; made by `load_recipe`, `parse_recipe` or `recipe_from_parts`, which know the method's rules.

    Parameters are in canonical form (numbers are floats, filters have both keys); paths are as written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text | None = None
    merge_method: Text
    base_model: Reference | None = None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, Any] = {}
    dtype: Dtype = None
    out_dtype: Dtype = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    min_change: Annotated[float, BeforeValidator(_at_least_zero)] = 0.0
    include: Patterns = ()
    exclude: Patterns = ()
    on_mismatch: Literal["error", "base"] = "error"
    allow_nonfinite: Annotated[bool, BeforeValidator(_flag)] = False
    seed: Annotated[int, BeforeValidator(_seed)] = 0

    _method: Method | None = PrivateAttr(None)
    _folder: Path | None = PrivateAttr(None)
    _source: _Source | None = PrivateAttr(None)
    _warnings: tuple[str, ...] = PrivateAttr(())

    @property
    def method(self) -> Method:
        """The merge method."""
        return self._method or _find_method(self.merge_method, None)

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
        """The models in the order of processing: by key if the order means nothing to the method, else as written."""
        return tuple(sorted(self.models, key=lambda entry: entry.key)) if self.method.symmetric else self.models

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
        """The Fisher folder of each model by its key, in the order of `experts`."""
        return {
            entry.key: None if entry.fisher is None else self._find(entry.fisher, self._place(entry, "fisher"))
            for entry in self.experts
        }

    def resolve(self, reference: str) -> Path:
        """The path that a reference means: in the recipe's folder, else in the working directory; it must exist."""
        return self._find(reference, ())

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe: every key and every default written out, in a fixed order; paths as written."""
        data = {key: value for key, value in self.model_dump().items() if value is not None}
        data["models"] = [{key: value for key, value in entry.items() if value} for entry in data["models"]]
        given = data["parameters"]
        defaults = {spec.name: given.get(spec.name, spec.default) for spec in self.method.parameters}
        data["parameters"] = {key: value for key, value in defaults.items() if value is not None}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def to_yaml(self) -> str:
        """`to_dict` as YAML that `parse_recipe` reads back to the same recipe."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """A new recipe with these `--set` values: top-level scalars (`SETTINGS`) or parameters of the method.

        A parameter set so holds for all models: it replaces the global value and every model's own.
        """
        source = self._source or _Source("recipe")
        data = self.to_dict()
        for entry in data["models"]:
            own = entry.get("parameters", {})
            entry["parameters"] = {key: value for key, value in own.items() if key not in settings}
        flags = _apply_settings(data, settings)
        source = _Source(source.name, source.lines, {**source.flags, **flags})
        recipe = _build(data, source, self._folder, None if self._method is None else {self.merge_method: self._method})
        recipe._warnings = tuple(dict.fromkeys((*self.warnings, *recipe.warnings)))
        return recipe

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
        where = (self._source or _Source("recipe")).at(place) + ": " if place else ""
        shown = " nor ".join(os.path.abspath(candidate) for candidate in dict.fromkeys(map(os.path.abspath, tried)))
        message = f"{where}{show(reference)} does not exist: there is {'no' if len(tried) == 1 else 'neither'} {shown}."
        raise RecipeError(message + _path_hint(reference, tried))


def _path_hint(reference: str, tried: list[Path]) -> str:
    for candidate in tried:
        try:
            siblings = sorted(os.listdir(candidate.parent))[:1000]
        except (OSError, ValueError):
            continue
        if hint := did_you_mean(candidate.name, siblings):
            return f"\n {hint}"
    if "+" in reference:
        return "\n  'model+lora' is not read: write the path of the LoRA folder, which names its base itself."
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
    data, lines = _read_yaml(text, source)
    return _build(data, _Source(source, lines), folder, methods)


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
    return _build(data, _Source("the command line", {}, flags), folder, methods)


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
        data, _ = _read_yaml(f"[{value}]", f"--set {key}", list)
        grid[key] = data
        if len(grid) * max(map(len, grid.values())) > MAX_SWEEP or _size(grid) > MAX_SWEEP:
            raise RecipeError(f"--set {key}: the sweep has more than {MAX_SWEEP} points.")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _size(grid: Mapping[str, list[Any]]) -> int:
    size = 1
    for values in grid.values():
        size *= len(values)
    return size


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
