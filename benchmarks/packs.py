"""Delta packs against folders: sizes, times of packing and unpacking, and merges of three packs beside three folders.

    .venv/bin/python benchmarks/packs.py [--data benchmarks/data] [--size 0.5B] [--runs 3]

Every merge is a process of its own, as a user starts it; packs and folders take turns. `cold`: the pages of all inputs
are dropped before each run (posix_fadvise), so that the disk is read. The outputs must be the same bytes. Prints tables
and writes benchmarks/packs.json. zstd is called as a command, if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import models as make
import rlmerge
from rlmerge.checkpoint.folder import open_checkpoint

HERE = Path(__file__).resolve().parent
METHODS = {
    "sar": {"sensitivity": "delta2"},
    "ties": {"weight": 1, "density": 0.5},
    "linear": {"weight": 0.33},
}
SAMPLE = 2**24
"""Coordinates on which other codings are compared."""


def drop(folder: Path) -> None:
    """Asks the kernel to forget the pages of all files in a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def merge(base: Path, experts: list[Path], method: str, out: Path, cold: bool) -> dict[str, Any]:
    """One merge: seconds, processor seconds, bytes that it read, digest of the weights."""
    shutil.rmtree(out, ignore_errors=True)
    for folder in (base, *experts):
        if cold:
            drop(folder)
    command = [sys.executable, "-m", "rlmerge", "merge", str(out), "--base", str(base), "--method", method, "--json"]
    command += [part for expert in experts for part in ("--expert", str(expert))]
    command += [part for key, value in METHODS[method].items() for part in ("--set", f"{key}={value}")]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with (out / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"seconds": seconds, "processor": processor, "read": json.loads(done.stdout)["bytes_read"], "sha256": digest}


def compare(base: Path, folders: list[Path], packs: list[Path], work: Path, runs: int) -> dict[str, Any]:
    """Medians of merges of folders and packs, warm and cold."""
    found: dict[str, Any] = {}
    for method in METHODS:
        for cold in (False, True):
            made: dict[str, list[dict[str, Any]]] = {"folders": [], "packs": []}
            if not cold:  # the first reading fills the cache
                merge(base, folders, method, work / "out", False)
                merge(base, packs, method, work / "out", False)
            for _ in range(runs):
                for kind, experts in (("folders", folders), ("packs", packs)):
                    made[kind].append(merge(base, experts, method, work / "out", cold))
            digests = {one["sha256"] for many in made.values() for one in many}
            assert len(digests) == 1, f"{method}: packs and folders do not merge to the same bytes"
            row = {
                kind: {key: statistics.median(one[key] for one in many) for key in ("seconds", "processor", "read")}
                for kind, many in made.items()
            }
            found[f"{method}, {'cold' if cold else 'warm'}"] = row
            print(method, "cold" if cold else "warm", json.dumps(row), flush=True)
    return found


def words_of(folder: Path, count: int) -> NDArray[np.uint16]:
    """The first stored bf16 words of the largest tensor."""
    info = max(open_checkpoint(folder).tensors.values(), key=lambda info: info.nbytes)
    return np.fromfile(info.file, np.uint16, min(count, info.size), offset=info.start)


def rank(words: NDArray[np.uint16]) -> NDArray[np.int64]:
    wide = words.astype(np.int64)
    return np.where(wide & 0x8000, -1 - (wide & 0x7FFF), wide)


