"""`rlmerge verify`: is an output still what the merge wrote?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet
from .show import size


def verify(
    out: Annotated[Path, typer.Argument(help="Folder that rlmerge wrote.")],
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare every byte of an output with the digests in its rlmerge.json."""
    from rlmerge.api import verify as run

    found = run(out)
    if json_:
        json.dump({"out": str(out)} | found, sys.stdout)
        print()
    elif not quiet:
        print(
            f"{out}: all {found['tensors']} tensors and {found['files']} files are as written ({size(found['bytes'])})"
        )
