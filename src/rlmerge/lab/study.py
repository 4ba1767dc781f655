"""The confirmatory part of the study, as cells: arms and controls from one base, tuned once, merged, measured.

docs/study/protocol.md says what is asked and what would refute it; `study_merges` has what is merged how, `hypotheses`
what is made of the numbers, `study_page` the page. A rehearsal is the same on the development pair alone, measured on
validation problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, opened_root, read_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.presets import DOMAINS, Preset
from rlmerge.lab.schedule import Step, run
from rlmerge.lab.study_merges import merges_of

ARMS = ("rlvr", "rft", "sft", "sft-accuracy", "sft-norm")
"""RLVR; SFT on that run's own verified samples; SFT on gold solutions; checkpoints of it that are matched."""
CONTROLS = ("twice", "average", "joint")
"""A run of twice the steps; the mean of one run's checkpoints; RL on both domains, as many steps as two runs."""
MATCHED = {"sft-accuracy": "accuracy", "sft-norm": "norm"}
HALVES = ("A", "B")


@dataclass(frozen=True)
class StudyPreset(Preset):
    """Sizes of the study; `seeds` are those of the confirmation.

    development   seed of the pair on which methods are tuned
    arms          of ARMS, controls: of CONTROLS; what does not fit is dropped in the order that the protocol has
    kept          steps after which SFT is looked at, to match it
    averaged      steps of an RLVR run whose mean is a control
    split, half   problems that confirm: of a split, all or the half 'A' or 'B'
    seal          what their seed is drawn from
    tuning        validation problems of a domain
    samples       of a problem at temperature 1, for the first `sampled` problems, of what is measured in full
    methods       that are tuned, SAR among them; tries: settings of each
    """

    development: int = 0
    arms: tuple[str, ...] = ARMS
    controls: tuple[str, ...] = CONTROLS
    controlled: tuple[int, ...] = (1, 2)
    kept: tuple[int, ...] = (10, 20, 40, 60, 80, 100)
    averaged: tuple[int, ...] = (60, 70, 80, 90, 100)
    split: str = "validation"
    half: str = ""
    seal: str = ""
    tuning: int = 300
    samples: int = 16
    sampled: int = 100
    tries: int = 8


