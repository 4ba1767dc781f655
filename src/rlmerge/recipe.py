"""The recipe: mergekit's YAML dialect, extended and strict. Every mistake that a recipe alone can show is raised here.

`dtype` is the dtype of the output unless `out_dtype` is given; arithmetic is always wide, whatever either says.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.methods.base import Method
from rlmerge.parameters import NUMBER, Resolver, as_integer, as_number, check_value, dead_entries, expected, show

MAX_BYTES = 2**20
MAX_VALUES = 20_000
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
            raise ValueError(
                f"{other[0]!r} of a model is not supported by this version of rlmerge; write the path alone"
            )
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
        places = list(dict.fromkeys(os.path.abspath(candidate) for candidate in tried))
        missing = f"there is {'neither' if len(places) > 1 else 'no'} {' nor '.join(places)}."
        message = f"{where}{show(reference)} does not exist: {missing}"
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


# ---- Checking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the recipe comes from: its name, the line of each place, the flags that set a place."""

    name: str
    lines: Mapping[Place, int] = field(default_factory=dict)
    flags: Mapping[Place, str] = field(default_factory=dict)

    def line(self, place: Place) -> int:
        """The line of the place, or of the closest one around it; 0 if none is known."""
        return next((self.lines[place[:cut]] for cut in range(len(place), 0, -1) if place[:cut] in self.lines), 0)

    def at(self, place: Place) -> str:
        """How a message names the place: 'recipe.yml:12: models[1].parameters.density', or the flag."""
        for cut in range(len(place), 0, -1):
            if place[:cut] in self.flags:
                return self.flags[place[:cut]]
        line = self.line(place)
        head = f"{self.name}:{line}" if line else self.name
        return f"{head}: {_dotted(place)}" if place else head


def _dotted(place: Place) -> str:
    words = [f"[{part}]" if isinstance(part, int) else f".{_word(part)}" for part in place]
    return "".join(words).removeprefix(".")


def _word(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else show(key)


def _find_method(name: str, methods: Mapping[str, Method] | None) -> Method:
    """The method of this name; ValueError with a suggestion and the list if there is none."""
    if methods is None:
        from rlmerge.methods import get_method, method_names  # methods are loaded when a recipe names them

        names, get = list(method_names()), get_method
    else:
        names, get = list(methods), methods.__getitem__
    if name not in names:
        hint = did_you_mean(name, names)
        raise ValueError(f"there is no merge method {show(name)}.\n {hint} The methods: {', '.join(sorted(names))}.")
    return get(name)


def _build(data: Any, source: _Source, folder: Path | None, methods: Mapping[str, Method] | None) -> Recipe:
    """The checked recipe; one RecipeError lists every mistake, by line."""
    checker = _Checker(source)
    method = checker.check(data, methods)
    recipe = checker.typed()
    recipe = recipe.model_copy(update={"models": checker.fit(recipe, method)})
    recipe._method, recipe._folder, recipe._source, recipe._warnings = method, folder, source, tuple(checker.warnings)
    resolver = Resolver(recipe, method, layers=1)
    if resolver.constant:
        try:
            resolver.resolve("")
        except RecipeError as error:
            raise RecipeError("\n".join(f"{source.name}: {line}" for line in str(error).splitlines())) from None
    return recipe


def _in_words(problem: Any) -> str:
    value = problem["input"]
    if problem["type"] == "literal_error":
        choices = [word.strip("'") for word in re.findall(r"'\w+'", problem["ctx"]["expected"])]
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{show(value)} is not one of: {', '.join(choices)}.{hint}"
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}".rstrip(".") + "."
    return f"{problem['msg']}, found {show(value)}."


