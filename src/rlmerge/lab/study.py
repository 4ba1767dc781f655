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

ARMS = ("rlvr", "rft", "sft", "sft-accuracy", "sft-norm", "other")
"""RLVR; SFT on that run's own verified samples; SFT on gold solutions; checkpoints of it that are matched; RLVR from
the other cold start: with right answers where the preset's has none, without where it has some."""
OTHER_BASE = "cold-other"
"""What the arm 'other' begins with."""
CONTROLS = ("twice", "average", "joint")
"""A run of twice the steps; the mean of one run's checkpoints; RL on both domains, as many steps as two runs."""
MATCHED = {"sft-accuracy": "accuracy", "sft-norm": "norm"}
HALVES = ("A", "B")


@dataclass(frozen=True)
class StudyPreset(Preset):
    """Sizes of the study; `seeds` are those of the confirmation.

    development   seed of the pair on which methods are tuned
    arms          of ARMS, controls: of CONTROLS; what does not fit is dropped in the order that the protocol has
    kept          steps after which SFT is looked at, to match it; matching: validation problems of the domain for that
    caliper       accuracy by which a matched checkpoint may miss
    averaged      steps of an RLVR run whose mean is a control
    split, half   problems that confirm: of a split, all or the half 'A' or 'B'
    seal          what their seed is drawn from
    tuning        validation problems of a domain
    samples       of a problem at temperature 1, for the first `sampled` problems
    deep          of so many of them alone (0: all); the others have `measure.FEW`
    texts         problems of a domain for which right texts of the base are looked for, in `attempts` samples each
    methods       that are tuned, SAR among them; tries: settings of each
    situations    'fusion' of the domains, 'single': two seeds of one domain
    ablations     whether H5 and H6 are asked, too
    sparse        whether updates change a fifth of the weights: what is tried of TIES and RAM
    frozen        what tuning has chosen before, by method; None: the development pair is trained and they are tuned
    """

    development: int = 0
    arms: tuple[str, ...] = ARMS
    controls: tuple[str, ...] = CONTROLS
    controlled: tuple[int, ...] = (1, 2)
    kept: tuple[int, ...] = (5, 10, 20, 40, 70, 100)
    matching: int = 200
    caliper: float = 0.03
    averaged: tuple[int, ...] = (60, 70, 80, 90, 100)
    split: str = "validation"
    half: str = ""
    seal: str = ""
    tuning: int = 300
    samples: int = 16
    sampled: int = 40
    deep: int = 0
    texts: int = 100
    attempts: int = 32
    tries: int = 8
    sparse: bool = False
    situations: tuple[str, ...] = ("fusion", "single")
    ablations: bool = True
    frozen: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Set:
    """Experts that are merged. what: 'fusion' of the domains, or 'single', two seeds of one domain."""

    what: str
    arm: str
    domains: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """The experts."""
        return tuple(expert(self.arm, domain, seed) for seed in self.seeds for domain in self.domains)

    @property
    def name(self) -> str:
        """Such as fusion.rlvr.1, single.sft.math.1.2."""
        domain = () if self.what == "fusion" else self.domains
        return ".".join((self.what, self.arm, *domain, *map(str, self.seeds)))


def expert(arm: str, domain: str, seed: int) -> str:
    """The name of one expert."""
    return f"{arm}-{domain}-{seed}"


def sets(preset: StudyPreset) -> list[Set]:
    """Fusion of the domains for each seed; for RLVR and SFT, disjoint pairs of seeds of a domain, too."""
    found = []
    for arm in preset.arms:
        if "fusion" in preset.situations:
            found += [Set("fusion", arm, DOMAINS, (seed,)) for seed in preset.seeds]
        if arm in ("rlvr", "sft") and "single" in preset.situations:
            for domain in DOMAINS:
                found += [Set("single", arm, (domain,), pair) for pair in pairs(preset.seeds) if len(pair) == 2]
    return found


