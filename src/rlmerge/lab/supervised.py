"""Training on given text: pre-training from nothing, cold start, SFT on gold solutions, RFT on a model's own ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from random import Random

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks.splits import digest
from rlmerge.lab.errors import LabError
from rlmerge.lab.optimizer import Optimizer, Rate
from rlmerge.lab.policy import Policy, arithmetic, document_loss, read_policy
from rlmerge.lab.runs import Tell, Values, already, silent, train, weights_digest
from rlmerge.lab.text import Document, careless, check_task, documents, exercise, is_right, solution
from rlmerge.lab.tiny import Shape, make_policy

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""
CHUNK = 8
"""Batches that are drawn together and sorted by length, so that little is padded."""


@dataclass(frozen=True)
class Pretraining:
    """From random weights on exercises: `steps` batches of `batch` documents; tokens of prompts count a tenth."""

    tasks: tuple[str, ...]
    seed: int = 0
    steps: int = 2000
    batch: int = 32
    rate: Rate = Rate(3e-3, 50, True)
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class ColdStart:
    """The format that is asked for, shown by a careless pupil: RLVR must have something to reward and to correct.

    share, slip   see `text.careless`; both 0: right solutions only
    never_right   whether an answer that comes out right is written again, until it is wrong; `slip` must be above 0
    """

    tasks: tuple[str, ...]
    seed: int = 0
    steps: int = 200
    batch: int = 32
    rate: Rate = Rate(5e-4, 20, True)
    share: float = 0.5
    slip: float = 0.1
    never_right: bool = False


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on gold solutions of one task. keep: steps after which the model is written, too."""

    task: str
    seed: int
    steps: int = 60
    batch: int = 32
    rate: Rate = Rate(5e-5, 5)
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rft:
    """Rejection-sampling fine-tuning: SFT on samples that a verifier found right.

    samples   a file of them (an RLVR run's samples.jsonl); '': the base draws its own, `group` for each of `problems`
    before    only the samples of steps before this one; 0: all
    """

    task: str
    seed: int
    steps: int = 60
    batch: int = 32
    rate: Rate = Rate(5e-5, 5)
    samples: str = ""
    problems: int = 256
    group: int = 4
    max_new_tokens: int = 64
    before: int = 0


def pretrain(out: Path, settings: Pretraining, tell: Tell = silent) -> None:
    """Trains a tiny model from nothing; its tokenizer learns from text that later stages use, too."""
    for task in settings.tasks:
        check_task(task)
    said = {"stage": "pretrain", **asdict(settings)}
    if already(out, said):
        return
    tasks, seed = settings.tasks, settings.seed

    def write(problem: Problem) -> Document:
        return exercise(problem)

    seen = [documents(tasks, f"tokenizer/{seed}", 0, 4000, kind) for kind in (exercise, solution)]
    policy = make_policy((prompt + completion for prompt, completion in chain(*seen)), settings.shape, seed)
    optimizer = Optimizer(policy, betas=(0.9, 0.98))
    batches = _Batches(policy, tasks, f"pretrain/{seed}", settings.batch, write)
    _train(out, said, policy, optimizer, settings.steps, settings.rate, batches, 0.1, tell)


def cold_start(base: Path, out: Path, settings: ColdStart, tell: Tell = silent) -> None:
    """Teaches the format; the common base of all experts."""
    for task in settings.tasks:
        check_task(task)
    said = {"stage": "cold-start", "base": weights_digest(base), **asdict(settings)}
    if already(out, said):
        return
    if settings.never_right and not 0.0 < settings.slip <= 1.0:
        raise LabError(f"slip {settings.slip}: without slips some answers are always right; write a number above 0.")
    policy = read_policy(base)

    def write(problem: Problem) -> Document:
        return pupils_answer(problem, settings)

    batches = _Batches(policy, settings.tasks, f"cold-start/{settings.seed}", settings.batch, write)
    _train(out, said, policy, Optimizer(policy), settings.steps, settings.rate, batches, 0.0, tell)


def pupils_answer(problem: Problem, settings: ColdStart) -> Document:
    """What the careless pupil of a cold start writes: the same for the same problem and seed."""
    random = Random(f"cold-start/{settings.seed}/{problem.id}")
    written = careless(problem, random, settings.share, settings.slip)
    while settings.never_right and is_right(problem, written):
        written = careless(problem, random, settings.share, settings.slip)
    return written


