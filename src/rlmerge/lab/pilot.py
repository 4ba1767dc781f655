"""G0, the exploratory part of the study: regimes in which averaging RLVR experts might cost what they learned.

A regime is a handful of experts of one base and the sets of them that are merged; all is done as cells. Experts are
trained once, however many regimes share them. Every set is merged in memory by the same few methods, kept in fp32 and
stored in bf16, and measured on the tasks of its experts; its geometry is measured beside the null model. `regimes`
lists what is tried, `pilot_work` does it, `pilot_summary` and `pilot_page` make numbers and page.

An expert is the checkpoint in bf16, as the policy that earned the rewards computed with weights rounded so. Its fp32
master is measured beside it: what has moved by less than a rounding, no reward has seen (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, opened_root
from rlmerge.lab.contenders import Contender
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
FORESEEN = frozenset(one.label for one in MERGES)
"""Of which a second look and the power are asked."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""In which a merge is kept."""
MASTERS = "masters"
"""Stands for a dtype where the fp32 masters are merged, in fp32; by the mean alone."""

AGAIN = 4
"""Samples of a problem at temperature 1, at the second look."""


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
    """Another cold start than the preset's: other tasks, another seed, or by answers that are never right.

    texts   whose right texts measure its experts; '': its own
    """

    name: str
    tasks: tuple[str, ...]
    seed: int = 0
    texts: str = ""
    never_right: bool = False


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
    note      said at the top of the page
    paired    (arm, how its sets of disjoint pairs begin): what a study of so many `pairs` could see is foreseen from
              them
    """

    regimes: tuple[Regime, ...] = ()
    bases: tuple[ColdBase, ...] = ()
    samples: int = 0
    texts: int = 100
    attempts: int = 32
    note: str = ""
    paired: tuple[tuple[str, str], ...] = (
        ("rlvr", "seeds.pair"),
        ("sft", "supervised.sft"),
        ("rft", "supervised.rft"),
    )
    pairs: int = 6
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


def merge_named(cell: str) -> tuple[str, str, str]:
    """(set, dtype, label) of a merge's cell; a regime may have dashes in its name."""
    whole, dtype, label = cell.removeprefix("merge-").rsplit("-", 2)
    return whole, dtype, label


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


def again_cells(preset: PilotPreset, merges: Sequence[tuple[str, str, str]]) -> list[Cell]:
    """For some merges, as (set, dtype, label): base, experts and merge on other validation problems, with samples."""
    found = {}
    for name, dtype, label in merges:
        experts = sets_of(preset)[name]
        for one in (*dict.fromkeys(experts_of(preset)[expert].base for expert in experts), *experts):
            found[f"again-{one}"] = Cell(f"again-{one}", "again", (f"measure-{one}",))
        cell = f"merge-{name}-{dtype}-{label}"
        found[f"again-{cell}"] = Cell(f"again-{cell}", "again", (cell,))
    return list(found.values())


def paired_merges(preset: PilotPreset) -> list[tuple[str, str, str]]:
    """(set, 'fp32', label): the merges of disjoint pairs from which it is foreseen what a study could see."""
    begun = tuple(start for _, start in preset.paired)
    return [
        (name, dtype, label)
        for name in sets_of(preset)
        if name.startswith(begun)
        for dtype, label in merges_of(preset, name)
        if dtype == "fp32" and label in FORESEEN
    ]


def run_pilot(
    out: Path,
    preset: PilotPreset,
    workers: int,
    tell: Callable[[Step], None] = lambda step: None,
    only: tuple[str, ...] = (),
) -> None:
    """Does all cells in `out`, or those of some regimes; what is there already is not done again."""
    from rlmerge.lab.pilot_summary import met_once
    from rlmerge.lab.pilot_work import pilot_work

    chosen = tuple(regime for regime in preset.regimes if not only or regime.name in only)
    if len(chosen) < len(only):
        raise LabError(f"regimes {only}: there are {', '.join(regime.name for regime in preset.regimes)}.")
    names = {regime.name for regime in chosen}
    wanted = pilot_cells(PilotPreset(**{**vars(preset), "regimes": chosen}))
    # a regime more is no other pilot
    others: dict[str, Any] = {"regimes": (), "bases": (), "merges": (), "note": "", "paired": (), "pairs": 0}
    stable = PilotPreset(**{**vars(preset), **others})
    with opened_root(out, stable):
        run(out, preset, workers, tell, wanted, pilot_work)
        # a gate that many sets try is met by chance, too: the second look is at the same models, by other problems
        asked = [*met_once(out, preset), *(one for one in paired_merges(preset) if one[0].split(".")[0] in names)]
        if asked:
            run(out, preset, workers, tell, [*wanted, *again_cells(preset, asked)], pilot_work)
