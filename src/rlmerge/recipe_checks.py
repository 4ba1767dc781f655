"""What a recipe may hold: the values of its keys, and a walk over its data that collects every mistake by line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.in_json import FLAG, JSON_OF, TEXT, either, in_json, items, mapping, number
from rlmerge.mergekit_dialect import TOKENIZER_KEYS, misplaced_without_effect, not_here, without_effect
from rlmerge.methods.base import Method, Parameter
from rlmerge.parameters import as_integer, as_number, check_value, dead_entries, expected, show
from rlmerge.recipe_tokens import check_chat_template, check_tokenizer, tokenizer_in_json
from rlmerge.slices import check_modules, check_slices
from rlmerge.yaml_lines import Place, dotted

if TYPE_CHECKING:
    from rlmerge.recipe import ModelEntry, Recipe

DTYPES = ("float32", "bfloat16", "float16")
PATH = mapping({"path": TEXT, "revision": either(TEXT, {"type": "null"})}, "path")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SETTINGS = ("dtype", "out_dtype", "rounding", "min_change", "on_mismatch", "seed")
"""The top-level keys that `--set key=value` reaches; every other key is a parameter of the method."""
BASE_ALONE = " The base is the only model: to write it alone, say merge_method: passthrough, without base_model."


# ---- Values of keys -----------------------------------------------------------------------------------------------

# Beside each function stands the JSON schema of what it accepts, for `rlmerge schema`.


@in_json(TEXT)
def _text(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    hint = "; write it in quotes" if isinstance(value, (bool, int, float)) else ""
    raise ValueError("expected text, found nothing" if value == "" else f"expected text, found {show(value)}{hint}")


@in_json(
    either(TEXT, PATH, mapping({"model": either(TEXT, PATH), "lora": either(TEXT, PATH, {"type": "null"})}, "model"))
)
def _reference(value: Any) -> Any:
    """A path, or mergekit's `{path: ..., revision: ...}` and `{model: {path: ...}, lora: {path: ...}}` as one."""
    if not isinstance(value, dict):
        return _text(value)
    parts = {"model": value} if "path" in value else value
    for key in parts:
        if key not in ("model", "lora"):
            raise ValueError(
                f"{show(key)} of a model is not supported by this version of rlmerge; write {{model: {{path: ...}}, "
                "lora: {path: ...}}, or 'path+lora'"
            )
    found = []
    for part in ("model", "lora"):
        given = parts.get(part)
        if given is None and part == "lora":
            continue
        if not isinstance(given, dict):
            found.append(_text(given))
            continue
        if other := [key for key in given if key not in ("path", "revision")]:
            raise ValueError(f"{show(other[0])} of a {part} is not supported by this version of rlmerge")
        revision = given.get("revision")
        found.append(_text(given.get("path")) + (f"@{_text(revision)}" if revision is not None else ""))
    return "+".join(found)


def _tokenizer_source(value: Any) -> Any:
    """A reference, also as `model:PATH`, which older recipes have."""
    return _reference(value.removeprefix("model:") if isinstance(value, str) else value)


JSON_OF[_tokenizer_source] = JSON_OF[_reference]


def _tokenizer(value: Any) -> Any:
    return check_tokenizer(value, _reference)


def _fisher(value: Any) -> Any:
    return _estimate(value, FISHER_VALUES)


def _gram(value: Any) -> Any:
    return _estimate(value, GRAM_VALUES)


