"""Sizes of the study: its confirmation, its rehearsal on one pair, and the same shape on a tiny model in minutes."""

from __future__ import annotations

from dataclasses import replace

from rlmerge.lab.presets import SMALL, TINY
from rlmerge.lab.study import StudyPreset
from rlmerge.lab.study_merges import BASELINES

METHODS = ("sar", *BASELINES)
SECONDS = {
    "base": 900,
    "texts": 500,
    "rlvr": 1650,
    "twice": 3300,
    "joint": 3300,
    "sft": 600,
    "rft": 600,
    "fisher": 120,
    "permuted": 15,
    "jitter": 15,
    "match": 310,
    "measure": 275,
    "both": 160,
    "own": 105,
    "tune": 1000,
    "frozen": 1,
    "geometry": 60,
    "merge": 130,
    "half": 70,
    "sampled": 190,
    "clean": 1,
}
"""What cells take on one thread, estimated from the pilot."""

CONFIRMATION = StudyPreset(
    **{
        **vars(SMALL), "name": "confirmation", "seeds": (11, 12, 13, 14, 15, 16), "problems": 200, "fisher": 96,
        "seconds": {**SMALL.seconds, **SECONDS}, "methods": METHODS,
    },
    development=10, controls=("twice", "average"), controlled=(11,), sampled=30, texts=60,
    split="test", half="A", seal="to be drawn when the protocol is frozen",
)  # fmt: skip
"""What docs/study/protocol.md describes. Seeds 1 to 6 are the pilot's, whose experts have been seen. It is
not run before that page has been read by others."""

REHEARSAL = replace(CONFIRMATION, name="rehearsal", seeds=(10,), split="validation", half="", seal="", controlled=(10,))
"""The development pair alone, on validation problems."""

SKETCH = StudyPreset(
    **{
        **vars(TINY), "name": "sketch", "seeds": (0, 1), "steps": 40, "problems": 100, "fisher": 64,
        "seconds": {**TINY.seconds, **dict.fromkeys(SECONDS, 10.0)}, "methods": METHODS,
    },
    kept=(10, 20, 30, 40), matching=60, averaged=(20, 30, 40), tuning=60, samples=4, texts=40, attempts=16,
    controlled=(0,),
)  # fmt: skip
"""A tiny model, minutes: that the parts work together, and no evidence."""

PRESETS = {preset.name: preset for preset in (CONFIRMATION, REHEARSAL, SKETCH)}
