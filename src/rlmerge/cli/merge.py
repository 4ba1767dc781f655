"""`rlmerge merge`: a recipe, or its parts as flags, to a folder."""

from __future__ import annotations

import gc
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmerge import kernels
from rlmerge.errors import RecipeError

from .options import (
    Parser,
    at_least,
    declare_download,
    declare_executor,
    declare_output,
    declare_parts,
    declare_report,
    declare_run,
    make_recipe,
    parse_bytes,
)
from .show import ProgressLine, duration, show_statistics, size
from .usage import refuse

if TYPE_CHECKING:
    from rlmerge.api import Outcome
    from rlmerge.recipe import Recipe
    from rlmerge.stages import Stages

USAGE = "[OPTIONS] RECIPE OUT"
DESCRIPTION = """\
Merge models: rlmerge merge RECIPE OUT, or
rlmerge merge OUT --base B --expert E --expert F --method sar.

An interrupted merge is continued by the same command. `--set lambda=0.3,0.5,1`
merges a sweep in one reading, one folder below OUT for each value. A recipe of
several documents is merged in stages: OUT.stages, removed when OUT is whole."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    parser.add_argument("first", metavar="RECIPE", nargs="?", help="recipe file; left out with --base/--expert")
    parser.add_argument("second", metavar="OUT", nargs="?", help="output folder")
    parser.add_argument("-o", "--out", metavar="OUT", help="the output folder, in place of the last argument")
    declare_parts(parser)
    declare_download(parser)
    declare_run(parser)
    declare_executor(parser)
    add = parser.add_argument
    add("--memory", metavar="SIZE", help="bound on memory, such as 600MB")
    add("--seed", metavar="N", type=at_least(0), help="seed of random choices and ties")
    add("--kernels", metavar="KIND", default="auto", help="numba, numpy (the same bits, slowly), or auto (default)")
    add("--shard-size", metavar="SIZE", default="5GB", help="largest weight file; default 5GB")
    add("--stages", metavar="FOLDER", help="where the stages of several documents are made, and stay")
    add("--overwrite", action="store_true", help="replace an earlier output")
    add("--dry-run", action="store_true", help="check and stop before any weight moves")
    add("--fsync", action="store_true", help="sync files to disk, against power loss")
    add("--sha256", action="store_true", help="add the hub's hash of every input file")
    declare_report(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Merges, or with --dry-run checks, and prints what became of the updates."""
    places = [place for place in (given.first, given.second, given.out) if place is not None]
    if not places:
        refuse("rlmerge merge: RECIPE and OUT are missing. See 'rlmerge merge --help'.")
    path, out = (None, *places) if len(places) == 1 else tuple(places[:2])
    if len(places) > 2:
        raise RecipeError(f"the output folder is given twice: {given.second}, and -o {given.out}. Leave one out.")
    if path is None and not given.expert:
        shown = given.first or "RECIPE"
        raise RecipeError(f"give a recipe and one output folder: rlmerge merge {shown} OUT")
    settings = [*(given.set or []), *([f"seed={given.seed}"] if given.seed is not None else [])]
    recipe, sweep = make_recipe(
        path, given.base, given.expert, given.fisher, given.method, settings, sweeps=True, plugins=given.plugin,
        grams=given.gram,
    )  # fmt: skip
    options: dict[str, Any] = {
        "sweep": sweep,
        "stages": given.stages,
        "threads": given.threads,
        "memory": parse_bytes(given.memory, "--memory"),
        "kernels": given.kernels,
        "overwrite": given.overwrite,
        "accept_tokenizers": given.accept_tokenizers,
        "download": given.download,
        "shard_bytes": parse_bytes(given.shard_size, "--shard-size") or 0,
    }
    _check_report(given, sweep, recipe, out)
    if given.dry_run:
        from rlmerge.preflight import check
        from rlmerge.settings import check_executor

        from .check import show_report

        check_executor(given.executor, given.address, options["memory"])
        show_report(check(recipe, out=out, **options), given.json, given.quiet)
        return
    from rlmerge.api import merge_to_folder
    from rlmerge.execute.memory import hold_memory

    hold_memory()
    gc.disable()  # numba brings many objects that live as long as we do
    kernels.skip_blas = True
    options |= {"executor": given.executor, "address": given.address}
    line = ProgressLine(given.quiet)
    try:
        outcome = merge_to_folder(recipe, out, fsync=given.fsync, sha256=given.sha256, progress=line, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command continues {out}.") from None
    finally:
        line.close()
    if given.html is not None or given.figures is not None:
        _report(given, out, outcome)
    if given.json:
        json.dump(_as_json(out, outcome), sys.stdout)
        print()
    elif not given.quiet:
        _show(recipe, out, outcome)


def _check_report(given: Namespace, sweep: list[dict[str, Any]], recipe: Recipe | Stages, out: str) -> None:
    """Raises, before any weight moves, where a page cannot be made of this merge or written there."""
    from rlmerge.report.outputs import check_apart, check_places
    from rlmerge.stages import Stages

    check_places(given.html, given.figures)
    recipes = recipe.recipes if isinstance(recipe, Stages) else [recipe]
    folders = [folder for one in recipes for folder in one.local_folders]
    for option, path in (("--html", given.html), ("--figures", given.figures)):
        check_apart(option, path, folders, out)
    if sweep and (given.html is not None or given.figures is not None):
        raise RecipeError(
            "--html: a sweep makes several merges, and a page shows one. Make the pages of those you want afterwards: "
            "rlmerge compare OUT/NAME/rlmerge.json --html page.html."
        )


def _report(given: Namespace, out: str, outcome: Outcome) -> None:
    from rlmerge.report.merge_page import merge_page
    from rlmerge.report.outputs import write_outputs

    provenance = json.loads((Path(out) / "rlmerge.json").read_text(encoding="utf-8"))
    page = merge_page(provenance, f"What the merge did: {Path(out).name}", outcome.alarms)
    write_outputs(page, given.html, given.figures)


def _as_json(out: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "out": out,
        "seconds": outcome.seconds,
        "bytes_read": outcome.bytes_read,
        "units": outcome.total_units,
        "resumed_units": outcome.resumed_units,
        "notes": list(outcome.notes),
        "alarms": list(outcome.alarms),
        "stages": {
            name: None if stage is None else _as_json(str(stage.out), stage) for name, stage in outcome.stages.items()
        },
        "merges": [
            {"folder": name or ".", "statistics": report["total"]}
            for name, report in zip(outcome.names, outcome.reports)
        ],
    }


def _show(recipe: Recipe | Stages, out: str, outcome: Outcome) -> None:
    from rlmerge.figures import statistics_rows
    from rlmerge.stages import Stages

    *stages, final = recipe.recipes if isinstance(recipe, Stages) else [recipe]
    for stage in stages:
        made = outcome.stages[stage.name or ""]
        if made is not None and statistics_rows(made.report["total"]):
            show_statistics(f"{stage.name}: {stage.merge_method}", made.report["total"])
    method = final.merge_method
    for name, report in zip(outcome.names, outcome.reports):
        if statistics_rows(report["total"]):
            show_statistics(f"{method} {name}".strip(), report["total"])
    print(f"{out}: {size(outcome.bytes_read)} read in {duration(outcome.seconds)}", end="")
    print(f", {outcome.resumed_units} of {outcome.total_units} units from before" if outcome.resumed_units else "")
