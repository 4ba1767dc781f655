"""What merges and Fishers of large models take on a cluster: the table of docs/cluster.md, made of plans and rates.

    python benchmarks/sizing.py            prints it
    python benchmarks/sizing.py --write    puts it into docs/cluster.md

Models are headers over files without content (no disk is taken), so plans, units and bytes are those of real ones.
Rates are those of `rlmerge check` and of benchmarks/fisher_cost.json, both measured.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import rlmerge
from rlmerge.plan import Plan
from rlmerge.planner import make_plan
from rlmerge.preflight import DECOMPOSED, RATE, estimate
from rlmerge.settings import whole_cost

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "cluster.md"
MARKS = "<!-- table of benchmarks/sizing.py -->", "<!-- end of the table -->"
SIZES = {
    "7B": (32, 4096, 11008, 4096, 32000),
    "70B": (80, 8192, 28672, 1024, 128256),
    "400B": (126, 16384, 53248, 1024, 128256),
}
"""Layers, hidden, intermediate, keys' and values' rows, vocabulary."""
METHODS = {
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.2},
    "sar": {"sensitivity": "delta2"},
    "iso_c": {},
}
WORKERS, DISK = 32, 2e9
SHARD = 5 * 10**9
SEQUENCES, LENGTH = 256, 512


def tensors(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    layers, hidden, inner, rows, vocabulary = SIZES[size]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (rows, hidden)),
            ("self_attn.v_proj", (rows, hidden)), ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)), ("mlp.down_proj", (hidden, inner)),
            ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)),
        ):  # fmt: skip
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write(folder: Path, size: str) -> None:
    """A bf16 model in shards, all holes."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors(size):
        if shards[-1] and filled + 2 * prod(shape) > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * prod(shape)
    placed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        offset, header = 0, {}
        for name, shape in shard.items():
            end = offset + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset, placed[name] = end, file
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def plan_of(home: Path, method: str) -> Plan:
    models = [{"model": name} for name in "abc"]
    data = {"merge_method": method, "base_model": "base", "models": models, "parameters": METHODS[method]}
    return make_plan(rlmerge.parse_recipe(json.dumps(data), folder=home))


def hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


def merge_rows() -> Iterator[str]:
    yield (
        f"| model | method | units | plan sent | read | written | memory a worker | one worker | {WORKERS} workers | "
        "largest unit | disk alone |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            for model in ("base", "a", "b", "c"):
                write(home / model, size)
            for method in METHODS:
                plan = plan_of(home, method)
                found = estimate(plan, 1)
                one = found["hours"] * 3600
                whole = max((DECOMPOSED * count * work for count, work, _ in whole_cost(plan)), default=0.0)
                unit = max(t.size if whole else t.units[0][1] for t in plan.tensors)
                slowest = whole + unit * 2 * (4 * found["passes"] + 1) / RATE
                moved = found["bytes_read"] + found["bytes_written"]
                yield (
                    f"| {size} | `{method}` | {len(plan.unit_list()):,} | {len(pickle.dumps(plan)) / 1e6:.1f} MB | "
                    f"{found['bytes_read'] / 1e9:,.0f} GB | {found['bytes_written'] / 1e9:,.0f} GB | "
                    f"{found['memory_bytes'] / 1e9:.1f} GB | {hours(one)} | {hours(max(one / WORKERS, slowest))} | "
                    f"{hours(slowest)} | {hours(moved / DISK)} |"
                )


def fisher_rows() -> Iterator[str]:
    cost = json.loads((HERE / "fisher_cost.json").read_text())
    row = next(r for r in cost["rows"] if r["length"] == 256 and r["compute"] == "fp32")
    known = 134.5e6  # of SmolLM2-135M, on which it was measured
    rate = 6 * known * cost["count"] * row["length"] / row["rlmerge"]["seconds"] / cost["threads"]
    yield "| model | memory a worker, at least | sums of a chunk, on disk | one thread | 16 workers of 32 threads |"
    yield "|---|---|---|---|---|"
    for size in SIZES:
        count = sum(prod(shape) for _, shape in tensors(size))
        one = 6 * count * SEQUENCES * LENGTH / rate
        yield (
            f"| {size} | {8 * count / 1e9:,.0f} GB | {4 * count / 1e9:,.0f} GB | {one / 3600:,.0f} h | "
            f"{hours(one / 16 / 32)} |"
        )
    yield ""
    yield f"({rate / 1e9:.0f} GFLOP a second and thread, as measured in fp32 on two threads.)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    text = "\n".join([
        f"Merges of three bf16 experts ({RATE / 1e6:.0f} MB a second and worker; {DISK / 1e9:.0f} GB/s of disk):",
        "", *merge_rows(), "",
        f"Fishers of {SEQUENCES} sequences of {LENGTH} tokens:", "", *fisher_rows(),
    ])  # fmt: skip
    print(text)
    if given.write:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
