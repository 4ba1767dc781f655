"""Several recipes in one file: a document refers to another one by its `name:`, as if that were a model.

The document that no other refers to is the output; the others are its stages, made before what is made of them.
A base that is 'MODEL+ADAPTER' is a stage, too, which no document spells out: see `with_adapted_bases`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.methods.base import Method
from rlmerge.parameters import show
from rlmerge.recipe import Recipe, build_recipe, read_text
from rlmerge.recipe_checks import Source
from rlmerge.yaml_lines import Place, read_documents

PLACE = Path("OUT.stages")
"""What the folder of the stages is called before an output is named."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_TAKEN = re.compile(r"lock|stages\.json|.*\.(unfinished|removed|part)")
"""Names of files and folders that lie beside the stages."""


@dataclass(frozen=True)
class Stages:
    """The checked recipes of one file, each after those that it refers to, the output last; made by `load_stages`.

    Each recipe knows the folders of the stages that it refers to: see `at`.

    written   how the recipes refer to a stage, where that is not its name
    """

    recipes: tuple[Recipe, ...]
    written: Mapping[str, str] = field(default_factory=dict)

    @property
    def final(self) -> Recipe:
        """The recipe of the output."""
        return self.recipes[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stages, without the output's."""
        return tuple(recipe.name or "" for recipe in self.recipes[:-1])

    def at(self, folder: Path) -> Stages:
        """The same recipes, for stages that lie in this folder, each in one of its name."""
        made: dict[str, tuple[Path, Recipe]] = {}
        placed = []
        for recipe in self.recipes:
            used = {stage for reference in recipe.references if (stage := _stage_of(reference, made))}
            new = recipe.with_stages({reference: stage for reference, stage in made.items() if reference in used})
            placed.append(new)
            name = new.name or ""
            made[self.written.get(name, name)] = folder / name, new
        return replace(self, recipes=tuple(placed))

    def folder(self, name: str) -> Path:
        """Where a stage lies."""
        reference = self.written.get(name, name)
        return next(recipe.stages[reference][0] for recipe in self.recipes if reference in recipe.stages)

    def with_settings(self, points: Sequence[Mapping[str, Any]]) -> tuple[Stages, list[dict[str, Any]]]:
        """With the `--set` values of one merge or of a sweep; also the points of the sweep, [] for one merge.

        'KEY' is of the output, 'NAME.KEY' of the document of that name. Only the output can be swept.
        """
        own = [{key: value for key, value in point.items() if "." not in key} for point in points]
        others = {key: [point[key] for point in points] for point in points[:1] for key in point if "." in key}
        settings: dict[str, dict[str, Any]] = {}
        for key, values in others.items():
            name, _, inner = key.rpartition(".")
            named = [recipe.name for recipe in self.recipes if recipe.name]
            if name not in named:
                raise RecipeError(
                    f"--set {key}: no document is called {show(name)}.{did_you_mean(name, named)} Write KEY=VALUE for "
                    f"the output, NAME.KEY=VALUE for one of: {', '.join(named)}."
                )
            if any(value != values[0] for value in values):
                raise RecipeError(f"--set {key}: only the output can be swept, by KEY=A,B; a stage is made once.")
            settings.setdefault(name, {})[inner] = values[0]
        if len(own) == 1 and own[0]:
            settings[self.final.name or ""] = {**settings.get(self.final.name or "", {}), **own[0]}
        recipes = [
            recipe.with_settings(new) if (new := settings.get(recipe.name or "")) else recipe for recipe in self.recipes
        ]
        return replace(self, recipes=tuple(recipes)).at(PLACE), own if len(own) > 1 else []


def load_stages(path: Path | str, methods: Mapping[str, Method] | None = None) -> Stages:
    """Reads and checks a recipe file of several documents, or of one. Paths as in `load_recipe`.

    Raises RecipeError for what is wrong in any document, names that are twice there or hide a path, references in a
    circle, and documents that no other refers to beside the output.
    """
    return parse_stages(read_text(path), str(path), Path(path).parent, methods)


def parse_stages(
    text: str, source: str = "recipe", folder: Path | None = None, methods: Mapping[str, Method] | None = None
) -> Stages:
    """Checks a text of several documents; arguments as those of `parse_recipe`."""
    documents = [_Document(Source(source, lines), data) for data, lines in read_documents(text, source)]
    recipes, problems = [], []
    for document in documents:
        try:
            recipes.append(build_recipe(document.data, document.source, folder, methods))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    documents = [replace(document, recipe=recipe) for document, recipe in zip(documents, recipes, strict=True)]
    if len(recipes) > 1:
        _check_names(documents, folder)
        _check_references(documents)
    return with_adapted_bases(_in_order(documents))


def with_adapted_bases(recipes: Sequence[Recipe]) -> Stages:
    """The stages of these recipes, each after those that it refers to, and before them one for every base that is
    'MODEL+ADAPTER': a base is copied wherever nothing changed, so it must be stored, as mergekit and PEFT store it
    (in the dtypes of MODEL).
    """
    names = {recipe.name for recipe in recipes if recipe.name}
    written: dict[str, str] = {}
    ordered: list[Recipe] = []
    for recipe in recipes:
        for base in recipe.bases:
            model, _, adapter = base.partition("+")
            if model not in names:
                model, adapter = recipe.split(base)
            if not adapter or base in written.values():
                continue
            name = _free_name(f"{Path(model).name}-with-{Path(adapter).name}", names, recipe)
            names.add(name)
            written[name] = base
            ordered.append(recipe.sibling({"name": name, "merge_method": "passthrough", "models": [{"model": base}]}))
        ordered.append(recipe)
    stages = Stages(tuple(ordered), written)
    return stages.at(PLACE) if len(ordered) > 1 else stages


def _free_name(wanted: str, names: Collection[str], recipe: Recipe) -> str:
    """A name for a stage that is no document's and no path's."""
    plain = re.sub(r"[^\w.-]+", "-", wanted).strip("-.")[:90] or "base"
    tries = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
    return next(name for name in tries if name not in names and not _TAKEN.fullmatch(name) and not recipe.exists(name))


def _stage_of(reference: str, stages: Collection[str]) -> str | None:
    """The stage that a reference means: all of it, or what stands before '+ADAPTER'."""
    model = reference.partition("+")[0]
    return next((name for name in (reference, model) if name in stages), None)


@dataclass(frozen=True)
class _Document:
    source: Source
    data: Any
    recipe: Recipe | None = None

    @property
    def name(self) -> str | None:
        return self.data.get("name")

    @property
    def references(self) -> dict[str, Place]:
        assert self.recipe is not None
        return self.recipe.references

    def uses(self, names: Collection[str]) -> dict[str, Place]:
        """Those of these documents that it refers to, and where."""
        found = {_stage_of(reference, names): place for reference, place in reversed(self.references.items())}
        return {name: found[name] for name in reversed(found) if name is not None}

    @property
    def line(self) -> int:
        return self.source.line(()) or self.source.lines.get((), 0)

    def at(self, place: Place = ()) -> str:
        """Where a place stands, or the document begins."""
        return self.source.at(place) if place else f"{self.source.name}:{self.line}"


def _names(documents: Sequence[_Document]) -> list[str]:
    return [document.name for document in documents if document.name]


def _used(documents: Sequence[_Document]) -> set[str]:
    return {name for document in documents for name in document.uses(_names(documents))}


def _check_names(documents: Sequence[_Document], folder: Path | None) -> None:
    """Names are there once, can be folders, and hide no path."""
    problems: list[str] = []
    first: dict[str, _Document] = {}
    used = _used(documents)
    for document in documents:
        name = document.name
        if name is None:
            continue
        if name in first:
            problems.append(
                f"{document.at(('name',))}: {show(name)} is the name of the document at {first[name].at()}, too. Give "
                "each its own."
            )
        elif name in used:  # the output's may be any title
            if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
                problems.append(
                    f"{document.at(('name',))}: {show(name)} cannot be the folder of a stage. Use letters, digits, "
                    "'_', '-' and '.'" + (", and another word." if _TAKEN.fullmatch(name) else ".")
                )
            for home in dict.fromkeys([folder or Path(), Path()]):
                if os.path.lexists(home / name):
                    problems.append(
                        f"{document.at(('name',))}: {show(name)} is also the path {home / name}, so it is not clear "
                        "which of them a reference means. Give the document another name."
                    )
        first.setdefault(name, document)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))


