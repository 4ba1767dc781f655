"""Sizes of the study: its confirmation, its rehearsal on one pair, and the same shape on a tiny model in minutes."""

from __future__ import annotations

from dataclasses import replace

from rlmerge.lab.presets import SMALL, TINY
from rlmerge.lab.regimes import PILOT, RATE, STEPS
from rlmerge.lab.study import CONTROLS, StudyPreset
from rlmerge.lab.study_merges import BASELINES

METHODS = ("sar", *BASELINES)
SECONDS = {
    "base": 60,
    "texts": 60,
    "cold": 60,
    "rlvr": 200,
    "other": 200,
    "twice": 400,
    "joint": 400,
    "sft": 60,
    "rft": 60,
    "fisher": 20,
    "permuted": 2,
    "jitter": 2,
    "match": 60,
    "both": 40,
    "own": 20,
    "tune": 160,
    "frozen": 1,
    "geometry": 5,
    "merge": 30,
    "half": 15,
    "clean": 1,
}
"""What cells take on one thread of two busy cores: medians of the rehearsal."""

SECONDS_OF_SMOLLM2 = {
    "base": 900, "texts": 500, "rlvr": 1650, "sft": 600, "fisher": 120, "both": 240, "tune": 560,
    "frozen": 1, "permuted": 15, "jitter": 15, "geometry": 60, "merge": 190, "clean": 1,
}  # fmt: skip
"""The same of SmolLM2, on a processor that has bf16 products, estimated from single cells."""

CONFIRMATION = StudyPreset(
    **{
        **vars(TINY), "name": "confirmation", "seeds": tuple(range(11, 23)), "problems": 400,
        "lr": RATE, "steps": STEPS, "prompts": PILOT.prompts, "never_right": True,
        "seconds": {**TINY.seconds, **SECONDS}, "methods": METHODS,
    },
    development=10, controls=CONTROLS, controlled=(11, 12), kept=(5, *range(10, 101, 10)),
    samples=16, sampled=100, texts=200, split="test", half="A", seal="to be drawn when the protocol is frozen",
)  # fmt: skip
"""What docs/study/protocol.md describes: the regime in which the pilot saw averaging fail. Seeds 1 to 7 are those of
the pilot, whose experts have been seen. It is not run before that page has been read by others."""

REPLICATION = StudyPreset(
    **{
        **vars(SMALL), "name": "replication", "seeds": tuple(range(11, 17)), "problems": 200, "fisher": 96,
        "seconds": {**SMALL.seconds, **SECONDS_OF_SMOLLM2}, "methods": ("sar", "ties", "ram", "task_arithmetic"),
    },
    development=10, arms=("rlvr", "sft"), controls=(), sampled=15, texts=60, tuning=100,
    situations=("fusion",), ablations=False, split="test", half="A", seal=CONFIRMATION.seal,
)  # fmt: skip
"""H1 to H4 in fusion once more, from a language model: as much of the study as hours allow there."""

REHEARSAL = replace(
    CONFIRMATION, name="rehearsal", seeds=(10,), split="validation", half="", seal="", controlled=(10,), problems=300
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

PRESETS = {preset.name: preset for preset in (CONFIRMATION, REPLICATION, REHEARSAL, SKETCH)}