def entropy(values: NDArray[Any]) -> float:
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def binary(share: float) -> float:
    return 0.0 if share in (0.0, 1.0) else float(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


def codings(base: NDArray[np.uint16], expert: NDArray[np.uint16], work: Path) -> dict[str, float]:
    """Bits that a changed coordinate takes: ours, others, and what no code of independent coordinates can beat."""
    where = np.flatnonzero(base != expert)
    step = rank(expert[where]) - rank(base[where])
    number = 2 * (np.abs(step) - 1) + (step < 0)
    gap = np.diff(where, prepend=-1) - 1
    flat = np.concatenate([gap.clip(0, 255), number.clip(0, 255)]).astype(np.uint8).tobytes()
    digits = np.floor(np.log2(number + 2)).astype(int)
    golomb = float(min((2 * digits - 1).mean(), *(((number >> k) + 1 + k).mean() for k in range(12))))
    exponent = (base >> 7) & 0xFF
    groups = [(exponent == e, exponent[where] == e) for e in np.unique(exponent)]
    known = sum(int(all_.sum()) * binary(float(mine.sum() / all_.sum())) for all_, mine in groups) / where.size
    stepped = sum(int(mine.sum()) * entropy(number[mine]) for _, mine in groups if mine.any()) / where.size
    tensors = {"t": base}, {"t": expert}
    for name, one in zip(("b", "e"), tensors):
        (work / name).mkdir(exist_ok=True)
        write(work / name / "model.safetensors", one["t"])
    made = rlmerge.pack(work / "e", work / "b", work / "p", overwrite=True)
    return {
        "changed, share of all": where.size / base.size,
        "pack": made.bits_per_change or 0.0,
        "stored values (32-bit position, value)": 48.0,
        "bitmap of positions, steps in Golomb codes": base.size / where.size + golomb,
        "a byte a gap and a byte a step, zlib level 6": 8 * len(zlib.compress(flat, 6)) / where.size,
        "entropy of positions and steps": base.size * binary(where.size / base.size) / where.size + entropy(number),
        "the same, if the base's exponent is known": known + stepped,
    }


def write(file: Path, words: NDArray[np.uint16]) -> None:
    entry = {"dtype": "BF16", "shape": [words.size], "data_offsets": [0, words.nbytes]}
    text = json.dumps({"t": entry}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + words.tobytes())


def simulated(folder: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Real weights, and the same after updates of one size everywhere, rounded to bf16: what Adam leaves, nearly."""
    base = words_of(folder, SAMPLE)
    value = (base.astype(np.uint32) << 16).view(np.float32)
    moved = (value + np.random.default_rng(0).normal(0, 1e-4, value.size).astype(np.float32)).view(np.uint32)
    return base, ((moved + 0x7FFF + ((moved >> 16) & 1)) >> 16).astype(np.uint16)


def sizes(expert: Path, made: rlmerge.Packed, work: Path) -> dict[str, int]:
    """Bytes of the checkpoint, of zstd of it, of positions and values, of the pack."""
    file = expert / "model.safetensors"
    found = {"checkpoint": file.stat().st_size}
    for level in (3, 9) if shutil.which("zstd") else ():
        subprocess.run(["zstd", "-q", "-f", f"-{level}", "-T0", str(file), "-o", str(work / "z")], check=True)
        found[f"zstd -{level} of it"] = (work / "z").stat().st_size
    found["stored values (32-bit position, value)"] = 6 * made.changed
    found["pack"] = made.bytes
    return found


def main() -> None:
    """Makes the packs, measures, prints, writes packs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=make.DATA)
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=HERE.parent / ".venv" / "smollm2")
    given = parser.parse_args()
    home = given.data / given.size
    base, folders = home / "base", [home / f"expert{k}" for k in range(3)]
    with tempfile.TemporaryDirectory(dir=given.data) as name:
        work = Path(name)
        packs = [work / f"pack{k}" for k in range(3)]
        made = [rlmerge.pack(folder, base, pack) for folder, pack in zip(folders, packs)]
        back = rlmerge.unpack(packs[0], work / "back")
        shutil.rmtree(work / "back")
        found: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores",
            "bytes": sizes(folders[0], made[0], work),
            "pack_seconds": statistics.median(one.seconds for one in made),
            "unpack_seconds": back.seconds,
            "bits per changed coordinate, made-up experts": codings(
                words_of(base, SAMPLE), words_of(folders[0], SAMPLE), work
            ),
        }
        if given.weights.is_dir():
            found["bits per changed coordinate, real weights, updates simulated"] = codings(
                *simulated(given.weights), work
            )
        print(json.dumps(found, indent=1), flush=True)
        found["merges"] = compare(base, folders, packs, work, given.runs)
    (HERE / "packs.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["merges"].items():
        texts = [f"{row[k]['seconds']:6.2f} s {row[k]['read'] / 1e9:5.2f} GB" for k in ("folders", "packs")]
        print(f"{name:<14} folders {texts[0]}   packs {texts[1]}")


if __name__ == "__main__":
    main()
