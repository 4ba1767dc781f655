"""Fetches what a recipe or a command names on the hub, when asked; if not asked, uses what lies in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlmerge.checkpoint.hub import has_headers_only, split_id
from rlmerge.errors import RecipeError
from rlmerge.recipe import Recipe, load_recipe
from rlmerge.recipe_checks import Source
from rlmerge.recipe_flags import recipe_from_parts
from rlmerge.stages import PLACE, Stages

Tell = Callable[[str], None]


def with_downloads(recipe: Recipe, *, headers: bool = False, tell: Tell = lambda text: None) -> Recipe:
    """The recipe with every model and Fisher that is on the hub, and in no folder, fetched into the cache.

    headers   of models that are not there only headers and small files: enough to plan a merge, not to make it
    Of what only lends its tokenizer, small files. Raises DownloadError, and MissingExtraError without the extra `hub`;
    a recipe of folders needs neither.
    """
    wanted, lender = recipe.remote, recipe.remote_lender
    if not wanted and not lender:
        return recipe
    from rlmerge.checkpoint.download import download

    found = {}
    for part in (*wanted, *lender):
        named = split_id(part)
        assert named is not None
        found[part] = download(*named, headers=headers, small=part not in wanted, tell=tell)
    return recipe.with_fetched(found)


def with_all_downloads(
    recipe: Recipe | Stages, *, headers: bool = False, tell: Tell = lambda text: None
) -> Recipe | Stages:
    """`with_downloads` for a recipe or for all documents of a file."""
    if isinstance(recipe, Recipe):
        return with_downloads(recipe, headers=headers, tell=tell)
    if not any(one.remote or one.remote_lender for one in recipe.recipes):
        return recipe
    fetched = tuple(with_downloads(one, headers=headers, tell=tell) for one in recipe.recipes)
    return replace(recipe, recipes=fetched).at(PLACE)


def find_model(reference: str, download: bool = False, tell: Tell = lambda text: None) -> Path | Recipe:
    """What a command's MODEL means: a recipe (.yml), a folder, one of the hub (fetched if asked, else from the cache).

    'A+B' is the recipe that puts the adapter B on A, in fp32. Paths start at the working directory; one that does not
    exist and cannot be an id is returned as it is, for whoever opens it to say so.
    """
    path = Path(reference)
    if path.suffix in (".yml", ".yaml") or path.exists():
        return path
    recipe = recipe_from_parts(None, [reference], "linear", {"weight": 1.0})
    recipe = replace(recipe, _source=Source("", {}, {("models",): "MODEL"}))
    remote = recipe.remote
    if download:
        recipe = with_downloads(recipe, tell=tell)
    if any(recipe.adapter_paths.values()):
        (model,) = recipe.model_paths.values()
        (adapter,) = recipe.adapter_paths.values()
        settings = {"weight": 1.0, "out_dtype": "float32"}
        return recipe_from_parts(str(model), [str(adapter)], "task_arithmetic", settings)
    return next(iter(recipe.model_paths.values())) if remote else path


def fetch_model(reference: str, tell: Tell) -> None:
    """Fetches what a command's MODEL names, so that it is in the cache for whoever looks for it there."""
    found = find_model(reference, True, tell)
    if isinstance(found, Path) and found.suffix in (".yml", ".yaml"):
        with_downloads(load_recipe(found), tell=tell)


def find_folder(reference: Path | str, download: bool = False, tell: Tell = lambda text: None) -> Path:
    """`find_model` where only a folder will do. Raises RecipeError for a recipe or a model with an adapter."""
    found = find_model(str(reference), download, tell)
    if isinstance(found, Path):
        return found
    raise RecipeError(
        f"{reference}: is a model with an adapter on it, which lies in no folder. Store it first, with "
        "`merge_method: linear` and this one model, and write that folder."
    )


def without_weights(recipe: Recipe) -> list[str]:
    """The models and Fishers of a recipe of which only headers are here, as written."""
    return [part for part, folder in recipe.fetched.items() if has_headers_only(folder)]
