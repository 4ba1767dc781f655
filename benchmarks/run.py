"""The benchmark: rlmerge, mergekit and the floor in turn, on the same files; times, ratios and peak memory.

    python benchmarks/run.py                 everything, 0.5B parameters (about 10 GB of data, 12 minutes)
    python benchmarks/run.py --small         32M parameters, to try the benchmark itself
    python benchmarks/run.py --agree         do both tools compute the same? (small size, fp32)

Before each run the inputs are read once and the disk is synced, so every run finds its inputs in the page cache and
no other's output still on its way to the disk; the output is deleted afterwards. Both are outside the timed part. The
first run of each is a warm-up (compile caches) and not in the median. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import agree
import measure
import mergekit_env
import models
from contenders import METHODS, Method, Place

HERE = Path(__file__).resolve().parent

RLMERGE = Path(sys.executable).parent / "rlmerge"
HELP_RUNS = 5


def median(runs: list[measure.Measurement]) -> dict[str, float]:
    """Median of each field by itself."""
    rows = [run.as_dict() for run in runs]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def ratio(results: dict[str, Any], over: str, under: str) -> float | None:
    """Quotient of two contenders' median wall times, or None if one has none."""
    sides = [results.get(side, {}).get("median") for side in (over, under)]
    return round(sides[0]["wall"] / sides[1]["wall"], 3) if sides[0] and sides[1] else None


def shown(command: list[str]) -> str:
    """A command as text, without the paths of this machine."""
    return " ".join(part.replace(f"{HERE.parent}/", "") for part in command)


def bench(place: Place, method: Method, runs: int, skip_mergekit: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All runs of one method. A contender that fails is reported, marked, and left out from then on."""
    recipe = place.write_recipe(method, "bfloat16")
    inputs = models.input_files(place.data, method.base, method.fisher)
    commands = place.commands(method, recipe, skip_mergekit)
    results: dict[str, Any] = {name: {"command": shown(command)} for name, command in commands.items()}
    seen: dict[str, list[measure.Measurement]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            if "error" in results[name]:
                continue
            try:
                one = place.once(command, inputs)
            except measure.CommandError as error:
                say(f"{method.name}: {name} failed: {error}")
                results[name]["error"] = str(error).replace(f"{HERE.parent}/", "")
                continue
            seen[name].append(one)
            label = "warm-up" if turn == 0 else f"{turn}/{runs}"
            say(f"{method.name:<16}{name:<12}{label:>8} {one.wall:8.2f} s {one.anonymous:7.0f} MB anonymous")
    place.clear()
    for name, measured in seen.items():
        if "error" not in results[name]:
            results[name] |= {
                "warm_up": measured[0].as_dict(),
                "runs": [one.as_dict() for one in measured[1:]],
                "median": median(measured[1:]),
            }
    return {
        "recipe": recipe.read_text(),
        "input_mb": round(sum(path.stat().st_size for path in inputs) / 1e6, 1),
        "output_mb": round((place.data / "base" / "model.safetensors").stat().st_size / 1e6, 1),
        "contenders": results,
        "rlmerge_over_plain": ratio(results, "rlmerge", "plain"),
        "rlmerge_over_floor": ratio(results, "rlmerge", "floor"),
        "rlmerge_over_floor_fsync": ratio(results, "rlmerge", "floor_fsync"),
        "mergekit_over_rlmerge": ratio(results, "mergekit", "rlmerge"),
    }


def bench_help(place: Place, skip_mergekit: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """How long each tool takes to print its help: its start-up."""
    commands = {"rlmerge": [str(place.rlmerge), "--help"]}
    if not skip_mergekit:
        commands["mergekit"] = [str(mergekit_env.executable()), "--help"]
    found: dict[str, Any] = {}
    for name, command in commands.items():
        try:
            runs = [measure.run(command, place.data, place.out / "log.txt") for _ in range(HELP_RUNS + 1)]
        except measure.CommandError as error:
            say(f"help: {name} failed: {error}")
            found[name] = {"error": str(error).replace(f"{HERE.parent}/", "")}
            continue
        found[name] = {"runs": [run.as_dict() for run in runs[1:]], "median": median(runs[1:])}
    return found


def agreement(place: Place, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Runs both tools with `dtype: float32` and compares their outputs."""
    found: dict[str, Any] = {}
    for method in (METHODS[name] for name in names if METHODS[name].mergekit):
        recipe = place.write_recipe(method, "float32")
        commands = place.commands(method, recipe, skip_mergekit=False)
        inputs = models.input_files(place.data, method.base, method.fisher)
        kept = {name: place.out / f"{method.name}-{name}" for name in ("rlmerge", "mergekit")}
        try:
            for name, folder in kept.items():
                shutil.rmtree(folder, ignore_errors=True)
                place.once(commands[name], inputs)
                (place.out / "merged").replace(folder)
            density = method.density if method.name == "ties" else None
            found[method.name] = agree.compare(kept["rlmerge"], kept["mergekit"], place.data, density)
            say(agree.describe(method.name, found[method.name]))
        except (measure.CommandError, ValueError) as error:
            say(f"{method.name}: {error}")
            found[method.name] = {"error": str(error).replace(f"{HERE.parent}/", ""), "agrees": False}
        finally:
            place.clear()
            for folder in kept.values():
                shutil.rmtree(folder, ignore_errors=True)
    return found


def versions(skip_mergekit: bool) -> dict[str, Any]:
    """Versions of all that is measured, and the commit (with a mark if the tree has changes)."""
    names = ("rlmerge", "numpy", "numba", "safetensors")
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True, text=True
    )
    found["commit"] = git.stdout.strip() or None
    if not skip_mergekit:
        found["mergekit"] = mergekit_env.versions()
    return found


