"""`rlmerge unpack`: the expert of a delta pack, as it was."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from .options import Parser, at_least, declare_download, declare_output
from .show import PackingLine, duration, size, told

USAGE = "[OPTIONS] PACK -o OUT"
DESCRIPTION = """\
Make the expert of a delta pack again, every byte of its weights and small
files; all are compared with the pack's digests before OUT appears."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("pack", metavar="PACK", help="folder of the pack")
    add("-o", "--out", metavar="OUT", type=Path, required=True, help="folder to make")
    add("--base", metavar="BASE", help="the base, where it is not where the pack says")
    add("--threads", metavar="N", type=at_least(1), help="worker threads; default: all processors")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Unpacks and says so."""
    from rlmerge.downloads import find_folder
    from rlmerge.packs.restore import unpack

    asked = given.download, told(given.quiet)
    pack, base = find_folder(given.pack, *asked), find_folder(given.base, *asked) if given.base else None
    line = PackingLine(given.quiet)
    try:
        made = unpack(pack, given.out, base=base, threads=given.threads, progress=line)
    finally:
        line.close()
    if given.json:
        found = {"bytes": made.bytes, "files": made.files, "tensors": made.tensors, "seconds": made.seconds}
        json.dump({"out": str(given.out), **found}, sys.stdout)
        print()
    elif not given.quiet:
        counts = f"{made.tensors} tensors in {made.files} files"
        print(f"{given.out}: {counts}, {size(made.bytes)}, as they were; {duration(made.seconds)}")
