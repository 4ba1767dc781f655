"""Takes the demo's models from a run of the lab: `python -m rlmerge.demo.assets ROOT [DATA]`.

ROOT is what `rlmerge lab run tiny -o ROOT` made. Writes the base, the RLVR experts as delta packs, and made.json with
the commands and the accuracies of that run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import model_of
from rlmerge.lab.presets import DOMAINS, TINY

DATA = Path(__file__).resolve().parent / "data"
EXPERTS = tuple(f"rlvr-{domain}-{seed}" for seed in TINY.seeds for domain in DOMAINS)


def write_assets(root: Path, data: Path) -> dict[str, Any]:
    """Writes the new folder `data`; returns what made.json says."""
    from rlmerge.packs.write import pack

    data.mkdir(parents=True)
    base = model_of(data, "base")
    shutil.copytree(model_of(root, "base"), base)
    for name in EXPERTS:
        model_of(data, name).parent.mkdir(parents=True)
        pack(model_of(root, name), base, model_of(data, name))
    summary = json.loads((root / "summary.json").read_text())
    made = {
        "preset": "tiny",
        "commands": {
            "all": "rlmerge lab run tiny -o ROOT; python -m rlmerge.demo.assets ROOT",
            "base": json.loads((root / "models" / "base" / "run.json").read_text()),
            **{name: json.loads((root / "models" / name / "run.json").read_text()) for name in EXPERTS},
        },
        "accuracies": {
            domain: {row["model"]: row["accuracy"] for row in rows if row["model"] in ("base", *EXPERTS)}
            for domain, rows in summary["experts"].items()
        },
    }
    (data / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


if __name__ == "__main__":
    write_assets(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else DATA)
