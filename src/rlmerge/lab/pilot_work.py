"""What the cells of the pilot do: train, measure, merge in memory, look again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, estimate_once, input_of, lab_work, model_of, start_cold
from rlmerge.lab.contenders import Contender, write_recipe
from rlmerge.lab.measure import Measuring, measured
from rlmerge.lab.pilot import (
    AGAIN,
    DTYPES,
    MASTERS,
    Expert,
    PilotPreset,
    base_of,
    dtype_of,
    experts_of,
    measured_on,
    merge_named,
    sets_of,
    tasks_from,
    tasks_of,
)
from rlmerge.lab.presets import Preset
from rlmerge.lab.texts import find_texts, read_texts


def pilot_work(root: Path, preset: Preset, cell: Cell) -> Iterator[tuple[str, Any]]:
    """Does a cell of the pilot; yields what it measured."""
    assert isinstance(preset, PilotPreset)
    if cell.kind in ("rlvr", "sft", "rft"):
        yield from _trained(root, preset, experts_of(preset)[cell.name])
    elif cell.kind == "fisher":
        expert = experts_of(preset)[cell.name.removeprefix("fisher-")]
        out = input_of(root, "fisher", expert.name)
        estimate_once(_folder(root, expert, dtype_of(expert)), expert.task, out, preset, attempts=64, compute="bf16")
    elif cell.kind == "texts":
        base = cell.needs[0]
        asked = {spec: _measuring(preset, 0).task(spec) for spec in tasks_from(preset, base)}
        out = root / cell.name
        yield from find_texts(out, model_of(root, base), asked, preset.texts, preset.attempts, preset.max_new_tokens)
    elif cell.kind == "measure":
        name = cell.name.removeprefix("measure-")
        texts = root / cell.needs[1]
        if _is_base(preset, name):
            model = model_of(root, name)
            yield "tasks", _measured(texts, model, preset, tasks_from(preset, name), preset.samples)
            return
        expert = experts_of(preset)[name]
        dtype = dtype_of(expert)
        yield "tasks", _measured(texts, _folder(root, expert, dtype), preset, measured_on(preset, name), preset.samples)
        other = next(one for one in DTYPES if one != dtype)
        found = _measured(texts, _folder(root, expert, other), preset, (expert.task,), 0)
        yield "other", {"dtype": other, "tasks": found}
    elif cell.kind == "cold":
        base = next(one for one in preset.bases if one.name == cell.name)
        start_cold(root, preset, base.name, base.tasks, base.seed, base.never_right)
    elif cell.kind == "again":
        yield "tasks", _measured_again(root, preset, cell.name.removeprefix("again-"))
    elif cell.kind == "geometry":
        yield from _geometry(root, preset, cell.name.removeprefix("geometry-"))
    elif cell.kind == "merge":
        yield from _merged(root, preset, cell)
    else:
        yield from lab_work(root, preset, cell)


def _trained(root: Path, preset: PilotPreset, expert: Expert) -> Iterator[tuple[str, Any]]:
    from rlmerge.lab.curves import means, read_log

    out = root / "models" / expert.name
    TRAINERS[expert.kind](root, preset, expert, out)
    log = read_log(out / "log.jsonl")
    yield "expert", asdict(expert)
    yield "curve", means(log, ("reward", "loss", "entropy", "kl", "length", "live_groups"))
    yield "step_seconds", sorted(line["seconds"] for line in log)[len(log) // 2]


def _rlvr(root: Path, preset: PilotPreset, expert: Expert, out: Path) -> None:
    from rlmerge.lab.rlvr import rlvr
    from rlmerge.lab.training import rlvr_settings

    settings = rlvr_settings(
        preset, expert.task, expert.seed, expert.lr, steps=expert.steps or preset.steps, temperature=expert.temperature,
        advantage=expert.advantage, curriculum=expert.curriculum, lora=expert.lora,
    )  # fmt: skip
    rlvr(model_of(root, expert.base), out, settings)


def _supervised(root: Path, preset: PilotPreset, expert: Expert, out: Path) -> None:
    from rlmerge.lab import supervised, training

    which, steps = (preset, expert.task, expert.seed, expert.lr), expert.steps or preset.steps
    if expert.kind == "sft":
        supervised.sft(model_of(root, expert.base), out, training.sft_settings(*which, steps=steps))
        return
    samples = str(root / "models" / expert.of / "samples.jsonl")
    supervised.rft(model_of(root, expert.base), out, training.rft_settings(*which, steps=steps, samples=samples))


TRAINERS: dict[str, Callable[[Path, PilotPreset, Expert, Path], None]] = {
    "rlvr": _rlvr,
    "sft": _supervised,
    "rft": _supervised,
}


def _is_base(preset: PilotPreset, name: str) -> bool:
    """Whether a model is a cold start, perhaps one that stands among the experts of a control."""
    experts = experts_of(preset)
    return name not in experts or experts[name].kind == "cold"


def _folder(root: Path, expert: Expert, dtype: str) -> Path:
    return model_of(root, expert.name).with_name(dtype)


def _measuring(preset: PilotPreset, samples: int) -> Measuring:
    return Measuring(
        "validation", preset.problems, samples=samples, max_new_tokens=preset.max_new_tokens, batch=preset.eval_batch
    )


def _measured(texts: Path, model: Path, preset: PilotPreset, tasks: tuple[str, ...], samples: int) -> dict[str, Any]:
    """Of a folder, or of a recipe's merge in memory."""
    return dict(measured(model, _measuring(preset, samples), tasks, read_texts(texts, tasks)))


