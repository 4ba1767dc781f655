"""The cells of a run of the whole lab: what they need, what they do, and that each is done once.

A cell is a folder or a file below ROOT, made by one process on one thread (pre-training: two). What a cell measured is
in ROOT/cells/NAME.json, which appears when it is done. A killed run goes on where it was: a cell that was under way is
continued, not begun again, as training, Fishers and evaluations keep what they have.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlmerge.errors import OutputError
from rlmerge.execute.safe_files import take_lock, write_inside
from rlmerge.lab.contenders import INPUTS, contenders, write_recipe
from rlmerge.lab.errors import LabError
from rlmerge.lab.presets import DOMAINS, Preset
from rlmerge.version import VERSION


@dataclass(frozen=True)
class Cell:
    """One piece of work. kind: a key of `Preset.seconds`; needs: cells that come before it."""

    name: str
    kind: str
    needs: tuple[str, ...] = ()
    threads: int = 1


Work = Callable[[Path, Preset, Cell], Iterator[tuple[str, Any]]]
"""Does a cell; yields what it measured, by name."""


@dataclass(frozen=True)
class Group:
    """Experts that are merged. domains: what they are evaluated on."""

    name: str
    kind: str
    experts: tuple[str, ...]
    domains: tuple[str, ...]


def groups(preset: Preset) -> list[Group]:
    """Fusion of the domains for each seed, and of the seeds of each domain."""
    found = []
    for kind in preset.kinds:
        for seed in preset.seeds:
            experts = tuple(f"{kind}-{domain}-{seed}" for domain in DOMAINS)
            found.append(Group(f"{kind}-fusion-{seed}", kind, experts, DOMAINS))
        for domain in DOMAINS if len(preset.seeds) > 1 else ():
            experts = tuple(f"{kind}-{domain}-{seed}" for seed in preset.seeds)
            found.append(Group(f"{kind}-seeds-{domain}", kind, experts, (domain,)))
    return found


def cells(preset: Preset) -> list[Cell]:
    """All cells, each after those it needs."""
    found = [Cell("pretrain", "pretrain", threads=2), Cell("base", "base", ("pretrain",))]
    experts = [f"{kind}-{domain}-{seed}" for kind in preset.kinds for seed in preset.seeds for domain in DOMAINS]
    found += [Cell(name, name.split("-")[0], ("base",)) for name in experts]
    found += [Cell(f"{kind}-{name}", kind, (name,)) for kind in INPUTS for name in experts]
    found += [Cell(f"eval-{name}", "eval", (name,)) for name in ("base", *experts)]
    for group in groups(preset):
        for contender in contenders(len(group.experts), preset.methods):
            made = tuple(f"{kind}-{name}" for kind in contender.inputs for name in group.experts)
            found.append(Cell(f"merge-{group.name}-{contender.label}", "merge", made or group.experts))
    return found


def is_done(root: Path, cell: Cell) -> bool:
    """Whether the cell has nothing left to do."""
    return _note(root, cell.name).exists()


def read_cell(root: Path, name: str) -> dict[str, Any]:
    """What a cell that is done measured."""
    return json.loads(_note(root, name).read_text())


def run_cell(root: Path, preset: Preset, cell: Cell, threads: int, work: Work | None = None) -> dict[str, Any]:
    """Does one cell, in this process; returns and keeps what it measured.

    work    what cells are, where they are not those of the lab
    """
    import torch

    torch.set_num_threads(threads)
    started = time.monotonic()
    measured = dict((work or lab_work)(root, preset, cell))
    measured["seconds"] = round(time.monotonic() - started, 2)
    write_inside(root, f"cells/{cell.name}.json", json.dumps({"cell": cell.name, **measured}, indent=1).encode())
    return measured


@contextlib.contextmanager
def opened_root(root: Path, preset: Preset, models: str = "", also: Set[str] = frozenset()) -> Iterator[None]:
    """ROOT, made or checked to belong to this preset and version, and locked. LabError if it holds something else.

    models   what tells models that are not trained here from others
    also     names that a folder may hold before it is ROOT
    """
    note = root / "lab.json"
    said = {key: value for key, value in asdict(preset).items() if key != "seconds"}
    wanted = json.loads(json.dumps({**said, "rlmerge": VERSION, "models": models}))
    try:
        if root.exists() and {file.name for file in root.iterdir()} - {"lock", *also} and not note.exists():
            raise LabError(f"{root}: holds something that is no run of the lab. Name another folder.")
        root.mkdir(parents=True, exist_ok=True)
        lock = take_lock(root)
    except OSError as error:
        raise OutputError(f"{root}: cannot be a folder for the lab: {error.strerror}.") from None
    if lock is None:
        raise LabError(f"{root}: another process works there. Wait for it, or stop it.")
    try:
        if not note.exists():
            write_inside(root, note.name, json.dumps(wanted, indent=1).encode())
        found = _read_note(note)
        if found != wanted:
            differs = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise LabError(
                f"{root}: holds a run with another {', '.join(differs)}. Name another folder, or remove this one."
            )
        yield
    finally:
        os.close(lock)


def _read_note(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LabError(f"{note}: is no JSON object, so this is no run of the lab. Name another folder.")
    return found


def model_of(root: Path, name: str) -> Path:
    """The bf16 model of a cell."""
    return root / "models" / name / "bf16"


def _note(root: Path, name: str) -> Path:
    return root / "cells" / f"{name}.json"


def input_of(root: Path, kind: str, name: str) -> Path:
    """What is made for an expert beside its model: the folder of its Fisher, for instance."""
    return root / f"{kind}s" / name


def lab_work(root: Path, preset: Preset, cell: Cell) -> Iterator[tuple[str, Any]]:
    """Does a cell of the lab; yields what it measured."""
    if cell.kind == "eval":
        yield from _evaluated(root, preset, cell.name.removeprefix("eval-"), DOMAINS)
    elif cell.kind == "merge":
        yield from _merged(root, preset, cell)
    elif cell.kind in MAKERS:
        MAKERS[cell.kind](root, preset, cell.name.removeprefix(f"{cell.kind}-"))
    else:
        _trained(root, preset, cell)


def _trained(root: Path, preset: Preset, cell: Cell) -> None:
    from rlmerge.lab import supervised, training
    from rlmerge.lab.rlvr import rlvr

    out, base = root / "models" / cell.name, model_of(root, "base")
    tasks = tuple(preset.tasks[domain] for domain in DOMAINS)
    out.parent.mkdir(parents=True, exist_ok=True)
    if cell.kind == "pretrain":
        _first(out, preset, tasks)
        return
    if cell.kind == "base":
        start_cold(root, preset, cell.name, tasks, 0, preset.never_right)
        return
    kind, domain, seed = cell.name.split("-")
    which = preset, preset.tasks[domain], int(seed)
    if kind == "rlvr":
        rlvr(base, out, training.rlvr_settings(*which))
    elif kind == "sft":
        supervised.sft(base, out, training.sft_settings(*which))
    else:
        supervised.rft(base, out, training.rft_settings(*which))


def start_cold(root: Path, preset: Preset, name: str, tasks: tuple[str, ...], seed: int, never_right: bool) -> None:
    """Makes a cold start of the preset's sizes from the pre-trained model."""
    from rlmerge.lab import supervised
    from rlmerge.lab.optimizer import Rate

    settings = supervised.ColdStart(
        tasks, seed, preset.cold_steps, preset.batch, Rate(preset.cold_lr, 20, True), preset.careless, preset.slip,
        never_right,
    )  # fmt: skip
    supervised.cold_start(model_of(root, "pretrain"), root / "models" / name, settings)


