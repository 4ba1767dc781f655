"""What the study merges how: tuned methods, two that have nothing to tune, and what is switched off one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlmerge.lab.contenders import Contender, inputs_of, write_recipe
from rlmerge.lab.grids import Setting
from rlmerge.lab.grids import settings_of as grid_of
from rlmerge.methods import get_method

BASELINES = ("task_arithmetic", "ties", "dare_ties", "ram", "ramplus_tl", "fisher")
"""What SAR must beat; each is tuned by as many tries as it."""
WORDS = {"fp32": "float32", "bf16": "bfloat16"}
ALL = {"weight": 1.0}


@dataclass(frozen=True)
class Merge:
    """One merge of a set.

    settings   of the method; of a tuned one they come from tuning
    dtype      of the experts and of the result
    fisher     whose: the expert's 'own', the 'other' one's, the 'base''s, 'permuted' within tensors, or 'jitter' (1 but
               for what breaks ties)
    full       whether it is sampled, too
    """

    label: str
    method: str
    settings: Setting = field(default_factory=dict)
    dtype: str = "fp32"
    fisher: str = "own"
    full: bool = False
    tuned: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads for each expert, beside the model."""
        return inputs_of(get_method(self.method), self.settings)


SUM = Merge("sum", "task_arithmetic", ALL, full=True)
MEAN = Merge("mean", "task_arithmetic", ALL | {"normalize": True}, full=True)

WHOLE: Setting = {"density": 1.0, "rescale": "none"}
"""SAR's first stage alone: nothing is cut, so all of these change the same coordinates."""
BY_DELTA: Setting = WHOLE | {"sensitivity": "delta2"}
AVERAGED: Setting = BY_DELTA | {"arbitration": "soft", "power": 0.0, "agreement": "mean"}
ABLATIONS = (
    Merge("F-delta2", "sar", WHOLE),
    Merge("delta2", "sar", BY_DELTA),
    Merge("delta2-ties-drawn", "sar", WHOLE, fisher="jitter"),
    Merge("F-alone", "sar", WHOLE | {"sensitivity": "fisher"}),
    Merge("F-permuted", "sar", WHOLE, fisher="permuted"),
    Merge("F-of-base", "sar", WHOLE, fisher="base"),
    Merge("F-of-other", "sar", WHOLE, fisher="other"),
    Merge("random-winner", "sar", BY_DELTA | {"arbitration": "random", "agreement": "mean"}),
    Merge("plain-mean", "sar", AVERAGED),
)
"""H5: who decides a conflict. The first is the reading of the paper; the last is RAM's mean, in which what one expert
alone changed stays whole. H6 takes the last two, too: a conflict is cancelled in one, won at random in the other."""
AGREEMENTS = tuple(Merge(f"agree-{how}", "sar", WHOLE | {"agreement": how}) for how in ("mean", "sum", "multiplicity"))
"""H5: how updates of one sign are combined; `F-delta2` has the fourth way, the mean by sensitivity."""
IN_BF16 = ("F-delta2", "delta2", "delta2-ties-drawn", "F-permuted", "random-winner", "plain-mean")
"""Of bf16 experts, too: only there many updates are of one size, and most coordinates changed by one expert alone."""
FEW = ("sum", "mean", "ties", "sar")
ROUNDED = ("sum", "mean", "ties", "ram", "sar")
"""Stored as bf16, too."""


def merges_of(what: str, arm: str, methods: tuple[str, ...]) -> list[Merge]:
    """All merges of a set: `what` is 'fusion' or 'single'; controls of the mechanism for fusions of RLVR alone. Arms
    that only say what RLVR is compared with have fewer, and are not sampled.
    """
    tuned = [Merge(method, method, full=method in ("ties", "sar"), tuned=True) for method in methods]
    found = [SUM, MEAN, *tuned]
    if arm not in ("rlvr", "sft"):
        return [replace(m, full=False) for m in found if m.label in FEW]
    if arm == "rlvr":
        found += [Merge(m.label, m.method, m.settings, "bf16", tuned=m.tuned) for m in found if m.label in ROUNDED]
        if what == "fusion":
            found += [*ABLATIONS, *AGREEMENTS, *(replace(m, dtype="bf16") for m in ABLATIONS if m.label in IN_BF16)]
    return found


FLOORS = (1e-3, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2, 0.1, 1.0)
"""Of the Fisher mean, whose grid in the table has half as many tries; the default comes first."""
EPSILONS = (1e-5, 0.0, 1e-6, 3e-6, 3e-5, 5e-5, 1e-4, 2e-4)
"""Of RAM: updates at a rate of 1e-5 are of 1e-4, and the grid of the table, for one of 1e-4, would drop all of them."""


def settings_of(method: str) -> tuple[Setting, ...]:
    """What is tried of a method on the development pair: the grid of the table of methods, without weights of single
    domains, as pairs of one domain have none.
    """
    if method == "fisher":
        return tuple({"floor": floor} for floor in FLOORS)
    if method == "ram":
        return tuple({"epsilon": epsilon} for epsilon in EPSILONS)
    if method == "ramplus_tl":
        return tuple({"r": r, "epsilon": epsilon} for r in (0.1, 0.5, 1.0, 2.0) for epsilon in (1e-5, 1e-4))
    return tuple(setting for setting in grid_of(method) if not any(isinstance(v, tuple) for v in setting.values()))


def write_merge(merge: Merge, base: Path, experts: dict[str, Path], fishers: dict[str, Path], out: Path) -> None:
    """Writes the recipe, as a user would write it."""
    contender = Contender(merge.label, merge.method, dict(merge.settings), merge.inputs)
    write_recipe(contender, base, experts, {"fisher": fishers}, out)
    recipe: dict[str, Any] = yaml.safe_load(out.read_text())
    out.write_text(yaml.safe_dump({**recipe, "dtype": WORDS[merge.dtype]}, sort_keys=False))