def _onto(root: Path, preset: PilotPreset, whole: str) -> Path:
    """The base of a set's merges."""
    regime = next(one for one in preset.regimes if one.name == whole.split(".")[0])
    return model_of(root, regime.onto or base_of(preset, sets_of(preset)[whole]))


def _geometry(root: Path, preset: PilotPreset, whole: str) -> Iterator[tuple[str, Any]]:
    from rlmerge.geometry.inspect import inspect

    members = sets_of(preset)[whole]
    experts = [experts_of(preset)[name] for name in members]
    folders = [_folder(root, one, dtype_of(one)) for one in experts]
    found = inspect(_onto(root, preset, whole), folders, names=members, threads=1)
    assert "coordinates" in found
    yield "coordinates", found["coordinates"]["total"]
    yield "storage", found.get("storage", {})


def _measured_again(root: Path, preset: PilotPreset, name: str) -> dict[str, Any]:
    """Greedy answers and samples of other problems: none that was measured before."""
    how = replace(_measuring(preset, AGAIN), seed=1, without=preset.problems)
    if name.startswith("merge-"):
        whole, dtype, label = merge_named(name)
        tasks = tasks_of(preset, sets_of(preset)[whole])
        return dict(measured(root / "recipes" / f"{whole}-{dtype}-{label}.yml", how, tasks))
    if _is_base(preset, name):
        return dict(measured(model_of(root, name), how, tasks_from(preset, name)))
    expert = experts_of(preset)[name]
    return dict(measured(_folder(root, expert, dtype_of(expert)), how, (expert.task,)))


def _merged(root: Path, preset: PilotPreset, cell: Cell) -> Iterator[tuple[str, Any]]:
    whole, dtype, label = merge_named(cell.name)
    members = sets_of(preset)[whole]
    contender = next(one for one in preset.merges if one.label == label)
    stored = Contender(label, contender.method, contender.settings, contender.inputs)
    recipe = root / "recipes" / f"{whole}-{dtype}-{label}.yml"
    experts = [experts_of(preset)[name] for name in members]
    models = {one.name: _folder(root, one, "fp32" if dtype == MASTERS else dtype_of(one)) for one in experts}
    inputs = {"fisher": {name: input_of(root, "fisher", name) for name in members}}
    write_recipe(stored, _onto(root, preset, whole), models, inputs, recipe)
    with recipe.open("a") as file:
        file.write(f"dtype: {DTYPES.get(dtype, 'float32')}\n")
    yield "tasks", _measured(root / cell.needs[-1], recipe, preset, tasks_of(preset, members), 0)
