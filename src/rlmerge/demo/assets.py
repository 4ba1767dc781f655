"""Takes the demo's models from a run of the lab: `python -m rlmerge.demo.assets ROOT OUT`.

ROOT is what `rlmerge lab run tiny -o ROOT` made. Writes the base, the RLVR experts as delta packs, and made.json with
the command of each model and the accuracies of that run, to the new folder OUT, which then replaces `data`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.lab.cells import model_of
from rlmerge.lab.errors import LabError
from rlmerge.lab.presets import DOMAINS, TINY

DATA = Path(__file__).resolve().parent / "data"
EXPERTS = tuple(f"rlvr-{domain}-{seed}" for seed in TINY.seeds for domain in DOMAINS)


def models_digest() -> str:
    """Which models the package brings."""
    state = xxhash.xxh3_128()
    for file in sorted(DATA.rglob("*")):
        if file.is_file():
            state.update(file.read_bytes())
    return state.hexdigest()


def write_assets(root: Path, out: Path) -> None:
    """Writes the new folder `out`. Raises LabError for a root that is no finished run."""
    from rlmerge.packs.write import pack

    missing = [name for name in ("base", *EXPERTS) if not (model_of(root, name) / "config.json").exists()]
    if missing or not (root / "summary.json").exists():
        raise LabError(f"{root}: is no finished run of the lab (no {', '.join(missing) or 'summary.json'}).")
    if out.exists():
        raise LabError(f"{out}: exists. Name a new folder.")
    base = model_of(out, "base")
    shutil.copytree(model_of(root, "base"), base)
    for name in EXPERTS:
        model_of(out, name).parent.mkdir(parents=True)
        pack(model_of(root, name), base, model_of(out, name))
    (out / "made.json").write_text(json.dumps(made_of(root), indent=1) + "\n")


def made_of(root: Path) -> dict[str, Any]:
    """What made.json says: the command of each model, the digests of their weights, the accuracies of the run."""
    from rlmerge.lab.runs import weights_digest

    experts = json.loads((root / "summary.json").read_text())["experts"]
    names = ("base", *EXPERTS)
    return {
        "commands": {
            "all": "rlmerge lab run tiny -o lab-tiny && python -m rlmerge.demo.assets lab-tiny data",
            **_commands(),
        },
        "weights_xxh3_128": {name: weights_digest(model_of(root, name)) for name in names},
        "accuracies": {
            domain: {row["model"]: row["accuracy"] for row in rows if row["model"] in names}
            for domain, rows in experts.items()
        },
    }


def _commands() -> dict[str, str]:
    """The single commands that make the same models, in their order."""
    tasks = " ".join(f"--task {TINY.tasks[domain]}" for domain in DOMAINS)
    cold = f"--careless {TINY.careless} --slip {TINY.slip} --batch {TINY.batch} --threads 1"
    found = {
        "pretrain": f"rlmerge lab pretrain -o pretrain {tasks} --seed 0 --steps {TINY.pretraining_steps} --lr 3e-3 "
        f"--batch {TINY.batch} --threads 2",
        "base": f"rlmerge lab cold-start pretrain/bf16 -o base {tasks} --seed 0 --steps {TINY.cold_steps} "
        f"--lr {TINY.cold_lr} {cold}",
    }
    for name in EXPERTS:
        _, domain, seed = name.split("-")
        found[name] = (
            f"rlmerge lab rlvr base/bf16 -o {name} --task {TINY.tasks[domain]} --seed {seed} --steps {TINY.steps} "
            f"--prompts {TINY.prompts} --group {TINY.group} --lr {TINY.lr} --max-new-tokens {TINY.max_new_tokens} "
            f"--threads 1 && rlmerge pack {name}/bf16 --base base/bf16 -o {name}-pack"
        )
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_assets(Path(sys.argv[1]), Path(sys.argv[2]))
