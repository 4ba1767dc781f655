"""Makes the benchmark's data: a base, its experts and their Fishers, at the true shape of a real model.

The shapes are those of Qwen2-0.5B (494M parameters, bf16, tied embeddings), of Qwen2-1.5B in shards, and smaller ones;
the numbers are made up, but what decides a merge's speed is as measured on real RLVR experts: 13 % of the stored values
changed, by one to three bf16 steps, with more coordinates in common than chance would give and 45 % of those in sign
conflict. NumPy only. Every chunk is a function of (seed, file, tensor, chunk), so the files are the same for any number
of threads; a finished file is never remade.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parent / "data"
EXPERTS = 3
SEED = 20260618
CHUNK = 1 << 22
"""Coordinates made at once."""

# Changed coordinates: one in five is `hot`, where an expert changes 35 % of the values, elsewhere 7.5 %: together 13 %,
# and two experts share 2.9 % of the coordinates where chance would give 1.7 %.
HOT, SUPPORT_HOT, SUPPORT_COLD = 0.2, 0.35, 0.075
STEPS = (0.7, 0.2, 0.1)
"""Shares of changes by one, two and three bf16 steps."""
COMMON_SIGN = 0.316
"""Share of changes that take a sign common to all experts: 45 % of the pairwise overlap is then in conflict."""


@dataclass(frozen=True)
class Size:
    """A model shape in the terms of config.json (model_type qwen2, tied embeddings)."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shards: int = 1

    def config(self) -> dict[str, Any]:
        """The model's config.json, with the keys that Qwen2-0.5B's has."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": self.vocab - 2,
            "eos_token_id": self.vocab - 1,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 131072,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, sorted by name, as safetensors writes them. No lm_head: it is tied."""
        kv = self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for projection, rows in (("q", self.hidden), ("k", kv), ("v", kv)):
                shapes[f"{prefix}.self_attn.{projection}_proj.weight"] = (rows, self.hidden)
                shapes[f"{prefix}.self_attn.{projection}_proj.bias"] = (rows,)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
        return dict(sorted(shapes.items()))

    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(int(np.prod(shape)) for shape in self.tensors().values())

    def files(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The weight files, each with its tensors: one, or shards of about equal size."""
        if self.shards == 1:
            return {"model.safetensors": self.tensors()}
        found = {f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors": {} for i in range(self.shards)}
        names, done, total = list(found), 0, self.parameters()
        for name, shape in self.tensors().items():
            found[names[min(self.shards - 1, done * self.shards // total)]][name] = shape
            done += int(np.prod(shape))
        return found


SIZES = {
    "0.5B": Size("0.5B", hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=151936),
    "1.5B": Size("1.5B", hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocab=151936, shards=4),
    "135M": Size("135M", hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocab=49152),
    "small": Size("small", hidden=384, layers=12, heads=6, kv_heads=2, intermediate=1536, vocab=16384),
    "tiny": Size("tiny", hidden=128, layers=2, heads=4, kv_heads=2, intermediate=512, vocab=2048),
    "square": Size("square", hidden=1536, layers=1, heads=12, kv_heads=12, intermediate=256, vocab=256),
    "oblong": Size("oblong", hidden=896, layers=1, heads=14, kv_heads=2, intermediate=4864, vocab=256),
}
"""135M has the shape of SmolLM2-135M; `square` has four square matrices and `oblong` three of a feed-forward layer, for
methods that decompose."""

Fill = Callable[[int, int, int, int], NDArray[Any]]
"""(tensor index, chunk index, flat start, coordinates) to the chunk's stored values."""


def _random(file: int, tensor: int, chunk: int) -> np.random.Generator:
    """The generator of one chunk of one file (file 0: what all experts have in common)."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((SEED, file, tensor, chunk))))


def _raw16(random: np.random.Generator, count: int) -> NDArray[np.uint16]:
    """`count` uniform 16-bit integers, four to each draw of the bit generator."""
    return random.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count]


def base_chunk(size: Size, tensor: int, chunk: int, count: int) -> NDArray[np.uint16]:
    """bf16 bits of N(0, 0.02); norm weights lie around 1."""
    name = list(size.tensors())[tensor]
    value = _random(1, tensor, chunk).standard_normal(count, dtype=np.float32)
    value *= 0.02
    if name.endswith("norm.weight"):
        value = value * 5 + 1
    bits = value.view(np.uint32)
    bits += 0x8000  # nearest; which way an exact half goes is of no interest here
    return (bits >> 16).astype(np.uint16)


def expert_chunk(base: NDArray[np.uint16], expert: int, tensor: int, chunk: int) -> NDArray[np.uint16]:
    """bf16 bits of one expert: the base with 13 % of its values moved by one to three steps."""
    common = _raw16(_random(0, tensor, chunk), base.size)
    random = _random(2 + expert if expert < EXPERTS else 100 + expert, tensor, chunk)
    hot = (common & 0x7FFF) < int(HOT * 0x8000)
    changed = np.flatnonzero(
        _raw16(random, base.size) < np.where(hot, np.uint16(SUPPORT_HOT * 65536), np.uint16(SUPPORT_COLD * 65536))
    )
    step = np.searchsorted((np.cumsum(STEPS) * 65536)[:-1], _raw16(random, changed.size), side="right") + 1
    draw = _raw16(random, changed.size)
    down = np.where((draw & 0x7FFF) < int(COMMON_SIGN * 0x8000), common[changed] >> 15, draw >> 15).astype(bool)

    # Bits of a float in sign-magnitude order are its rank among the values of its sign: a step is ± 1 of that rank.
    stored = base[changed].astype(np.int32)
    rank = np.where(stored & 0x8000, -(stored & 0x7FFF), stored)
    rank += np.where(down, -step, step).astype(np.int32)
    result = base.copy()
    result[changed] = np.where(rank < 0, 0x8000 - rank, rank).astype(np.uint16)
    return result


def fisher_chunk(expert: int, tensor: int, chunk: int, count: int) -> NDArray[np.float32]:
    """Log-normal numbers: positive, heavy-tailed (mean 7 × median), another scale in each tensor."""
    scale = _random(5 + expert, tensor, 1 << 20).uniform(-11, -7)
    value = _random(5 + expert, tensor, chunk).standard_normal(count, dtype=np.float32)
    value *= 2
    value += np.float32(scale * np.log(10))
    return np.exp(value, out=value)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Entries of a safetensors file's header (without its metadata) and the offset of the first data byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def header_bytes(tensors: dict[str, tuple[int, ...]], dtype: str) -> tuple[bytes, dict[str, int], int]:
    """A file's first bytes, each tensor's absolute offset, and the file's length."""
    width = {"BF16": 2, "F32": 4}[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + int(np.prod(shape)) * width
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, offsets, start + offset


def write_tensors(
    path: Path, tensors: dict[str, tuple[int, ...]], number: dict[str, int], dtype: str, fill: Fill, threads: int
) -> None:
    """Writes one safetensors file, chunks in threads, under a temporary name until it is whole.

    `number` is what `fill` knows each tensor by: its place among all tensors of the model.
    """
    head, offsets, length = header_bytes(tensors, dtype)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        os.truncate(file.fileno(), length)
        os.pwrite(file.fileno(), head, 0)

        def one(job: tuple[int, int, int, int, int]) -> None:
            tensor, chunk, start, count, offset = job
            values = fill(tensor, chunk, start, count)
            view, done = values.data.cast("B"), 0
            while done < len(view):
                done += os.pwrite(file.fileno(), view[done:], offset + start * values.itemsize + done)

        jobs = []
        for name, shape in tensors.items():
            total = int(np.prod(shape))
            for chunk, start in enumerate(range(0, total, CHUNK)):
                jobs.append((number[name], chunk, start, min(CHUNK, total - start), offsets[name]))
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, jobs):
                pass
    part.replace(path)


def write_sums(path: Path) -> None:
    """fisher.json beside a Fisher: sum and digest of each tensor, as the documentation of Fisher folders has them."""
    header, first = read_header(path)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        total, digest = 0.0, xxhash.xxh3_128()
        for offset in range(start, end, 4 * CHUNK):
            count = min(CHUNK, (end - offset) // 4)
            some = np.fromfile(path, np.float32, count, offset=first + offset)
            total += float(some.sum(dtype=np.float64))
            digest.update(some.data)
        found[name] = {"sum": total, "count": (end - start) // 4, "xxh3_128": digest.hexdigest()}
    (path.parent / "fisher.json").write_text(json.dumps({"format": 1, "tensors": found}, indent=1) + "\n")


def ensure(
    folder: Path, size: Size, experts: int = EXPERTS, fishers: int = EXPERTS, equal: int = 0, threads: int = 2
) -> Path:
    """Makes what is missing of base, expert0…, fisher0… and equal0… (copies of the base) in `folder`; returns it."""
    spec = {"config": size.config(), "made_with": [SEED, CHUNK, HOT, SUPPORT_HOT, SUPPORT_COLD, *STEPS, COMMON_SIGN]}
    if size.shards > 1:
        spec["shards"] = size.shards
    stamp = folder / "data.json"
    if not (stamp.exists() and json.loads(stamp.read_text()) == spec):
        for made in ("base", "expert*", "fisher*", "equal*"):
            for old in folder.glob(made):
                shutil.rmtree(old)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(spec, indent=1))

    write_model(folder / "base", size, lambda t, c, start, count: base_chunk(size, t, c, count), threads)
    stored = places(folder / "base", size)
    for i in range(experts):
        write_model(folder / f"expert{i}", size, expert_fill(stored, i), threads)
    for i in range(fishers):
        write_fisher(folder / f"fisher{i}", size, i, threads)
    for i in range(equal):
        if not (folder / f"equal{i}").exists():
            part = folder / f"equal{i}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(folder / "base", part)
            part.replace(folder / f"equal{i}")
    return folder


def places(model: Path, size: Size) -> list[tuple[Path, int]]:
    """File and offset of each tensor of a bf16 model, by its number."""
    found = {}
    for file, tensors in size.files().items():
        _, offsets, _ = header_bytes(tensors, "BF16")
        found |= {name: (model / file, offset) for name, offset in offsets.items()}
    return [found[name] for name in size.tensors()]


def expert_fill(base: list[tuple[Path, int]], expert: int) -> Fill:
    """Chunks of an expert, made from the base as it is stored."""

    def fill(tensor: int, chunk: int, start: int, count: int) -> NDArray[np.uint16]:
        path, offset = base[tensor]
        stored = np.fromfile(path, np.uint16, count, offset=offset + 2 * start)
        return expert_chunk(stored, expert, tensor, chunk)

    return fill


def write_model(folder: Path, size: Size, fill: Fill, threads: int) -> None:
    """A bf16 model: what is missing of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")
    number = {name: i for i, name in enumerate(size.tensors())}
    for file, tensors in size.files().items():
        if not (folder / file).exists():
            began = time.perf_counter()
            write_tensors(folder / file, tensors, number, "BF16", fill, threads)
            _tell(folder / file, began)
    if size.shards > 1:
        index = {name: file for file, tensors in size.files().items() for name in tensors}
        text = json.dumps({"metadata": {"total_size": 2 * size.parameters()}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def write_fisher(folder: Path, size: Size, expert: int, threads: int) -> None:
    """A Fisher folder: one fp32 file, with sums and digests beside it; nothing if it is there."""
    path = folder / "fisher.safetensors"
    if path.exists() and (folder / "fisher.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    number = {name: i for i, name in enumerate(size.tensors())}

    def fill(tensor: int, chunk: int, start: int, count: int) -> NDArray[np.float32]:
        return fisher_chunk(expert, tensor, chunk, count)

    write_tensors(path, size.tensors(), number, "F32", fill, threads)
    write_sums(path)
    _tell(path, began)


def _tell(path: Path, began: float) -> None:
    took = time.perf_counter() - began
    print(f"made {path} ({path.stat().st_size / 1e6:.0f} MB, {took:.1f} s)", file=sys.stderr, flush=True)


def weights(model: Path) -> list[Path]:
    """The weight files of a model or a Fisher, in order."""
    return sorted(model.glob("*.safetensors"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    ensure(args.data / args.size, SIZES[args.size])
