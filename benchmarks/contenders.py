"""Who takes part in the benchmark, on which recipes, with which commands; one measured run of one of them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import measure
import mergekit_env
import models

HERE = Path(__file__).resolve().parent

MERGEKIT_FLAGS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
"""mergekit's fastest way on a CPU that keeps its one-file output. It uses all cores by itself. The models have no
tokenizer, and for its card mergekit asks the hub about each model named by a relative path. The other performance
flags are for GPUs or pickles, or (`--async-write`) wait until the one shard is full."""

RLMERGE_FLAGS = ("--overwrite", "--quiet")
TIES_DENSITY = 0.05


@dataclass(frozen=True)
class Method:
    """One merge method's recipe, in the dialect that both tools read, and what it makes a tool read."""

    name: str
    base: bool = True
    fisher: bool = False
    mergekit: bool = True
    density: float | None = None

    def recipe(self, dtype: str) -> str:
        """The recipe. Paths are relative to the data folder, the working directory of every run."""
        lines = [
            f"merge_method: {self.name}",
            f"dtype: {dtype}",
            *(["base_model: base"] if self.base else []),
            "models:",
        ]
        for i in range(models.EXPERTS):
            lines += [f"- model: expert{i}", *([f"  fisher: fisher{i}"] if self.fisher else [])]
        lines += ["parameters:", "  weight: 1.0"]
        if self.density is not None:
            lines.append(f"  density: {self.density}")
        return "\n".join(lines) + "\n"


METHODS = {
    method.name: method
    for method in (
        Method("linear", base=False),
        Method("task_arithmetic"),
        Method("ties", density=TIES_DENSITY),
        Method("sar", fisher=True, mergekit=False),
    )
}


@dataclass(frozen=True)
class Place:
    """Where one run of the benchmark reads and writes."""

    data: Path
    """The folder with base, expert0..2, fisher0..2; the working directory of the measured commands."""
    out: Path
    rlmerge: Path

    def write_recipe(self, method: Method, dtype: str) -> Path:
        """Puts the recipe into the data folder and returns its path."""
        path = self.data / f"{method.name}-{dtype}.yml"
        path.write_text(method.recipe(dtype))
        return path

    def commands(self, method: Method, recipe: Path, skip_mergekit: bool) -> dict[str, list[str]]:
        """The contenders of one method, in the order in which they take turns."""
        output = str(self.out / "merged")
        size = (self.data / "base" / "model.safetensors").stat().st_size
        read = [str(path) for path in models.input_files(self.data, method.base, method.fisher)]
        floor = [sys.executable, str(HERE / "floor.py"), "--write", output, "--size", str(size), "--read", *read]
        found = {"rlmerge": [str(self.rlmerge), "merge", str(recipe), output, *RLMERGE_FLAGS]}
        if method.mergekit and not skip_mergekit:
            found["mergekit"] = [str(mergekit_env.executable()), str(recipe), output, *MERGEKIT_FLAGS]
        return {**found, "plain": [*floor, "--threads", "1"], "floor": floor, "floor_fsync": [*floor, "--fsync"]}

    def clear(self) -> None:
        """Deletes the last run's output."""
        output = self.out / "merged"
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)

    def written(self) -> int:
        """Bytes of weights in the last run's output."""
        output = self.out / "merged"
        files = [output] if output.is_file() else list(output.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)

    def once(self, command: list[str], inputs: list[Path]) -> measure.Measurement:
        """One measured run. The output stays. Raises CommandError on failure or if weights are missing."""
        self.clear()
        measure.warm(inputs)
        os.sync()
        result = measure.run(command, self.data, self.out / "log.txt", {"HF_HUB_OFFLINE": "1"})
        expected = (self.data / "base" / "model.safetensors").stat().st_size
        if self.written() < 0.99 * expected:
            raise measure.CommandError(f"{self.written()} bytes of weights written, expected {expected}: {command}")
        return result
