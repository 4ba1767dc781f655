"""A training run on disk: a folder that appears whole, one log line a step, and a state to go on from after a kill.

    OUT/bf16, OUT/fp32    the model: as trained (rounded to bf16), and its fp32 master weights
    OUT/log.jsonl         one object a step: loss or reward, KL, length, entropy, learning rate, seconds
    OUT/curve.svg         the same as a plot
    OUT/run.json          what was trained: stage, base, settings, versions
    OUT/steps/N/…         the model after N steps, where a run keeps some

Until the end all this is in OUT.unfinished. A step is a function of weights, optimizer and its number alone, so a run
that is continued ends with the same weights as one that was never stopped (on the same machine).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from rlmerge.errors import OutputError
from rlmerge.execute.safe_files import take_lock, write_inside
from rlmerge.lab.errors import LabError
from rlmerge.lab.optimizer import Optimizer
from rlmerge.lab.policy import Policy, fast_bf16, write_model
from rlmerge.version import VERSION

SAVE_EVERY = 20.0
"""Seconds between saved states: what a kill can cost. More where it takes long, so that it takes a thirtieth."""
LOG, NOTE, STATE, MADE = "log.jsonl", "run.json", "state.safetensors", "made_by"

Values = dict[str, Any]
Tell = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, in all, and what the last one measured; seconds of this call and its first step."""

    out: Path
    step: int
    steps: int
    values: Values
    seconds: float
    first: int

    @property
    def line(self) -> str:
        """For a terminal: 'code-1: step 40 of 100, reward 0.552, 0.71 s a step, 43 s left'."""
        each = self.seconds / max(1, self.step - self.first)
        measured = ", ".join(f"{key} {self.values[key]:.3f}" for key in ("reward", "loss") if key in self.values)
        left = f"{each:.2f} s a step, {each * (self.steps - self.step):.0f} s left"
        return f"{self.out.name}: step {self.step} of {self.steps}, {measured}, {left}"


def silent(progress: Progress) -> None:
    """Tells nobody."""


def teller() -> Tell:
    """Tells a person on stderr: one live line on a terminal, else a line every ten seconds."""
    told = 0.0

    def tell(progress: Progress) -> None:
        nonlocal told
        live, now, last = sys.stderr.isatty(), time.monotonic(), progress.step == progress.steps
        if now - told >= (0.2 if live else 10.0) or last:
            told = now
            end = "\n" if last or not live else ""
            print(("\r\x1b[K" if live else "") + progress.line, end=end, file=sys.stderr, flush=True)

    return tell


def weights_digest(folder: Path) -> str:
    """xxh3-128 of a model's weight files: which base a run is of, wherever it lies."""
    state = xxhash.xxh3_128()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                state.update(piece)
    return state.hexdigest()


def finished(out: Path) -> Values | None:
    """run.json of a run, or None. LabError for one that is no JSON object."""
    if not (out / NOTE).is_file():
        return None
    try:
        found = json.loads((out / NOTE).read_text())
        if not isinstance(found, dict):
            raise ValueError
    except ValueError:
        raise LabError(f"{out / NOTE}: is no JSON object, so this is no run of the lab. Name another folder.") from None
    return found


def already(out: Path, said: Values) -> bool:
    """Whether `out` holds this very run, finished. Raises LabError if it holds anything else."""
    if not out.exists():
        return False
    found = finished(out) if out.is_dir() else None
    if found is None:
        raise LabError(f"{out}: exists and is no run of the lab, which writes over nothing. Name another folder.")
    wanted = json.loads(json.dumps(said))
    differs = sorted(key for key in wanted if found.get(key) != wanted[key])
    if differs:
        raise LabError(
            f"{out}: holds a finished run with another {', '.join(differs)}. Name another folder, or remove this one."
        )
    for name in (STATE, "lock"):  # a kill right after the renaming leaves them
        (out / name).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def unfinished(out: Path, said: Values) -> Iterator[Path]:
    """OUT.unfinished, locked, of this run alone; gets its name at the end. LabError where another run is in the way."""
    folder = out.absolute().with_name(f"{out.name}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}.") from None
    if lock is None:
        raise LabError(f"{folder}: another process trains there. Wait for it, or stop it.")
    try:
        _claim(folder, json.loads(json.dumps(said)))
        yield folder
        try:
            os.rename(folder, out)
        except OSError as error:
            raise OutputError(
                f"{out}: cannot take the place of {folder.name}: {error.strerror}. Something appeared there meanwhile; "
                "move it, and start the same command again: the run is done and kept."
            ) from None
        already(out, said)
    finally:
        os.close(lock)


