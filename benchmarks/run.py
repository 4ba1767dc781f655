"""The benchmark: rlmerge, mergekit and the floor in turn, on the same files; times, ratios and peak memory.

    python benchmarks/run.py                 everything, 0.5B parameters (about 13 GB of data, two hours)
    python benchmarks/run.py --large         and 1.5B parameters in shards (12 GB more, another hour)
    python benchmarks/run.py --small         32M parameters, to try the benchmark itself
    python benchmarks/run.py --sections methods --methods ties

Every run is saved when it is done (`cells.py` says what is kept and what is measured anew), so a benchmark that was
killed goes on where it was: the same command again. `--fresh` begins anew. Before each run the inputs are read once and
the disk is synced, so every run finds its inputs in the page cache and no other's output still on its way to the disk;
the output is deleted afterwards. Both are outside the timed part. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import mergekit_env
import models
import rows
from cells import ratio
from contenders import METHODS
from session import HERE, SECTIONS, Bench, say

RLMERGE = Path(sys.executable).parent / "rlmerge"


def table(report: dict[str, Any], section: str) -> Table:
    """A section's medians for the terminal."""
    found = report["sections"].get(section, {})
    result = Table(title=f"{section}, bf16, medians", box=SIMPLE_HEAD)
    heads = ("row", "tool", "wall s", "CPU s", "peak MB", "anon. MB", "× plain", "× floor", "× rlmerge")
    for column in heads:
        result.add_column(column, justify="left" if column in ("row", "tool") else "right", no_wrap=True)
    for name, row in found.items():
        for tool, one in row["contenders"].items():
            if "median" not in one:
                result.add_row(name, tool, "failed")
                continue
            m = one["median"]
            quotients = [ratio(row, tool, other) for other in ("plain", "floor", "rlmerge")]
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
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({method.merge or method.name for method in (*METHODS.values(), *rows.SPECTRAL.values())})
    parser.add_argument("--runs", type=int, default=3, help="turns of each row (default 3)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--methods", nargs="+", choices=known, default=[], metavar="METHOD")
    parser.add_argument("--small", action="store_true", help="32M parameters instead of 494M")
    parser.add_argument("--large", action="store_true", help="1.5B parameters in shards, too")
    parser.add_argument("--fresh", action="store_true", help="forget all that was measured")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--data", type=Path, default=models.DATA, help="where the models are made and kept")
    parser.add_argument("--out", type=Path, help="where merged models are written and deleted (default: DATA/out)")
    parser.add_argument("--results", type=Path, help="the report (default: results.json here, or in OUT if small)")
    parser.add_argument("--rlmerge", type=Path, default=RLMERGE, help="another executable")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    args = parser.parse_args(arguments)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a tool failed or outputs disagree, else 0."""
    args = parse(arguments)
    if not args.rlmerge.exists():
        print(f"there is no {args.rlmerge}: install the project first (make install)", file=sys.stderr)
        return 2
    bench = Bench(args)
    results = args.results or (bench.out / "small.json" if args.small else HERE / "results.json")
    if not args.skip_mergekit:
        mergekit_env.ensure()
        bench.out.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(mergekit_env.executable()), "--help"], check=True, capture_output=True)
    if os.getloadavg()[0] > 0.5:
        say(f"load average is {os.getloadavg()[0]:.1f}: something else is running, these times will not be trustworthy")
    bench.everything(results)
    report = bench.report()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        console = Console()
        console.width = max(console.width, 110)
        for section in (one for one in SECTIONS if one in bench.rows and one in args.sections):
            console.print(table(report, section))
    missing = Counter(name.partition("/")[0] for name in report["missing"])
    say(f"written: {results}; not measured: {', '.join(f'{s} ({n})' for s, n in missing.items()) or 'nothing'}")
    rows_made = [row for section in bench.rows for row in report["sections"].get(section, {}).values()]
    failed = any("error" in one for row in rows_made for one in row["contenders"].values())
    verdicts = {one["verdict"] for one in report["sections"].get("agree", {}).values()}
    return int(failed or bool(verdicts & {"differ", "failed"}))


if __name__ == "__main__":
    sys.exit(main())