def table(report: dict[str, Any]) -> Table:
    """The report's medians for the terminal."""
    size = report["size"]
    result = Table(title=f"{size['parameters'] / 1e6:.0f}M parameters, bf16, median of {size['runs']}", box=SIMPLE_HEAD)
    for column in (
        "method",
        "tool",
        "wall s",
        "CPU s",
        "peak MB",
        "anon. MB",
        "× plain",
        "× floor",
        "× fsync",
        "× rlmerge",
    ):
        result.add_column(column, justify="left" if column in ("method", "tool") else "right", no_wrap=True)
    for name, found in report["methods"].items():
        contenders = found["contenders"]
        for tool, one in contenders.items():
            if "median" not in one:
                result.add_row(name, tool, "failed")
                continue
            m = one["median"]
            quotients = [ratio(contenders, tool, other) for other in ("plain", "floor", "floor_fsync", "rlmerge")]
            result.add_row(
                name,
                tool,
                f"{m['wall']:.2f}",
                f"{m['user'] + m['system']:.2f}",
                f"{m['rss']:.0f}",
                f"{m['anonymous']:.0f}",
                *("" if q is None else f"{q:.2f}" for q in quotients),
            )
        result.add_section()
    for tool, one in report["help"].items():
        result.add_row("--help", tool, f"{one['median']['wall']:.2f}" if "median" in one else "failed")
    return result


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the report so that a half-written file never appears."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each, after one warm-up (default 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--small", action="store_true", help="32M parameters instead of 494M")
    parser.add_argument("--agree", action="store_true", help="compare the tools' outputs in fp32 instead of timing")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--data", type=Path, default=models.DATA, help="where the models are made and kept")
    parser.add_argument("--out", type=Path, help="where merged models are written and deleted (default: DATA/out)")
    parser.add_argument("--results", type=Path, help="the report (default: results.json here, or in OUT if small)")
    parser.add_argument("--rlmerge", type=Path, default=RLMERGE, help="another executable")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    args = parser.parse_args(arguments)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if args.agree and args.skip_mergekit:
        parser.error("--agree compares with mergekit: leave out --skip-mergekit")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a tool failed or outputs disagree, else 0."""
    args = parse(arguments)
    out = (args.out or args.data / "out").resolve()
    size = models.SIZES["small" if args.small or args.agree else "0.5B"]
    place = Place((args.data / size.name).resolve(), out, args.rlmerge.absolute())
    quick = "agreement.json" if args.agree else "small.json" if args.small else None
    results = args.results or (out / quick if quick else HERE / "results.json")

    if not place.rlmerge.exists():
        print(f"there is no {place.rlmerge}: install the project first (make install)", file=sys.stderr)
        return 2

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    models.ensure(place.data, size)
    out.mkdir(parents=True, exist_ok=True)
    if not args.skip_mergekit:
        mergekit_env.ensure()
    if not args.agree and os.getloadavg()[0] > 0.5:
        say(f"load average is {os.getloadavg()[0]:.1f}: something else is running, these times will not be trustworthy")
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "size": {"name": size.name, "parameters": size.parameters(), "experts": models.EXPERTS, "runs": args.runs},
        "machine": measure.machine(out),
        "versions": versions(args.skip_mergekit),
    }
    if args.agree:
        report["agreement"] = agreement(place, args.methods, say)
        failed = not all(one["agrees"] for one in report["agreement"].values())
    else:
        report |= {"methods": {}, "help": bench_help(place, args.skip_mergekit, say)}
        for name in args.methods:
            report["methods"][name] = bench(place, METHODS[name], args.runs, args.skip_mergekit, say)
            write_json(results, report)
        parts = [report["help"], *(method["contenders"] for method in report["methods"].values())]
        failed = any("error" in one for part in parts for one in part.values())
    write_json(results, report)
    if args.json:
        print(json.dumps(report, indent=1))
    elif not args.agree:
        console = Console()
        console.width = max(console.width, 110)
        console.print(table(report))
    say(f"written: {results}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
