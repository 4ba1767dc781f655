"""`rlmerge explain`: the resolved parameters of every group of tensors."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from .options import Parser, declare_output, declare_recipe, make_recipe

USAGE = "[OPTIONS] RECIPE"
DESCRIPTION = """\
Print which parameters hold for which tensors, gradients, filters and defaults
resolved. Long lists of tensors are cut; --json has them whole."""
SHOWN = 6
"""Patterns of tensors in a line."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    declare_recipe(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Resolves and prints."""
    from rlmerge.preflight import explain

    recipe, _ = make_recipe(
        given.recipe, given.base, given.expert, given.fisher, given.method, given.set, plugins=given.plugin,
        grams=given.gram,
    )  # fmt: skip
    groups = explain(recipe, download=given.download)
    if given.json:
        json.dump(groups, sys.stdout)
        print()
    elif not given.quiet:
        shown = None
        for group in groups:
            if (stage := group.get("stage", shown)) != shown:
                print(f"--- {stage or 'the output'}")
                shown = stage
            _show(group)


def _show(group: dict[str, Any]) -> None:
    shown, more = group["tensors"][:SHOWN], len(group["tensors"]) - SHOWN
    names = ", ".join(shown) + (f", and {more} more (--json lists all)" if more > 0 else "")
    print(f"{group['count']} tensor(s): {names}")
    if "module" in group:
        print(f"  module {group['module']}")
    if "slice" in group:
        ranges = {**group["layers"], **({"the base": group["base_layers"]} if "base_layers" in group else {})}
        print(f"  slice {group['slice']}: " + ", ".join(f"{key}[{a}:{b}]" for key, (a, b) in ranges.items()))
    for word in ("before", "after"):
        if word in group:
            print(f"  {word} the layers: {', '.join(group[word])}")
    if "vocabulary" in group:
        from rlmerge.checkpoint.vocabulary import describe

        print("\n".join(f"  {line}" for line in describe(group["vocabulary"])))
    if "carried" in group:
        print(f"  copied from the base ({group['carried']})")
    for key, value in group["values"].items():
        print(f"  {key}: {value}")
    for model, values in group["models"].items():
        print(f"  {model}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
