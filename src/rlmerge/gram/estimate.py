"""Estimates the Gram matrices of a model's inputs on some data, into a folder; an interrupted run is continued.

G = Σ xᵀx / n over n positions of the sequences, x fp32[in] the input of a linear layer there (RegMean, arXiv
2212.09849, section 3.2). Layers are done in groups that fit in memory, each in a pass over all sequences.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open

from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.errors import GramError, NonFiniteError
from rlmerge.evaluate.run import load_model
from rlmerge.fisher.data import SequenceChoice, check_choice, load_data
from rlmerge.fisher.folder import Kind, RunFolder
from rlmerge.fisher.given import (
    TOKEN_RULE,
    Progress,
    as_source,
    base_of,
    count_accepted,
    draw,
    drawing,
    read_small_files,
)
from rlmerge.fisher.names import as_stored
from rlmerge.fisher.sequences import Batch, Unit, make_batch, make_batches, shortened
from rlmerge.fisher.sources import make_units
from rlmerge.small_files import json_lines
from rlmerge.version import VERSION

from .inputs import InputProducts, Weight
from .room import Room, plan_room
from .store import plan_shards, shard_names, write_arrays

KIND = Kind("gram", "Gram folder", GramError)
POSITIONS = ("all", "answer")
CHUNK = 16
"""Sequences that are added before the run may be interrupted without loss."""
TOKENS = 1024
"""Padded tokens of a batch, at most."""
PATIENCE = 60.0
"""Seconds after which the sums so far are put on disk, if that does not take a tenth of the time."""
LOOK = 64
"""Tokens of the sequence by which linear layers are found."""


@dataclass(frozen=True)
class GramSettings:
    """How Gram matrices are estimated.

    choice      which sequences, as for a Fisher, but for `policy`, whose weights mean nothing here
    positions   'all' tokens of prompt and completion, or those that predict the 'answer', a token of the completion
    tokens      padded tokens of a batch, at most
    memory      bytes that the run may take: layers are then done in groups, each in a pass of its own
    """

    choice: SequenceChoice = field(default_factory=SequenceChoice)
    positions: str = "all"
    tokens: int = TOKENS
    memory: int | None = None
    unsafe: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Grams:
    """Finished Gram matrices: their folder, gram.json, seconds of this call, and sequences that an earlier one had done
    (over all passes).
    """

    out: Path
    meta: dict[str, Any]
    seconds: float
    resumed: int


def estimate_gram(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    settings: GramSettings | None = None,
    *,
    base: Path | str | None = None,
    overwrite: bool = False,
    wait: bool = False,
    download: bool = False,
    progress: Callable[[Progress], None] = lambda step: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Grams:
    """Estimates the Gram matrices of `model` (a folder, a pack, or a recipe merged in memory) on `data` (.jsonl, task).

    base    the base of a LoRA folder or a pack, where it is not where they say
    wait    for another process that makes the same, instead of an error
    download   fetches a model of the hub
    tell    is told sizes and passes before the first
    Raises GramError or FisherError for what cannot be done, TaskError for the data, EvaluationError for the model.
    """
    settings = settings or GramSettings()
    started = time.monotonic()
    data, choice = str(data), settings.choice
    task = load_data(data, choice.wanted, 1, choice.seed)
    source = as_source(str(model), base, download)
    stored = open_checkpoint(source if isinstance(source, Path) else base_of(source))
    _check(settings)
    check_choice(choice, task.problems, data)
    folder = RunFolder(out, overwrite, KIND)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    progress(Progress("loading", 0, 1))
    loaded, tokenizer = load_model(source, settings.threads, base=base)
    said = drawing(loaded, tokenizer, read_small_files(stored, base), task, choice) | {
        "positions": settings.positions,
        "batch": [settings.tokens, settings.memory],
        "torch": torch.__version__.split("+")[0],
    }
    with folder.opened(said, wait) as unfinished:
        if wait and (Path(out) / "gram.json").exists():
            raise GramError(f"{out}: another process has just made it.")
        drawn = draw(loaded, tokenizer, task, choice, settings.unsafe, unfinished, progress)
        units = [unit for unit in make_units(drawn, choice) if unit is not None]
        _check_tokens(units, loaded, model)
        run = _Run(loaded, settings, unfinished, stored, units)
        tell(run.room.describe())
        resumed = run.measure(progress)
        meta = {
            "format": 1,
            "rlmerge": VERSION,
            "model": str(model),
            **{key: value for key, value in said.items() if key != "draw"},
            **said["draw"],
            "sequences": len(units),
            "counted": run.positions,
            "accepted": count_accepted(unfinished),
            "token_rule": TOKEN_RULE,
            "notes": run.products.notes,
        }
        run.write(meta)
    return Grams(Path(out), json.loads((Path(out) / "gram.json").read_text()), time.monotonic() - started, resumed)


class _Run:
    """The sums of one run, a group of layers at a time, on disk from time to time."""

    def __init__(self, model: Any, settings: GramSettings, folder: Path, stored: Checkpoint, units: list[Unit]) -> None:
        self.settings = settings
        self.folder = folder
        self.units = units
        model.eval()
        self.products = InputProducts(model, settings.positions == "answer")
        first = units[0]
        self.products.look(shortened(make_batch([first, first], False), LOOK))
        self.names = _names(model, self.products, stored)
        leaders = [weight for weight in self.products.leaders if weight in self.names]
        if not leaders:
            raise GramError(f"{stored.folder}: no linear layer of it could be found, so there is nothing to measure.")
        widths = {weight: self.products.linear[weight].width for weight in leaders}
        self.room: Room = plan_room(model, widths, settings.tokens, settings.memory)
        groups = [[(self.names[weight][0], 4 * widths[weight] ** 2) for weight in group] for group in self.room.groups]
        self.shards = plan_shards(groups)
        self.files = shard_names(sum(map(len, self.shards)))
        self.positions = 0

    def measure(self, progress: Callable[[Progress], None]) -> int:
        """All passes. Returns how many sequences an earlier run had added, over all passes."""
        total = len(self.units) * len(self.room.groups)
        group, done = self._read_note()
        resumed = before = group * len(self.units) + done
        tokens = 0
        progress(Progress("activations", before, total, 0, resumed))
        for number in range(group, len(self.room.groups)):
            self.products.want(self.room.groups[number])
            if done:
                self._read_sums()
            saved, cost = time.monotonic(), 0.0
            for start in range(done, len(self.units), CHUNK):
                chunk = self.units[start : start + CHUNK]
                for batch in self._batches(chunk):
                    self.products.add(batch)
                    tokens += int(batch.mask.sum())
                done = start + len(chunk)
                progress(Progress("activations", number * len(self.units) + done, total, tokens, resumed))
                if time.monotonic() - saved > max(PATIENCE, 10 * cost) and done < len(self.units):
                    began = time.monotonic()
                    self._write_sums(number, done)
                    saved, cost = time.monotonic(), time.monotonic() - began
            self._write_group(number)
            done = 0
        self.products.want([])
        return resumed

    def _batches(self, chunk: list[Unit]) -> list[Batch]:
        if not self.products.unpadded:
            return make_batches(chunk, self.settings.tokens, False)
        lengths = sorted({unit.length for unit in chunk})
        parts = ([unit for unit in chunk if unit.length == length] for length in lengths)
        return [batch for part in parts for batch in make_batches(part, self.settings.tokens, False)]

    # -- on disk --------------------------------------------------------------------------------------------------

    def _note(self, group: int, done: int) -> dict[str, Any]:
        return {
            "group": group,
            "done": done,
            "positions": self.products.positions,
            "rows": {self.names[weight][0]: rows for weight, rows in self.products.rows.items()},
        }

    def _write_sums(self, group: int, done: int) -> None:
        """Sums, and what is in them, in one file that appears whole."""
        text = json.dumps(self._note(group, done)).encode()
        note = np.frombuffer(text.ljust(-(-len(text) // 8) * 8), np.int64)
        arrays: dict[str, Any] = {"note": (note.shape, "int64", lambda: note)}
        for weight, value in self.products.total.items():
            arrays[self.names[weight][0]] = (tuple(value.shape), "float64", lambda value=value: value.numpy())
        part = self.folder / "sums.part"
        write_arrays(part, arrays)
        part.replace(self.folder / "sums.safetensors")

    def _read_note(self) -> tuple[int, int]:
        """The group at which an earlier run was, and how many sequences it had added."""
        finished = self._finished()
        if finished:
            self.positions = finished[0]["positions"]
        file = self.folder / "sums.safetensors"
        if not file.exists():
            return len(finished), 0
        with safe_open(file, "np") as opened:
            note = json.loads(opened.get_tensor("note").tobytes())
        return len(finished), note["done"] if note["group"] == len(finished) else 0

    def _read_sums(self) -> None:
        with safe_open(self.folder / "sums.safetensors", "pt") as opened:
            note = json.loads(opened.get_tensor("note").numpy().tobytes())
            self.products.positions = note["positions"]
            for weight, value in self.products.total.items():
                value.copy_(opened.get_tensor(self.names[weight][0]))
                self.products.rows[weight] = note["rows"][self.names[weight][0]]

    def _finished(self) -> list[dict[str, Any]]:
        """What went into each finished group."""
        file = self.folder / "groups.json"
        return json.loads(file.read_text()) if file.exists() else []

    def _write_group(self, group: int) -> None:
        """The means of a finished pass as fp32, in their shards; then its record."""
        self.positions = self.products.positions
        by_name = {self.names[weight][0]: value for weight, value in self.products.total.items()}
        bad = next((name for name, value in by_name.items() if not isfinite(float(value.sum()))), None)
        if bad is not None:
            raise NonFiniteError(
                f"the inputs of {bad!r} are infinite or no numbers: the model's weights are damaged, or a merge has "
                "broken it."
            )
        first = sum(map(len, self.shards[:group]))
        for place, names in enumerate(self.shards[group]):
            arrays = {}
            for name in names:
                value = by_name[name]
                arrays[name] = (tuple(value.shape), "float32", lambda value=value: self._mean(value))
            write_arrays(self.folder / self.files[first + place], arrays)
        part = self.folder / "groups.part"
        part.write_text(json.dumps([*self._finished(), self._note(group, len(self.units))]))
        part.replace(self.folder / "groups.json")
        (self.folder / "sums.safetensors").unlink(missing_ok=True)

    def _mean(self, total: torch.Tensor) -> np.ndarray:
        mean = (total / self.positions).numpy()
        # products of BLAS are symmetric but for rounding
        return ((mean + mean.T) / 2.0).astype(np.float32)

    def write(self, meta: dict[str, Any]) -> None:
        """gram.json, and the index of shards."""
        rows: dict[str, int] = {}
        for note in self._finished():
            rows |= note["rows"]
        records, placed, size = {}, {}, 0
        for file in self.files:
            with safe_open(self.folder / file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    value = opened.get_tensor(name)
                    digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(value).data)
                    trace = float(np.trace(value, dtype=np.float64))
                    records[name] = {"inputs": rows[name], "trace": trace, "xxh3_128": digest}
                    placed[name] = file
                    size += value.nbytes
        linear, aliases, first = self.products.linear, {}, []
        for weight, names in self.names.items():
            leader = self.names[linear[weight].same or weight][0]
            aliases |= {name: leader for name in names if name != leader}
            first += names if linear[weight].first else []
        tensors = dict(sorted(records.items()))
        meta |= {"passes": len(self.room.groups), "bytes": size}
        meta |= {"aliases": dict(sorted(aliases.items())), "input_first": sorted(first), "tensors": tensors}
        if len(self.files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": placed}
            (self.folder / "gram.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (self.folder / "gram.json").write_text(json_lines(meta, 2) + "\n")


def _names(model: Any, products: InputProducts, stored: Checkpoint) -> dict[Weight, list[str]]:
    """The tensors of the files that each weight is, by what transformers' own way back does with numbered matrices.

    A weight whose leader has no tensor leads to none either. What is rearranged beyond that gets a note.
    """
    marked: dict[str, torch.Tensor] = {}
    of_number: dict[float, Weight] = {}
    for name, value in model.named_parameters():
        stack = value.shape[0] if value.dim() == 3 else 1
        own = torch.arange(len(of_number), len(of_number) + stack, dtype=torch.float32)
        of_number |= {float(n): Weight(name, place if value.dim() == 3 else -1) for place, n in enumerate(own)}
        marked[name] = (own[:, None, None] if value.dim() == 3 else own.sum()).expand(value.shape)
    found: dict[Weight, list[str]] = {}
    for name, value in as_stored(model, marked, stored.tensors).items():
        weight = of_number.get(float(value[0, 0])) if value.dim() == 2 and value.numel() else None
        linear = None if weight is None else products.linear.get(weight)
        if weight is None or linear is None:
            continue
        if bool(value.amin() == value.amax()) and value.shape[0 if linear.first else 1] == linear.width:
            found.setdefault(weight, []).append(name)
    leaders = {weight for weight in found if products.linear[weight].same is None}
    kept = {w: names for w, names in found.items() if (products.linear[w].same or w) in leaders}
    lost = sorted({weight.parameter for weight in products.linear if weight not in kept})
    if lost:
        listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        products.notes.append(
            f"{listed}: rearranged in the files, so without a Gram matrix; merges take the mean there"
        )
    return kept


def _check(settings: GramSettings) -> None:
    if settings.choice.source == "policy":
        raise GramError(
            "--source policy weighs the gradients of a group's samples, and inputs have no such weights: use own, "
            "sampled or gold."
        )
    if settings.positions not in POSITIONS:
        raise GramError(f"--positions {settings.positions}: write one of: {', '.join(POSITIONS)}.")
    if settings.tokens < 1:
        raise GramError(f"--batch-tokens {settings.tokens}: at least one is needed.")


def _check_tokens(units: list[Unit], loaded: Any, model: Path | str) -> None:
    largest = max(max(sequence.ids) for unit in units for sequence in unit.sequences)
    if largest >= loaded.get_input_embeddings().weight.shape[0]:
        raise GramError(
            f"{model}: its tokenizer made token {largest}, and its embedding has only "
            f"{loaded.get_input_embeddings().weight.shape[0]} rows: they do not belong together."
        )
