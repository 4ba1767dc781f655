"""G0, the exploratory part of the study: regimes in which averaging RLVR experts might cost what they learned.

A regime is a handful of experts of one base and the sets of them that are merged; all is done as cells. Experts are
trained once, however many regimes share them. Every set is merged in memory by the same few methods, kept in fp32 and
stored in bf16, and measured on the tasks of its experts; its geometry is measured beside the null model. `pilot_page`
makes the page, `regimes` lists what is tried.

An expert is the checkpoint in bf16, as the policy that earned the rewards computed with weights rounded so. Its fp32
master is measured beside it: what has moved by less than a rounding, no reward has seen (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, estimate_once, input_of, lab_work, model_of, opened_root
from rlmerge.lab.contenders import Contender, write_recipe
from rlmerge.lab.errors import LabError
from rlmerge.lab.presets import Preset
from rlmerge.lab.schedule import Step, run

MERGES = (
    Contender("sum", "task_arithmetic", {"weight": 1.0}),
    Contender("mean", "task_arithmetic", {"weight": 1.0, "normalize": True}),
    Contender("ties", "ties", {"weight": 1.0, "density": 0.2}),
    Contender("ram", "ram"),
    Contender("sar", "sar", inputs=("fisher",)),
)
"""What every set is merged by."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""In which a merge is kept."""
MASTERS = "masters"
"""Stands for a dtype where the fp32 masters are merged, in fp32; by the mean alone."""
ASKED = ("fp32-", "bf16-mean", "bf16-sar", "masters-")
"""Merges that are asked for greedy answers; of the others there is the likelihood of solutions, which shows what
rounding does, and costs a fifth."""


@dataclass(frozen=True)
class Expert:
    """One run from the common base; what is None is the preset's. `task` is also what it is measured on.

    base   the cold start that it begins with
    kind   'rlvr', 'sft' on gold solutions, 'rft' on the verified samples of the RLVR run `of`; 'cold': the base itself
    """

    name: str
    task: str
    seed: int
    steps: int | None = None
    lr: float | None = None
    temperature: float = 1.0
    advantage: str = "grpo"
    curriculum: tuple[str, ...] = ()
    lora: int = 0
    kind: str = "rlvr"
    of: str = ""
    base: str = "base"


@dataclass(frozen=True)
class ColdBase:
    """Another cold start than the preset's: other tasks, or another seed. texts: whose right texts measure its experts;
    '': its own.
    """

    name: str
    tasks: tuple[str, ...]
    seed: int = 0
    texts: str = ""


