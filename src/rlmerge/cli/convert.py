"""`rlmerge convert`: pickled weights to safetensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet
from .show import warn


def convert(
    source: Annotated[Path, typer.Argument(help="Folder with .bin, .pt or .pth files, or one such file.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert pickled weights to safetensors: weights only, in a process of its own. Needs torch."""
    from rlmerge.checkpoint.convert import convert as run

    written = run(source, out, note=(lambda text: None) if quiet else warn)
    if json_:
        json.dump({"out": str(out), "files": [path.name for path in written]}, sys.stdout)
        print()
    elif not quiet:
        print(f"{out}: {', '.join(path.name for path in written)}")