def _claim(folder: Path, wanted: Values) -> None:
    """Notes down in a fresh folder what it is for; refuses one that is for something else."""
    found = finished(folder)
    if found is not None:
        if {key: value for key, value in found.items() if key != MADE} != wanted:
            raise LabError(
                f"{folder}: an unfinished run of other settings. Finish it with its own command, or remove it."
            )
    elif {file.name for file in folder.iterdir()} - {"lock", f"{NOTE}.part"}:
        raise LabError(f"{folder}: is in the way, and is no unfinished run. Move it elsewhere.")
    else:
        write_inside(folder, NOTE, json.dumps(wanted, indent=1).encode())


def train(
    out: Path,
    said: Values,
    policy: Policy,
    optimizer: Optimizer,
    steps: int,
    step: Callable[[int, Path], Values],
    tell: Tell = silent,
    keep: Sequence[int] = (),
) -> None:
    """Runs the steps that are left, and writes the models.

    said   what is trained: another `said` is another run
    step   (its number, the run's folder) -> what it measured; a function of the weights and the number alone
    keep   after how many steps the model is written, too
    """
    with unfinished(out, said) as folder:
        first = _restore(folder, optimizer)
        started = saved = time.monotonic()
        pause = SAVE_EVERY
        values: Values = {}
        with (folder / LOG).open("a", buffering=1) as log:
            for number in range(first, steps):
                before = time.monotonic()
                values = step(number, folder)
                if not math.isfinite(values.get("loss", 0.0)):
                    raise LabError(
                        f"{out}: the loss of step {number} is {values['loss']}: training has diverged. Lower the "
                        f"learning rate, and remove {folder.name}."
                    )
                if number + 1 in keep:  # before the state, which must not be ahead of it
                    write_models(folder / "steps" / str(number + 1), policy, optimizer)
                now = time.monotonic()
                log.write(log_line({"step": number, **values, "seconds": now - before}))
                tell(Progress(out, number + 1, steps, values, now - started, first))
                if now - saved >= pause and number + 1 < steps:
                    _save(folder, optimizer, number + 1)
                    saved = time.monotonic()
                    pause = max(SAVE_EVERY, 30.0 * (saved - now))
        _save(folder, optimizer, steps)  # so that a kill while models are written costs no step
        finish(folder, said, policy, optimizer)


def log_line(values: Values) -> str:
    """One line of the log, floats rounded to six digits."""
    return (
        json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()})
        + "\n"
    )


def _save(folder: Path, optimizer: Optimizer, step: int) -> None:
    part = folder / f"{STATE}.part"
    save_file({name: tensor.contiguous() for name, tensor in optimizer.state().items()}, part, {"step": str(step)})
    os.replace(part, folder / STATE)


def _restore(folder: Path, optimizer: Optimizer) -> int:
    """The step to go on with."""
    step = 0
    if (folder / STATE).exists():
        with safe_open(folder / STATE, "pt") as file:
            step = int((file.metadata() or {})["step"])
            optimizer.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    truncate(folder, step)
    return step


def truncate(folder: Path, step: int) -> None:
    """Cuts off the records what steps wrote that will be made again: all from this one on."""
    for record in folder.glob("*.jsonl"):
        kept = []
        for line in record.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] >= step:
                break
            kept.append(line)
        write_inside(folder, record.name, "".join(kept).encode())


def write_models(folder: Path, policy: Policy, optimizer: Optimizer) -> None:
    """The model as trained (bf16), and its fp32 masters, as two folders."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        shutil.rmtree(folder / name, ignore_errors=True)
        weights = dict(zip(optimizer.names, (master.to(dtype) for master in optimizer.masters)))
        write_model(policy, weights, folder / name)


def finish(folder: Path, said: Values, policy: Policy, optimizer: Optimizer) -> None:
    """Writes the models, the curve and the note of what made them."""
    from rlmerge.lab.curves import write_curve

    write_models(folder, policy, optimizer)
    write_curve([folder / LOG], folder / "curve.svg")
    made = {"rlmerge": VERSION, "torch": torch.__version__, "arithmetic": "bf16" if fast_bf16() else "fp32"}
    write_inside(folder, NOTE, json.dumps({**said, MADE: made}, indent=1).encode())