def pairs(seeds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two after two; the last alone if their number is odd."""
    return [seeds[start : start + 2] for start in range(0, len(seeds), 2)]


def base_name(arm: str) -> str:
    """The model that the experts of an arm begin with."""
    return OTHER_BASE if arm == "other" else "base"


def tuning_set(preset: StudyPreset) -> Set:
    """The development pair."""
    return Set("fusion", "rlvr", DOMAINS, (preset.development,))


def domain_of(name: str) -> str:
    """'math' or 'code' of an expert; LabError for a model of both."""
    found = [domain for domain in DOMAINS if f"-{domain}-" in name]
    if not found:
        raise LabError(f"{name}: is an expert of no domain.")
    return found[0]


def study_cells(preset: StudyPreset) -> list[Cell]:
    """All cells, each after those it needs: what a pair of seeds needs, up to its merges, before the next pair, so that
    its large files can go.
    """
    _check(preset)
    found = [
        Cell("pretrain", "pretrain", threads=2),
        Cell("base", "base", ("pretrain",), threads=2),
        Cell("texts", "texts", ("base",)),
        Cell("measure-base", "both", ("texts",)),
    ]
    if "other" in preset.arms:
        found += [Cell(OTHER_BASE, "cold", ("pretrain",), threads=2), _measure(OTHER_BASE, OTHER_BASE)]
    if preset.ablations:
        found += [Cell(f"fisher-base-{domain}", "fisher", ("base",)) for domain in DOMAINS]
    tunes: list[Cell] = []
    if preset.frozen is None:
        for domain in DOMAINS:
            found += _experts(preset, domain, preset.development)
        tunes = [Cell(f"tune-{method}", "tune", _fishers(tuning_set(preset).members)) for method in preset.methods]
    found += [*tunes, Cell("frozen", "frozen", tuple(cell.name for cell in tunes))]
    for pair in pairs(preset.seeds):
        for seed in pair:
            if preset.frozen is not None or seed != preset.development:
                found += [cell for domain in DOMAINS for cell in _experts(preset, domain, seed)]
            if "joint" in preset.controls and seed in preset.controlled:
                found += [Cell(f"joint-{seed}", "joint", ("base",)), _measure(f"joint-{seed}", f"joint-{seed}")]
        merges = [cell for one in sets(preset) if set(one.seeds) <= set(pair) for cell in _merges(preset, one)]
        found += merges
        measures = [cell.name for cell in found if cell.name.startswith("measure-") and cell.name.endswith(_ends(pair))]
        found.append(Cell(f"clean-{pair[0]}", "clean", (*(cell.name for cell in merges), *measures)))
    return found


def _ends(pair: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"-{seed}" for seed in pair)


def _merges(preset: StudyPreset, one: Set) -> list[Cell]:
    """The geometry of a set, and all its merges."""
    found = [Cell(f"geometry-{one.name}", "geometry", tuple(map(_made_by, one.members)))]
    for merge in merges_of(one.what, one.arm, preset.methods, preset.ablations):
        needs = (*(_fishers(one.members) if merge.inputs else map(_made_by, one.members)), "frozen", "texts")
        if merge.fisher in ("permuted", "jitter"):
            needs += tuple(f"{merge.fisher}-{name}" for name in one.members)
        if merge.fisher == "base":
            needs += tuple(f"fisher-base-{domain}" for domain in DOMAINS)
        kind = "merge" if one.what == "fusion" else "half"
        found.append(Cell(f"merge-{one.name}-{merge.dtype}-{merge.label}", kind, needs))
    return found


def _check(preset: StudyPreset) -> None:
    if preset.half and (preset.half not in HALVES or not preset.seal):
        raise LabError(f"half {preset.half!r}: of the test problems there are A and B, and each needs a seal.")
    if preset.split == "test" and not preset.half:
        raise LabError("split 'test': only a half of it is opened at a time. Name half A or B, and its seal.")


def _experts(preset: StudyPreset, domain: str, seed: int) -> list[Cell]:
    """Runs of a domain and seed, their Fishers and measurements; RLVR alone where the seed does not confirm."""
    own = expert("rlvr", domain, seed)
    goes_on = seed in preset.controlled and bool(preset.controls)
    found = [
        Cell(own, "twice" if goes_on else "rlvr", ("base",)),
        Cell(f"fisher-{own}", "fisher", (own,)),
        _measure(own, own),
    ]
    if seed not in preset.seeds:
        return found
    for kind in ("permuted", "jitter") if preset.ablations else ():
        found.append(Cell(f"{kind}-{own}", kind, (f"fisher-{own}",)))
    if "rft" in preset.arms:
        name = expert("rft", domain, seed)
        found += [Cell(name, "rft", (own,)), _measure(name, name)]
    if "other" in preset.arms:
        name = expert("other", domain, seed)
        found += [Cell(name, "other", (OTHER_BASE,)), _measure(name, name)]
    matched = [arm for arm in preset.arms if arm in MATCHED]
    if "sft" in preset.arms or matched:
        name, match = expert("sft", domain, seed), f"match-{domain}-{seed}"
        found.append(Cell(name, "sft", ("base",)))
        if matched:
            found.append(Cell(match, "match", (own, name)))
        found.append(_measure(name, match if matched else name))
        found += [_measure(expert(arm, domain, seed), match) for arm in matched]
    for control in ("twice", "average"):
        if control in preset.controls and seed in preset.controlled:
            found.append(_measure(expert(control, domain, seed), own))
    return found


def _made_by(name: str) -> str:
    """The cell that makes an expert."""
    arm, domain, seed = name.rsplit("-", 2)
    return f"match-{domain}-{seed}" if arm in MATCHED else name


def _fishers(members: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"fisher-{name}" for name in members)


ON_BOTH = ("rlvr-", "joint-", "sft", "other-", OTHER_BASE)
"""How the names of models begin that are measured on both domains; others on their own one."""


def _measure(name: str, needs: str) -> Cell:
    return Cell(f"measure-{name}", "both" if name.startswith(ON_BOTH) else "own", (needs, "texts"))


def folder_of(root: Path, preset: StudyPreset, name: str, dtype: str = "bf16") -> Path:
    """Where a model of the study is: in 'bf16', as it was trained and is merged, or its 'fp32' master. An RLVR run goes
    on to twice its steps, so the expert is one of its kept models; so are the matched checkpoints of SFT.
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