@dataclass(frozen=True)
class Regime:
    """Experts that differ in a certain way, and the sets of them that are merged, by name.

    merges    labels of the merges that are made; empty: all. kept: dtypes in which they are kept
    masters   whether the mean of the fp32 masters is measured, too
    onto      the model whose weights are taken off and added to; '': where the first expert began
    """

    name: str
    why: str
    experts: tuple[Expert, ...]
    sets: tuple[tuple[str, tuple[str, ...]], ...]
    masters: bool = False
    onto: str = ""
    merges: tuple[str, ...] = ()
    kept: tuple[str, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class PilotPreset(Preset):
    """Sizes of the pilot.

    regimes   in the order in which they are tried; bases: cold starts that some of them need
    samples   of a problem at temperature 1, of base and experts
    texts     problems of a task for which right texts of the base are looked for, in `attempts` samples each
    """

    regimes: tuple[Regime, ...] = ()
    bases: tuple[ColdBase, ...] = ()
    samples: int = 0
    texts: int = 100
    attempts: int = 32
    merges: tuple[Contender, ...] = field(default=MERGES)


def experts_of(preset: PilotPreset) -> dict[str, Expert]:
    """All experts by name. LabError where two regimes mean different runs by one name."""
    found: dict[str, Expert] = {}
    for regime in preset.regimes:
        for expert in regime.experts:
            if found.setdefault(expert.name, expert) != expert:
                raise LabError(f"expert {expert.name!r}: is two different runs. Give them two names.")
    return found


def dtype_of(expert: Expert) -> str:
    """In which it is merged: a LoRA is a product in fp32, which its policy added to weights in bf16."""
    return "fp32" if expert.lora else "bf16"


def sets_of(preset: PilotPreset) -> dict[str, tuple[str, ...]]:
    """The experts of every set, by REGIME.SET. LabError for a set of experts that its regime does not have."""
    found = {}
    for regime in preset.regimes:
        known = {expert.name for expert in regime.experts}
        for name, members in regime.sets:
            if not set(members) <= known or len(members) < 2:
                raise LabError(f"set {regime.name}.{name}: merges {members}, of which {regime.name} has {known}.")
            found[f"{regime.name}.{name}"] = members
    return found


def merges_of(preset: PilotPreset, whole: str) -> list[tuple[str, str]]:
    """(dtype, label) of every merge of a set."""
    regime = next(one for one in preset.regimes if one.name == whole.split(".")[0])
    labels = [one.label for one in preset.merges if not regime.merges or one.label in regime.merges]
    found = [(dtype, label) for dtype in regime.kept for label in labels]
    return found + [(MASTERS, label) for label in labels if regime.masters and label == "mean"]


def tasks_of(preset: PilotPreset, members: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks of some experts, each once."""
    experts = experts_of(preset)
    return tuple(dict.fromkeys(experts[name].task for name in members))


def measured_on(preset: PilotPreset, name: str) -> tuple[str, ...]:
    """Tasks on which an expert is measured: those of the sets that it is in, in the first regime that has it."""
    regime = next(one for one in preset.regimes if name in {expert.name for expert in one.experts})
    members = [member for _, some in regime.sets if name in some for member in some]
    return tasks_of(preset, (name, *members))


def pilot_cells(preset: PilotPreset) -> list[Cell]:
    """All cells, each after those it needs: what a regime needs comes before what the next one does."""
    experts_of(preset)
    sets_of(preset)
    found = {
        cell.name: cell
        for cell in (Cell("pretrain", "pretrain", threads=2), Cell("base", "base", ("pretrain",), threads=2))
    }
    for regime in preset.regimes:
        for base in dict.fromkeys(expert.base for expert in regime.experts):
            for cell in _base_cells(preset, base):
                found.setdefault(cell.name, cell)
        for expert in regime.experts:
            if expert.kind == "cold":
                continue
            trained = Cell(expert.name, expert.kind, (expert.of or expert.base,))
            measured = Cell(f"measure-{expert.name}", "measure", (expert.name, texts_cell(preset, expert.base)))
            found |= {cell.name: cell for cell in (trained, measured)}
        for name, members in regime.sets:
            whole = f"{regime.name}.{name}"
            found[f"geometry-{whole}"] = Cell(f"geometry-{whole}", "geometry", members)
            contenders = {one.label: one for one in preset.merges}
            for dtype, label in merges_of(preset, whole):
                needs = members
                if contenders[label].inputs:
                    needs = tuple(f"fisher-{member}" for member in members)
                    found |= {name: Cell(name, "fisher", (name.removeprefix("fisher-"),)) for name in needs}
                cell = f"merge-{whole}-{dtype}-{label}"
                found[cell] = Cell(cell, "merge", (*needs, texts_cell(preset, base_of(preset, members))))
    return list(found.values())


def _base_cells(preset: PilotPreset, name: str) -> list[Cell]:
    """A cold start, unless it is the preset's, its right texts, and what it can do."""
    texts = texts_cell(preset, name)
    found = [] if name == "base" else [Cell(name, "cold", ("pretrain",), threads=2)]
    if texts in ("texts", f"texts-{name}"):
        found.append(Cell(texts, "texts", (texts.removeprefix("texts-") if texts != "texts" else "base",)))
    return [*found, Cell(f"measure-{name}", "measure", (name, texts))]


def base_of(preset: PilotPreset, members: Sequence[str]) -> str:
    """Where the first of some experts began: what gains are counted from."""
    return experts_of(preset)[members[0]].base


def texts_cell(preset: PilotPreset, base: str) -> str:
    """The cell of the right texts that experts of a base are measured by."""
    own = next((one for one in preset.bases if one.name == base), None)
    name = base if own is None else own.texts or base
    return "texts" if name == "base" else f"texts-{name}"


def tasks_from(preset: PilotPreset, base: str) -> tuple[str, ...]:
    """The tasks on which a base, its experts and their merges are measured, and those that use its right texts."""
    texts, found = texts_cell(preset, base), []
    for name, expert in experts_of(preset).items():
        if texts_cell(preset, expert.base) == texts:
            found += measured_on(preset, name)
    for members in sets_of(preset).values():
        if texts_cell(preset, base_of(preset, members)) == texts:
            found += tasks_of(preset, members)
    return tuple(dict.fromkeys(found))


def again_cells(preset: PilotPreset, members: Sequence[tuple[str, tuple[str, ...], str]]) -> list[Cell]:
    """For sets that meet the gate, as (set, experts, dtype): base, experts and mean on other validation problems.
    A gate that many sets try is met by chance, too; the second look is at the same models.
    """
    found = {}
    for name, experts, dtype in members:
        for one in (*dict.fromkeys(experts_of(preset)[expert].base for expert in experts), *experts):
            found[f"again-{one}"] = Cell(f"again-{one}", "again", (f"measure-{one}",))
        cell = f"merge-{name}-{dtype}-mean"
        found[f"again-{cell}"] = Cell(f"again-{cell}", "again", (cell,))
    return list(found.values())


def run_pilot(
    out: Path,
    preset: PilotPreset,
    workers: int,
    tell: Callable[[Step], None] = lambda step: None,
    only: tuple[str, ...] = (),
) -> None:
    """Does all cells in `out`, or those of some regimes; what is there already is not done again."""
    from rlmerge.lab.pilot_summary import met_once

    chosen = tuple(regime for regime in preset.regimes if not only or regime.name in only)
    if len(chosen) < len(only):
        raise LabError(f"regimes {only}: there are {', '.join(regime.name for regime in preset.regimes)}.")
    wanted = pilot_cells(PilotPreset(**{**vars(preset), "regimes": chosen}))
    stable = PilotPreset(
        **{**vars(preset), "regimes": (), "bases": (), "merges": ()}
    )  # a regime more is no other pilot
    with opened_root(out, stable):
        run(out, preset, workers, tell, wanted, pilot_work)
        again = again_cells(preset, met_once(out, preset))
        if again:
            run(out, preset, workers, tell, [*wanted, *again], pilot_work)


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
        from rlmerge.lab.texts import find_texts

        base = cell.needs[0]
        asked = {spec: _measuring(preset, 0).task(spec) for spec in tasks_from(preset, base)}
        out = root / cell.name
        yield from find_texts(out, model_of(root, base), asked, preset.texts, preset.attempts, preset.max_new_tokens)
    elif cell.kind == "measure":
        name = cell.name.removeprefix("measure-")
        texts = root / cell.needs[1]
        if name not in experts_of(preset):
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
        _cold(root, preset, next(one for one in preset.bases if one.name == cell.name))
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


def _cold(root: Path, preset: PilotPreset, base: ColdBase) -> None:
    from rlmerge.lab import supervised
    from rlmerge.lab.optimizer import Rate

    settings = supervised.ColdStart(
        base.tasks, base.seed, preset.cold_steps, preset.batch, Rate(preset.cold_lr, 20, True), preset.careless,
        preset.slip,
    )  # fmt: skip
    supervised.cold_start(model_of(root, "pretrain"), root / "models" / base.name, settings)


def _rlvr(root: Path, preset: PilotPreset, expert: Expert, out: Path) -> None:
    from rlmerge.lab.optimizer import Rate
    from rlmerge.lab.rlvr import Rlvr, rlvr

    settings = Rlvr(
        expert.task, expert.seed, expert.steps or preset.steps, preset.prompts, preset.group,
        Rate(expert.lr or preset.lr, 5), preset.max_new_tokens, "fast", expert.temperature, expert.advantage,
        expert.curriculum, expert.lora,
    )  # fmt: skip
    rlvr(model_of(root, expert.base), out, settings)


def _supervised(root: Path, preset: PilotPreset, expert: Expert, out: Path) -> None:
    from rlmerge.lab import supervised
    from rlmerge.lab.optimizer import Rate

    steps, rate = expert.steps or preset.steps, Rate(expert.lr or preset.lr, 5)
    if expert.kind == "sft":
        supervised.sft(model_of(root, "base"), out, supervised.Sft(expert.task, expert.seed, steps, preset.batch, rate))
        return
    samples = str(root / "models" / expert.of / "samples.jsonl")
    settings = supervised.Rft(
        expert.task, expert.seed, steps, preset.batch, rate, samples, max_new_tokens=preset.max_new_tokens
    )
    supervised.rft(model_of(root, expert.base), out, settings)


TRAINERS = {"rlvr": _rlvr, "sft": _supervised, "rft": _supervised}


def _folder(root: Path, expert: Expert, dtype: str) -> Path:
    return model_of(root, expert.name).with_name(dtype)


def _measuring(preset: PilotPreset, samples: int, greedy: bool = True) -> Any:
    from rlmerge.lab.measure import Measuring

    return Measuring(
        "validation", preset.problems, samples=samples, max_new_tokens=preset.max_new_tokens, batch=preset.eval_batch,
        greedy=greedy,
    )  # fmt: skip


def _measured(
    texts: Path, model: Path, preset: PilotPreset, tasks: tuple[str, ...], samples: int, greedy: bool = True
) -> dict[str, Any]:
    """Of a folder, or of a recipe's merge in memory."""
    from rlmerge.lab.measure import measured
    from rlmerge.lab.texts import read_texts

    return dict(measured(model, _measuring(preset, samples, greedy), tasks, read_texts(texts, tasks)))


def onto(root: Path, preset: PilotPreset, whole: str) -> Path:
    """The base of a set's merges."""
    regime = next(one for one in preset.regimes if one.name == whole.split(".")[0])
    return model_of(root, regime.onto or base_of(preset, sets_of(preset)[whole]))


def _geometry(root: Path, preset: PilotPreset, whole: str) -> Iterator[tuple[str, Any]]:
    from rlmerge.geometry.inspect import inspect

    members = sets_of(preset)[whole]
    experts = [experts_of(preset)[name] for name in members]
    folders = [_folder(root, one, dtype_of(one)) for one in experts]
    found = inspect(onto(root, preset, whole), folders, names=members, threads=1)
    assert "coordinates" in found
    yield "coordinates", found["coordinates"]["total"]
    yield "storage", found.get("storage", {})


def _measured_again(root: Path, preset: PilotPreset, name: str) -> dict[str, Any]:
    """Greedy answers to other problems: none that was measured before."""
    from rlmerge.lab.measure import measured

    how = replace(_measuring(preset, 0), seed=1, without=preset.problems)
    if name.startswith("merge-"):
        whole, dtype, label = name.removeprefix("merge-").split("-", 2)
        tasks = tasks_of(preset, sets_of(preset)[whole])
        return dict(measured(root / "recipes" / f"{whole}-{dtype}-{label}.yml", how, tasks))
    if name not in experts_of(preset):
        return dict(measured(model_of(root, name), how, tasks_from(preset, name)))
    expert = experts_of(preset)[name]
    return dict(measured(_folder(root, expert, dtype_of(expert)), how, (expert.task,)))


def _merged(root: Path, preset: PilotPreset, cell: Cell) -> Iterator[tuple[str, Any]]:
    whole, dtype, label = cell.name.removeprefix("merge-").split("-", 2)
    members = sets_of(preset)[whole]
    contender = next(one for one in preset.merges if one.label == label)
    stored = Contender(label, contender.method, contender.settings, contender.inputs)
    recipe = root / "recipes" / f"{whole}-{dtype}-{label}.yml"
    experts = [experts_of(preset)[name] for name in members]
    models = {one.name: _folder(root, one, "fp32" if dtype == MASTERS else dtype_of(one)) for one in experts}
    inputs = {"fisher": {name: input_of(root, "fisher", name) for name in members}}
    write_recipe(stored, onto(root, preset, whole), models, inputs, recipe)
    with recipe.open("a") as file:
        file.write(f"dtype: {DTYPES.get(dtype, 'float32')}\n")
    greedy = f"{dtype}-{label}".startswith(ASKED)
    yield "tasks", _measured(root / cell.needs[-1], recipe, preset, tasks_of(preset, members), 0, greedy)
