"""`rlmerge merge`: a recipe, or its parts as flags, to a folder."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from typing import Annotated, Any

import typer

from rlmerge.errors import RecipeError

from .options import Accept, Base, Expert, Fisher, Json, MethodName, Quiet, Set, Threads, make_recipe, parse_bytes
from .show import ProgressLine, duration, size, statistics_table


def hold_memory() -> None:
    """Asks glibc to keep freed memory and to share one arena: block arrays come and go by the thousand, and giving
    their pages back to the kernel each time costs a third of a merge. Elsewhere, nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2**30), (-3, 2**30), (-2, 2**26), (-8, 1)):  # trim, mmap threshold; top pad; arenas
            libc.mallopt(option, value)


def merge(
    first: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file; left out with --base/--expert.")],
    second: Annotated[str | None, typer.Argument(metavar="OUT", help="Output folder.", show_default=False)] = None,
    base: Base = None,
    expert: Expert = None,
    fisher: Fisher = None,
    method: MethodName = None,
    set_: Set = None,
    threads: Threads = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Bound on memory, such as 600MB.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of random choices and ties.")] = None,
    kernels: Annotated[str, typer.Option("--kernels", help="numba, or numpy: the same bits, slowly.")] = "numba",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and stop before any weight moves.")] = False,
    fsync: Annotated[bool, typer.Option("--fsync", help="Sync files to disk, against power loss.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Add the hub's hash of every input file.")] = False,
    accept_tokenizers: Accept = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: rlmerge merge RECIPE OUT, or rlmerge merge OUT --base B --expert E --expert F --method sar.

    An interrupted merge is continued by the same command. `--set lambda=0.3,0.5,1` merges a sweep in one reading, one
    folder below OUT for each value.
    """
    from rlmerge.api import merge_to_folder

    path, out = (first, second) if second is not None else (None, first)
    if second is None and not expert:
        raise RecipeError(f"give a recipe and an output folder: rlmerge merge {first} OUT")
    settings = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    recipe, sweep = make_recipe(path, base, expert, fisher, method, settings, sweeps=True)
    if dry_run:
        from rlmerge.preflight import check

        from .check import show_report

        report = check(
            recipe,
            sweep=sweep,
            out=out,
            threads=threads,
            memory=parse_bytes(memory, "--memory"),
            kernels=kernels,
            overwrite=overwrite,
            accept_tokenizers=accept_tokenizers,
            shard_bytes=parse_bytes(shard_size, "--shard-size") or 0,
        )
        show_report(report, json_, quiet)
        return
    hold_memory()
    line = ProgressLine(quiet)
    try:
        outcome = merge_to_folder(
            recipe,
            out,
            sweep=sweep,
            threads=threads,
            memory=parse_bytes(memory, "--memory"),
            kernels=kernels,  # type: ignore[arg-type]
            overwrite=overwrite,
            fsync=fsync,
            sha256=sha256,
            accept_tokenizers=accept_tokenizers,
            shard_bytes=parse_bytes(shard_size, "--shard-size") or 0,
            progress=line,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command continues {out}.") from None
    finally:
        line.close()
    if json_:
        result: dict[str, Any] = {
            "out": str(out),
            "seconds": outcome.seconds,
            "bytes_read": outcome.bytes_read,
            "units": outcome.total_units,
            "resumed_units": outcome.resumed_units,
            "notes": list(outcome.notes),
            "alarms": list(outcome.alarms),
            "merges": [
                {"folder": name or ".", "statistics": report["total"]}
                for name, report in zip(outcome.names, outcome.reports)
            ],
        }
        json.dump(result, sys.stdout)
        print()
        return
    if quiet:
        return
    for name, report in zip(outcome.names, outcome.reports):
        if "support" in report["total"]:
            statistics_table(f"{recipe.merge_method} {name}".strip(), report["total"])
    print(f"{out}: {size(outcome.bytes_read)} read in {duration(outcome.seconds)}", end="")
    print(f", {outcome.resumed_units} of {outcome.total_units} units from before" if outcome.resumed_units else "")
