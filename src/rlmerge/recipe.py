"""The recipe: mergekit's YAML dialect, extended and strict. Every mistake that a recipe alone can show is raised here.

`dtype` is the dtype of the output unless `out_dtype` is given; arithmetic is always wide, whatever either says.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rlmerge.checkpoint.hub import split_id
from rlmerge.checkpoint.reference import split_reference
from rlmerge.errors import RecipeError
from rlmerge.methods.base import Method
from rlmerge.parameters import Resolver, show
from rlmerge.recipe_checks import ENTRY_KEYS, SETTINGS, TOP_KEYS, Checker, Source, find_method
from rlmerge.recipe_paths import find_path, path_hint, places_of
from rlmerge.slices import Part, own_parameters, parts_of
from rlmerge.yaml_lines import MAX_BYTES, Dumper, Place, plain_data, read_yaml

# ---- The models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelEntry:
    """One model of the recipe: where it is, what it is called, its Fisher, its Gram matrices, its own parameters.

    Fisher and Gram are folders, or what to estimate one from: {'data': …, 'source': …}, see `fisher.on_demand`.
    """

    model: str
    name: str | None = None
    fisher: str | dict[str, Any] | None = None
    gram: str | dict[str, Any] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What reports, hashes and the order of processing know the model by: its name, else the path as written."""
        return self.name or self.model


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; made by `load_recipe`, `parse_recipe` or `recipe_from_parts`, which know the method's rules.

    Parameters are in canonical form (numbers are floats, filters have both keys); paths are as written. With `slices`
    or `modules`, which hold plain data in canonical form, `models` are all their models, each once; see `parts`.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    name: str | None = None
    base_model: str | None = None
    slices: tuple[dict[str, Any], ...] = ()
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    min_change: float = 0.0
    pre_weights: tuple[str, ...] = ()
    post_weights: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_mismatch: Literal["error", "base"] = "error"
    allow_nonfinite: bool = False
    seed: int = 0
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None

    _method: Method | None = field(default=None, repr=False, compare=False)
    _folder: Path | None = field(default=None, repr=False, compare=False)
    _source: Source = field(default=Source("recipe"), repr=False, compare=False)
    _estimated: dict[tuple[str, str], Path] = field(default_factory=dict, repr=False, compare=False)
    _fetched: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)
    _stages: Mapping[str, tuple[Path, Recipe]] = field(default_factory=dict, repr=False, compare=False)
    _warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _scopes: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, compare=False)
    _places: tuple[Place, ...] = field(default=(), repr=False, compare=False)
    bare: bool = field(default=False, repr=False, compare=False)
    """For who looks at headers and deltas only: what the method needs beside them is not asked for."""

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

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the output, each with a recipe of its own: slices, modules, or the whole."""
        return parts_of(self)

    @property
    def scopes(self) -> tuple[Mapping[str, Any], ...]:
        """The parameters that hold for all models, nearest first: the slice's, the module's, the recipe's."""
        return self._scopes or (self.parameters,)

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
        if self.base_model is None:
            return None
        model, adapter = self.split(self.base_model)
        if adapter is not None:
            raise RecipeError(
                f"{self.at(('base_model',))}: {show(self.base_model)}: a base is copied wherever nothing changed, and "
                "a model with an adapter on it is stored nowhere. A merge into a folder makes it first, as a stage; "
                "here, store it and write its folder: merge_method: passthrough with this one model does that."
            )
        return self._find(model, ("base_model",))

    @property
    def model_paths(self) -> dict[str, Path]:
        """The folder of each model by its key, in the order of `experts`; of 'A+B' that of A."""
        return {entry.key: self._find(self.split(entry.model)[0], self.place(entry, "model")) for entry in self.experts}

    @property
    def adapter_paths(self) -> dict[str, Path | None]:
        """The folder of the adapter B of each model that is written 'A+B' by its key, in the order of `experts`."""
        found = {entry.key: (self.split(entry.model)[1], entry) for entry in self.experts}
        return {key: self._find(b, self.place(e, "model")) if b else None for key, (b, e) in found.items()}

    @property
    def local_folders(self) -> list[Path]:
        """The folders of this machine among the models and adapters that it names; no error for what is elsewhere."""
        written = [self.base_model, *(entry.model for entry in self.models)]
        parts = [part for one in written if one is not None for part in self.split(one) if part is not None]
        return [path for part in parts if (path := (self._folder or Path()) / part).is_dir()]

    @property
    def remote(self) -> dict[str, Place]:
        """What the recipe names that is in no folder and may be on the hub, with the (first) place that names it."""
        named = [(part, at) for name, at in self.references.items() for part in self.split(name) if part]
        for kind in ("fisher", "gram"):
            given = [(getattr(entry, kind), self.place(entry, kind)) for entry in self.models]
            named += [(name, place) for name, place in given if isinstance(name, str)]
        return self._absent(named)

    @property
    def remote_lender(self) -> dict[str, Place]:
        """The same of what only lends its tokenizer: of that small files are enough."""
        policy = self.tokenizer or {"source": self.tokenizer_source}
        place: Place = ("tokenizer", "source") if self.tokenizer else ("tokenizer_source",)
        source, models = policy["source"], {name for entry in self.models for name in (entry.key, entry.model)}
        return {} if source is None or {source} & {*models, *self.references} else self._absent([(source, place)])

    def _absent(self, named: Iterable[tuple[str, Place]]) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for part, place in named:
            if split_id(part) and part not in self._stages and not self.exists(part):
                found.setdefault(part, place)
        return found

    @property
    def fetched(self) -> dict[str, Path]:
        """What was fetched from the hub, as written, and its folders."""
        return dict(self._fetched)

    def with_fetched(self, folders: Mapping[str, Path]) -> Recipe:
        """The same recipe, with the folders of what was fetched from the hub, as it is written."""
        return replace(self, _fetched={**self._fetched, **folders})

    @property
    def fisher_paths(self) -> dict[str, Path | None]:
        """The Fisher folder of each model by its key, in the order of `experts`.

        Raises RecipeError for one that must be estimated first (`fisher.on_demand.with_estimates`).
        """
        return {entry.key: self._given_path(entry, "fisher") for entry in self.experts}

    @property
    def gram_paths(self) -> dict[str, Path | None]:
        """The same for Gram matrices."""
        return {entry.key: self._given_path(entry, "gram") for entry in self.experts}

    @property
    def to_estimate(self) -> tuple[tuple[str, ModelEntry], ...]:
        """What is still to be estimated: 'fisher' or 'gram', and the model."""
        pairs = [(kind, entry) for kind in ("fisher", "gram") for entry in self.experts]
        return tuple(
            p for p in pairs if isinstance(getattr(p[1], p[0]), dict) and (p[0], p[1].key) not in self._estimated
        )

    def with_estimates(self, folders: Mapping[tuple[str, str], Path]) -> Recipe:
        """The same recipe, with the folders of what was estimated, by kind and key."""
        return replace(self, _estimated={**self._estimated, **folders})

    @property
    def references(self) -> dict[str, Place]:
        """Base and models as written, in this order, and where each stands first."""
        places: list[tuple[str | None, Place]] = [(self.base_model, ("base_model",))]
        for part in self.parts:
            places += [(part.recipe.base_model, ("base_model",))]
            places += [(entry.model, part.recipe.place(entry, "model")) for entry in part.recipe.models]
        found: dict[str, Place] = {}
        for reference, place in places:
            if reference is not None:
                found.setdefault(reference, place)
        return found

    @property
    def bases(self) -> tuple[str, ...]:
        """The bases of all its parts as written, each once."""
        named = [self.base_model, *(part.recipe.base_model for part in self.parts)]
        return tuple(dict.fromkeys(base for base in named if base is not None))

    @property
    def stages(self) -> Mapping[str, tuple[Path, Recipe]]:
        """Those of its references that are made by another document of its file: folder and recipe, see `stages`."""
        return self._stages

    def with_stages(self, stages: Mapping[str, tuple[Path, Recipe]]) -> Recipe:
        """The same recipe, with the folders and recipes of the stages that it refers to."""
        return replace(self, _stages=stages)

    @property
    def all_stages(self) -> dict[str, tuple[Path, Recipe]]:
        """The stages that it is made of, those of its stages included, each after what it is made of."""
        found: dict[str, tuple[Path, Recipe]] = {}
        for name, (folder, recipe) in self._stages.items():
            found |= recipe.all_stages
            found[name] = folder, recipe
        return found

    @property
    def ancestors(self) -> dict[str, Path]:
        """The folders of the models that it is made of, by reference, base first; those of a stage in its place, and
        an adapter after its model.
        """
        found: dict[str, Path] = {}
        for reference, place in self.references.items():
            for part in filter(None, self.split(reference)):
                stage = self._stages.get(part)
                inner = {part: self._find(part, place)} if stage is None else stage[1].ancestors
                found |= {name: folder for name, folder in inner.items() if name not in found}
        return found

    def check_paths(self) -> None:
        """Raises one RecipeError for all models, Fishers and Gram matrices that are not there."""
        named = [(part, at) for name, at in self.references.items() for part in self.split(name) if part]
        for kind in () if self.bare else ("fisher", "gram"):
            given = [(getattr(entry, kind), self.place(entry, kind)) for entry in self.models]
            named += [(name, at) for name, at in given if isinstance(name, str)]
        problems: dict[str, None] = {}
        for name, at in named:
            try:
                self._find(name, at)
            except RecipeError as error:
                problems.setdefault(str(error))
        if problems:
            raise RecipeError("\n".join(problems))

    def resolve(self, reference: str, small: bool = False) -> Path:
        """The path that a reference means: in the recipe's folder, else in the working directory; it must exist.

        small   small files are enough: a model may be in the hub's cache without its weights
        """
        return self._find(reference, (), small)

    def split(self, reference: str) -> tuple[str, str | None]:
        """Model and adapter of a reference, as written; no adapter, as a rule."""
        return split_reference(reference, lambda part: part in self._stages or self.exists(part))

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
        for key in ("slices", "modules", "pre_weights", "post_weights"):
            if not data[key]:
                del data[key]
        if self.slices or self.modules:
            del data["models"]
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
        for own in own_parameters(data):
            for key in settings.keys() & own.keys():
                del own[key]
        flags = apply_settings(data, settings)
        source = Source(source.name, source.lines, {**source.flags, **flags})
        recipe = build_recipe(
            data, source, self._folder, None if self._method is None else {self.merge_method: self._method}
        )
        warnings = tuple(dict.fromkeys((*self.warnings, *recipe.warnings)))
        return replace(
            recipe, _warnings=warnings, _estimated=self._estimated, _fetched=self._fetched, _stages=self._stages,
            bare=self.bare,
        )  # fmt: skip

    def sibling(self, data: dict[str, Any]) -> Recipe:
        """Another recipe that stands where this one stands, and has fetched what this one has."""
        places = [("models",), ("base_model",), ("name",)]
        source = Source(self.source_name, {}, dict.fromkeys(places, self.at(("base_model",))))
        return replace(build_recipe(data, source, self._folder, None), _fetched=self._fetched)

    def _given_path(self, entry: ModelEntry, kind: str) -> Path | None:
        given = getattr(entry, kind)
        if given is None:
            return None
        if isinstance(given, str):
            return self._find(given, self.place(entry, kind))
        if (kind, entry.key) not in self._estimated:
            raise RecipeError(f"{self.at(self.place(entry, kind))}: is not estimated yet; a merge does that.")
        return self._estimated[kind, entry.key]

    def place(self, entry: ModelEntry, *rest: str) -> Place:
        """Where a model stands in the recipe, or something of it."""
        number = next((k for k, one in enumerate(self.models) if one is entry), 0)
        return (*(self._places[number] if self._places else ("models", number)), *rest)

    def exists(self, reference: str) -> bool:
        """Whether something lies at this path, seen from the recipe's folder or the working directory."""
        return any(map(os.path.exists, places_of(reference, self._folder)))

    def _find(self, reference: str, place: Place, small: bool = False) -> Path:
        if reference in self._stages:
            return self._stages[reference][0]
        try:
            return find_path(reference, self._folder, self._fetched, small)
        except RecipeError as error:
            where = self.at(place) + ": " if place else ""
            raise RecipeError(f"{where}{error}") from None


