"""What the cells of the study do: train, estimate, measure, tune, merge."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, estimate_once, input_of, lab_work, model_of, read_cell, start_cold
from rlmerge.lab.errors import LabError
from rlmerge.lab.grids import Setting
from rlmerge.lab.measure import Measuring, measured
from rlmerge.lab.presets import Preset
from rlmerge.lab.study import (
    MATCHED,
    OTHER_BASE,
    Set,
    StudyPreset,
    base_name,
    both_tasks,
    domain_of,
    expert,
    folder_of,
    pairs,
    sets,
    tuning_set,
)
from rlmerge.lab.study_merges import Merge, first_tries, later_tries, merges_of, write_merge
from rlmerge.lab.texts import find_texts, read_texts

FISHER, TEXTS = "fisher.safetensors", "texts"
ATTEMPTS = 64
"""Samples of a problem at most, until one is right: the base solves an eighth."""


def study_work(root: Path, preset: Preset, cell: Cell) -> Iterator[tuple[str, Any]]:
    """Does a cell of the study; yields what it measured."""
    assert isinstance(preset, StudyPreset)
    name = cell.name.removeprefix(f"{cell.kind}-")
    if cell.kind in TRAINERS:
        TRAINERS[cell.kind](root, preset, cell.name)
    elif cell.kind == "cold":
        start_cold(root, preset, cell.name, both_tasks(preset), 0, not preset.never_right)
    elif cell.kind == "fisher":
        _estimate(root, preset, name)
    elif cell.kind in ("permuted", "jitter"):
        _spoil(root, cell.kind, name)
    elif cell.kind == "texts":
        yield from _texts(root, preset)
    elif cell.kind == "match":
        yield from _match(root, preset, name)
    elif cell.kind in ("both", "own"):
        yield from _single(root, preset, cell.name.removeprefix("measure-"), cell.kind)
    elif cell.kind == "tune":
        yield from _tune(root, preset, name)
    elif cell.kind == "frozen":
        tuned = preset.frozen or {one: read_cell(root, f"tune-{one}")["chosen"] for one in preset.methods}
        yield "settings", {one: tuned[one] for one in preset.methods}
    elif cell.kind == "geometry":
        yield from _geometry(root, preset, next(one for one in sets(preset) if one.name == name))
    elif cell.kind in ("merge", "half"):
        yield from _merge(root, preset, cell.name.removeprefix("merge-"))
    elif cell.kind == "clean":
        _clean(root, preset, int(name))
    else:
        yield from lab_work(root, preset, cell)


# -- training ----------------------------------------------------------------------------------------------------------


def _rlvr(root: Path, preset: StudyPreset, name: str) -> None:
    """Of the arms 'rlvr' and 'other', which differ in what they begin with."""
    from rlmerge.lab.rlvr import rlvr
    from rlmerge.lab.training import rlvr_settings

    arm, domain, seed = name.split("-")
    steps, keep = preset.steps, (preset.steps,) if arm == "rlvr" else ()
    if arm == "rlvr" and int(seed) in preset.controlled and preset.controls:  # a 'twice' cell
        steps, keep = 2 * steps, tuple(sorted({*preset.averaged, preset.steps}))
    settings = rlvr_settings(preset, preset.tasks[domain], int(seed), steps=steps, keep=keep)
    rlvr(model_of(root, base_name(arm)), root / "models" / name, settings)


def _joint(root: Path, preset: StudyPreset, name: str) -> None:
    from rlmerge.lab.rlvr import rlvr
    from rlmerge.lab.training import rlvr_settings

    tasks, seed = both_tasks(preset), int(name.removeprefix("joint-"))
    settings = rlvr_settings(preset, tasks[0], seed, steps=2 * preset.steps, curriculum=tasks * preset.steps)
    rlvr(model_of(root, "base"), root / "models" / name, settings)


def _sft(root: Path, preset: StudyPreset, name: str) -> None:
    from rlmerge.lab import supervised
    from rlmerge.lab.training import sft_settings

    domain, seed = name.split("-")[1:]
    kept = preset.kept if set(preset.arms) & set(MATCHED) else ()
    settings = sft_settings(preset, preset.tasks[domain], int(seed), keep=kept)
    supervised.sft(model_of(root, "base"), root / "models" / name, settings)


def _rft(root: Path, preset: StudyPreset, name: str) -> None:
    """On what the RLVR run itself drew and a verifier found right, up to the expert's own last step."""
    from rlmerge.lab import supervised
    from rlmerge.lab.training import rft_settings

    domain, seed = name.split("-")[1:]
    samples = str(root / "models" / expert("rlvr", domain, int(seed)) / "samples.jsonl")
    settings = rft_settings(preset, preset.tasks[domain], int(seed), samples=samples, before=preset.steps)
    supervised.rft(model_of(root, "base"), root / "models" / name, settings)


