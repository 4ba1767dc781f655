"""What mergekit 0.1.5 makes of the recipes in tests/dialect: `python benchmarks/dialect.py` writes expected.json there.

Its models hold one number a tensor, so a merged number tells which layers and which parameters mergekit used. The tests
compare rlmerge with the file; only this script needs mergekit (benchmarks/mergekit_env.py installs it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mergekit_env import ensure, executable

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.dialect.models import read_depth, read_numbers, write_models  # noqa: E402

FOLDER = ROOT / "tests" / "dialect"


def main() -> None:
    """Runs mergekit on every recipe, one after the other."""
    ensure()
    command = executable()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        write_models(home)
        for recipe in sorted((FOLDER / "recipes").glob("*.yml")):
            out = home / "out" / recipe.stem
            done = subprocess.run(
                [command, recipe, out, "--no-copy-tokenizer", "--no-write-model-card"], cwd=home, text=True,
                capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode:
                found[recipe.stem] = {"error": done.stderr.strip().splitlines()[-1]}
            else:
                found[recipe.stem] = {"layers": read_depth(out), "tensors": read_numbers(out)}
            print(recipe.stem, found[recipe.stem].get("error", "merged"), flush=True)
    text = json.dumps(found, indent=1)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