# ---- Making a recipe --------------------------------------------------------------------------------------------


def load_recipe(path: Path | str, methods: Mapping[str, Method] | None = None) -> Recipe:
    """Reads and checks a recipe file; relative paths in it start at its folder. `methods` replaces the registry.

    A file of several documents is an error: `load_stages` reads it.
    """
    return parse_recipe(read_text(path), str(path), Path(path).parent, methods)


def read_text(path: Path | str) -> str:
    """The text of a recipe file. RecipeError if it cannot be read."""
    if not isinstance(path, (str, os.PathLike)):
        raise RecipeError(f"expected a recipe or the path of one, found {show(path)}. parse_recipe takes a mapping.")
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe.{path_hint(path.name, [path])}") from None
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}.") from None


def parse_recipe(
    text: str | Mapping[str, Any],
    source: str = "recipe",
    folder: Path | None = None,
    methods: Mapping[str, Method] | None = None,
) -> Recipe:
    """Checks the text of a recipe, or a mapping with its keys; `source` is its name in messages, `folder` where its
    relative paths start (default: the working directory).
    """
    if isinstance(text, Mapping):
        return build_recipe(plain_data(text, source), Source(source), folder, methods)
    if not isinstance(text, str):
        raise RecipeError(f"{source}: expected the text of a recipe or a mapping of its keys, found {show(text)}.")
    data, lines = read_yaml(text, source)
    return build_recipe(data, Source(source, lines), folder, methods)


