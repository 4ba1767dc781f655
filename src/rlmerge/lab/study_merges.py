"""What the study merges how: tuned methods, two that have nothing to tune, and what is switched off one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlmerge.lab.contenders import Contender, inputs_of, required, write_recipe
from rlmerge.lab.grids import Setting
from rlmerge.methods import get_method

BASELINES = ("task_arithmetic", "ties", "dare_ties", "ram", "ramplus_tl", "fisher")
"""What SAR must beat; each is tuned by as many tries as it."""
ALL = {"weight": 1.0}


@dataclass(frozen=True)
class Merge:
    """One merge of a set.

    settings   of the method; of a tuned one they come from tuning
    dtype      in which the result is kept; experts are bf16, as they were trained
    fisher     whose: the expert's 'own', the 'other' one's, the 'base''s, 'permuted' within tensors, or 'jitter' (1 but
               for what breaks ties)
    scale      what its update is multiplied by at last
    """

    label: str
    method: str
    settings: Setting = field(default_factory=dict)
    dtype: str = "fp32"
    fisher: str = "own"
    tuned: bool = False
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads for each expert, beside the model."""
        return inputs_of(get_method(self.method), self.settings)


SUM = Merge("sum", "task_arithmetic", ALL)
MEAN = Merge("mean", "task_arithmetic", ALL | {"normalize": True})

WHOLE: Setting = {"density": 1.0, "rescale": "none", "agreement": "mean"}
"""SAR's first stage alone: nothing is cut, and updates of one sign are averaged, so that all of these change the same
coordinates, and differ in conflicts alone."""
BY_DELTA: Setting = WHOLE | {"sensitivity": "delta2"}
ABLATIONS = (
    Merge("F-delta2", "sar", WHOLE),
    Merge("delta2", "sar", BY_DELTA),
    Merge("delta2-ties-drawn", "sar", WHOLE, fisher="jitter"),
    Merge("F-alone", "sar", WHOLE | {"sensitivity": "fisher"}),
    Merge("F-permuted", "sar", WHOLE, fisher="permuted"),
    Merge("F-of-base", "sar", WHOLE, fisher="base"),
    Merge("F-of-other", "sar", WHOLE, fisher="other"),
    Merge("random-winner", "sar", BY_DELTA | {"arbitration": "random"}),
    Merge("plain-mean", "sar", BY_DELTA | {"arbitration": "soft", "power": 0.0}),
)
"""H5: who decides a conflict. The first is the reading of the paper; the last is RAM's mean, in which what one expert
alone changed stays whole. H6 takes the two: a conflict is cancelled in one, settled in the other."""
AGREEMENTS = tuple(
    Merge(f"agree-{how}", "sar", WHOLE | {"agreement": how}) for how in ("sensitivity_mean", "sum", "multiplicity")
)
"""H5: how updates of one sign are combined; `F-delta2` has the fourth way, the mean. The first is the paper's."""
UNTUNED = ("sum", "mean")
"""What is made of all arms: nobody has chosen their settings on RLVR's experts. Of gold SFT TIES, too."""
ROUNDED = ("mean", "sar")
"""Stored as bf16, too."""


def merges_of(what: str, arm: str, methods: tuple[str, ...], ablations: bool = True) -> list[Merge]:
    """All merges of a set: `what` is 'fusion' or 'single'; those that switch something off for fusions of RLVR alone.
    Arms that only say what RLVR is compared with have fewer.
    """
    tuned = [Merge(method, method, tuned=True) for method in methods]
    found = [SUM, MEAN, *tuned]
    if arm != "rlvr":
        return [m for m in found if m.label in ((*UNTUNED, "ties") if arm == "sft" else UNTUNED)]
    if what == "fusion":
        found += [replace(m, dtype="bf16") for m in found if m.label in ROUNDED]
        found += [*ABLATIONS, *AGREEMENTS] if ablations else []
    return found


OWN: dict[str, tuple[Setting, ...]] = {
    "task_arithmetic": ({},),
    "ties": tuple({"density": density} for density in (1.0, 0.8, 0.5, 0.2)),
    "dare_ties": tuple({"density": density} for density in (1.0, 0.8, 0.5, 0.2)),
    "ram": tuple({"epsilon": epsilon} for epsilon in (1e-5, 1e-4, 3e-4, 1e-3)),
    "ramplus_tl": tuple({"r": r} for r in (0.1, 0.5, 1.0, 2.0)),
    "fisher": tuple({"floor": floor} for floor in (1e-3, 1e-4, 1e-2, 0.1)),
    "sar": tuple({"density": density} for density in (0.8, 1.0, 0.5, 0.2)),
}
"""What is tried of each method first: its default and three others of the parameter that shapes the result most."""
OF_SPARSE: dict[str, tuple[Setting, ...]] = OWN | {
    "ties": tuple({"density": density} for density in (0.2, 0.15, 0.1, 0.05)),
    "ram": tuple({"epsilon": epsilon} for epsilon in (1e-5, 1e-4, 2e-4, 4e-4)),
}
"""The same where a fifth of the weights has changed, and none of them by 0.001 (SmolLM2). TIES keeps a share of all
weights, so that 0.5 to 1 cut nothing, and 0.2, which the pilot has, a seventh of what changed; RAM at 0.001 is the base
(docs/log.md). SAR keeps a share of what changed."""
SCALES = (0.5, 0.7, 1.4, 2.0)
"""What the update of the best of them is multiplied by afterwards: an axis that all methods have, outside of them."""
MORE_SCALES = (0.3, 0.6, 0.85)
"""Of a method that has no parameter but this."""


def first_tries(method: str, sparse: bool = False) -> list[tuple[Setting, float]]:
    """(settings, scale): four of the method's own, or as many scales where it has none.

    sparse   whether updates change a fifth of the weights, not most of them
    """
    needed = required(get_method(method))
    own = [needed | setting for setting in (OF_SPARSE if sparse else OWN)[method]]
    return [(setting, 1.0) for setting in own] + [(needed, scale) for scale in MORE_SCALES if len(own) == 1]


def later_tries(best: Setting) -> list[tuple[Setting, float]]:
    """The best of them at other scales."""
    return [(best, scale) for scale in SCALES]


def write_merge(merge: Merge, base: Path, experts: dict[str, Path], fishers: dict[str, Path], out: Path) -> None:
    """Writes the recipe, as a user would write it, of a merge kept in fp32: what it is rounded to comes last."""
    contender = Contender(merge.label, merge.method, dict(merge.settings), merge.inputs)
    write_recipe(contender, base, experts, {"fisher": fishers}, out)
    recipe: dict[str, Any] = yaml.safe_load(out.read_text())
    out.write_text(yaml.safe_dump({**recipe, "dtype": "float32"}, sort_keys=False))
