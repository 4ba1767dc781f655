"""Compares what rlmerge and mergekit made of the same recipe, coordinate by coordinate, in fp32.

`linear` and `task_arithmetic` must agree to the order of fp32 sums. `ties` leaves two choices open, and the tools
choose differently: which of the updates that tie at the threshold are kept (mergekit: whichever its unstable sort puts
first; rlmerge: by a hash of the coordinate) and what a coordinate becomes whose kept updates sum to zero (mergekit:
the positive ones win; rlmerge: no update). Deltas between bf16 models tie in large classes, so such coordinates are
many; a coordinate that differs for neither reason is a defect of one of the two.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import EXPERTS, read_header

TOLERANCE = 1e-6
"""Absolute, on fp32 values below 2: the tools sum in different orders and widths, then round to fp32 once."""


class Tensors:
    """The tensors of a model folder, each decoded to fp32 when asked for."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, tuple[NDArray[np.uint8], dict[str, Any], int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            header, start = read_header(path)
            with path.open("rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            self.where.update({name: (data, entry, start) for name, entry in header.items()})

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """fp32, flat. Raises ValueError for a dtype other than F32 and BF16."""
        data, entry, start = self.where[name]
        begin, end = entry["data_offsets"]
        stored = data[start + begin : start + end]
        if entry["dtype"] == "F32":
            return stored.view(np.float32)
        if entry["dtype"] == "BF16":
            return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        raise ValueError(f"{name} is {entry['dtype']}, expected F32 or BF16")


def ties_excuses(
    base: NDArray[np.float32], experts: list[NDArray[np.float32]], density: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where `ties` is free to differ: (an update ties at its expert's threshold, the surely kept updates sum to 0)."""
    tied = np.zeros(base.size, bool)
    total = np.zeros(base.size)
    active = np.zeros(base.size, bool)
    for expert in experts:
        delta = expert - base
        size = np.abs(delta)
        kept = max(1, int(density * size.size))
        threshold = np.partition(size, size.size - kept)[size.size - kept]
        if np.count_nonzero(size >= threshold) > kept:
            tied |= size == threshold
        sure = size >= threshold
        total += np.where(sure, delta.astype(np.float64), 0)
        active |= sure
    return tied, active & (total == 0)


def compare(ours: Path, theirs: Path, inputs: Path, density: float | None) -> dict[str, Any]:
    """Differences between two merged models. `density` is given for `ties` only: then differences are explained.

    Raises ValueError if the two have not the same tensors.
    """
    a, b = Tensors(ours), Tensors(theirs)
    if a.where.keys() != b.where.keys():
        raise ValueError(f"different tensors: {sorted(a.where.keys() ^ b.where.keys())[:5]} are in one output only")
    base = Tensors(inputs / "base")
    experts = [Tensors(inputs / f"expert{i}") for i in range(EXPERTS)]
    count = dict.fromkeys(("coordinates", "differ", "tie_at_threshold", "zero_sum", "unexplained"), 0)
    largest = largest_unexplained = 0.0
    for name in a.where:
        left, right = a[name], b[name]
        if left.shape != right.shape:
            raise ValueError(f"{name}: {left.size} coordinates in one output, {right.size} in the other")
        gap = np.abs(left.astype(np.float64) - right)
        differ = ~(gap <= TOLERANCE)  # also where one is NaN
        count["coordinates"] += gap.size
        count["differ"] += int(differ.sum())
        largest = max(largest, float(gap.max()))
        if density is not None and differ.any():
            tied, zero = ties_excuses(base[name], [expert[name] for expert in experts], density)
            count["tie_at_threshold"] += int((differ & tied).sum())
            count["zero_sum"] += int((differ & zero & ~tied).sum())
            differ &= ~(tied | zero)
        count["unexplained"] += int(differ.sum())
        largest_unexplained = max(largest_unexplained, float(gap[differ].max(initial=0.0)))
    return {
        **count,
        "differ_share": count["differ"] / count["coordinates"],
        "max_difference": largest,
        "max_unexplained": largest_unexplained,
        "tolerance": TOLERANCE,
        "agrees": count["unexplained"] == 0,
    }


def describe(method: str, result: dict[str, Any]) -> str:
    """One line for the terminal."""
    verdict = "agree" if result["agrees"] else "DISAGREE"
    line = f"{method}: {verdict}; largest difference {result['max_difference']:.2e}"
    if result["differ"]:
        line += (
            f"; {result['differ_share']:.3%} of {result['coordinates']} coordinates differ by more than "
            f"{result['tolerance']:g}: {result['tie_at_threshold']} tie at a threshold, {result['zero_sum']} sum to "
            f"zero, {result['unexplained']} unexplained (up to {result['max_unexplained']:.2e})"
        )
    return line


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--inputs", type=Path, required=True, help="folder with base and expert0..2")
    parser.add_argument("--ties-density", type=float, default=None)
    args = parser.parse_args()
    print(json.dumps(compare(args.ours, args.theirs, args.inputs, args.ties_density), indent=2))
