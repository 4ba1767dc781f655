"""What a model can do on a task, with as little noise as there can be: greedy answers, samples with common random
numbers, and the probability of texts that are known to be right.

A sample's random numbers depend on the problem and its number alone, so that two models draw with the same ones; the
probability of a text needs none. All in fp32: bf16 products would round the weights, which fp32 merges have not been,
and turn a quarter of the greedy answers of one model into others (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from rlmerge.evaluate.backend import Asked, Sampling
from rlmerge.evaluate.run import TransformersBackend, seed_of, stops_of
from rlmerge.evaluate.tasks import Task, load_task, problems
from rlmerge.evaluate.tasks.splits import digest
from rlmerge.evaluate.verifiers import completed, verify
from rlmerge.lab.linear import by_onednn
from rlmerge.lab.policy import Policy
from rlmerge.lab.texts import Texts, likelihoods

FEW = 4
"""Samples of the problems that are not asked often: many problems say more of the mean than many samples."""


class Measured(TypedDict):
    """Problem by problem, in the order of the task.

    problems   digest of the problems: what may be compared
    greedy     '1' for a right answer, '0' for a wrong one
    right      right ones of `drawn` at temperature 1; perhaps of the first problems alone
    drawn      samples of each of these problems: `samples` of the first, perhaps fewer of the rest
    mass       probability at temperature 1 that the answer is one of the known right texts, of the first problems: from
               below it bounds pass@1, whose noise it does not have, and is it where there is one right text
    trace      mean log-probability of a token of these texts, in nats
    tokens     mean length of the greedy answers
    """

    problems: str
    samples: int
    greedy: str
    right: list[int]
    drawn: NotRequired[list[int]]
    mass: list[float]
    trace: list[float]
    tokens: float


@dataclass(frozen=True)
class Measuring:
    """On which problems, and how often each is asked.

    split      'validation' or 'test', `problems` of it by `seed`; half: all, or those of the half 'A' or 'B' of it
    samples    of a problem at temperature 1, for the first `sampled` of them (0: all)
    deep       of so many problems alone (0: all that are sampled); of the others there are FEW
    without    how many problems of seed 0 are left out: to look again at others
    """

    split: str
    problems: int
    seed: int = 0
    half: str = ""
    samples: int = 0
    sampled: int = 0
    max_new_tokens: int = 64
    batch: int = 64
    without: int = 0
    deep: int = 0

    def task(self, spec: str) -> Task:
        """The problems of a task. A form is in one half, whatever the seed."""
        if not self.half and not self.without:
            return load_task(spec, self.split, self.problems, self.seed)
        left_out = {one.canonical for one in islice(problems(spec, self.split), self.without)}
        fitting = (
            one
            for one in problems(spec, self.split, self.seed)
            if (not self.half or half_of(one.canonical) == self.half) and one.canonical not in left_out
        )
        found, chosen = load_task(spec, self.split, 1, self.seed), list(islice(fitting, self.problems))
        about = {"half": self.half, "count": len(chosen), "problems": digest("\n".join(map(repr, chosen)), 16)}
        return replace(found, problems=chosen, settings=found.settings | about)


def half_of(canonical: str) -> str:
    """'A' or 'B', by a hash of the canonical form."""
    return "AB"[int(digest("rlmerge/half/" + canonical), 16) % 2]


def measured(
    model: Path,
    how: Measuring,
    tasks: Sequence[str],
    texts: Mapping[str, Texts] | None = None,
    scaled: tuple[Path, float] | None = None,
    rounded: bool = False,
) -> dict[str, Measured]:
    """What the model of a folder, or a recipe's merge in memory, can do on some tasks.

    texts    right texts of the first problems of each task; without them neither `mass` nor `trace` is measured
    scaled   (base, factor): what the model's difference from the base is multiplied by, in fp32
    rounded  whether the weights are rounded to bf16 after that, as if they had been stored
    """
    from rlmerge.evaluate.run import load_model

    policy = Policy(*load_model(model))
    policy.model.eval()
    if scaled is not None and scaled[1] != 1.0:
        base, factor = scaled
        _scale(policy.model, load_model(base)[0], factor)
    if rounded:
        for parameter in policy.model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return {spec: measure(policy, how.task(spec), how, (texts or {}).get(spec, ())) for spec in tasks}


@torch.no_grad()
def _scale(model: torch.nn.Module, base: torch.nn.Module, factor: float) -> None:
    """θ = θ0 + factor · (θ − θ0), in place."""
    start = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(start[name].float() + factor * (parameter.float() - start[name].float()))


def measure(policy: Policy, task: Task, how: Measuring, texts: Texts = ()) -> Measured:
    """Greedy answers, samples, and the probability of right texts."""
    with by_onednn(policy.model):
        return _measure(policy, task, how, texts)


def _measure(policy: Policy, task: Task, how: Measuring, texts: Texts) -> Measured:
    samples, batch = how.samples, how.batch
    greedy, lengths = _answers(policy, task, [1] * len(task.problems), Sampling(0.0, how.max_new_tokens), batch)
    right, drawn = np.zeros(0, np.int64), list[int]()
    if samples:
        some = replace(task, problems=task.problems[: how.sampled or None])
        deep = how.deep or len(some.problems)
        drawn = [samples if place < deep else min(FEW, samples) for place in range(len(some.problems))]
        verdicts, _ = _answers(policy, some, drawn, Sampling(1.0, how.max_new_tokens), batch)
        right = np.add.reduceat(verdicts.astype(np.int64), np.cumsum([0, *drawn[:-1]]))
    mass, trace = likelihoods(policy, task, texts)
    return {
        "problems": str(task.settings["problems"]),
        "samples": samples,
        "greedy": "".join(str(int(verdict)) for verdict in greedy),
        "right": right.tolist(),
        "drawn": drawn,
        "mass": [round(value, 7) for value in mass],
        "trace": [round(value, 5) for value in trace],
        "tokens": round(float(np.mean(lengths)), 2),
    }


def _answers(
    policy: Policy, task: Task, samples: Sequence[int], sampling: Sampling, batch: int
) -> tuple[NDArray[np.bool_], list[int]]:
    """Verdicts of so many samples of each problem, those of a problem together, and the lengths of the answers."""
    asked = [
        Asked((place, number), problem, seed_of(0, task.name, problem.id, number), stops_of(problem))
        for place, (problem, count) in enumerate(zip(task.problems, samples, strict=True))
        for number in range(count)
    ]
    made = {one.key: one for one in TransformersBackend(policy.model, policy.tokenizer, batch).run(asked, sampling)}
    ordered = [made[one.key] for one in asked]
    problems = [one.problem for one in asked]
    texts = [completed(one.text, one.finish, problem) for one, problem in zip(ordered, problems, strict=True)]
    verdicts = np.array([verdict.correct for verdict in verify(texts, problems)], bool)
    return verdicts, [one.tokens for one in ordered]


def drawn_of(measured: Measured) -> NDArray[np.int64]:
    """Samples of each problem that was sampled."""
    return np.array(measured.get("drawn") or [measured["samples"]] * len(measured["right"]), np.int64)


def scores_of(measured: Sequence[Measured], metric: str) -> np.ndarray:
    """A table [models, problems] of one metric: 'greedy', 'sampled' (share of right samples), 'mass' or 'trace'."""
    if metric == "greedy":
        return np.array([[float(letter) for letter in one["greedy"]] for one in measured])
    if metric == "sampled":
        return np.array([np.array(one["right"]) / drawn_of(one) for one in measured])
    return np.array([one["mass" if metric == "mass" else "trace"] for one in measured])
