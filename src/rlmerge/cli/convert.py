"""`rlmerge convert`: pickled weights to safetensors."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from .options import Parser, declare_output
from .show import warn

USAGE = "[OPTIONS] SOURCE OUT"
DESCRIPTION = """\
Convert pickled weights to safetensors: weights only, in a process of its own.
Needs torch."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="folder with .bin, .pt or .pth files, or one such file"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    declare_output(parser)


def run(given: Namespace) -> None:
    """Converts and lists the files."""
    from rlmerge.checkpoint.convert import convert

    written = convert(given.source, given.out, note=(lambda text: None) if given.quiet else warn)
    if given.json:
        json.dump({"out": str(given.out), "files": [path.name for path in written]}, sys.stdout)
        print()
    elif not given.quiet:
        print(f"{given.out}: {', '.join(path.name for path in written)}")
