"""`rlmerge check`: everything that can be known before a merge."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from .options import Parser, declare_output, declare_recipe, declare_run, make_recipe
from .show import duration, size, warn

if TYPE_CHECKING:
    from rlmerge.preflight import CheckReport

USAGE = "[OPTIONS] RECIPE"
DESCRIPTION = """\
Check a recipe against headers, small files and a one-percent sample; estimate
bytes, memory, disk and time.

Exit code 2 for what would make the merge fail. Alarms are warnings and change
nothing."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    declare_recipe(parser)
    declare_run(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Checks and prints what was found."""
    from rlmerge.preflight import check

    recipe, _ = make_recipe(
        given.recipe, given.base, given.expert, given.fisher, given.method, given.set, plugins=given.plugin,
        grams=given.gram,
    )  # fmt: skip
    report = check(recipe, threads=given.threads, accept_tokenizers=given.accept_tokenizers, download=given.download)
    show_report(report, given.json, given.quiet)


def show_report(report: CheckReport, json_: bool, quiet: bool) -> None:
    """Prints a report: as JSON, as text, or not at all."""
    if json_:
        json.dump(asdict(report), sys.stdout)
        print()
        return
    if quiet:
        return
    for name, stage in report.stages.items():
        print(f"--- {name}")
        _show(stage, f"{name}: ")
    if report.stages:
        print("--- the output")
    _show(report)
    if report.total:
        total = report.total
        print(
            f"--- all that is to be merged: reads {size(total['bytes_read'])}, writes {size(total['bytes_written'])}; "
            f"disk {size(total['disk_bytes'])}, the stages included; memory about {size(total['memory_bytes'])}; "
            f"roughly {duration(total['hours'] * 3600)}"
        )
    print(f"all right, checked in {duration(report.seconds)}")


def _show(report: CheckReport, label: str = "") -> None:
    for text in (*report.notes, *report.alarms):
        warn(f"{label}{text}")
    summary, estimate = report.summary, report.estimate
    experts = summary["experts"]
    print(f"{summary['method']} of {len(experts)} model{'s' * (len(experts) != 1)}: {', '.join(experts)}")
    print(
        f"{summary['coordinates']:,} weights: {summary['merged_tensors']} tensors merged, "
        f"{summary['carried_tensors']} carried, written as {', '.join(summary['dtypes'])} in "
        f"{len(summary['files'])} file(s)"
    )
    if "vocabulary" in summary:
        from rlmerge.checkpoint.vocabulary import describe

        print("\n".join(describe(summary["vocabulary"])))
    for key, entry in report.sample.get("experts", {}).items():
        norm = "-" if entry["relative_norm"] is None else f"{entry['relative_norm']:.2e}"
        print(f"  {key}: support {entry['support']:.1%}, ‖δ‖/‖θ0‖ {norm}")
    for pair in report.sample.get("pairs", []):
        conflict = "-" if pair["conflict"] is None else f"{pair['conflict']:.0%} in sign conflict"
        print(
            f"  {pair['experts'][0]} and {pair['experts'][1]}: overlap {pair['overlap']:.1%} of all weights, {conflict}"
        )
    print(
        f"reads {size(estimate['bytes_read'])} in {estimate['passes']} pass(es), "
        f"writes {size(estimate['bytes_written'])}; "
        f"disk {size(estimate['disk_bytes'])}; memory about {size(estimate['memory_bytes'])}; "
        f"roughly {duration(estimate['hours'] * 3600)} on {estimate['threads']} threads"
    )
