"""Merges three made-up experts of a tiny Llama by several methods and prints what each method did to the updates.

    python examples/demo.py [FOLDER]        (default: demo-out in this repository; again: the same, in seconds)

Nothing here was trained. The base is the tiny Llama of tests/golden, cast to bf16. The experts take direction and rank
of their changes from the golden experts, cut to what reinforcement learning leaves in bf16 weights: few coordinates,
each moved by one to three steps between neighbouring bf16 numbers. The Fishers are random. So the table shows how the
methods work, not which of them makes the better model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import rlmerge
from rlmerge.figures import ORDER, as_text, statistics_rows

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
EXPERTS = ("expert0", "expert1", "expert2")
SUPPORT = 0.15
"""Share of the weights that each expert changes."""
SEED = 20260618

MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sar": ("sar", {}),
    "sar, δ² only": ("sar", {"sensitivity": "delta2"}),
    "ties": ("ties", {"weight": 1.0, "density": 0.8, "density_of": "support"}),
    "ram": ("ram", {}),
    "linear": ("linear", {"weight": 1.0}),
    "linear, fp32": ("linear", {"weight": 1.0, "out_dtype": "float32"}),
}
"""Column of the table: method and settings."""


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bf16 numbers, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def step_towards(base: NDArray[np.uint16], delta: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The base with the largest SUPPORT of the changes, as one to three bf16 steps in their direction."""
    size = np.abs(delta)
    changed = size > np.quantile(size, 1.0 - SUPPORT)
    if not changed.any():
        return base
    steps = 1 + np.searchsorted(np.quantile(size[changed], [0.7, 0.95]), size)
    away = (delta > 0) == (base < 0x8000)  # away from zero: the next number has the next larger bits
    moved = base.astype(np.int64) + np.where(away, steps, -steps)
    stays = ((base & 0x7FFF) <= 3) | ~changed  # no step crosses zero
    return np.where(stays, base, moved).astype(np.uint16)


def write_models(folder: Path) -> None:
    """Base, experts and Fishers as folders. The same bytes every time."""
    base = load_file(GOLDEN / "base" / "model.safetensors")
    stored = {name: to_bf16(tensor) for name, tensor in base.items()}
    write_model(folder / "base", stored)
    for k, expert in enumerate(EXPERTS):
        trained = load_file(GOLDEN / expert / "model.safetensors")
        write_model(folder / expert, {name: step_towards(stored[name], trained[name] - base[name]) for name in base})
        random = np.random.default_rng([SEED, k])
        fisher = {name: random.lognormal(-12.0, 2.0, base[name].shape).astype(np.float32) for name in sorted(base)}
        (folder / f"fisher{k}").mkdir(parents=True, exist_ok=True)
        save_file(fisher, folder / f"fisher{k}" / "fisher.safetensors")


def write_model(folder: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    """A Hugging Face folder with bf16 weights (written by hand: NumPy has no bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (GOLDEN / "base" / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for _, tensor in sorted(tensors.items()))
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def cells_of(total: dict[str, Any]) -> dict[tuple[str, str], str]:
    """One column: (quantity, expert) -> value, from the statistics that every merge returns."""
    cells = {}
    for row in statistics_rows(total):
        cells |= {(row.name, ""): row.whole} if row.whole else {}
        cells |= {(row.name, expert): value for expert, value in zip(EXPERTS, row.each)}
    return cells


def show(columns: dict[str, dict[tuple[str, str], str]]) -> None:
    """One table: a column a merge, a row a quantity; empty where the method has no such thing."""
    keys = {key for cells in columns.values() for key in cells}
    rows = []
    for name, expert in sorted(keys, key=lambda key: (ORDER.index(key[0]), key[1])):
        label = f"{name}, {expert}" if expert else name
        rows.append([label, *(cells.get((name, expert), "") for cells in columns.values())])
    print(as_text([["", *columns], *rows]))


def main() -> None:
    """Makes the models, merges them, prints the table."""
    started = time.monotonic()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo-out"
    write_models(folder / "models")
    columns: dict[str, dict[tuple[str, str], str]] = {}
    warnings: list[str] = []
    for title, (method, settings) in MERGES.items():
        reads_fisher = method == "sar" and "sensitivity" not in settings
        recipe = rlmerge.recipe_from_parts(
            "models/base",
            [f"models/{expert}" for expert in EXPERTS],
            method,
            settings,
            fishers=[f"models/fisher{k}" for k in range(len(EXPERTS))] if reads_fisher else (),
            folder=folder,
        )
        out = folder / title.replace("δ²", "delta2").replace(", ", "-").replace(" ", "-")
        outcome = rlmerge.merge_to_folder(recipe, out, overwrite=True, progress=tell)
        columns[title] = cells_of(outcome.report["total"])
        warnings += [text for text in (*outcome.notes, *outcome.alarms) if text not in warnings]
    show(columns)
    print()
    for text in warnings:
        print(f"warning: {text}")
    print(
        "\nSAR settles each sign conflict for one expert (by δ² alone, often a draw) and keeps whole bf16 steps, so\n"
        "its updates survive the cast; an average asks for fractions of a step, and bf16 rounds many of them away.\n"
        "Experts and Fishers are synthetic (see the top of examples/demo.py): this shows the mechanism, not quality."
    )
    print(f"\n{len(columns)} merged models in {folder.name}, {time.monotonic() - started:.1f} s.")


def tell(step: rlmerge.Step) -> None:
    """Prints that kernels are compiled; warnings stand below the table."""
    if step.message and not step.message.startswith("warning"):
        print(step.message, flush=True)


if __name__ == "__main__":
    main()
