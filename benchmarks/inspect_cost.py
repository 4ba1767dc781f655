"""What `rlmerge inspect` costs beside the floor: reading base and three experts with two threads and nothing else.

    python benchmarks/inspect_cost.py [--data benchmarks/data/0.5B] [--runs 3]

Every contender is a process of its own, in turn, on files that are in the page cache. `coordinates` is the whole of the
coordinate-wise measures and their null model; `no null` leaves that out; `all` adds the survival of average, sum, TIES
and SAR. Seconds of processors (user + system) are what a busy machine changes least. Writes inspect_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import floor
import measure

HERE = Path(__file__).resolve().parent
CONTENDERS = {"coordinates": ["--no-storage"], "no null": ["--no-storage", "--no-null"], "all": []}


def read(files: list[Path], threads: int) -> None:
    """Reads all files, each thread its part of each."""
    opened = [(os.open(file, os.O_RDONLY), file.stat().st_size) for file in files]

    def work(index: int) -> None:
        buffer = memoryview(bytearray(floor.CHUNK))
        for file, size in opened:
            floor.read_range(file, buffer, *floor.pieces(size, threads, index), lambda _: None)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))  # raises what a thread raised


def main() -> None:
    """All contenders in turn, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "0.5B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "inspect_cost.json")
    parser.add_argument("--read", type=Path, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(given.read, given.threads)
        return
    models = [given.data / name for name in ("base", "expert0", "expert1", "expert2")]
    files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    python, threads = sys.executable, ["--threads", str(given.threads)]
    commands = {"floor": [python, __file__, *threads, "--read", *map(str, files)]}
    for name, flags in CONTENDERS.items():
        commands[name] = [python, "-m", "rlmerge", "inspect", *map(str, models), "-q", *threads, *flags]
    seen: dict[str, list[measure.Measurement]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        measure.warm(files)
        for turn in range(given.runs + 1):
            for name, command in commands.items():
                one = measure.run(command, HERE.parent, Path(folder) / "log")
                if turn:  # the first compiles
                    seen[name].append(one)
    rows = {}
    for name, runs in seen.items():
        wall = statistics.median(one.wall for one in runs)
        processor = statistics.median(one.user + one.system for one in runs)
        memory = max(one.anonymous for one in runs)
        rows[name] = {"wall": round(wall, 3), "processor": round(processor, 3), "anonymous_mb": round(memory, 1)}
    for row in rows.values():
        row["wall_over_floor"] = round(row["wall"] / rows["floor"]["wall"], 2)
        row["processor_over_floor"] = round(row["processor"] / rows["floor"]["processor"], 2)
    found = {
        "machine": measure.machine(given.data),
        "load": [round(one.load, 2) for one in seen["floor"]],
        "input_mb": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "threads": given.threads,
        "runs": given.runs,
        "rows": rows,
    }
    given.results.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:<12}" + "".join(f"{key} {value:<8}" for key, value in row.items()))


if __name__ == "__main__":
    main()