def apply_settings(data: dict[str, Any], settings: Mapping[str, Any]) -> dict[Place, str]:
    """Puts `--set` values into a recipe's data; the flags by the places they went to."""
    flags: dict[Place, str] = {}
    for key, value in plain_data(settings, "--set").items():
        if key in SETTINGS:
            data[key], place = value, (key,)
        else:
            data.setdefault("parameters", {})[key], place = value, ("parameters", key)
        flags[place] = f"--set {key}"
    return flags


def build_recipe(data: Any, source: Source, folder: Path | None, methods: Mapping[str, Method] | None) -> Recipe:
    """The checked recipe; one RecipeError lists every mistake, by line."""
    checker = Checker(source)
    method = checker.check(data, methods)
    checker.finish()
    entries = tuple(ModelEntry(**entry) for entry in checker.data.pop("models"))
    recipe = Recipe(models=entries, **checker.data, _method=method, _folder=folder, _source=source)
    if recipe.slices or recipe.modules:
        recipe = _united(recipe, checker, method)
    else:
        recipe = _appended(recipe, checker, method)
        kept = checker.fit(recipe, method)
        source = source if len(kept) == len(recipe.models) else source.keeping(list(kept))
        recipe = replace(recipe, models=tuple(kept.values()), _source=source)
    recipe = replace(recipe, _warnings=tuple(checker.warnings))
    for part in recipe.parts:
        resolver = Resolver(part.recipe, method, layers=1)
        if resolver.constant:
            resolver.resolve("")
    return recipe


