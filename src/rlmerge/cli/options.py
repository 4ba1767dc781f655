"""Options that several commands share, and how a recipe is made of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlmerge.errors import RecipeError

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

Base = Annotated[str | None, typer.Option("--base", help="Base model folder (instead of a recipe).")]
Expert = Annotated[list[str] | None, typer.Option("--expert", help="Expert folder; once for each.")]
Fisher = Annotated[list[str] | None, typer.Option("--fisher", help="Fisher folder; once for each expert, in order.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Merge method, see 'rlmerge methods'.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Parameter or key; several values make a sweep.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: all processors.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Accept = Annotated[
    bool, typer.Option("--accept-tokenizers", help="Merge although tokenizers, special tokens or templates differ.")
]
RecipePath = Annotated[str | None, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]


def make_recipe(
    path: str | None,
    base: str | None,
    experts: list[str] | None,
    fishers: list[str] | None,
    method: str | None,
    settings: list[str] | None,
    sweeps: bool = False,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe of a file or of --base/--expert/--method, and the points of a sweep ([] for a single merge).

    A single point of --set is applied to the recipe; several need a command that `sweeps`.
    """
    from rlmerge.recipe import load_recipe, parse_settings, recipe_from_parts

    parts = [flag for flag, value in (("--base", base), ("--expert", experts), ("--method", method)) if value]
    if path is not None and (parts or fishers):
        flags = ", ".join(parts or ["--fisher"])
        raise RecipeError(f"a recipe file and {flags}: give one or the other. --set changes single values of a recipe.")
    points = parse_settings(settings) if settings else []
    single = points[0] if len(points) == 1 else {}
    if path is not None:
        recipe = load_recipe(Path(path))
        recipe = recipe.with_settings(single) if single else recipe
    else:
        if not experts:
            raise RecipeError("give a recipe file, or --base, --expert (once for each) and --method.")
        first = single or (points[0] if points else {})
        recipe = recipe_from_parts(base, experts, method or "sar", first, fishers=fishers or ())
    if len(points) > 1 and not sweeps:
        raise RecipeError("--set: a sweep of several values works with 'rlmerge merge' only; here give one value each.")
    return recipe, points if len(points) > 1 else []


def parse_bytes(text: str | None, flag: str) -> int | None:
    """'600MB', '2GB', '1.5G', '300000000' as bytes (powers of ten; KiB, MiB, GiB of two)."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not found:
        raise RecipeError(f"{flag} {text}: expected a size such as 600MB or 2GB.")
    number, prefix, binary = found.groups()
    step = 1024 if binary else 1000
    return int(float(number) * step ** " kMGT".index(prefix.replace("K", "k") or " "))