def _check_references(documents: Sequence[_Document]) -> None:
    """Every document but one is used, and what looks like a name is one."""
    names = _names(documents)
    for document in documents:
        for reference, place in document.references.items():
            known = _stage_of(reference, names) is not None or _exists(document, reference)
            if not known and (hint := did_you_mean(reference, names)):
                raise RecipeError(f"{document.at(place)}: {show(reference)} is no path and no document.{hint}")
    used = _used(documents)
    unused = [document for document in documents if document.name not in used]
    if len(unused) > 1:
        listed = " and ".join(
            document.at() + (f" ({show(document.name)})" if document.name else "") for document in unused
        )
        raise RecipeError(
            f"{listed}: no other document refers to these, and one alone is the output. Give each of the others a "
            "`name:` and write it where a model stands (`model:`, `base_model:`), or remove it."
        )


def _exists(document: _Document, reference: str) -> bool:
    assert document.recipe is not None
    try:
        document.recipe.resolve(reference)
    except RecipeError:
        return False
    return True


def _in_order(documents: Sequence[_Document]) -> list[Recipe]:
    """Each after those that it refers to, else in the order of the file. Raises RecipeError for a circle."""
    left, made = list(documents), set[str]()
    names = _names(documents)
    ordered = []
    while left:
        ready = next((d for d in left if not d.uses(names).keys() - made), None)
        if ready is None:
            raise RecipeError(_circle(left))
        left.remove(ready)
        made.add(ready.name or "")
        ordered.append(ready.recipe)
    return ordered


def _circle(left: Sequence[_Document]) -> str:
    """What to say of documents that wait for each other."""
    by_name = {document.name: document for document in left if document.name}
    walk = [next(iter(by_name))]
    while walk.count(walk[-1]) == 1:
        walk.append(next(iter(by_name[walk[-1]].uses(by_name))))
    walk = walk[walk.index(walk[-1]) :]
    first = by_name[walk[0]]
    shown = " → ".join(walk)
    return (
        f"{first.at(first.uses(by_name)[walk[1]])}: documents refer to each other in a circle: {shown}. Each can be "
        "made only of those that are made before."
    )
