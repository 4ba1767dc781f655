"""What the pilot tries: the regimes of G0, from SmolLM2-135M, in the order in which they are run.

Each says why averaging might fail there. `plumbing` is the same shape on a tiny model, in minutes, and no evidence.
"""

from __future__ import annotations

from rlmerge.lab.pilot import ColdBase, Expert, PilotPreset, Regime
from rlmerge.lab.presets import SMALL, TINY

MATH, CODE, WRITE = "math:1", "code:trace:1", "code:write:1"
BASES = (ColdBase("writer", (MATH, WRITE)), ColdBase("second", (MATH, CODE), seed=1, texts="base"))
"""The common base has seen no function that is to be written, and solves none of 300: RLVR has nothing to reward there.
So a far domain has a cold start of its own."""


def _seeds(letter: str, task: str, seeds: range, **settings: object) -> tuple[Expert, ...]:
    return tuple(Expert(f"{letter}{seed}", task, seed, **settings) for seed in seeds)  # type: ignore[arg-type]


REGIMES = (
    Regime(
        "seeds",
        "the pilot of before, where answers have steps: seeds of two domains at 1e-5, two to six experts",
        _seeds("m", MATH, range(1, 4)) + _seeds("c", CODE, range(1, 4)),
        (
            ("pair1", ("m1", "c1")),
            ("pair2", ("m2", "c2")),
            ("pair3", ("m3", "c3")),
            ("math", ("m1", "m2", "m3")),
            ("code", ("c1", "c2", "c3")),
            ("four", ("m1", "m2", "c1", "c2")),
            ("six", ("m1", "m2", "m3", "c1", "c2", "c3")),
        ),
        masters=True,
    ),
    Regime(
        "far",
        "domains that are far: sums, and functions to be written; code traces turned out to be sums, too",
        (Expert("mw1", MATH, 1, base="writer"), Expert("ww1", WRITE, 1, base="writer")),
        (("fusion", ("mw1", "ww1")),),
    ),
    Regime(
        "hot",
        "three times the learning rate: larger updates that fight where they overlap",
        _seeds("mh", MATH, range(1, 2), lr=3e-5) + _seeds("ch", CODE, range(1, 2), lr=3e-5),
        (("fusion", ("mh1", "ch1")),),
    ),
    Regime(
        "supervised",
        "no RLVR at all, at the same rate and steps: SFT on gold solutions, and on what RLVR runs drew and got right",
        _seeds("m", MATH, range(1, 3))
        + _seeds("c", CODE, range(1, 3))
        + tuple(
            Expert(f"{letter}{kind[0]}{seed}", task, seed, kind=kind, of=f"{letter}{seed}" if kind == "rft" else "")
            for kind in ("sft", "rft")
            for letter, task in (("m", MATH), ("c", CODE))
            for seed in (1, 2)
        ),
        tuple(
            (f"{kind}{seed}", (f"m{kind[0]}{seed}", f"c{kind[0]}{seed}")) for kind in ("sft", "rft") for seed in (1, 2)
        ),
        merges=("sum", "mean", "ties"),
        kept=("fp32",),
    ),
    Regime(
        "mixed",
        "experts of one task that differ by more than a seed: temperature, advantage, curriculum",
        (
            Expert("m1", MATH, 1),
            Expert("mt", MATH, 4, temperature=0.7),
            Expert("mr", MATH, 5, advantage="rloo"),
            Expert("mc", MATH, 6, curriculum=("math:0", MATH)),
        ),
        (("math", ("m1", "mt", "mr", "mc")),),
    ),
    Regime(
        "cold",
        "experts of one task from two cold starts, which differ by their data, merged onto what both began with",
        (Expert("m1", MATH, 1), Expert("mk1", MATH, 2, base="second")),
        (("math", ("m1", "mk1")),),
        onto="pretrain",
    ),
    Regime(
        "cold-control",
        "the two cold starts themselves, merged in the same way: what of the loss is theirs",
        (Expert("base", MATH, 0, kind="cold"), Expert("second", MATH, 1, kind="cold", base="second")),
        (("math", ("base", "second")),),
        onto="pretrain",
        merges=("sum", "mean", "ties"),
        kept=("fp32",),
    ),
    Regime(
        "lora",
        "LoRAs of rank 16 at twenty times the rate",
        (Expert("ma1", MATH, 1, lr=2e-4, lora=16), Expert("ca1", CODE, 1, lr=2e-4, lora=16)),
        (("fusion", ("ma1", "ca1")),),
    ),
    Regime(
        "long",
        "twice the steps: entropy has fallen by then, or as far as that goes here",
        (Expert("ml1", MATH, 1, steps=200), Expert("cl1", CODE, 1, steps=200)),
        (("fusion", ("ml1", "cl1")),),
    ),
)

SECONDS = {
    "base": 900, "cold": 900, "texts": 900, "rlvr": 1500, "sft": 700, "rft": 700, "fisher": 120, "measure": 350,
    "geometry": 60, "merge": 180, "again": 150,
}  # fmt: skip
"""What cells take, estimated."""

PILOT = PilotPreset(
    **{**vars(SMALL), "name": "pilot", "problems": 300, "fisher": 96, "seconds": {**SMALL.seconds, **SECONDS}},
    regimes=REGIMES,
    bases=BASES,
)

PLUMBING = PilotPreset(
    **{
        **vars(TINY),
        "name": "plumbing",
        "problems": 200,
        "seconds": {**TINY.seconds, "measure": 15, "texts": 15, "cold": 25, "again": 5, "geometry": 2, "merge": 15},
    },
    regimes=(
        Regime(
            "seeds",
            "that the parts work together",
            (
                Expert("m1", "math:0", 1),
                Expert("m2", "math:0", 2),
                Expert("c1", "code:0", 1),
                Expert("c2", "code:0", 2),
            ),
            (("pair1", ("m1", "c1")), ("pair2", ("m2", "c2")), ("four", ("m1", "m2", "c1", "c2"))),
        ),
    ),
)
