"""`rlmerge fisher-stats`: are these Fishers worth merging by, and what do they say?"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from rlmerge.errors import MissingExtraError

from .options import Parser, declare_download, declare_output
from .show import told

USAGE = "[OPTIONS] DIR [DIR ...]"
DESCRIPTION = """\
Judge Fisher folders: their distribution by layer, whether they rest on enough
sequences (the two halves of each against each other), how they correlate.

With --base also who wins the conflicts of the models that the Fishers are of:
by F·δ² and by δ², by either half, and after so many sequences."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("folders", metavar="DIR", nargs="+", help="Fisher folder")
    add("--base", metavar="BASE", help="the base of their models")
    add("--model", metavar="MODEL", action="append", default=[], help="model of each Fisher, in their order")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Judges, and prints tables."""
    try:
        from rlmerge.fisher.stats import judge_fishers
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge fisher-stats", error.name or "torch", "model") from None
    from rlmerge.downloads import find_folder

    asked = given.download, told(given.quiet)
    folders, models = ([find_folder(name, *asked) for name in names] for names in (given.folders, given.model))
    base = find_folder(given.base, *asked) if given.base else None
    found = judge_fishers(folders, base, models)
    if given.json:
        json.dump(found, sys.stdout)
        print()
    elif not given.quiet:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    for folder, one in found["fishers"].items():
        print(f"{folder}: {one['source']}, {one['units']} units, mean {one['mean']:.3g}, {one['zeros']:.1%} zero")
        quantiles = ", ".join(f"{float(q):.1%} {value:.2g}" for q, value in one["quantiles"].items())
        print(f"  quantiles: {quantiles}")
        layers = sorted(one["layers"].items(), key=lambda entry: -entry[1]["share"])[:6]
        print(
            "  most in: "
            + ", ".join(f"{'layer ' * key.isdecimal()}{key} {entry['share']:.1%}" for key, entry in layers)
        )
        if "note" in one:
            print(f"  {one['note']}")
        if one.get("reliability") is not None:
            r, whole = one["split_half_rank_correlation"], one["reliability"]
            print(f"  halves: rank correlation {r:.3f}; of the whole with another such estimate, {whole:.3f} expected")
    for pair in found["pairs"]:
        print(f"{' and '.join(pair['fishers'])}: rank correlation {_number(pair['rank_correlation'])}")
    for folder, entry in found.get("delta", {}).items():
        own = _number(entry["rank_correlation_with_delta2"])
        print(f"{folder}: support {entry['support']:.1%}, rank correlation of F with δ² where it moved: {own}")
    if "winners" in found:
        _show_winners(found["winners"], found["sample"])


def _show_winners(won: dict[str, Any], sample: int) -> None:
    print(f"winners at {won['conflicts']:,} conflicts of {sample:,} coordinates looked at:")
    print(f"  draws: {won['draws']:.1%} by F·δ², {won['draws_delta2']:.1%} by δ²")
    print(f"  the same winner by δ² as by F·δ², where both decide: {_share(won['same_as_delta2'])}")
    if "same_in_both_halves" in won:
        print(f"  the same winner by both halves: {_share(won['same_in_both_halves'])}")
    for count, share in won["after"].items():
        print(f"  after {count} units as after all: {_share(share)}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
