"""Compares what rlmerge and mergekit made of the same recipe, coordinate by coordinate.

In fp32 (`dtype: float32`) the tools must agree to the order of fp32 sums, with three kinds of exceptions, each counted:

- *Ties at a threshold.* Deltas between bf16 models tie in large classes. mergekit keeps whichever its unstable sort
  puts first, rlmerge decides by a hash of the coordinate. A coordinate that differs and does not tie is unexplained.
- *Random masks.* dare and della draw; only how much they keep, and how long the update is, can be compared.
- *Defects on small updates*, which `contenders.py` names per method: tests/golden shows that the tools agree there on
  larger updates.

Where the signs of updates cancel, rlmerge keeps the base and mergekit adds the positive ones: for the comparison the
recipes say `cancelled: positive`, which mergekit ignores.

In bf16 mergekit computes in bf16, and rlmerge rounds once: differences are only counted.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contenders import METHODS, Method
from models import read_header

TOLERANCE = 1e-6
"""Absolute, on fp32 values below 2: the tools sum in different orders and widths, then round to fp32 once."""
RANDOM_TOLERANCE = 0.02
"""Relative, on counts and norms of updates that were drawn."""
OUTLIERS = 0.01
"""mergekit's and rlmerge's default of `gamma`."""


class Tensors:
    """The tensors of a model folder, each decoded to fp32 when asked for."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, tuple[NDArray[np.uint8], dict[str, Any], int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            header, start = read_header(path)
            with path.open("rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            self.where.update({name: (data, entry, start) for name, entry in header.items()})

    def stored(self, name: str) -> tuple[NDArray[np.uint8], str]:
        """Bytes and dtype."""
        data, entry, start = self.where[name]
        begin, end = entry["data_offsets"]
        return data[start + begin : start + end], entry["dtype"]

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """fp32, flat. Raises ValueError for a dtype other than F32 and BF16."""
        stored, dtype = self.stored(name)
        if dtype == "F32":
            return stored.view(np.float32)
        if dtype == "BF16":
            return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        raise ValueError(f"{name} is {dtype}, expected F32 or BF16")

    def words(self, name: str) -> NDArray[np.uint16]:
        """bf16, flat; what is stored in fp32 is rounded to the nearest."""
        stored, dtype = self.stored(name)
        if dtype == "BF16":
            return stored.view(np.uint16)
        wide = self[name].view(np.uint32)
        return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def tied(size: NDArray[np.float32], ranks: list[int]) -> NDArray[np.bool_]:
    """Where |δ| equals a threshold: the values of the given ranks, counted from the largest, 1 the first.

    Only where more coordinates tie than fit above the cut.
    """
    found = np.zeros(size.size, bool)
    for rank in ranks:
        if 1 <= rank < size.size:
            threshold = np.partition(size, size.size - rank)[size.size - rank]
            if np.count_nonzero(size >= threshold) > rank:
                found |= size == threshold
    return found


def excuses(method: Method, base: NDArray[np.float32], experts: list[NDArray[np.float32]]) -> NDArray[np.bool_] | None:
    """Where a method that cuts by magnitude is free to differ, or None for one that does not cut."""
    kind = method.merge or method.name
    if kind == "sce":
        return tied_spread(base, experts, method.value("select_topk"))
    if kind not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return None
    keep = int(method.value("density") * base.size)
    if kind == "ties":
        ranks = [max(1, keep)]
    else:
        top = int(OUTLIERS * base.size)
        ranks = [top, top + keep]
    found = np.zeros(base.size, bool)
    for expert in experts:
        found |= tied(np.abs(expert - base), ranks)
    return found


def tied_spread(base: NDArray[np.float32], experts: list[NDArray[np.float32]], share: float) -> NDArray[np.bool_]:
    """Where the variance over the experts is that of the last one selected, but for rounding in fp32."""
    spread = np.var([expert.astype(np.float64) - base for expert in experts], axis=0)
    keep = int(np.count_nonzero(spread) * share)
    if not 0 < keep < spread.size:
        return np.zeros(spread.size, bool)
    threshold = np.partition(spread, spread.size - keep)[spread.size - keep]
    return np.abs(spread - threshold) <= 1e-5 * threshold


def _experts(method: Method, inputs: Path) -> list[Tensors]:
    return [Tensors(inputs / name) for name in method.inputs if name != "base"]


def same_tensors(ours: Path, theirs: Path) -> tuple[Tensors, Tensors]:
    """Both outputs. Raises ValueError if they have not the same tensors."""
    a, b = Tensors(ours), Tensors(theirs)
    if a.where.keys() != b.where.keys():
        raise ValueError(f"different tensors: {sorted(a.where.keys() ^ b.where.keys())[:5]} are in one output only")
    for name in a.where:
        if a[name].shape != b[name].shape:
            raise ValueError(f"{name}: {a[name].size} coordinates in one output, {b[name].size} in the other")
    return a, b


def compare(ours: Path, theirs: Path, inputs: Path, method: Method) -> dict[str, Any]:
    """Differences between two merged models in fp32. Raises ValueError if the two have not the same tensors."""
    a, b = same_tensors(ours, theirs)
    base, experts = Tensors(inputs / "base"), _experts(method, inputs)
    count = dict.fromkeys(("coordinates", "differ", "tie_at_threshold", "unexplained"), 0)
    largest = unexplained = 0.0
    for name in a.where:
        gap = np.abs(a[name].astype(np.float64) - b[name])
        differ = ~(gap <= TOLERANCE)  # also where one is NaN
        count["coordinates"] += gap.size
        count["differ"] += int(differ.sum())
        largest = max(largest, float(gap.max()))
        if differ.any():
            free = excuses(method, base[name], [expert[name] for expert in experts])
            if free is not None:
                count["tie_at_threshold"] += int((differ & free).sum())
                differ &= ~free
        count["unexplained"] += int(differ.sum())
        unexplained = max(unexplained, float(gap[differ].max(initial=0.0)))
    verdict = "agree" if not count["differ"] else "but for ties" if not count["unexplained"] else "differ"
    return {
        **count,
        "differ_share": count["differ"] / count["coordinates"],
        "max_difference": largest,
        "max_unexplained": unexplained,
        "tolerance": TOLERANCE,
        "verdict": "known" if verdict == "differ" and method.differs else verdict,
        "reason": method.differs if verdict == "differ" else "",
    }


def compare_drawn(ours: Path, theirs: Path, inputs: Path) -> dict[str, Any]:
    """Counts and norms of the updates in two merged models whose masks were drawn."""
    a, b = same_tensors(ours, theirs)
    base = Tensors(inputs / "base")
    totals = np.zeros((2, 3))
    for name in a.where:
        origin = base[name].astype(np.float64)
        for row, made in zip(totals, (a, b)):
            update = made[name] - origin
            row += np.count_nonzero(update), np.abs(update).sum(), np.square(update).sum()
    totals[:, 2] **= 0.5
    ratios = dict(zip(("changed", "l1", "l2"), (totals[0] / totals[1]).tolist()))
    near = all(abs(value - 1) <= RANDOM_TOLERANCE for value in ratios.values())
    return {**ratios, "tolerance": RANDOM_TOLERANCE, "verdict": "as likely" if near else "differ", "reason": ""}


def compare_bf16(ours: Path, theirs: Path) -> dict[str, Any]:
    """Share of the stored words that differ, the largest difference in steps of bf16, and mergekit's dtypes."""
    a, b = same_tensors(ours, theirs)
    coordinates = differ = largest = 0
    for name in a.where:
        ranks = []
        for made in (a, b):
            words = made.words(name).astype(np.int32)
            ranks.append(np.where(words & 0x8000, -(words & 0x7FFF), words))
        steps = np.abs(ranks[0] - ranks[1])
        coordinates += steps.size
        differ += int(np.count_nonzero(steps))
        largest = max(largest, int(steps.max(initial=0)))
    dtypes = sorted({entry["dtype"] for _, entry, _ in b.where.values()})
    return {"differ_share": differ / coordinates, "max_steps": largest, "mergekit_dtypes": dtypes}


def describe(name: str, result: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in result:
        return f"{name}: failed: {result['error']}"
    if "changed" in result:
        shown = ", ".join(f"{key} {result[key]:.4f}" for key in ("changed", "l1", "l2"))
        return f"{name}: {result['verdict']}; rlmerge over mergekit: {shown}"
    line = f"{name}: {result['verdict']}; largest difference {result['max_difference']:.2e}"
    if result["differ"]:
        line += (
            f"; {result['differ_share']:.3%} of {result['coordinates']} coordinates differ by more than "
            f"{result['tolerance']:g}: {result['tie_at_threshold']} tie at a threshold, {result['unexplained']} do "
            f"not (up to {result['max_unexplained']:.2e})"
        )
    return f"{line}{'; ' * bool(result['reason'])}{result['reason']}"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--inputs", type=Path, required=True, help="folder with base and expert0..2")
    args = parser.parse_args()
    print(json.dumps(compare(args.ours, args.theirs, args.inputs, METHODS[args.method]), indent=2))