def _first(out: Path, preset: Preset, tasks: tuple[str, ...]) -> None:
    """What the cold start begins with: a tiny model from nothing, or SmolLM2."""
    from rlmerge.lab import supervised
    from rlmerge.lab.base import write_base

    if preset.pretraining_steps:
        supervised.pretrain(out, supervised.Pretraining(tasks, steps=preset.pretraining_steps, batch=preset.batch))
    elif not (out / "bf16").exists():
        out.mkdir(exist_ok=True)
        shutil.rmtree(out / "bf16.unfinished", ignore_errors=True)
        write_base(out / "bf16")


def estimate_once(model: Path, task: str, out: Path, preset: Preset, attempts: int = 8, compute: str = "fp32") -> None:
    """The Fisher of a model from its own right answers on a task, unless it is there; attempts: at a problem."""
    from rlmerge.fisher.data import SequenceChoice
    from rlmerge.fisher.estimate import FisherSettings, estimate_fisher

    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    choice = SequenceChoice(sequences=preset.fisher, max_new_tokens=preset.max_new_tokens, attempts=attempts)
    estimate_fisher(model, task, out, FisherSettings(choice=choice, compute=compute))


def _fisher(root: Path, preset: Preset, name: str) -> None:
    task = preset.tasks[name.split("-")[1]]
    estimate_once(model_of(root, name), task, input_of(root, "fisher", name), preset)


