"""Options that several commands share, how they are parsed, and how a recipe is made of them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from rlmerge.errors import RecipeError

from .usage import refuse

if TYPE_CHECKING:
    from rlmerge.methods.base import Method
    from rlmerge.recipe import Recipe
    from rlmerge.stages import Stages


class Parser(argparse.ArgumentParser):
    """argparse with our words for a mistake; options may stand anywhere and are never abbreviated."""

    def __init__(self, name: str, usage: str, description: str) -> None:
        super().__init__(
            prog=f"rlmerge {name}",
            usage=f"rlmerge {name} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Wrong usage: one message, exit code 2."""
        refuse(f"{self.prog}: {message}. See '{self.prog} --help'.")


def at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer that is not too small."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"{number} is less than {low}")
        return number

    return parse


def declare_plugins(parser: Parser) -> None:
    """Methods of one's own."""
    parser.add_argument(
        "--plugin", metavar="FILE", action="append", help="Python file with merge methods; it is run; repeatable"
    )


def declare_parts(parser: Parser) -> None:
    """What a recipe is made of without a file, and what changes single values of one."""
    parser.add_argument("--base", metavar="FOLDER", help="base model folder (instead of a recipe)")
    parser.add_argument("--expert", metavar="FOLDER", action="append", help="expert folder; once for each")
    parser.add_argument(
        "--fisher", metavar="FOLDER", action="append", help="Fisher folder; once for each expert, in order"
    )
    parser.add_argument("--gram", metavar="FOLDER", action="append", help="Gram folder; once for each expert, in order")
    parser.add_argument("--method", metavar="NAME", help="merge method, see 'rlmerge methods'")
    declare_plugins(parser)
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", help="parameter or key; several values make a sweep"
    )


def declare_recipe(parser: Parser) -> None:
    """The recipe file, or its parts."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="recipe file (YAML)")
    declare_parts(parser)
    declare_download(parser)


def declare_download(parser: Parser) -> None:
    """What every command takes that reads models."""
    parser.add_argument("--download", action="store_true", help="fetch models that are named by id from the hub")


def declare_run(parser: Parser) -> None:
    """What `check` and `merge` have in common."""
    parser.add_argument("--threads", metavar="N", type=at_least(1), help="worker threads; default: all processors")
    parser.add_argument(
        "--accept-tokenizers",
        action="store_true",
        help="merge although tokenizers, special tokens or templates differ",
    )


def declare_executor(parser: Parser) -> None:
    """Where the work is done."""
    parser.add_argument("--executor", metavar="E", default="local", help="local (default), or ray: on a cluster")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; default: one of our own, here")


def declare_report(parser: Parser) -> None:
    """Where a report goes."""
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page to look at (extra 'report')")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="write its figures as SVG and PNG (extra 'report')")


def declare_output(parser: Parser) -> None:
    """What every command takes."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def registry(plugins: list[str] | None) -> Mapping[str, Method] | None:
    """All methods, those of plugins too; None for rlmerge's own."""
    if not plugins:
        return None
    from rlmerge.plugins import BesidePlugins, load_plugins

    sys.stdout = cast(TextIO, BesidePlugins(sys.stdout))
    return load_plugins(*plugins)


def make_recipe(
    path: str | None,
    base: str | None,
    experts: list[str] | None,
    fishers: list[str] | None,
    method: str | None,
    settings: list[str] | None,
    sweeps: bool = False,
    plugins: list[str] | None = None,
    grams: list[str] | None = None,
) -> tuple[Recipe | Stages, list[dict[str, Any]]]:
    """The recipe of a file or of --base/--expert/--method, and the points of a sweep ([] for a single merge).

    A single point of --set is applied to the recipe; several need a command that `sweeps`. Of a file of several
    documents the stages: there, 'NAME.KEY=VALUE' is of the document of that name.
    """
    from rlmerge.recipe_flags import parse_settings, recipe_from_parts
    from rlmerge.stages import load_stages

    parts = [flag for flag, value in (("--base", base), ("--expert", experts), ("--method", method)) if value]
    if path is not None and (parts or fishers or grams):
        flags = ", ".join(parts or ["--fisher" if fishers else "--gram"])
        raise RecipeError(f"a recipe file and {flags}: give one or the other. --set changes single values of a recipe.")
    points = parse_settings(settings) if settings else []
    single = points[0] if len(points) == 1 else {}
    methods = registry(plugins)
    if path is not None:
        stages = load_stages(Path(path), methods)
        recipe = stages.final
        if len(stages.recipes) > 1:
            recipe, points = stages.with_settings(points)
        elif single:
            recipe = recipe.with_settings(single)
    else:
        if not experts:
            raise RecipeError("give a recipe file, or --base, --expert (once for each) and --method.")
        first = single or (points[0] if points else {})
        recipe = recipe_from_parts(
            base, experts, method or "sar", first, fishers=fishers or (), grams=grams or (), methods=methods
        )
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
