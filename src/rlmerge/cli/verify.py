"""`rlmerge verify`: is an output still what the merge wrote?"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from .options import Parser, declare_output
from .show import size

USAGE = "[OPTIONS] OUT"
DESCRIPTION = "Compare every byte of an output with the digests in its rlmerge.json."


def declare(parser: Parser) -> None:
    """Its arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that rlmerge wrote")
    declare_output(parser)


def run(given: Namespace) -> None:
    """Verifies and says so."""
    from rlmerge.verification import verify

    found = verify(given.out)
    if given.json:
        json.dump({"out": str(given.out)} | found, sys.stdout)
        print()
    elif not given.quiet:
        tensors, files = found["tensors"], found["files"]
        print(f"{given.out}: all {tensors} tensors and {files} files are as written ({size(found['bytes'])})")
