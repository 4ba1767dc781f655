"""Sizes of the study: its confirmation, its rehearsal on one pair, and the same shape on a tiny model in minutes."""

from __future__ import annotations

from dataclasses import replace

from rlmerge.lab.presets import SMALL, TINY
from rlmerge.lab.regimes import PILOT, RATE, SMALL_WRONG, STEPS
from rlmerge.lab.study import CONTROLS, StudyPreset
from rlmerge.lab.study_merges import BASELINES

METHODS = ("sar", *BASELINES)
SECONDS = {
    "pretrain": 480, "base": 300, "cold": 300, "texts": 90, "rlvr": 125, "other": 125, "twice": 250, "joint": 250,
    "sft": 50, "rft": 45, "fisher": 40, "permuted": 1, "jitter": 1, "match": 30, "both": 16, "own": 8, "tune": 62,
    "frozen": 1, "geometry": 8, "merge": 14, "half": 8, "clean": 1,
}  # fmt: skip
"""What cells take on one thread of two busy cores: medians of the rehearsal; of measuring, timed after that had been
made faster (docs/log.md, *What a cell of the small model costs*)."""

SECONDS_OF_SMOLLM2 = {
    "base": 730, "texts": 420, "rlvr": 1740, "sft": 1120, "fisher": 420, "both": 275, "tune": 800, "geometry": 60,
    "merge": 200, "frozen": 1, "clean": 1,
}  # fmt: skip
"""The same of SmolLM2 without bf16 products, as `smollm2-rehearsal` took them; of measuring, times the problems."""

FROZEN = {
    "sar": {"setting": {"density": 1.0}, "scale": 1.4},
    "task_arithmetic": {"setting": {"weight": 1.0}, "scale": 0.85},
    "ties": {"setting": {"weight": 1.0, "density": 0.5}, "scale": 1.4},
    "dare_ties": {"setting": {"weight": 1.0, "density": 1.0}, "scale": 1.0},
    "ram": {"setting": {"epsilon": 0.0003}, "scale": 1.4},
    "ramplus_tl": {"setting": {"r": 2.0}, "scale": 1.4},
    "fisher": {"setting": {"floor": 0.0001}, "scale": 1.4},
}
"""What the tuning of part 1's rehearsal chose (docs/study/rehearsal.md)."""

FROZEN_OF_SMOLLM2 = {
    "sar": {"setting": {"density": 0.5}, "scale": 1.0},
    "ties": {"setting": {"weight": 1.0, "density": 0.1}, "scale": 1.0},
    "ram": {"setting": {"epsilon": 1e-05}, "scale": 0.7},
    "task_arithmetic": {"setting": {"weight": 1.0}, "scale": 0.6},
}
"""What that of part 2's chose (docs/study/rehearsal-smollm2.md). SmolLM2 wants smaller updates than the small model, by
every method; part 1's choices for SAR and TIES keep half as much there as the defaults do, RAM's as much."""

CONFIRMATION = StudyPreset(
    **{
        **vars(TINY), "name": "confirmation", "seeds": tuple(range(11, 23)), "problems": 400,
        "lr": RATE, "steps": STEPS, "prompts": PILOT.prompts, "never_right": True,
        "seconds": {**TINY.seconds, **SECONDS}, "methods": METHODS,
    },
    development=10, controls=CONTROLS, controlled=(11,), kept=(5, *range(10, 101, 10)),
    samples=16, sampled=140, deep=20, texts=200, split="test", half="A", seal="to be drawn when the protocol is frozen",
    frozen=FROZEN,
)  # fmt: skip
"""What docs/study/protocol.md describes: the regime in which the pilot saw averaging fail. Seeds 1 to 7 are those of
the pilot, whose experts have been seen. It is not run before that page has been read by others."""

REPLICATION = StudyPreset(
    **{
        **vars(SMALL_WRONG), "name": "replication", "seeds": tuple(range(23, 29)), "problems": 160, "fisher": 64,
        "seconds": {**SMALL.seconds, **SECONDS_OF_SMOLLM2}, "methods": ("sar", "ties", "ram", "task_arithmetic"),
    },
    development=10, arms=("rlvr", "sft"), controls=(), samples=4, sampled=40, texts=60, attempts=16, tuning=150,
    situations=("fusion",), ablations=False, split="test", half="A", seal=CONFIRMATION.seal, sparse=True,
    frozen=FROZEN_OF_SMOLLM2,
)  # fmt: skip
"""H1 to H4 in fusion once more, from a language model: part 1's tasks and kind of cold start, other seeds, as much of
the study as hours allow. The pilot's two pairs from this base: docs/study/pilot-smollm2-wrong.md."""

REHEARSAL = replace(
    CONFIRMATION,
    name="rehearsal",
    seeds=(10,),
    split="validation",
    half="",
    seal="",
    controlled=(10,),
    problems=300,
    sampled=100,
    deep=0,
    frozen=None,
)
"""The development pair alone, on validation problems, of which there are fewer."""

SKETCH = StudyPreset(
    **{
        **vars(TINY), "name": "sketch", "seeds": (0, 1), "steps": 40, "problems": 100, "fisher": 64,
        "seconds": {**TINY.seconds, **dict.fromkeys(SECONDS, 10.0)}, "methods": METHODS,
    },
    kept=(10, 20, 30, 40), matching=60, averaged=(20, 30, 40), tuning=60, samples=4, texts=40, attempts=16,
    controlled=(0,),
)  # fmt: skip
"""A tiny model, minutes: that the parts work together, and no evidence."""

REHEARSAL_OF_PART_2 = replace(
    REPLICATION,
    name="smollm2-rehearsal",
    seeds=(10,),
    problems=100,
    sampled=20,
    texts=40,
    split="validation",
    half="",
    seal="",
    frozen=None,
)
"""The development pair of SmolLM2, on fewer problems, of validation."""

PRESETS = {preset.name: preset for preset in (CONFIRMATION, REPLICATION, REHEARSAL, REHEARSAL_OF_PART_2, SKETCH)}
