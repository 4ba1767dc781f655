"""Who takes part in the benchmark, on which recipes, with which commands; one measured run of one of them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, replace
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
THREE = ("expert0", "expert1", "expert2")


@dataclass(frozen=True)
class Method:
    """A merge method's recipe, in the dialect that both tools read.

    name        the row in the tables
    merge       merge_method, where it is not `name`
    inputs      what `models:` lists
    weight      whether it takes weights (all are 1)
    shared      global parameters
    mergekit    whether mergekit 0.1.5 has it
    positive    whether both tools must be told alike what becomes of coordinates whose signs cancel (`--agree`)
    random      whether each tool draws its own masks
    differs     why the tools cannot agree on updates as small as those of RL, if they cannot
    """

    name: str
    merge: str = ""
    inputs: tuple[str, ...] = THREE
    base: bool = True
    weight: bool = True
    fisher: bool = False
    shared: tuple[tuple[str, float | str], ...] = ()
    mergekit: bool = True
    positive: bool = False
    random: bool = False
    differs: str = ""

    def recipe(self, dtype: str, agree: bool = False) -> str:
        """The recipe. Paths are relative to the data folder, the working directory of every run."""
        lines = [
            f"merge_method: {self.merge or self.name}",
            f"dtype: {dtype}",
            *(["base_model: base"] if self.base else []),
            "models:",
        ]
        for name in self.inputs:
            lines.append(f"- model: {name}")
            if self.fisher:
                lines.append(f"  fisher: {name.replace('expert', 'fisher')}")
        shared = [*([("weight", 1.0)] if self.weight else []), *self.shared]
        if agree and self.positive:
            shared.append(("cancelled", "positive"))
        if shared:
            lines += ["parameters:", *(f"  {key}: {value}" for key, value in shared)]
        return "\n".join(lines) + "\n"

    def reads(self) -> list[str]:
        """Folders, below the data folder, of all that a merge must read."""
        found = dict.fromkeys([*(["base"] if self.base else []), *self.inputs])
        fishers = [name.replace("expert", "fisher") for name in self.inputs if self.fisher]
        return [*found, *fishers]

    def value(self, key: str) -> float:
        """A global parameter."""
        return float(dict(self.shared)[key])

    def on(self, name: str, inputs: tuple[str, ...]) -> Method:
        """The same method under another name on other models."""
        return replace(self, name=name, merge=self.merge or self.name, inputs=inputs)


TIES, CRUMBS, HALF = (("density", 0.05),), (("density", 0.1),), (("density", 0.5),)
"""Shares of all coordinates, which is what `density` is for mergekit and, by default, for rlmerge: 13 % of the
coordinates changed, so ties keeps five of thirteen and breadcrumbs (less the 1 % largest) ten of twelve."""
SMALL_UPDATES = "mergekit's absolute bound of 1e-6 is above what RL changes: "

METHODS = {
    method.name: method
    for method in (
        Method("linear", base=False),
        Method("task_arithmetic"),
        Method("ties", shared=TIES, positive=True),
        Method("dare_linear", shared=HALF, random=True),
        Method("dare_ties", shared=HALF, random=True, positive=True),
        Method("della_linear", shared=HALF, random=True),
        Method("della", shared=HALF, random=True, positive=True),
        Method("breadcrumbs", shared=CRUMBS),
        Method("breadcrumbs_ties", shared=CRUMBS, positive=True),
        Method(
            "sce",
            weight=False,
            shared=(("select_topk", 0.1),),
            positive=True,
            differs=SMALL_UPDATES + "it takes equal coefficients",
        ),
        Method("ram", weight=False),
        Method("ramplus_tl", weight=False),
        Method(
            "model_stock", weight=False, differs=SMALL_UPDATES + "it takes deltas of small tensors for orthogonal ones"
        ),
        Method("slerp", inputs=("base", "expert0"), weight=False, shared=(("t", 0.5),)),
        Method("nuslerp", inputs=THREE[:2]),
        Method("multislerp"),
        Method(
            "karcher", base=False, weight=False, differs="mergekit takes angles from an fp32 arccos, which is 0 or 3e-4"
        ),
        Method("nearswap", inputs=THREE[:1], weight=False, shared=(("t", 0.0001),)),
        Method(
            "arcee_fusion",
            inputs=THREE[:1],
            weight=False,
            differs="mergekit's divergences of rows are below the noise of fp32, and its threshold is from a sample",
        ),
        Method("passthrough", inputs=THREE[:1], base=False, weight=False),
        Method("sar", fisher=True, weight=False, mergekit=False),
        Method("sar_delta2", merge="sar", weight=False, shared=(("sensitivity", "delta2"),), mergekit=False),
        Method("fisher", fisher=True, weight=False, mergekit=False),
        Method("ota", fisher=True, weight=False, mergekit=False),
        Method("ramplus", weight=False, mergekit=False),
        Method("dots", mergekit=False),
    )
}

SPECTRAL = {
    method.name: method
    for method in (
        *(
            Method(name, weight=False, mergekit=False)
            for name in ("tsv_m", "iso_c", "iso_cts", "iso_merger", "resmerge")
        ),
        Method("subspace_rewiring", inputs=THREE[:1], weight=False, mergekit=False),
    )
}
"""Methods on whole matrices."""


@dataclass(frozen=True)
class Place:
    """Where one run of the benchmark reads and writes."""

    data: Path
    """The folder with base, expert0…, fisher0…; the working directory of the measured commands."""
    out: Path
    rlmerge: Path

    def write_recipe(self, method: Method, dtype: str, agree: bool = False) -> Path:
        """Puts the recipe into the output folder and returns its path."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{method.name}-{dtype}.yml"
        path.write_text(method.recipe(dtype, agree))
        return path

    def inputs(self, method: Method) -> list[Path]:
        """The weight files that a merge must read."""
        return [file for name in method.reads() for file in models.weights(self.data / name)]

    def output_bytes(self) -> int:
        """Bytes of a merged model's weight files."""
        return sum(file.stat().st_size for file in models.weights(self.data / "base"))

    def commands(self, method: Method, recipe: Path, threads: int | None = None) -> dict[str, list[str]]:
        """The command of every contender.

        `first` is rlmerge without compiled kernels, `warm` makes them all and is not shown, `plain` is the floor with
        one thread, `hashed` the floor with hashes, and *_fsync wait for the disk.
        """
        output, flags = str(self.out / "merged"), [*RLMERGE_FLAGS, *(["--threads", str(threads)] if threads else [])]
        read = [str(path) for path in self.inputs(method)]
        ours = [str(self.rlmerge), "merge", str(recipe), output, *flags]
        size = str(self.output_bytes())
        floor = [sys.executable, str(HERE / "floor.py"), "--write", output, "--size", size, "--read", *read]
        return {
            "first": ours,
            "warm": [*ours, "--kernels", "numba"],
            "rlmerge": ours,
            "mergekit": [str(mergekit_env.executable()), str(recipe), output, *MERGEKIT_FLAGS],
            "plain": [*floor, "--threads", "1"],
            "floor": floor,
            "hashed": [*floor, "--hash"],
            "rlmerge_fsync": [*ours, "--fsync"],
            "floor_fsync": [*floor, "--fsync"],
        }

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

    def once(self, command: list[str], inputs: list[Path], kernels: Path, empty: bool = False) -> measure.Measurement:
        """One measured run of a contender, with the compiled kernels of a folder, or with none. The output stays.

        Raises CommandError on failure or if weights are missing.
        """
        self.clear()
        if empty:
            shutil.rmtree(kernels, ignore_errors=True)
        kernels.mkdir(parents=True, exist_ok=True)
        measure.warm(inputs)
        os.sync()
        environment = {"HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(kernels)}
        result = measure.run(command, self.data, self.out / "log.txt", environment)
        if self.written() < 0.99 * self.output_bytes():
            raise measure.CommandError(
                f"{self.written()} bytes of weights written, expected {self.output_bytes()}: {command}"
            )
        return result
