"""Estimates the diagonal Fisher of a model on some data, into a folder; an interrupted run is continued.

F = mean over units of (∂ log p(y|x)/∂θ)² at θ, one sequence a unit (design, section 1; Kunstner et al. 2019, arXiv
1905.12558, on why the square of a batch's gradient is something else).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file

from rlmerge.checkpoint.folder import Checkpoint, is_weight_tensor, open_checkpoint
from rlmerge.errors import FisherError, NonFiniteError
from rlmerge.evaluate.run import load_model
from rlmerge.evaluate.tasks import Task
from rlmerge.settings import check_executor
from rlmerge.version import VERSION

from .data import SequenceChoice, check_choice, load_data
from .folder import RunFolder, sums_of_chunks
from .given import TOKEN_RULE, Progress, as_source, base_of, count_accepted, draw, drawing, read_small_files
from .gradients import SquaredGradients
from .names import as_stored, names_in_files
from .only import positions_asked, tensors_asked
from .room import fit
from .sequences import Batch, Unit, make_batches
from .sources import make_units
from .store import DTYPES, Course, save_tensors, write_fisher

CHUNK = 16
"""Units that are added before the run may be interrupted without loss; even and odd chunks make the two halves."""
TOKENS = 1024
"""Padded tokens of a batch, at most: more would be no faster, and logits of a large vocabulary take their room."""
PATIENCE = 60.0
"""Seconds after which the sums so far are put on disk, if that does not take a tenth of the time."""
WIDTH = {"fp32": 4, "bf16": 2}
"""Bytes of a stored value."""


@dataclass(frozen=True)
class FisherSettings:
    """How a Fisher is estimated.

    reduce     'sum' of the log-probabilities of a completion's tokens, or their 'mean'
    dtype      'fp32' or 'bf16', of the stored Fisher
    compute    'fp32', or 'bf16': products of matrices in bf16
    storage    'full', or 'factored': row and column sums of matrices
    tokens     padded tokens of a batch, at most
    memory     bytes that the run may take: lowers `tokens`, and computes activations twice where it must
    part       (i, n): the i-th of n shares of the units, for several machines
    threads    of torch, in every worker
    executor   'local', or 'ray': `workers` processes of the cluster at `address` (or of one of our own), or as many as
               fit, each with the model; chunks of sequences are added up apart
    """

    choice: SequenceChoice = field(default_factory=SequenceChoice)
    reduce: str = "sum"
    dtype: str = "fp32"
    compute: str = "fp32"
    storage: str = "full"
    tokens: int = TOKENS
    memory: int | None = None
    part: tuple[int, int] = (1, 1)
    unsafe: bool = False
    threads: int | None = None
    executor: str = "local"
    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A finished Fisher: its folder, fisher.json, seconds of this call and units that an earlier one had done."""

    out: Path
    meta: dict[str, Any]
    seconds: float
    resumed: int


def estimate_fisher(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    settings: FisherSettings | None = None,
    *,
    base: Path | str | None = None,
    only: Path | str | None = None,
    sparse: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    download: bool = False,
    progress: Callable[[Progress], None] = lambda step: None,
) -> Estimate:
    """Estimates the Fisher of `model` (a folder, a pack, or a recipe merged in memory) on `data` (.jsonl, or a task).

    base       the base of a LoRA folder or a pack, where it is not where they say
    only       a recipe: just the tensors whose Fishers it reads; with `sparse`, just the coordinates
    download   fetches a model of the hub
    wait       for another process that makes the same, instead of an error
    Raises FisherError for what cannot be done, TaskError for the data, EvaluationError for the model.
    """
    settings = settings or FisherSettings()
    started = time.monotonic()
    data = str(data)
    choice = settings.choice
    task = load_data(data, choice.wanted, choice.group if choice.source == "policy" else 1, choice.seed)
    source = as_source(str(model), base, download)
    stored = open_checkpoint(source if isinstance(source, Path) else base_of(source))
    _check(settings, sparse, task, data)
    asked = _Asked.by(only, sparse, stored)
    folder = RunFolder(out, overwrite)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    progress(Progress("loading", 0, 1))
    loaded, tokenizer = load_model(source, settings.threads, base=base)
    said = _identity(loaded, tokenizer, read_small_files(stored, base), task, settings, asked)
    with folder.opened(said, wait) as unfinished:
        if wait and (Path(out) / "fisher.json").exists():
            raise FisherError(f"{out}: another process has just made it.")
        drawn = draw(loaded, tokenizer, task, settings.choice, settings.unsafe, unfinished, progress)
        place, parts = settings.part
        mine = make_units(drawn, choice)[place - 1 :: parts]
        live = [unit for unit in mine if unit is not None]
        if not live:
            raise FisherError(
                f"part {place} of {parts} has no sequence with a gradient ({len(mine)} units): take more sequences, or "
                "fewer parts; with --source policy some groups must have right and wrong answers."
            )
        largest = max(max(sequence.ids) for unit in live for sequence in unit.sequences)
        if largest >= loaded.get_input_embeddings().weight.shape[0]:
            raise FisherError(
                f"{model}: its tokenizer made token {largest}, and its embedding has only "
                f"{loaded.get_input_embeddings().weight.shape[0]} rows: they do not belong together."
            )
        longest = max(unit.length * len(unit.sequences) for unit in live)
        tokens, checkpointing = fit(loaded, longest, settings.tokens, settings.memory)
        run = Run(loaded, replace(settings, tokens=tokens), unfinished, asked, stored, checkpointing)
        if settings.executor == "ray":
            from .on_ray import ModelSource, add_on_cluster

            origin = ModelSource(
                source, base, said["draw"]["weights"], xxhash.xxh3_64_hexdigest(json.dumps(said).encode())
            )
            resumed = run.measure(live, progress, partial(add_on_cluster, run, origin, progress))
        else:
            resumed = run.measure(live, progress, run.add_here)
        meta = {
            "format": 1,
            "rlmerge": VERSION,
            "model": str(model),
            **{key: value for key, value in said.items() if key != "draw"},
            **said["draw"],
            "units": len(mine),
            "part": list(settings.part),
            "sequences": sum(len(unit.sequences) for unit in live),
            "tokens": sum(sequence.scored for unit in live for sequence in unit.sequences),
            "accepted": count_accepted(unfinished),
            "log_probability": run.log_probability / len(live),
            "token_rule": TOKEN_RULE,
            "notes": run.notes,
        }
        run.write(meta, len(mine), stored)
    return Estimate(Path(out), json.loads((Path(out) / "fisher.json").read_text()), time.monotonic() - started, resumed)


