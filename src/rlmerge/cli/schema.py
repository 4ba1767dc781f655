"""`rlmerge schema`: what a recipe may hold, for editors."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

from .options import Parser, declare_output, declare_plugins, registry

USAGE = "[OPTIONS]"
DESCRIPTION = """\
Print the JSON schema of a recipe: keys, methods, their parameters.

An editor that knows YAML schemas then completes, explains and checks recipes:
rlmerge schema > recipe.schema.json, and as the first line of a recipe
# yaml-language-server: $schema=recipe.schema.json"""


def declare(parser: Parser) -> None:
    """Its arguments."""
    declare_plugins(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Prints JSON, with --json in one line."""
    from rlmerge.schema import recipe_schema

    if given.json or not given.quiet:
        json.dump(
            recipe_schema(registry(given.plugin)), sys.stdout, indent=None if given.json else 1, ensure_ascii=False
        )
        print()