def _estimate(value: Any, known: Mapping[str, Callable[[Any], Any]]) -> Any:
    """A path, or settings of an estimate."""
    if not isinstance(value, dict):
        return value if value is None else _text(value)
    for key in value:
        if key not in known:
            raise ValueError(
                f"{show(key)} is no setting of an estimate.{did_you_mean(str(key), known)} There are: "
                f"{', '.join(known)}"
            )
    if "data" not in value:
        raise ValueError("an estimate needs data: write {data: problems.jsonl, source: own}, or the path of a folder")
    found = {}
    for key, check in known.items():
        if key in value:
            try:
                found[key] = check(value[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return found


@in_json(
    either(
        {"enum": list(DTYPES)},
        {"type": "string", "pattern": rf"^(torch\.)?({'|'.join((*DTYPES, *ALIASES))})$"},
        {"type": "null"},
    )
)
def _dtype(value: Any) -> Any:
    word = str(value).removeprefix("torch.")
    word = ALIASES.get(word, word)
    if value is None or word in DTYPES:
        return None if value is None else word
    known = f"it is one of: {', '.join(DTYPES)}"
    if word in ("float64", "fp64", "double"):
        raise ValueError(f"{word} is not written by rlmerge (arithmetic is in float64 anyway); {known}")
    raise ValueError(f"{show(value)} is not a dtype that can be written; {known}.{did_you_mean(word, DTYPES)}")


@in_json(either(TEXT, items(TEXT)))
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


@in_json(FLAG)
def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {show(value)}")
    return value


@in_json(number(minimum=0))
def _at_least_zero(value: Any) -> Any:
    if (number := as_number(value)) < 0:
        raise ValueError(f"expected a number >= 0, found {show(value)}")
    return number


@in_json(number("integer", minimum=0, maximum=2**63 - 1))
def _seed(value: Any) -> Any:
    if not 0 <= (number := as_integer(value)) < 2**63:
        raise ValueError(f"expected an integer from 0 to 2**63 - 1, found {show(value)}")
    return number


def _one_of(*choices: str) -> Callable[[Any], Any]:
    @in_json({"enum": list(choices)})
    def check(value: Any) -> Any:
        if value in choices:
            return value
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{show(value)} is not one of: {', '.join(choices)}.{hint}")

    return check


@in_json(number("integer", minimum=1))
def _positive(value: Any) -> Any:
    if (number := as_integer(value)) < 1:
        raise ValueError(f"expected an integer >= 1, found {show(value)}")
    return number


FISHER_VALUES: dict[str, Callable[[Any], Any]] = {
    "data": _text,
    "source": _one_of("own", "gold", "sampled", "policy"),
    "sequences": _positive,
    "attempts": _positive,
    "group": _positive,
    "temperature": _at_least_zero,
    "max_new_tokens": _positive,
    "seed": _seed,
    "reduce": _one_of("sum", "mean"),
    "compute": _one_of("fp32", "bf16"),
}
"""What `fisher: {data: …}` may say: settings of `rlmerge fisher`."""
JSON_OF[_tokenizer] = tokenizer_in_json(JSON_OF[_reference])
JSON_OF[_fisher] = either(TEXT, mapping({key: JSON_OF[check] for key, check in FISHER_VALUES.items()}, "data"))

GRAM_VALUES = {key: check for key, check in FISHER_VALUES.items() if key not in ("group", "reduce", "compute")} | {
    "source": _one_of("own", "gold", "sampled"),
    "positions": _one_of("all", "answer"),
}
"""The same for `gram: {data: …}` and `rlmerge gram`."""
JSON_OF[_gram] = either(TEXT, mapping({key: JSON_OF[check] for key, check in GRAM_VALUES.items()}, "data"))

TOP_VALUES: dict[str, Callable[[Any], Any]] = {
    "name": _text,
    "merge_method": _text,
    "base_model": _reference,
    "dtype": _dtype,
    "out_dtype": _dtype,
    "rounding": _one_of("nearest", "stochastic"),
    "min_change": _at_least_zero,
    "pre_weights": _patterns,
    "post_weights": _patterns,
    "include": _patterns,
    "exclude": _patterns,
    "on_mismatch": _one_of("error", "base"),
    "allow_nonfinite": _flag,
    "seed": _seed,
    "tokenizer_source": _tokenizer_source,
    "tokenizer": _tokenizer,
    "chat_template": check_chat_template,
}
"""The canonical value of each top-level key, or a ValueError; models and parameters have functions of their own."""
TOP_KEYS = ("name", "merge_method", "base_model", "models", "slices", "modules", "parameters", *list(TOP_VALUES)[3:])
ENTRY_VALUES: dict[str, Callable[[Any], Any]] = {"model": _reference, "name": _text, "fisher": _fisher, "gram": _gram}
ENTRY_KEYS = (*ENTRY_VALUES, "parameters")
MOE_KEYS = ("gate_mode", "experts")
"""What recipes of mergekit-moe have in place of a merge_method."""


# ---- The whole recipe ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where the recipe comes from: its name, the line of each place, the flags that set a place."""

    name: str
    lines: Mapping[Place, int] = field(default_factory=dict)
    flags: Mapping[Place, str] = field(default_factory=dict)

    def line(self, place: Place) -> int:
        """The line of the place, or of the closest one around it; 0 if none is known."""
        return next((self.lines[place[:cut]] for cut in range(len(place), 0, -1) if place[:cut] in self.lines), 0)

    def flag(self, place: Place) -> str | None:
        """The flag that set the place, or what is around it."""
        return next((self.flags[place[:cut]] for cut in range(len(place), 0, -1) if place[:cut] in self.flags), None)

    def head(self, place: Place) -> str:
        """Where the place stands: 'recipe.yml:12', or the flag."""
        line = self.line(place)
        return self.flag(place) or (f"{self.name}:{line}" if line else self.name)

    def at(self, place: Place) -> str:
        """How a message names the place: 'recipe.yml:12: models[1].parameters.density', or the flag."""
        return self.head(place) if not place or self.flag(place) else f"{self.head(place)}: {dotted(place)}"

    def keeping(self, models: Sequence[int]) -> Source:
        """The same source for a recipe of which only these models are left."""
        new = {k: number for number, k in enumerate(models)}

        def renumber(places: Mapping[Place, Any]) -> dict[Place, Any]:
            found = {p: v for p, v in places.items() if p[:1] != ("models",) or len(p) < 2}
            of_models = ((p, v) for p, v in places.items() if p[:1] == ("models",) and len(p) > 1 and p[1] in new)
            return found | {("models", new[p[1]], *p[2:]): v for p, v in of_models}  # type: ignore[index]

        return Source(self.name, renumber(self.lines), renumber(self.flags))


def find_method(name: str, methods: Mapping[str, Method] | None) -> Method:
    """The method of this name; ValueError with a suggestion and the list if there is none."""
    if methods is None:
        from rlmerge.methods import get_method, method_names  # methods are loaded when a recipe names them

        names, get = list(method_names()), get_method
    else:
        names, get = list(methods), methods.__getitem__
    if name not in names:
        hint = did_you_mean(name, names)
        raise ValueError(
            f"there is no merge method {show(name)}.\n {hint} The methods: {', '.join(sorted(names))}. One of your own "
            "comes with --plugin FILE."
        )
    return get(name)


def _sentence(error: Any) -> str:
    text = str(error)
    return text if text.endswith((".", "?")) else f"{text}."


class Checker:
    """Walks over a recipe's data once: collects every mistake with its line, and the canonical data."""

    def __init__(self, source: Source) -> None:
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
        """Notes unknown keys and wrong values; `data` then holds the canonical ones. The method of the recipe."""
        if not isinstance(data, dict):
            raise RecipeError(f"{self.source.at(())}: a recipe is a mapping of keys and values, found {show(data)}.")
        if "merge_method" not in data and (moe := [key for key in MOE_KEYS if key in data]):
            raise RecipeError(
                f"{self.source.at((moe[0],))}: this is a recipe of mergekit-moe, which makes a mixture of experts out "
                "of dense models. rlmerge merges models into one of the same kind, by a 'merge_method', and makes no "
                "mixtures."
            )
        method = self._method(data.get("merge_method"), methods)
        self.unknown((), data, TOP_KEYS, method)
        self.data = {key: value for key, value in data.items() if key in TOP_KEYS and value is not None}
        if method is None:
            self.finish()
        assert method is not None
        self._sources(method)
        self.data["parameters"] = self.parameters(method, ("parameters",), self.data.get("parameters"), own=False)
        self.data |= self.values((), TOP_VALUES, self.data)
        if "tokenizer" in self.data and "tokenizer_source" in self.data:
            self.add(
                ("tokenizer",), "'tokenizer_source' says the same: write one of them ('tokenizer: {source: ...}')."
            )
        return method

    def _sources(self, method: Method) -> None:
        """Which models there are: `models`, `slices` or `modules`."""
        ways = [key for key in ("models", "slices", "modules") if key in self.data]
        if len(ways) > 1:
            self.add((ways[1],), f"a recipe has either {ways[0]!r} or {ways[1]!r}, not both: remove one of them.")
        way = ways[0] if ways else "models"
        if way == "slices":
            self.data["slices"] = tuple(check_slices(self, method, ("slices",), self.data["slices"]))
        elif way == "modules":
            self.data["modules"] = check_modules(self, method, ("modules",), self.data["modules"])
        elif ways or not self.problems:  # a misspelt key says it better
            self.data["models"] = self.models(method, ("models",), self.data.get("models"))
            return
        self.data["models"] = []

    def unknown(self, place: Place, given: Mapping[str, Any], known: Sequence[str], method: Method | None) -> None:
        """Notes the keys that are not known at a place."""
        home = "parameters:" if not place else "the 'parameters:' here."
        for key in given:
            if key not in known:
                self._other_key((*place, key), method, home, known)

    def values(
        self, place: Place, checks: Mapping[str, Callable[[Any], Any]] | Sequence[str], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The canonical values of the keys that `checks` knows, or of these keys."""
        known = checks if isinstance(checks, Mapping) else {key: TOP_VALUES[key] for key in checks}
        values = {}
        for key in (key for key in known if given.get(key) is not None):
            try:
                values[key] = known[key](given[key])
            except ValueError as error:
                self.add((*place, key), _sentence(error))
        return values

    def fit(self, recipe: Recipe, method: Method) -> dict[int, ModelEntry]:
        """The models to merge, by number: notes what does not fit the method (base, keys, number, parameters)."""
        kept = dict(enumerate(recipe.models))
        if method.arity.base == "required" and recipe.base_model is None:
            asked = "give it with --base FOLDER" if ("models",) in self.source.flags else "write 'base_model: FOLDER'"
            self.add((), f"base_model is missing: method {method.name!r} works on differences to a base; {asked}.")
        elif recipe.base_model is not None and (method.arity.base == "required" or method.base_entry == "origin"):
            base = os.path.normpath(recipe.base_model)
            for k in [k for k, entry in kept.items() if os.path.normpath(entry.model) == base]:
                self.warn(
                    recipe.place(kept[k]), "this is the base, which has no difference to itself: the entry is ignored."
                )
                del kept[k]
        places = {k: recipe.place(entry) for k, entry in kept.items()}
        home = next(iter(places.values()))[:-1] if places else ("models",)
        self._keys(kept, places)
        named = recipe.models or "slices" in self.data or "modules" in self.data
        hint = BASE_ALONE if named and not kept and recipe.base_model is not None else ""
        self._count(method, home, len(kept), recipe.base_model is not None, hint)
        for spec in method.parameters:
            if spec.default is None and not any(spec.name in scope for scope in recipe.scopes):
                lacking: list[Place] = [places[k] for k, entry in kept.items() if spec.name not in entry.parameters]
                whole: Place = ("parameters",) if self.source.line(("parameters",)) else ("merge_method",)
                for place in lacking if spec.per_model else [whole]:
                    flags = ("models",) in self.source.flags
                    self.add(place, f"parameter {spec.name!r} is missing: {_needs(method, spec, flags)}")
        self.finish()
        return kept

    def _method(self, name: Any, methods: Mapping[str, Method] | None) -> Method | None:
        try:
            return find_method(_text(name), methods)
        except ValueError as error:
            text = "merge_method is missing: write 'merge_method: sar', or another one." if name is None else str(error)
            self.add(() if name is None else ("merge_method",), text)
        return None

    def _other_key(self, place: Place, method: Method | None, home: str, known: Iterable[str]) -> None:
        """Notes a key that is none of those that may stand here: a mistake, unless nothing can be meant by it."""
        key = str(place[-1])
        names = {spec.name for spec in method.parameters} if method else set()
        if known is TOP_KEYS and key in ("plugin", "plugins"):
            self.add(
                place,
                "a recipe cannot name a plugin: it is data that people pass on, and a plugin is a program that runs. "
                "Who merges names it: --plugin FILE.",
            )
        elif method is not None and key in names:
            self.add(place, f"{key!r} is a parameter of method {method.name!r}: write it under {home}")
        elif method is not None and (text := misplaced_without_effect(method.name, key)):
            self.warn(place, text)
        elif key == "layer_range":
            self.add(place, "layers are chosen under 'slices: - sources:', and 'models:' takes all of them.")
        elif key in TOKENIZER_KEYS:
            self.add(place, f"{key!r} is a key of 'tokenizer:': write it there.")
        else:
            self.add(place, f"unknown key.\n {did_you_mean(key, known)} The keys here: {', '.join(known)}.")

    def models(self, method: Method, place: Place, models: Any) -> list[dict[str, Any]]:
        """The canonical entries of a list of models."""
        if not isinstance(models, list):
            found = "'models' is missing" if models is None else f"expected a list, found {show(models)}"
            self.add(() if models is None else place, f"{found}: list the models, '- model: path' each.")
            return []  # said once is enough
        return [self.entry(method, (*place, k), entry) for k, entry in enumerate(models)]

    def entry(self, method: Method, place: Place, entry: Any) -> dict[str, Any]:
        """The canonical entry of one model, with the model '?' where it has none, which is said."""
        if not isinstance(entry, dict) or "model" not in entry:
            found = "'model' is missing" if isinstance(entry, dict) else f"found {show(entry)}"
            self.add(place, f"{found}: an entry is a mapping, '- model: path'.")
            return {"model": "?"}  # keeps the numbers of the others
        for key in entry:
            if key not in ENTRY_KEYS:
                self._other_key((*place, key), method, "the 'parameters:' of this model.", ENTRY_KEYS)
        parameters = self.parameters(method, (*place, "parameters"), entry.get("parameters"), own=True)
        found = self.values(place, ENTRY_VALUES, {**entry, "model": "" if entry["model"] is None else entry["model"]})
        return {"model": "?", **found, "parameters": parameters}

    def parameters(self, method: Method, place: Place, given: Any, own: bool) -> dict[str, Any]:
        """The canonical parameters of a model (`own`) or of the recipe, in the order of the method's specification."""
        if given is not None and not isinstance(given, dict):
            self.add(place, f"expected a mapping of parameters, found {show(given)}.")
        given = given if isinstance(given, dict) else {}
        specs = {spec.name: spec for spec in method.parameters}
        values = {}
        for key, value in given.items():
            here = (*place, key)
            if key not in specs and here not in self.source.flags and (text := without_effect(method.name, key)):
                self.warn(here, text)
            elif key not in specs:
                known = [*specs, *SETTINGS] if here in self.source.flags else list(specs)
                hint = did_you_mean(key, known)
                what = not_here(method.name, key) or f"unknown parameter of method {method.name!r}."
                self.add(here, f"{what}\n {hint} {_takes(method)}")
            elif own and not specs[key].per_model:
                found = f"{key!r} is a global parameter of method {method.name!r}"
                self.add(here, f"{found}: move it to the top-level 'parameters:' (mergekit ignores it here).")
            else:
                try:
                    values[key] = check_value(specs[key], value)
                except ValueError as error:
                    self.add(here, _sentence(error))
                    continue
                if dead_entries(values[key]):
                    self.warn(here, "the entries after the one that matches every tensor have no effect.")
        return {key: values[key] for key in specs if key in values and values[key] != []}

    def _keys(self, models: Mapping[int, ModelEntry], places: Mapping[int, Place]) -> None:
        seen: dict[str, int] = {}
        for k, entry in models.items():
            if entry.key in seen:
                twice = f"{show(entry.key)} is listed twice (also {dotted(places[seen[entry.key]])})"
                self.add(places[k], f"{twice}: give each its own 'name:'.")
            seen.setdefault(entry.key, k)

    def _count(self, method: Method, home: Place, count: int, has_base: bool, hint: str) -> None:
        low, high = method.arity.minimum, method.arity.maximum
        if count < low or (high is not None and count > high):
            limits = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            noun = "model" if limits.endswith(" 1") else "models"
            beside = " beside the base" if method.arity.base == "required" else ""
            self.add(home, f"method {method.name!r} takes {limits} {noun}{beside}, found {count}.{hint}")
        elif problem := method.misfit(count, has_base):
            self.add(home, problem)


def _needs(method: Method, spec: Parameter, flags: bool) -> str:
    """What to write for a required parameter, in a recipe or in `flags`."""
    if flags:
        return f"method {method.name!r} needs {expected(spec)}. Add '--set {spec.name}=1', or another value."
    homes = "under 'parameters:' of each model, or once for all" if spec.per_model else "under 'parameters:'"
    return f"method {method.name!r} needs {expected(spec)}. Write '{spec.name}: ...' {homes}."


def _takes(method: Method) -> str:
    """'ties' takes: weight, density (per model); lambda, normalize (global)."""
    own = ", ".join(spec.name for spec in method.parameters if spec.per_model)
    rest = ", ".join(spec.name for spec in method.parameters if not spec.per_model)
    groups = [text for text in (own and f"{own} (per model)", rest and f"{rest} (global)") if text]
    return f"{method.name!r} takes: {'; '.join(groups) or 'no parameters'}."