def _gram(root: Path, preset: Preset, name: str) -> None:
    from rlmerge.fisher.data import SequenceChoice
    from rlmerge.gram.estimate import GramSettings, estimate_gram

    out = input_of(root, "gram", name)
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    choice = SequenceChoice(sequences=preset.fisher, max_new_tokens=preset.max_new_tokens)
    estimate_gram(model_of(root, name), preset.tasks[name.split("-")[1]], out, GramSettings(choice=choice))


MAKERS: dict[str, Callable[[Path, Preset, str], None]] = {"fisher": _fisher, "gram": _gram}
"""What makes each of INPUTS for an expert."""


def _merged(root: Path, preset: Preset, cell: Cell) -> Iterator[tuple[str, Any]]:
    """Merges by a recipe to a folder, which is small here, evaluates it, and keeps what the merge did."""
    from rlmerge.api import merge_to_folder

    group = next(one for one in groups(preset) if cell.name.startswith(f"merge-{one.name}-"))
    label = cell.name.removeprefix(f"merge-{group.name}-")
    contender = next(one for one in contenders(len(group.experts), preset.methods) if one.label == label)
    name = f"{group.name}-{label}"
    recipe = root / "recipes" / f"{name}.yml"
    experts = {expert: model_of(root, expert) for expert in group.experts}
    inputs = {kind: {expert: input_of(root, kind, expert) for expert in group.experts} for kind in INPUTS}
    write_recipe(contender, model_of(root, "base"), experts, inputs, recipe)
    out = model_of(root, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    outcome = merge_to_folder(recipe, out, overwrite=True, threads=1)
    yield "merge", outcome.report["total"]
    yield from _evaluated(root, preset, name, group.domains, label)


def _evaluated(
    root: Path, preset: Preset, name: str, domains: tuple[str, ...], label: str = ""
) -> Iterator[tuple[str, Any]]:
    """Greedy accuracy on the test split of each domain."""
    from rlmerge.evaluate.backend import Sampling
    from rlmerge.evaluate.results import scores
    from rlmerge.evaluate.run import TransformersBackend, evaluate, load_model
    from rlmerge.evaluate.tasks import load_task

    backend = TransformersBackend(*load_model(model_of(root, name)), batch=preset.eval_batch)
    about: dict[str, Any]
    if name == "base" or label:
        about = {"role": "merged" if label else "base", "name": label or name}
    else:  # two seeds of one kind and domain are one row of a comparison
        about = {"role": "expert", "name": name.rpartition("-")[0], "model_seed": int(name.rpartition("-")[2])}
    for domain in domains:
        task = load_task(preset.tasks[domain], "test", preset.problems)
        out = root / "results" / name / f"{domain}.jsonl"
        sampling = Sampling(max_new_tokens=preset.max_new_tokens)
        found = scores(evaluate(backend, task, out, label=name, sampling=sampling, **about))
        yield domain, sum(c / n for c, n in zip(found.c, found.n)) / len(found.ids)
