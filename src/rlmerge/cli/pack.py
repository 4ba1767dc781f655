"""`rlmerge pack`: what training changed in a base, as a delta pack."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from .options import Parser, at_least, declare_download, declare_output
from .show import PackingLine, duration, size, told, warn

USAGE = "[OPTIONS] EXPERT --base BASE -o PACK"
DESCRIPTION = """\
Store what training changed in BASE to make EXPERT, bit for bit: the places and
the steps between neighbouring floats. Recipes, eval and fisher take the pack
wherever they take the expert; `rlmerge unpack` makes the expert again."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("expert", metavar="EXPERT", help="model folder that was trained from the base")
    add("--base", metavar="BASE", required=True, help="model folder that it was trained from")
    add("-o", "--out", metavar="PACK", type=Path, required=True, help="folder for the pack")
    add("--overwrite", action="store_true", help="replace an earlier pack")
    add("--threads", metavar="N", type=at_least(1), help="worker threads; default: all processors")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Packs, and prints sizes, support and bits per changed coordinate."""
    from rlmerge.downloads import find_folder
    from rlmerge.packs.write import pack

    expert, base = (find_folder(name, given.download, told(given.quiet)) for name in (given.expert, given.base))
    line = PackingLine(given.quiet)
    try:
        made = pack(expert, base, given.out, overwrite=given.overwrite, threads=given.threads, progress=line)
    finally:
        line.close()
    if given.json:
        found = {name: getattr(made, name) for name in ("bytes", "expert_bytes", "coordinates", "changed")}
        found |= {"bits_per_change": made.bits_per_change, "whole": made.whole, "seconds": made.seconds}
        json.dump({"out": str(given.out), **found}, sys.stdout)
        print()
        return
    if given.quiet:
        return
    for name, reason in list(made.whole.items())[:5]:
        warn(f"{name} is stored whole: {reason}")
    if len(made.whole) > 5:
        warn(f"and {len(made.whole) - 5} more tensors")
    share = made.changed / made.coordinates if made.coordinates else 0.0
    bits = f", {made.bits_per_change:.1f} bits each" if made.bits_per_change else ""
    print(
        f"{given.out}: {size(made.bytes)}, {made.bytes / made.expert_bytes:.1%} of the expert's "
        f"{size(made.expert_bytes)}; support {share:.1%}{bits}; {duration(made.seconds)}"
    )