class Run:
    """The sums of one run, on disk from time to time."""

    def __init__(
        self, model: Any, settings: FisherSettings, folder: Path, asked: _Asked, stored: Checkpoint,
        checkpointing: bool,
    ) -> None:  # fmt: skip
        self.model = model
        self.settings = settings
        self.folder = folder
        self.asked = asked
        wanted = None if asked.names is None else _loaded_names(model, asked.names, stored)
        self.squares = SquaredGradients(model, wanted, compute=settings.compute, checkpointing=checkpointing)
        self._stored = names_in_files(model, self.squares.total, stored.tensors)
        self.course = Course({self._stored[name]: value.numel() for name, value in self.squares.total.items()})
        self.checkpointing = checkpointing
        self.notes: list[str] = []
        self.log_probability = 0.0

    def add_here(self, units: list[Unit], first: int, size: int) -> Generator[tuple[int, int]]:
        """Adds chunks of `size` units from unit `first` on; yields each one's first unit and its tokens."""
        for start in range(first, len(units), size):
            tokens = 0
            for batch in batches_of(units[start : start + size], self.settings):
                self.squares.add(batch)
                tokens += int(batch.mask.sum())
            yield start, tokens

    def measure(
        self, units: list[Unit], progress: Callable[[Progress], None],
        add: Callable[[list[Unit], int, int], Generator[tuple[int, int]]],
    ) -> int:  # fmt: skip
        """Adds all units, chunk by chunk, by `add_here` or its like. Returns how many an earlier run had added."""
        size = min(CHUNK, max(1, -(-len(units) // 2)))
        self.squares.check(batches_of(units[:size], self.settings)[0])
        first = resumed = self._read_state()
        saved, cost, tokens = time.monotonic(), 0.0, 0
        progress(Progress("gradients", first, len(units), 0, resumed))
        chunks = add(units, first, size)
        try:
            for start, read in chunks:
                tokens += read
                done = min(start + size, len(units))
                if not math.isfinite(self.squares.log_probability):
                    raise NonFiniteError(
                        f"the log-probability of one of sequences {start + 1} to {done} is infinite or no number: the "
                        "model's weights are damaged, or a merge has broken it."
                    )
                sums = {self._stored[name]: value for name, value in self.squares.total.items()}
                self.course.add(sums, start // size, done)
                progress(Progress("gradients", done, len(units), tokens, resumed))
                if time.monotonic() - saved > max(PATIENCE, 10 * cost) and done < len(units):
                    began = time.monotonic()
                    self._write_state(done, done // size)
                    saved = time.monotonic()
                    cost = saved - began
        except BaseException:
            chunks.close()
            self.squares.close()
            raise
        self.notes = self.squares.notes
        self.log_probability = self.squares.log_probability
        self.squares.close()
        return resumed

    def write(self, meta: dict[str, Any], units: int, stored: Checkpoint) -> None:
        """Fisher, fisher.json and the course."""
        means = {name: value.div_(units) for name, value in self.squares.total.items()}
        values = as_stored(self.model, means, stored.tensors)
        if self.asked.names is not None:
            values = {name: value for name, value in values.items() if name in self.asked.names}
        meta["whole_bytes"] = sum(info.size for info in stored.tensors.values()) * WIDTH[self.settings.dtype]
        write_fisher(self.folder, values, meta, self.settings.dtype, self.settings.storage, self.asked.positions)
        save_tensors(self.course.to_tensors(), self.folder / "course.safetensors")

    def _write_state(self, done: int, chunks: int) -> None:
        """Sums and how many units they hold, in one file that appears whole; sums of these chunks alone go."""
        state = {f"sum/{name}": value for name, value in self.squares.total.items()}
        state |= {f"course/{name}": value for name, value in self.course.to_tensors().items()}
        state["log_probability"] = torch.tensor(self.squares.log_probability, dtype=torch.float64)
        state["done"] = torch.tensor(done)
        part = self.folder / "sums.part"
        save_tensors(state, part)
        part.replace(self.folder / "sums.safetensors")
        for file in sums_of_chunks(self.folder, chunks):
            file.unlink()

    def _read_state(self) -> int:
        file = self.folder / "sums.safetensors"
        if not file.exists():
            return 0
        state = load_file(file)
        for name, value in self.squares.total.items():
            value.copy_(state[f"sum/{name}"])
        self.course.take({k.removeprefix("course/"): v for k, v in state.items() if k.startswith("course/")})
        self.squares.log_probability = float(state["log_probability"])
        return int(state["done"])


@dataclass(frozen=True)
class _Asked:
    """What is to be estimated: names of tensors as the files have them, and coordinates; None for all."""

    names: set[str] | None = None
    positions: dict[str, np.ndarray] | None = None

    @staticmethod
    def by(recipe: Path | str | None, sparse: bool, stored: Checkpoint) -> _Asked:
        if recipe is None:
            if sparse:
                raise FisherError("--sparse keeps the coordinates that a recipe asks for: give one with --only.")
            return _Asked()
        parsed, plan, names = tensors_asked(recipe)
        missing = sorted(names - set(stored.tensors))
        if missing:
            raise FisherError(f"{recipe}: merges {missing[0]!r}, which {stored.folder} does not have.")
        if not sparse:
            return _Asked(names)
        # tensors that are not merged count in the scale of a Fisher: their sums are kept, without coordinates
        positions = positions_asked(parsed, plan)
        others = {name for name, info in stored.tensors.items() if is_weight_tensor(info)}
        return _Asked(names | others, {**{name: np.zeros(0, np.int64) for name in others}, **positions})

    @property
    def digest(self) -> str | None:
        """Of names and coordinates."""
        if self.names is None:
            return None
        state = xxhash.xxh3_128("\0".join(sorted(self.names)).encode())
        for name, places in sorted((self.positions or {}).items()):
            state.update(name.encode())
            state.update(places.data)
        return state.hexdigest()


def batches_of(units: list[Unit], settings: FisherSettings) -> list[Batch]:
    """The batches of a chunk."""
    return make_batches(units, settings.tokens, settings.reduce == "mean")


def _check(settings: FisherSettings, sparse: bool, task: Task, data: str) -> None:
    check_choice(settings.choice, task.problems, data)
    for name, value, known in (
        ("reduce", settings.reduce, ("sum", "mean")),
        ("dtype", settings.dtype, tuple(DTYPES)),
        ("compute", settings.compute, ("fp32", "bf16")),
        ("storage", settings.storage, ("full", "factored")),
    ):
        if value not in known:
            raise FisherError(f"{name} {value!r}: write one of: {', '.join(known)}.")
    if sparse and settings.storage != "full":
        raise FisherError("--sparse keeps single coordinates, and --storage factored sums of rows: choose one.")
    if settings.tokens < 1:
        raise FisherError(f"--batch-tokens {settings.tokens}: at least one is needed.")
    check_executor(settings.executor, settings.address)
    if settings.workers is not None and settings.executor != "ray":
        raise FisherError(f"--workers {settings.workers}: are processes of a cluster: add --executor ray.")
    place, parts = settings.part
    if not 1 <= place <= parts:
        raise FisherError(f"--part {place}/{parts}: write I/N with 1 ≤ I ≤ N.")


def _loaded_names(model: Any, names: set[str], stored: Checkpoint) -> set[str]:
    """The parameters of the loaded model that become these tensors of the files."""
    shapes = {name: torch.empty(value.shape, device="meta") for name, value in model.named_parameters()}
    found = set()
    for name, value in shapes.items():
        try:
            placed = as_stored(model, {name: value}, stored.tensors)
        except FisherError:
            placed = {}
        if not placed or names & set(placed):
            found.add(name)  # what cannot be told alone (fused experts) is had whole
    return found


def _identity(
    model: Any, tokenizer: Any, files: dict[str, bytes], task: Task, settings: FisherSettings, asked: _Asked
) -> dict[str, Any]:
    """Everything that decides the result; under 'draw' what decides the sequences, but for how many are taken."""
    return {
        **drawing(model, tokenizer, files, task, settings.choice),
        "reduce": settings.reduce,
        "compute": settings.compute,
        "storage": settings.storage,
        "stored_dtype": settings.dtype,
        "batch": [settings.tokens, settings.memory],
        "share": list(settings.part),
        "only": asked.digest,
        "torch": torch.__version__.split("+")[0],
        **({"sums": "by chunk"} if settings.executor == "ray" else {}),
    }