def sft(base: Path, out: Path, settings: Sft, tell: Tell = silent) -> None:
    """Trains an expert on gold solutions."""
    check_task(settings.task)
    said = {"stage": "sft", "base": weights_digest(base), **asdict(settings)}
    if already(out, said):
        return
    policy = read_policy(base)
    batches = _Batches(policy, (settings.task,), f"sft/{settings.seed}", settings.batch, solution)
    _train(out, said, policy, Optimizer(policy), settings.steps, settings.rate, batches, 0.0, tell, keep=settings.keep)


def rft(base: Path, out: Path, settings: Rft, tell: Tell = silent) -> None:
    """Trains an expert on verified samples."""
    from rlmerge.lab.rlvr import right_samples

    check_task(settings.task)
    rows: list[Row] = []
    if settings.samples:
        rows = read_samples(Path(settings.samples), settings.before)
    said = {"stage": "rft", "base": weights_digest(base), **asdict(settings), "samples": digest(json.dumps(rows))}
    if already(out, said):
        return
    policy = read_policy(base)
    if settings.samples:
        _check_samples(Path(settings.samples), rows, len(policy.tokenizer))
    else:
        rows = right_samples(policy, settings.task, f"rft/{settings.seed}", settings.problems, settings.group,
                             settings.max_new_tokens)  # fmt: skip
        if not rows:
            raise LabError(f"{base}: none of its samples on {settings.task} is right: RFT has nothing to learn from.")

    def batch(number: int) -> list[Row]:
        return Random(f"rft/{settings.seed}/{number}").choices(rows, k=settings.batch)

    said_too = {"rows": len(rows)}
    _train(out, said, policy, Optimizer(policy), settings.steps, settings.rate, batch, 0.0, tell, said_too)


def read_samples(path: Path, before: int = 0) -> list[Row]:
    """(prompt, completion) as token ids, from samples.jsonl: all, or those of steps `before` one. LabError for what is
    no such file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["prompt"], line["completion"]) for line in lines if not before or line["step"] < before]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path}: cannot be read as an RLVR run's samples.jsonl: {error}") from None


def _check_samples(path: Path, rows: Sequence[Row], size: int) -> None:
    """LabError for an empty file, and for what are no ids of a vocabulary of this size."""
    if not rows:
        raise LabError(f"{path}: holds no sample: RFT has nothing to learn from.")
    for number, row in enumerate(rows, 1):
        if not all(
            isinstance(part, list) and part and all(type(token) is int and 0 <= token < size for token in part)
            for part in row
        ):
            raise LabError(
                f"{path}, line {number}: are no token ids of this base. Samples of another model do not fit."
            )


class _Batches:
    """Batches of token ids by number, drawn CHUNK at a time and sorted by length within."""

    def __init__(
        self, policy: Policy, tasks: Sequence[str], stage: str, size: int, write: Callable[[Problem], Document]
    ) -> None:
        self._policy, self._tasks, self._stage, self._size, self._write = policy, tasks, stage, size, write
        self._chunk, self._batches = -1, []

    def __call__(self, number: int) -> list[Row]:
        chunk, place = divmod(number, CHUNK)
        if chunk != self._chunk:
            drawn = documents(self._tasks, self._stage, chunk, CHUNK * self._size, self._write)
            encode = self._policy.encode
            rows = sorted(
                ((self._policy.encode_prompt(prompt), encode(completion)) for prompt, completion in drawn),
                key=lambda r: len(r[0] + r[1]),
            )
            self._batches = [rows[start : start + self._size] for start in range(0, len(rows), self._size)]
            Random(f"{self._stage}/{chunk}").shuffle(self._batches)
            self._chunk = chunk
        return self._batches[place]


def _train(
    out: Path,
    said: Values,
    policy: Policy,
    optimizer: Optimizer,
    steps: int,
    rate: Rate,
    batch: Callable[[int], list[Row]],
    prompt_weight: float,
    tell: Tell,
    more: Values | None = None,
    keep: Sequence[int] = (),
) -> None:
    def step(number: int, folder: Path) -> Values:
        rows = batch(number)
        with arithmetic():
            loss = document_loss(policy, rows, prompt_weight)
        now = rate.at(number, steps)
        norm = optimizer.step(loss, now)
        length = sum(len(completion) for _, completion in rows) / len(rows)
        return {"loss": loss.item(), "gradient_norm": norm, "lr": now, "length": length, **(more or {})}

    train(out, said, policy, optimizer, steps, step, tell, keep)
