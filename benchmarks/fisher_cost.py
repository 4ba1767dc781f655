"""What a Fisher costs: the vectorised squares, the loop of single passes, and one plain batched pass, in turn.

    python benchmarks/fisher_cost.py MODEL                  64 sequences of 32 and of 256 tokens, fp32 and bf16
    python benchmarks/fisher_cost.py MODEL --lengths 32 --runs 3

Each contender runs in a process of its own (peak memory is its own), on the same random sequences, a quarter of each a
prompt; loading is outside the timed part. `floor` is what a training step computes: forward, loss, backward, in batches
of as many tokens, nothing squared. `loop` is a backward pass a sequence, with its squares added up: the straight way.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTENDERS = ("floor", "rlmerge", "loop")


def sequences(length: int, count: int, vocabulary: int) -> list[Any]:
    """Random sequences."""
    import torch

    from rlmerge.fisher.sequences import Sequence, Unit

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    return [Unit((Sequence(tuple(row), length // 4),)) for row in ids]


def floor(model: Any, units: list[Any], tokens: int, compute: str) -> None:
    """Forward, cross entropy, backward."""
    import torch

    from rlmerge.fisher.sequences import make_batches

    for batch in make_batches(units, tokens, mean=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            logits = model(input_ids=batch.ids, use_cache=False).logits
            targets = batch.ids[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        loss.backward()
        model.zero_grad()


def squares(model: Any, units: list[Any], tokens: int, compute: str, plain: bool) -> None:
    """Σ of squared gradients of sequences."""
    from rlmerge.fisher.gradients import SquaredGradients
    from rlmerge.fisher.sequences import make_batches

    found = SquaredGradients(model, compute=compute, plain=plain)
    for batch in make_batches(units, 1 if plain else tokens, mean=False):
        found.add(batch)
    found.close()


def tiles(threads: int) -> None:
    """Nanoseconds for an entry of a gradient and a sequence: the product, its square, the sum."""
    import torch

    from rlmerge.fisher.squares import add_outer_squares

    torch.set_num_threads(threads)
    for length, units in ((11, 16), (32, 16), (256, 4)):
        left, right, total = torch.randn(units, length, 1536), torch.randn(units, length, 576), torch.zeros(1536, 576)
        seen = []
        for _ in range(7):
            began = time.perf_counter()
            add_outer_squares(total, left, right, None)
            seen.append((time.perf_counter() - began) / units / total.numel() * 1e9)
        print(f"{length} tokens: {statistics.median(seen):.2f} ns")


def one(given: argparse.Namespace) -> None:
    """A contender, in this process; prints seconds and MB."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, local_files_only=True)
    units = sequences(given.lengths[0], given.count, model.config.vocab_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if given.one == "floor":
        floor(model, units, given.tokens, given.compute)
    else:
        squares(model, units, given.tokens, given.compute, given.one == "loop")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": peak * 1024 / 1e6, "loaded_mb": before * 1024 / 1e6}))


def main() -> None:
    """All contenders in turn, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--count", type=int, default=64, help="sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--computes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--results", type=Path, default=HERE / "fisher_cost.json")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--compute", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--tiles", action="store_true", help="time the products and squares of one layer only")
    given = parser.parse_args()
    if given.tiles:
        tiles(given.threads)
        return
    if given.one:
        one(given)
        return
    report: dict[str, Any] = {"count": given.count, "batch_tokens": given.tokens, "threads": given.threads, "rows": []}
    for length in given.lengths:
        for compute in given.computes:
            seen: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for _ in range(given.runs):
                for name in CONTENDERS:
                    command = [sys.executable, __file__, str(given.model), "--one", name, "--lengths", str(length)]
                    command += ["--compute", compute, "--count", str(given.count), "--tokens", str(given.tokens)]
                    done = subprocess.run(
                        [*command, "--threads", str(given.threads)], capture_output=True, text=True, check=True
                    )
                    seen[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(f"{length} tokens {compute} {name}: {seen[name][-1]['seconds']:.1f} s", flush=True)
            row: dict[str, Any] = {"length": length, "compute": compute}
            for name, runs in seen.items():
                row[name] = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
            row["over_floor"] = round(row["rlmerge"]["seconds"] / row["floor"]["seconds"], 3)
            row["over_loop"] = round(row["rlmerge"]["seconds"] / row["loop"]["seconds"], 3)
            report["rows"].append(row)
    given.results.write_text(json.dumps(report, indent=1) + "\n")
    heads = ("tokens", "compute", "floor s", "rlmerge s", "loop s", "/floor", "/loop")
    print("\n" + "".join(f"{head:>10}" for head in heads) + "   peak MB")
    for row in report["rows"]:
        peaks = " ".join(f"{row[name]['peak_mb']:.0f}" for name in CONTENDERS)
        values = (row["length"], row["compute"], *(row[name]["seconds"] for name in CONTENDERS))
        ratios = (row["over_floor"], row["over_loop"])
        print("".join(f"{value:>10}" for value in (*values, *ratios)) + f"   {peaks}")


if __name__ == "__main__":
    main()
