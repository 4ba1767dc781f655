"""How many conflicts two sets of Fishers settle differently, at all coordinates in conflict.

python benchmarks/fisher_winners.py BASE --models A B --fishers FA FB --others GA GB
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from rlmerge.checkpoint.folder import open_checkpoint, read_json_object
from rlmerge.fisher.combine import read_tensor
from rlmerge.fisher.stats import winners


def main() -> None:
    """Counts over all tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    for name in ("models", "fishers", "others"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True)
    given = parser.parse_args()
    opened = [open_checkpoint(folder) for folder in (given.base, *given.models)]
    means = []
    for folder in (*given.fishers, *given.others):
        entries = read_json_object(folder / "fisher.json")["tensors"].values()
        means.append(sum(entry["sum"] for entry in entries) / sum(entry["count"] for entry in entries))
    count = len(given.models)
    conflicts = draws = decided = same = 0
    for name in opened[0].tensors:
        values = []
        for one in opened:
            with safe_open(one.tensors[name].file, "pt") as file:
                values.append(file.get_tensor(name).double().flatten().numpy())
        delta = np.array(values[1:]) - values[0]
        moves = (delta != 0.0).sum(0)
        place = (moves > 1) & (np.abs(np.sign(delta).sum(0)) != moves)
        if not place.any():
            continue
        delta = delta[:, place]
        fishers = [
            read_tensor(folder, name).double().flatten().numpy()[place] / mean
            for folder, mean in zip((*given.fishers, *given.others), means)
        ]
        one = winners(np.array(fishers[:count]) * delta**2, delta)
        other = winners(np.array(fishers[count:]) * delta**2, delta)
        both = (one >= 0) & (other >= 0)
        conflicts += one.size
        draws += int((one < 0).sum())
        decided += int(both.sum())
        same += int((one[both] == other[both]).sum())
    found = {"conflicts": conflicts, "draws": draws, "decided_by_both": decided, "same_winner": same / max(decided, 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
