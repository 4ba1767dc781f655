"""Seconds of one RLVR step: the lab's loop and TRL's GRPOTrainer, the same base, problems and batch, in turn.

    python benchmarks/rlvr_step.py BASE --task math:1 [--steps 6] [--prompts 8] [--rounds 2] [--json FILE]

One thread. The first two steps of every run do not count. Both measure KL and entropy at one completion a prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from rlmerge.lab.optimizer import Rate
from rlmerge.lab.rlvr import TRAINERS, Rlvr, rlvr


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--task", default="math:0")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {trainer: [] for trainer in TRAINERS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(given.rounds):
            for trainer in TRAINERS:
                out = Path(scratch) / f"{trainer}-{number}"
                settings = Rlvr(given.task, number, given.steps, given.prompts, 8, Rate(given.lr, 5),
                                given.max_new_tokens, trainer)  # fmt: skip
                rlvr(given.base, out, settings)
                lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                seconds[trainer] += [line["seconds"] for line in lines[2:]]
    found = {trainer: statistics.median(values) for trainer, values in seconds.items()}
    ratio = found["trl"] / found["fast"]
    print(
        f"{given.task}, {given.prompts} × 8 completions: {found['fast']:.2f} s a step, "
        f"TRL {found['trl']:.2f} s ({ratio:.2f} ×)"
    )
    if given.json:
        given.json.write_text(json.dumps({"task": given.task, "prompts": given.prompts, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