class _Checker:
    """Walks over a recipe's data once: collects every mistake with its line, and the canonical data."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.data: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.problems: list[tuple[int, str]] = []

    def add(self, place: Place, problem: str) -> None:
        """Notes a mistake at a place."""
        self.problems.append((self.source.line(place), f"{self.source.at(place)}: {problem}"))

    def warn(self, place: Place, text: str) -> None:
        """Notes something that has no effect."""
        self.warnings.append(f"{self.source.at(place)}: {text}")

    def finish(self) -> None:
        """Raises what was found."""
        texts = list(dict.fromkeys(text for _, text in sorted(self.problems, key=lambda problem: problem[0])))
        if texts:
            more = [f"... and {len(texts) - 10} more."] if len(texts) > 10 else []
            raise RecipeError("\n".join(texts[:10] + more))

    def check(self, data: Any, methods: Mapping[str, Method] | None) -> Method:
        """Notes unknown keys and wrong parameters, which need the method; types of the other keys are pydantic's."""
        if not isinstance(data, dict):
            raise RecipeError(f"{self.source.at(())}: a recipe is a mapping of keys and values, found {show(data)}.")
        method = self._method(data.get("merge_method"), methods)
        for key in data:
            if key not in Recipe.model_fields:
                self.add((key,), self._unknown_key(key, method, "parameters:"))
        self.data = {key: value for key, value in data.items() if key in Recipe.model_fields and value is not None}
        if method is None:
            self.finish()
        assert method is not None
        self._models(method)
        self.data["parameters"] = self._parameters(method, ("parameters",), self.data.get("parameters"), own=False)
        return method

    def typed(self) -> Recipe:
        """The recipe as pydantic sees it, or every mistake found so far."""
        try:
            recipe = Recipe(**self.data)
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] != "missing":  # noted where more can be said
                    self.add(tuple(problem["loc"]), _in_words(problem))
            recipe = None
        self.finish()
        assert recipe is not None
        return recipe

    def fit(self, recipe: Recipe, method: Method) -> tuple[ModelEntry, ...]:
        """The models to merge: notes what does not fit the method (base, keys, number, required parameters)."""
        kept = dict(enumerate(recipe.models))
        if method.arity.base == "required" and recipe.base_model is None:
            self.add((), f"base_model is missing: method {method.name!r} works on differences to a base.")
        elif method.arity.base == "required" and recipe.base_model is not None:
            base = os.path.normpath(recipe.base_model)
            for k in [k for k, entry in kept.items() if os.path.normpath(entry.model) == base]:
                self.warn(("models", k), "this is the base, which has no difference to itself: the entry is ignored.")
                del kept[k]
        self._keys(kept)
        self._count(method, len(kept))
        for spec in method.parameters:
            if spec.default is None and spec.name not in recipe.parameters:
                lacking = [("models", k) for k, entry in kept.items() if spec.name not in entry.parameters]
                for place in lacking if spec.per_model else [()]:
                    needs = f"method {method.name!r} needs {expected(spec)}"
                    self.add(place, f"parameter {spec.name!r} is missing: {needs}.")
        self.finish()
        return tuple(kept.values())

    def _method(self, name: Any, methods: Mapping[str, Method] | None) -> Method | None:
        try:
            return _find_method(_text(name), methods)
        except ValueError as error:
            text = "merge_method is missing: write 'merge_method: sar', or another one." if name is None else str(error)
            self.add(() if name is None else ("merge_method",), text)
        return None

    def _unknown_key(self, key: str, method: Method | None, home: str, known: Iterable[str] | None = None) -> str:
        if known is None and key in LATER:
            return f"mergekit's {key!r} is not supported by this version of rlmerge."
        if method is not None and key in {spec.name for spec in method.parameters}:
            return f"{key!r} is a parameter of method {method.name!r}: write it under {home}"
        known = list(known or Recipe.model_fields)
        return f"unknown key.\n {did_you_mean(key, known)} The keys here: {', '.join(known)}."

    def _models(self, method: Method) -> None:
        models = self.data.get("models")
        if models is None and self.problems:  # 'slices' or a misspelt key say it better
            return
        if not isinstance(models, list):
            found = "'models' is missing" if models is None else f"expected a list, found {show(models)}"
            self.add(() if models is None else ("models",), f"{found}: list the models, '- model: path' each.")
            return
        entries = []
        for k, entry in enumerate(models):
            if isinstance(entry, dict) and "model" in entry:
                entries.append(self._entry(method, ("models", k), entry))
            else:
                found = "'model' is missing" if isinstance(entry, dict) else f"found {show(entry)}"
                self.add(("models", k), f"{found}: an entry is a mapping, '- model: path'.")
                entries.append({"model": "?"})  # keeps the numbers of the others
        self.data["models"] = entries

    def _entry(self, method: Method, place: Place, entry: dict[str, Any]) -> dict[str, Any]:
        known = list(ModelEntry.model_fields)
        for key in entry:
            if key not in known:
                self.add((*place, key), self._unknown_key(key, method, "the 'parameters:' of this model.", known))
        kept = {key: value for key, value in entry.items() if key in known and (value is not None or key == "model")}
        kept["parameters"] = self._parameters(method, (*place, "parameters"), kept.get("parameters"), own=True)
        return kept

    def _parameters(self, method: Method, place: Place, given: Any, own: bool) -> dict[str, Any]:
        """The canonical parameters of a model (`own`) or of the recipe, in the order of the method's specification."""
        if given is not None and not isinstance(given, dict):
            self.add(place, f"expected a mapping of parameters, found {show(given)}.")
        given = given if isinstance(given, dict) else {}
        specs = {spec.name: spec for spec in method.parameters}
        values = {}
        for key, value in given.items():
            here = (*place, key)
            if key not in specs and key == "int8_mask":
                self.warn(here, "has no effect here (in mergekit it changes no bit of the result either).")
            elif key not in specs:
                known = [*specs, *SETTINGS] if here in self.source.flags else list(specs)
                hint = did_you_mean(key, known)
                self.add(here, f"unknown parameter of method {method.name!r}.\n {hint} {_takes(method)}")
            elif own and not specs[key].per_model:
                found = f"{key!r} is a global parameter of method {method.name!r}"
                self.add(here, f"{found}: move it to the top-level 'parameters:'.")
            else:
                try:
                    values[key] = check_value(specs[key], value)
                except ValueError as error:
                    self.add(here, f"{error}".rstrip(".") + ".")
                    continue
                if dead_entries(values[key]):
                    self.warn(here, "the entries after the one that matches every tensor have no effect.")
        return {key: values[key] for key in specs if key in values and values[key] != []}

    def _keys(self, models: Mapping[int, ModelEntry]) -> None:
        seen: dict[str, int] = {}
        for k, entry in models.items():
            if entry.key in seen:
                twice = f"{show(entry.key)} is listed twice (also models[{seen[entry.key]}])"
                self.add(("models", k), f"{twice}: give each its own 'name:'.")
            seen.setdefault(entry.key, k)

    def _count(self, method: Method, count: int) -> None:
        low, high = method.arity.minimum, method.arity.maximum
        if count < low or (high is not None and count > high):
            limits = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            noun = "model" if limits.endswith(" 1") else "models"
            beside = " beside the base" if method.arity.base == "required" else ""
            self.add(("models",), f"method {method.name!r} takes {limits} {noun}{beside}, found {count}.")