TRAINERS: dict[str, Callable[[Path, StudyPreset, str], None]] = {
    "rlvr": _rlvr, "twice": _rlvr, "other": _rlvr, "joint": _joint, "sft": _sft, "rft": _rft,
}  # fmt: skip


def _average(root: Path, preset: StudyPreset, name: str) -> None:
    """The mean of one run's checkpoints, kept in fp32 as merges are; they go when it is there."""
    from rlmerge.api import merge_to_folder
    from rlmerge.recipe import parse_recipe

    made = root / "models" / name / "fp32"
    run_of = root / "models" / name.replace("average-", "rlvr-", 1)
    models = [{"model": str(run_of / "steps" / str(step) / "bf16")} for step in preset.averaged]
    text = json.dumps({"merge_method": "linear", "dtype": "float32", "models": models, "parameters": {"weight": 1.0}})
    made.parent.mkdir(parents=True, exist_ok=True)
    if not made.exists():
        merge_to_folder(parse_recipe(text, folder=root), made, threads=1)
    for step in preset.averaged:
        if step != preset.steps:
            shutil.rmtree(run_of / "steps" / str(step), ignore_errors=True)


def _clean(root: Path, preset: StudyPreset, first: int) -> None:
    """Removes what was needed for the merges of a pair of seeds alone: fp32 masters, and Fishers. The bf16 models stay,
    and seeds make the rest again.
    """
    seeds = next(pair for pair in pairs(preset.seeds) if pair[0] == first)
    for model in (root / "models").iterdir():
        if model.name.rsplit("-", 1)[-1] in map(str, seeds):
            for folder in (model, *(model / "steps").glob("*")):
                shutil.rmtree(folder / "fp32", ignore_errors=True)
            if int(model.name.rsplit("-", 1)[-1]) != preset.development:
                for kind in ("fisher", "permuted", "jitter"):
                    shutil.rmtree(input_of(root, kind, model.name), ignore_errors=True)


# -- Fishers -----------------------------------------------------------------------------------------------------------


def _estimate(root: Path, preset: StudyPreset, name: str) -> None:
    """Of an expert from its own right answers; `base-math`: of the base, from its own on that domain."""
    base = name.startswith("base-")
    domain = name.removeprefix("base-") if base else domain_of(name)
    model = model_of(root, "base") if base else folder_of(root, preset, name)
    out = input_of(root, "fisher", name)
    estimate_once(model, preset.tasks[domain], out, preset, attempts=ATTEMPTS, compute="bf16")