@dataclass(frozen=True)
class Set:
    """Experts that are merged. what: 'fusion' of the domains, or 'single', two seeds of one domain."""

    what: str
    arm: str
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as fusion.rlvr.1, single.sft.math.1.2."""
        parts = [one.removeprefix(f"{self.arm}-").split("-") for one in self.members]
        seeds = dict.fromkeys(seed for _, seed in parts)
        domain = () if self.what == "fusion" else (parts[0][0],)
        return ".".join((self.what, self.arm, *domain, *seeds))


def expert(arm: str, domain: str, seed: int) -> str:
    """The name of one expert."""
    return f"{arm}-{domain}-{seed}"


def sets(preset: StudyPreset) -> list[Set]:
    """Fusion of the domains for each seed; for RLVR and SFT, disjoint pairs of seeds of a domain, too."""
    found = []
    for arm in preset.arms:
        for seed in preset.seeds:
            found.append(Set("fusion", arm, tuple(expert(arm, domain, seed) for domain in DOMAINS)))
        if arm in ("rlvr", "sft"):
            for domain in DOMAINS:
                for one, other in zip(preset.seeds[::2], preset.seeds[1::2]):
                    found.append(Set("single", arm, (expert(arm, domain, one), expert(arm, domain, other))))
    return found


def tuning_set(preset: StudyPreset) -> Set:
    """The development pair."""
    return Set("fusion", "rlvr", tuple(expert("rlvr", domain, preset.development) for domain in DOMAINS))


def domain_of(name: str) -> str:
    """'math' or 'code' of an expert; LabError for a model of both."""
    found = [domain for domain in DOMAINS if f"-{domain}-" in name]
    if not found:
        raise LabError(f"{name}: is an expert of no domain.")
    return found[0]


def study_cells(preset: StudyPreset) -> list[Cell]:
    """All cells, each after those it needs."""
    _check(preset)
    found = [
        Cell("pretrain", "pretrain", threads=2),
        Cell("base", "base", ("pretrain",), threads=2),
        *(Cell(f"fisher-base-{domain}", "fisher", ("base",)) for domain in DOMAINS),
        Cell("measure-base", "measure", ("base",)),
    ]
    for seed in dict.fromkeys((preset.development, *preset.seeds)):
        confirms = seed in preset.seeds
        for domain in DOMAINS:
            found += _experts(preset, domain, seed, confirms)
        if "joint" in preset.controls and seed in preset.controlled:
            found += [Cell(f"joint-{seed}", "joint", ("base",)), _measure(f"joint-{seed}", f"joint-{seed}")]
    chosen = tuning_set(preset)
    tunes = [Cell(f"tune-{method}", "tune", _fishers(chosen.members)) for method in preset.methods]
    found += tunes
    found.append(Cell("frozen", "frozen", tuple(cell.name for cell in tunes)))
    for one in sets(preset):
        found.append(Cell(f"geometry-{one.name}", "geometry", tuple(map(_made_by, one.members))))
        for merge in merges_of(one.what, one.arm, preset.methods):
            needs = (*(_fishers(one.members) if merge.inputs else map(_made_by, one.members)), "frozen")
            if merge.fisher in ("permuted", "jitter"):
                needs += tuple(f"{merge.fisher}-{name}" for name in one.members)
            if merge.fisher == "base":
                needs += tuple(f"fisher-base-{domain}" for domain in DOMAINS)
            kind = "sampled" if merge.full else "merge"
            found.append(Cell(f"merge-{one.name}-{merge.dtype}-{merge.label}", kind, needs))
    return found


def _check(preset: StudyPreset) -> None:
    if preset.half and (preset.half not in HALVES or not preset.seal):
        raise LabError(f"half {preset.half!r}: of the test problems there are A and B, and each needs a seal.")
    if preset.split == "test" and not preset.half:
        raise LabError("split 'test': only a half of it is opened at a time. Name half A or B, and its seal.")


def _experts(preset: StudyPreset, domain: str, seed: int, confirms: bool) -> list[Cell]:
    """Runs of a domain and seed, their Fishers and measurements; RLVR alone where the seed does not confirm."""
    own = expert("rlvr", domain, seed)
    found = [Cell(own, "rlvr", ("base",)), Cell(f"fisher-{own}", "fisher", (own,)), _measure(own, own)]
    if not confirms:
        return found
    for kind in ("permuted", "jitter"):
        found.append(Cell(f"{kind}-{own}", kind, (f"fisher-{own}",)))
    if "rft" in preset.arms:
        found.append(Cell(expert("rft", domain, seed), "rft", (own,)))
    sft = expert("sft", domain, seed)
    found.append(Cell(sft, "sft", ("base",)))
    matches = bool(set(preset.arms) & set(MATCHED))
    if matches:
        found.append(Cell(f"match-{domain}-{seed}", "match", (own, sft)))
    for arm in preset.arms:
        if arm != "rlvr":
            name = expert(arm, domain, seed)
            needs = _made_by(name if arm != "sft" or not matches else expert("sft-norm", domain, seed))
            found += [Cell(f"fisher-{name}", "fisher", (_made_by(name),)), _measure(name, needs)]
    for control in ("twice", "average"):
        if control in preset.controls and seed in preset.controlled:
            name = expert(control, domain, seed)
            found.append(_measure(name, own))
    return found


def _made_by(name: str) -> str:
    """The cell that makes an expert."""
    arm, domain, seed = name.rsplit("-", 2)
    return f"match-{domain}-{seed}" if arm in MATCHED else name


def _fishers(members: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"fisher-{name}" for name in members)


def _measure(name: str, needs: str) -> Cell:
    return Cell(f"measure-{name}", "measure", (needs,))


def folder_of(root: Path, preset: StudyPreset, name: str, dtype: str = "bf16") -> Path:
    """Where a model of the study is, in 'bf16' or 'fp32'. An RLVR run goes on to twice its steps, so the expert is one
    of its kept models; so are the matched checkpoints of SFT.
    """
    arm, *rest = name.rsplit("-", 2) if name.count("-") >= 2 else (name,)
    models = root / "models"
    if arm == "rlvr":
        return models / name / "steps" / str(preset.steps) / dtype
    if arm == "twice":
        return models / "-".join(("rlvr", *rest)) / dtype
    if arm in MATCHED:
        step = read_cell(root, "-".join(("match", *rest)))[MATCHED[arm]]
        return models / "-".join(("sft", *rest)) / "steps" / str(step) / dtype
    return models / name / dtype


def both_tasks(preset: StudyPreset) -> tuple[str, ...]:
    """The tasks of both domains, on which everything is measured."""
    return tuple(preset.tasks[domain] for domain in DOMAINS)


def run_study(
    out: Path, preset: StudyPreset, workers: int, tell: Callable[[Step], None] = lambda step: None
) -> dict[str, Any]:
    """Does all cells in `out` that are not done, writes the page; returns its numbers."""
    from rlmerge.lab.study_page import write_page
    from rlmerge.lab.study_work import study_work

    with opened_root(out, preset):
        run(out, preset, workers, tell, study_cells(preset), study_work)
        return write_page(out, preset, out / "study.md")