def _united(recipe: Recipe, checker: Checker, method: Method) -> Recipe:
    """A recipe of slices or modules with all their models, each once; notes what does not fit."""
    found: dict[str, ModelEntry] = {}
    places: dict[str, Place] = {}
    for part in recipe.parts:
        checker.fit(part.recipe, method)
        if part.sliced and part.base_range is None and part.recipe.base_model is not None:
            checker.add(
                part.recipe.place(part.recipe.models[0])[:-2],
                "the sources give different layers, so it is not clear which ones the base gives: list it among them.",
            )
        for entry in part.recipe.models:
            plain = replace(entry, parameters={})
            if found.setdefault(entry.key, plain) != plain:
                checker.add(part.recipe.place(entry), f"{show(entry.key)} is another model (or Fisher) elsewhere.")
            places.setdefault(entry.key, part.recipe.place(entry))
    checker.finish()
    return replace(recipe, models=tuple(found.values()), _places=tuple(places[key] for key in found))


def _appended(recipe: Recipe, checker: Checker, method: Method) -> Recipe:
    """The recipe with its base as one more model, where mergekit 0.1.5 averages in a base that is not listed.

    That is where a base is a model like any other, and every parameter of a model has a value for it. On the command
    line `--set` is meant for the models, and the base stays what it is.
    """
    base, own = recipe.base_model, [spec.name for spec in method.parameters if spec.per_model]
    if base is None or not method.averages_base or not all(name in recipe.parameters for name in own):
        return recipe
    if any(os.path.normpath(entry.model) == os.path.normpath(base) for entry in recipe.models):
        return recipe
    if any(("parameters", name) in checker.source.flags for name in own):
        # what a flag sets for all models it sets for those that are listed
        given = {name: recipe.parameters[name] for name in own}
        models = tuple(replace(entry, parameters={**given, **entry.parameters}) for entry in recipe.models)
        rest = {name: value for name, value in recipe.parameters.items() if name not in own}
        return replace(recipe, models=models, parameters=rest)
    checker.warnings.append(
        f"{checker.source.at(('base_model',))}: is not listed under models, and {method.name!r} takes it as one more "
        "model, as in mergekit. Drop base_model to leave it out."
    )
    return replace(recipe, models=(*recipe.models, ModelEntry(base)))