def _spoil(root: Path, kind: str, name: str) -> None:
    """Controls of an expert's Fisher: permuted within tensors, or 1 but for what breaks ties."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    found = {}
    for number, (tensor, values) in enumerate(sorted(load_file(input_of(root, "fisher", name) / FISHER).items())):
        random = np.random.default_rng([int(hashlib.sha256(name.encode()).hexdigest()[:8], 16), number])
        if kind == "permuted":
            found[tensor] = random.permutation(values.ravel()).reshape(values.shape)
        else:
            found[tensor] = (1.0 + 1e-4 * random.random(values.shape)).astype(np.float32)
    out = input_of(root, kind, name)
    out.mkdir(parents=True, exist_ok=True)
    save_file(found, out / FISHER, {"format": "pt"})


# -- measuring ---------------------------------------------------------------------------------------------------------


def measuring(preset: StudyPreset, sampled: bool = True) -> Measuring:
    """How models are measured where it counts."""
    seed = sealed_seed(preset.seal, preset.name) if preset.seal else 0
    return Measuring(
        preset.split, preset.problems, seed, preset.half, preset.samples if sampled else 0, preset.sampled,
        preset.max_new_tokens, preset.eval_batch, deep=preset.deep,
    )  # fmt: skip


def _validation(preset: StudyPreset, problems: int) -> Measuring:
    """Where choices are made: greedy answers to validation problems."""
    return Measuring("validation", problems, 0, "", 0, 0, preset.max_new_tokens, preset.eval_batch)


def _texts(root: Path, preset: StudyPreset) -> Iterator[tuple[str, Any]]:
    """Of the base alone: solutions are what one of the arms is trained on."""
    tasks = {spec: measuring(preset).task(spec) for spec in both_tasks(preset)}
    sizes = (preset.texts, preset.attempts, preset.max_new_tokens)
    yield from find_texts(root / TEXTS, model_of(root, "base"), tasks, *sizes, solutions=False)


def _single(root: Path, preset: StudyPreset, name: str, kind: str) -> Iterator[tuple[str, Any]]:
    """A model that is no merge of experts: on both tasks ('both'), or on its 'own'."""
    dtype, tasks = "bf16", both_tasks(preset)
    if name.startswith("average-"):
        _average(root, preset, name)
        dtype = "fp32"
    if name.rsplit("-", 2)[0] == "sft" and set(preset.arms) & set(MATCHED):
        _keep_matched(root, preset, name)
    bases = ("base", OTHER_BASE)
    folder = model_of(root, name) if name in bases else folder_of(root, preset, name, dtype)
    if kind == "own":
        tasks = (preset.tasks[domain_of(name)],)
    yield from _made_from(root)
    yield "tasks", measured(folder, measuring(preset), tasks, read_texts(root / TEXTS, tasks))
    if name.rsplit("-", 2)[0] in ("rlvr", "rft", "sft"):
        own, master = (preset.tasks[domain_of(name)],), folder_of(root, preset, name, "fp32")
        yield "master", measured(master, measuring(preset, False), own)


def _made_from(root: Path) -> Iterator[tuple[str, Any]]:
    """Which base, and which products: seeds make the rest again, but not on another machine."""
    from rlmerge.lab.policy import fast_bf16
    from rlmerge.lab.runs import weights_digest

    yield "base", weights_digest(model_of(root, "base"))
    yield "arithmetic", "bf16" if fast_bf16() else "fp32"


def sealed_seed(seal: str, part: str) -> int:
    """The seed that a text stands for in one part of the study: nobody can choose the text for its problems, as a hash
    is between, and the parts draw theirs apart.
    """
    return int(hashlib.sha256(f"rlmerge/study/{part}/{seal}".encode()).hexdigest()[:12], 16)


def _match(root: Path, preset: StudyPreset, name: str) -> Iterator[tuple[str, Any]]:
    """The SFT checkpoint nearest to the RLVR expert by accuracy on validation problems of its domain, and by norm."""
    import numpy as np

    domain, seed = name.rsplit("-", 1)
    sft, rlvr = (expert(arm, domain, int(seed)) for arm in ("sft", "rlvr"))
    task = (preset.tasks[domain],)
    base = model_of(root, "base")

    def looked_at(folder: Path) -> dict[str, float]:
        letters = measured(folder, _validation(preset, preset.matching), task)[task[0]]["greedy"]
        return {"greedy": letters.count("1") / len(letters), "norm": _distance(base, folder)}

    aim = looked_at(folder_of(root, preset, rlvr))
    seen = {step: looked_at(root / "models" / sft / "steps" / str(step) / "bf16") for step in preset.kept}
    steps = np.array(preset.kept)
    for what, key in (("accuracy", "greedy"), ("norm", "norm")):
        off = np.array([abs(seen[step][key] - aim[key]) for step in preset.kept])
        yield what, int(steps[off.argmin()])
    yield "aim", aim
    yield "seen", seen


def _keep_matched(root: Path, preset: StudyPreset, name: str) -> None:
    """Removes the checkpoints that no arm needs: 0.8 GB each."""
    domain, seed = name.removeprefix("sft-").rsplit("-", 1)
    found = read_cell(root, f"match-{domain}-{seed}")
    needed = {found[MATCHED[arm]] for arm in preset.arms if arm in MATCHED}
    for step in set(preset.kept) - needed:
        shutil.rmtree(root / "models" / name / "steps" / str(step), ignore_errors=True)


def _distance(base: Path, model: Path) -> float:
    """L2 norm of an update, in fp64, tensor by tensor."""
    from safetensors import safe_open

    total = 0.0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as first, safe_open(model / file.name, "pt") as second:
            for key in first.keys():  # noqa: SIM118
                change = second.get_tensor(key).double() - first.get_tensor(key).double()
                total += float((change * change).sum())
    return math.sqrt(total)


def _geometry(root: Path, preset: StudyPreset, one: Set) -> Iterator[tuple[str, Any]]:
    from rlmerge.geometry.inspect import inspect

    for dtype in ("bf16", "fp32"):
        folders = [folder_of(root, preset, name, dtype) for name in one.members]
        found = inspect(model_of(root, base_name(one.arm)), folders, names=one.members, threads=1)
        assert "coordinates" in found
        yield dtype, found["coordinates"]["total"]


# -- merging -----------------------------------------------------------------------------------------------------------


def _tune(root: Path, preset: StudyPreset, method: str) -> Iterator[tuple[str, Any]]:
    """Settings of a method on the development pair, kept in fp32, validation problems: four of its own, then the best
    of them at four scales. The best mean accuracy wins, of equal ones the first.
    """
    tried: list[dict[str, Any]] = []

    def attempt(setting: Setting, scale: float) -> None:
        merge = Merge(f"try-{method}-{len(tried)}", method, setting)
        recipe = _recipe(root, preset, tuning_set(preset), merge, f"tune-{method}-{len(tried)}")
        scaled = (model_of(root, "base"), scale)
        scores = measured(recipe, _validation(preset, preset.tuning), both_tasks(preset), scaled=scaled).values()
        greedy = [found["greedy"].count("1") / len(found["greedy"]) for found in scores]
        tried.append({"setting": setting, "scale": scale, "greedy": greedy})

    def best() -> dict[str, Any]:
        return max(tried, key=lambda row: round(sum(row["greedy"]), 9))

    for setting, scale in first_tries(method, preset.sparse)[: preset.tries]:
        attempt(setting, scale)
    for setting, scale in later_tries(best()["setting"])[: preset.tries - len(tried)]:
        attempt(setting, scale)
    yield "tried", tried
    yield "chosen", {key: best()[key] for key in ("setting", "scale")}


def _merge(root: Path, preset: StudyPreset, name: str) -> Iterator[tuple[str, Any]]:
    whole, dtype, label = _parts(name)
    one = next(found for found in sets(preset) if found.name == whole)
    known = merges_of(one.what, one.arm, preset.methods, preset.ablations)
    merge = next(m for m in known if (m.label, m.dtype) == (label, dtype))
    if merge.tuned:
        frozen = read_cell(root, "frozen")["settings"][merge.method]
        merge = replace(merge, settings=frozen["setting"], scale=frozen["scale"])
    recipe = _recipe(root, preset, one, merge, name)
    tasks = tuple(preset.tasks[domain] for domain in one.domains)
    yield from _made_from(root)
    yield "settings", {"setting": merge.settings, "scale": merge.scale}
    scaled, texts = (model_of(root, base_name(one.arm)), merge.scale), read_texts(root / TEXTS, tasks)
    yield "tasks", measured(recipe, measuring(preset), tasks, texts, scaled, merge.dtype == "bf16")


def _parts(name: str) -> tuple[str, str, str]:
    """Set, dtype and label of 'fusion.sft-norm.1-fp32-sar'."""
    for dtype in ("fp32", "bf16"):
        whole, found, label = name.partition(f"-{dtype}-")
        if found:
            return whole, dtype, label
    raise LabError(f"{name}: is no merge.")


def _recipe(root: Path, preset: StudyPreset, one: Set, merge: Merge, name: str) -> Path:
    """Writes recipes/NAME.yml."""
    experts = {member: folder_of(root, preset, member) for member in one.members}
    fishers = {}
    for place, member in enumerate(one.members):
        if merge.fisher in ("permuted", "jitter"):
            fishers[member] = input_of(root, merge.fisher, member)
        elif merge.fisher == "base":
            fishers[member] = input_of(root, "fisher", f"base-{domain_of(member)}")
        elif merge.fisher == "other":
            fishers[member] = input_of(root, "fisher", one.members[1 - place])
        else:
            fishers[member] = input_of(root, "fisher", member)
    out = root / "recipes" / f"{name}.yml"
    write_merge(merge, model_of(root, base_name(one.arm)), experts, fishers, out)
    return out
