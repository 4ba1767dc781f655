"""What `rlmerge lab run` makes: `tiny`, from nothing in minutes, and `small`, from SmolLM2-135M in hours."""

from __future__ import annotations

from dataclasses import dataclass

from rlmerge.errors import did_you_mean
from rlmerge.lab.errors import LabError

KINDS = ("rlvr", "sft", "rft")
DOMAINS = ("math", "code")


@dataclass(frozen=True)
class Preset:
    """Sizes of a run of the whole lab.

    tasks      the task of each domain
    lr, steps  of every expert, whatever its kind
    prompts    problems of an RLVR step; group: completions of each; batch: documents of the other kinds
    fisher     sequences of a Fisher, and of Gram matrices
    problems   of each domain, to evaluate on
    seconds    what a cell of a kind takes, for `rlmerge lab plan`, on one thread ('pretrain': on two); measured for
               tiny, estimated for small from single steps
    kinds      of experts
    methods    labels of the contenders that are merged; empty: all
    never_right   whether the cold start's answers are all wrong
    """

    name: str
    tasks: dict[str, str]
    seeds: tuple[int, ...]
    pretraining_steps: int
    cold_steps: int
    cold_lr: float
    careless: float
    slip: float
    lr: float
    steps: int
    prompts: int
    group: int
    batch: int
    max_new_tokens: int
    fisher: int
    problems: int
    eval_batch: int
    seconds: dict[str, float]
    kinds: tuple[str, ...] = KINDS
    methods: tuple[str, ...] = ()
    never_right: bool = False


TINY = Preset(
    name="tiny",
    tasks={"math": "math:0", "code": "code:0"},
    seeds=(1, 2),
    pretraining_steps=2000,
    cold_steps=200,
    cold_lr=5e-4,
    careless=0.5,
    slip=0.1,
    lr=1e-4,
    steps=100,
    prompts=16,
    group=8,
    batch=32,
    max_new_tokens=64,
    fisher=256,
    problems=400,
    eval_batch=200,
    seconds={
        "pretrain": 170,
        "base": 25,
        "rlvr": 75,
        "sft": 20,
        "rft": 25,
        "fisher": 10,
        "gram": 8,
        "eval": 8,
        "merge": 4,
    },
)

SMALL = Preset(
    name="small",
    tasks={"math": "math:1", "code": "code:trace:1"},
    seeds=(1, 2),
    pretraining_steps=0,
    cold_steps=150,
    cold_lr=1e-4,
    careless=0.5,
    slip=0.1,
    lr=1e-5,
    steps=100,
    prompts=8,
    group=8,
    batch=32,
    max_new_tokens=96,
    fisher=256,
    problems=400,
    eval_batch=64,
    seconds={
        "pretrain": 60,
        "base": 900,
        "rlvr": 2000,
        "sft": 700,
        "rft": 900,
        "fisher": 300,
        "gram": 200,
        "eval": 300,
        "merge": 300,
    },
)

PRESETS = {preset.name: preset for preset in (TINY, SMALL)}


def get_preset(name: str) -> Preset:
    """The preset of that name. LabError for another."""
    if name not in PRESETS:
        raise LabError(f"preset {name!r}: unknown.{did_you_mean(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    return PRESETS[name]
