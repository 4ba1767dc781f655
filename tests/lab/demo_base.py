"""The demo's base as the base of a run of the lab."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlmerge.demo.assets import DATA
from rlmerge.lab.cells import opened_root
from rlmerge.lab.presets import Preset


def put_base(root: Path, preset: Preset) -> None:
    """The demo's base instead of one that has learned nothing: half of its answers are right."""
    with opened_root(root, preset):
        shutil.copytree(DATA / "models" / "base", root / "models" / "base")
        (root / "cells").mkdir()
        for name in ("pretrain", "base"):
            (root / "cells" / f"{name}.json").write_text("{}")
