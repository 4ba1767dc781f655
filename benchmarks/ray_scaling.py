"""How much faster two processes of a Ray cluster are than one, each with one thread: a spectral merge and a Fisher.

    python benchmarks/ray_scaling.py [--rounds 3] [--only merge]

The models are made here: eight layers of seven 1024 x 1024 matrices for the merge, an untrained Llama of 20M parameters
for the Fisher. One and two in turn; what is timed is the work, without the start of cluster and processes. Prints
seconds, medians, the ratio, the machine's load, and what two plain processes gain over one at that load.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import rlmerge
from rlmerge.api import Step
from rlmerge.execute.ray_cluster import connected


def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_models(home: Path, side: int) -> None:
    """base and two experts, fp32, seven matrices a layer."""
    rng = np.random.default_rng(0)
    base = {
        f"layers.{i}.{j}.weight": rng.standard_normal((side, side)).astype(np.float32)
        for i in range(8)
        for j in range(7)
    }
    write(home / "base", base)
    for key in ("a", "b"):
        write(home / key, {k: v + (rng.standard_normal(v.shape) * 0.01).astype(np.float32) for k, v in base.items()})


def time_merge(home: Path, method: str, workers: int) -> float:
    """Seconds a matrix, over the second half of them: the start of the processes is not what is divided."""
    marks: list[tuple[int, float]] = []

    def tell(step: Step) -> None:
        if 2 * step.units >= step.total_units and not step.message:
            marks.append((step.units, time.monotonic()))

    models = [{"model": "a"}, {"model": "b"}]
    text = json.dumps({"merge_method": method, "base_model": "base", "models": models})
    recipe = rlmerge.parse_recipe(text, folder=home)
    with connected(None, workers):
        rlmerge.merge_to_folder(recipe, home / "out", executor="ray", threads=workers, progress=tell)
    shutil.rmtree(home / "out")
    (first, began), (last, ended) = marks[0], marks[-1]
    return (ended - began) / (last - first)


def decompose(count: int, side: int) -> None:
    from threadpoolctl import threadpool_limits

    matrix = np.random.default_rng(0).standard_normal((side, side))
    with threadpool_limits(1):
        for _ in range(count):
            np.linalg.svd(matrix)


def time_plainly(side: int, workers: int, count: int = 20) -> float:
    """Seconds a decomposition by processes without Ray or rlmerge: what this machine has to divide just now."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=decompose, args=(count // workers, side)) for _ in range(workers)]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return (time.monotonic() - started) / count


def write_language_model(home: Path, count: int) -> None:
    """An untrained Llama with a byte tokenizer, and gold answers of about a hundred tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(home / "lm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / "lm")
    lines = [
        {"id": str(n), "prompt": f"{n} + {n} =", "completion": f" {2 * n}. " * 12} for n in range(100, 100 + count)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def time_fisher(home: Path, workers: int) -> float:
    """Seconds a sequence, over the second half of them: loading the model is not what is divided."""
    from rlmerge.fisher.data import SequenceChoice
    from rlmerge.fisher.estimate import FisherSettings, Progress, estimate_fisher

    marks: list[tuple[int, float]] = []

    def tell(step: Progress) -> None:
        if step.what == "gradients" and 2 * step.done >= step.total:
            marks.append((step.done, time.monotonic()))

    settings = FisherSettings(SequenceChoice("gold"), threads=1, executor="ray", workers=workers)
    with connected(None, workers):
        estimate_fisher(home / "lm", home / "data.jsonl", home / "fisher", settings, progress=tell)
    shutil.rmtree(home / "fisher")
    (first, began), (last, ended) = marks[0], marks[-1]
    return (ended - began) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--only", choices=("merge", "fisher"))
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="rlmerge-ray-"))
    try:
        write_models(home, given.side)
        write_language_model(home, given.sequences)
        for name, run in (
            ("plain processes, seconds a decomposition", lambda workers: time_plainly(given.side, workers)),
            ("iso_c, seconds a matrix", lambda workers: time_merge(home, "iso_c", workers)),
            ("fisher, seconds a sequence", lambda workers: time_fisher(home, workers)),
        ):
            if given.only is not None and name.startswith("iso_c" if given.only == "fisher" else "fisher"):
                continue
            found: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(given.rounds):
                for workers in found:
                    found[workers].append(run(workers))
            one, two = (statistics.median(found[workers]) for workers in (1, 2))
            load = "/".join(f"{value:.1f}" for value in os.getloadavg())
            print(f"{name}: 1: {one:.3f}  2: {two:.3f}  ratio {one / two:.2f}  all {found}  load {load}", flush=True)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
