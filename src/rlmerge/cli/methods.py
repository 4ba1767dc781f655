"""`rlmerge methods`: what there is, and what one of them takes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from rlmerge.errors import RecipeError

from .options import Parser, declare_output, declare_plugins, registry

USAGE = "[OPTIONS] [NAME]"
DESCRIPTION = """\
List the merge methods, or describe one: formula, source, parameters, defaults,
laws."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method; without it, all in one line each")
    declare_plugins(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Describes one method, or lists all."""
    from rlmerge.methods import get_method, method_names
    from rlmerge.recipe_checks import find_method

    known = registry(given.plugin)
    names = [given.name] if given.name else method_names() if known is None else list(known)
    try:
        described = [describe(get_method(name) if known is None else find_method(name, known)) for name in names]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if given.json:
        json.dump(described[0] if given.name else described, sys.stdout)
        print()
    elif given.quiet:
        return
    elif given.name:
        _show(described[0])
    else:
        for entry in described:
            print(f"{entry['name']:<16} {entry['summary']}")


def describe(method: Any) -> dict[str, Any]:
    """A method as JSON-able data."""
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "source": method.source,
        "plugin": method.origin.file if method.origin else None,
        "base": method.arity.base,
        "models": [method.arity.minimum, method.arity.maximum],
        "grain": method.grain,
        "deterministic": method.deterministic,
        "laws": sorted(method.laws),
        "parameters": [
            {
                "name": spec.name,
                "kind": spec.kind,
                "default": spec.default,
                "per_model": spec.per_model,
                "choices": list(spec.choices),
                "doc": spec.doc,
            }
            for spec in method.parameters
        ],
    }


def _show(entry: dict[str, Any]) -> None:
    print(f"{entry['name']}: {entry['summary']}\n  {entry['formula']}\n  source: {entry['source']}")
    if entry["plugin"]:
        print(f"  plugin: {entry['plugin']}")
    print(f"  base model: {entry['base']}; laws: {', '.join(entry['laws']) or 'none'}")
    for spec in entry["parameters"]:
        place = "per model or global" if spec["per_model"] else "global"
        default = "required" if spec["default"] is None else f"default {spec['default']}"
        choices = f" ({' | '.join(spec['choices'])})" if spec["choices"] else ""
        print(f"  {spec['name']}: {spec['doc']}{choices}; {default}, {place}")