def _takes(method: Method) -> str:
    """'ties' takes: weight, density (per model); lambda, normalize (global)."""
    own = ", ".join(spec.name for spec in method.parameters if spec.per_model)
    rest = ", ".join(spec.name for spec in method.parameters if not spec.per_model)
    groups = [text for text in (own and f"{own} (per model)", rest and f"{rest} (global)") if text]
    return f"{method.name!r} takes: {'; '.join(groups) or 'no parameters'}."


# ---- YAML with lines --------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_WORDS = {
    "bool": re.compile("true|True|TRUE|yes|Yes|YES|on|On|ON|false|False|FALSE|no|No|NO|off|Off|OFF"),
    "null": re.compile("~|null|Null|NULL|"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": re.compile(rf"{NUMBER.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    "merge": re.compile("<<"),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only; '1e-5' is a number (YAML 1.1 reads text), dates and '1:30' are text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        if self.nodes > MAX_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=mark)
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever YAML 1.1 or this module would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _WORDS.items():
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, None)


def _read_yaml(text: str, source: str, kind: type = dict) -> tuple[Any, dict[Place, int]]:
    """One YAML document as plain data, and the line of every place in it. RecipeError for everything else."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{source}: the recipe is longer than {MAX_BYTES} bytes; that is no recipe.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node() if kind is not dict else _single_node(loader, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and kind is dict else ""
        hint = "\n  Indent with spaces, not with tabs." if "'\\t'" in str(error.problem) else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}{line}: this is no recipe in YAML: {problem}.{hint}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is no recipe in YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise RecipeError(f"{source}: this is nested too deeply.") from None
    if node is None:
        raise RecipeError(f"{source}: the recipe is empty.")
    reader = _Reader(source)
    data = reader.read(node, ())
    return data, reader.lines


def _single_node(loader: _Loader, source: str) -> Any:
    loader.get_event()  # the start of the stream
    if loader.check_event(yaml.StreamEndEvent):
        return None
    node = loader.compose_document()
    if not loader.check_event(yaml.StreamEndEvent):
        line = loader.peek_event().start_mark.line + 1
        raise RecipeError(f"{source}:{line}: a second document starts here: several in one file are not supported yet.")
    return node


class _Reader:
    """Turns nodes into plain data: no tags of programming languages, no key twice, no alias bombs."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Place, int] = {}
        self.count = 0
        self.open: set[int] = set()

    def fail(self, node: Any, place: Place, problem: str) -> RecipeError:
        """The error for a node."""
        where = f"{self.source}:{node.start_mark.line + 1}: " + (f"{_dotted(place)}: " if place else "")
        return RecipeError(where + problem)

    def read(self, node: Any, place: Place) -> Any:
        """The data of a node; `place` is where it stands in the recipe."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise RecipeError(f"{self.source}: with its aliases the recipe has more than {MAX_VALUES} values.")
        if id(node) in self.open:
            raise self.fail(node, place, "this alias refers to itself.")
        self.open.add(id(node))
        self.lines.setdefault(place, node.start_mark.line + 1)
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            data = self._mapping(node, place)
        elif isinstance(node, yaml.SequenceNode) and tag == "seq":
            data = [self.read(item, (*place, k)) for k, item in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode):
            data = self._scalar(node, tag, place)
        else:
            raise self.fail(node, place, f"the tag {node.tag!r} is not allowed in a recipe.")
        self.open.remove(id(node))
        return data

    def _mapping(self, node: Any, place: Place) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                merged = {**self._merged(value, place), **merged}
        own: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                continue
            if key.tag != _TAG + "str":
                shown = show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise self.fail(key, place, f"a key must be text, found {shown}; if it is meant, write it in quotes.")
            line = key.start_mark.line + 1
            if key.value in own:
                raise self.fail(key, (*place, key.value), f"the same key stands in line {own[key.value]} already.")
            own[key.value] = self.lines[(*place, key.value)] = line
            merged[key.value] = self.read(value, (*place, key.value))
        return merged

    def _merged(self, node: Any, place: Place) -> dict[str, Any]:
        """What `<<: *other` or `<<: [*one, *two]` brings; the earlier of several wins."""
        total: dict[str, Any] = {}
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if not isinstance(part, yaml.MappingNode):
                raise self.fail(part, place, "'<<' takes a mapping or a list of mappings.")
            total |= self.read(part, place)
        return total

    def _scalar(self, node: Any, tag: str, place: Place) -> Any:
        text = node.value
        if tag == "str":
            return text
        if tag not in ("bool", "null", "int", "float"):
            raise self.fail(node, place, f"the tag {node.tag!r} is not allowed in a recipe.")
        if not _WORDS[tag].fullmatch(text):
            raise self.fail(node, place, f"{show(text)} is not a value of the tag {node.tag!r}.")
        if tag == "bool":
            return text.lower() in ("true", "yes", "on")
        if tag == "null":
            return None
        return (
            int(text)
            if tag == "int" and len(text) < 1000
            else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        )
