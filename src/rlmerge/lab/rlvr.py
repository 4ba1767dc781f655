"""RLVR: on-policy GRPO with a verifiable reward, by a short loop of our own or by TRL's GRPOTrainer.

The loop samples with `evaluate.generate` and runs prompts once for a group; `lab.trl` does the same through TRL, and a
test holds their losses and gradients together. docs/lab.md has what a step of each costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlmerge.evaluate.backend import Sampling
from rlmerge.evaluate.generate import Generator, Request, Sample
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.run import seed_of
from rlmerge.evaluate.verifiers import completed, verify
from rlmerge.lab.errors import LabError
from rlmerge.lab.optimizer import Optimizer, Rate
from rlmerge.lab.policy import (
    Policy,
    add_lora,
    arithmetic,
    check_logits,
    completion_logits,
    log_probabilities,
    read_policy,
)
from rlmerge.lab.runs import Tell, Values, already, silent, train, weights_digest
from rlmerge.lab.text import batch_of, check_task

TRAINERS = ("fast", "trl")
ADVANTAGES = ("grpo", "centred", "rloo")
"""reward − mean, divided by the group's deviation (GRPO), or not (Dr. GRPO); or less the mean of the others (RLOO)."""


@dataclass(frozen=True)
class Rlvr:
    """One RLVR run: `prompts` problems a step, `group` completions each, one AdamW step a batch.

    temperature  of the samples, and of the probabilities that are trained: the policy is the tempered one
    advantage    of ADVANTAGES
    curriculum   tasks that follow each other in equal parts of the run; empty: `task` all along
    lora         rank of a LoRA that is trained instead of all weights; 0: none
    keep         after how many steps the model is written, too (OUT/steps/N)
    """

    task: str
    seed: int
    steps: int = 100
    prompts: int = 16
    group: int = 8
    rate: Rate = Rate(1e-5, 5)
    max_new_tokens: int = 64
    trainer: str = "fast"
    temperature: float = 1.0
    advantage: str = "grpo"
    curriculum: tuple[str, ...] = ()
    lora: int = 0
    keep: tuple[int, ...] = ()

    def task_at(self, step: int) -> str:
        """Whose problems a step has."""
        tasks = self.curriculum or (self.task,)
        return tasks[min(step * len(tasks) // max(1, self.steps), len(tasks) - 1)]


def rlvr(base: Path, out: Path, settings: Rlvr, tell: Tell = silent) -> None:
    """Trains one expert from `base`; verified samples are kept in OUT/samples.jsonl, for RFT.

    Advantages are normalised within the group (GRPO, arXiv 2402.03300); a sequence counts by the sum of its
    log-probabilities over a constant length (Dr. GRPO, arXiv 2503.20783). On-policy: each batch serves one step, so
    there is no ratio to clip; no KL term in the loss, but the KL from the base is measured.
    """
    for task in (settings.task, *settings.curriculum):
        check_task(task)
    said = {"stage": "rlvr", "base": weights_digest(base), **asdict(settings)}
    if settings.trainer not in TRAINERS:
        raise LabError(f"trainer {settings.trainer!r}: unknown. There are: {', '.join(TRAINERS)}.")
    if settings.group < 2:
        raise LabError(f"group {settings.group}: GRPO compares completions of one prompt; ask for at least 2.")
    if settings.advantage not in ADVANTAGES:
        raise LabError(f"advantage {settings.advantage!r}: unknown. There are: {', '.join(ADVANTAGES)}.")
    if not 0.0 < settings.temperature < float("inf"):
        raise LabError(f"temperature {settings.temperature}: RLVR samples; write a number above 0.")
    if settings.trainer == "trl" and settings != Rlvr(
        settings.task, settings.seed, settings.steps, settings.prompts, settings.group, settings.rate,
        settings.max_new_tokens, "trl",
    ):  # fmt: skip
        raise LabError("trainer 'trl': knows no advantage, temperature, curriculum, LoRA or kept steps here. Use fast.")
    if already(out, said):
        return
    if settings.trainer == "trl":
        from rlmerge.lab.trl import rlvr_by_trl

        rlvr_by_trl(base, out, said, settings, tell)
        return
    policy, reference = read_policy(base), read_policy(base)
    check_logits(policy, base)
    if settings.lora:
        policy = add_lora(policy, settings.lora, settings.seed)
    optimizer = Optimizer(policy)
    loop = _Loop(policy, reference, optimizer, settings)
    train(out, said, policy, optimizer, settings.steps, loop.step, tell, settings.keep)


def grpo_advantages(rewards: torch.Tensor, kind: str = "grpo") -> torch.Tensor:
    """(reward − mean of its group) / (deviation + 1e-4), flat, from rewards [prompts, group]; as TRL has it.

    'centred' does not divide (Dr. GRPO, arXiv 2503.20783); 'rloo' takes the mean of the others of the group, which is
    the same times group / (group − 1) (arXiv 2402.14740).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "centred":
        return centred.flatten()
    if kind == "rloo":
        return (centred * (rewards.shape[1] / (rewards.shape[1] - 1))).flatten()
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    advantages: torch.Tensor,
    rows: int,
    length: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """−Σ advantage · Σ p(token) / p(token, held fixed) / (rows · length): Dr. GRPO's surrogate, on-policy.

    All ratios are 1, so there is nothing to clip; the gradient is that of −Σ advantage · Σ log p(token), over the same.
    Completions of one prompt lie together. rows, length: what is divided by; rows that are left out, as their advantage
    is 0, count.
    """
    logs, mask = log_probabilities(policy, prompts, completions, temperature)
    ratios = (logs - logs.detach()).exp() * mask
    return -(advantages * ratios.sum(1)).sum() / (rows * length)


def draw(
    policy: Policy, batch: Sequence[Problem], group: int, seed: str, max_new_tokens: int, temperature: float = 1.0
) -> list[Sample]:
    """`group` samples of each problem, in order; the same for the same weights and seed."""
    requests = []
    for place, problem in enumerate(batch):
        prompt = tuple(policy.encode_prompt(problem.prompt))
        stop = tuple(filter(None, (problem.meta.get("end"),)))
        for number in range(group):
            key = place * group + number
            requests.append(Request(key, prompt, seed_of(0, seed, f"{place}/{problem.id}", number), stop))
    generator = Generator(policy.model, policy.tokenizer, batch=min(len(requests), 256))
    with arithmetic():
        samples = {sample.key: sample for sample in generator.run(requests, Sampling(temperature, max_new_tokens))}
    return [samples[key] for key in range(len(requests))]


def tokens_of(sample: Sample) -> list[int]:
    """All new tokens of a sample, the one that ended it included."""
    return [*sample.tokens, *([] if sample.end is None else [sample.end])]


def rewards_of(samples: Sequence[Sample], batch: Sequence[Problem]) -> torch.Tensor:
    """1 for right, 0 for wrong: [problems, group]."""
    group = len(samples) // len(batch)
    problems = [problem for problem in batch for _ in range(group)]
    texts = [completed(sample.text, sample.finish, problem) for sample, problem in zip(samples, problems)]
    return torch.tensor([float(verdict.correct) for verdict in verify(texts, problems)]).view(len(batch), group)


def right_samples(
    policy: Policy, task: str, stage: str, problems: int, group: int, max_new_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) as token ids of the samples that a verifier finds right."""
    rows = []
    for number, start in enumerate(range(0, problems, 64)):
        batch = batch_of(task, stage, number, min(64, problems - start))
        samples = draw(policy, batch, group, f"{stage}/{number}", max_new_tokens)
        for place, reward in enumerate(rewards_of(samples, batch).flatten().tolist()):
            if reward:
                rows.append((policy.encode_prompt(batch[place // group].prompt), tokens_of(samples[place])))
    return rows


class _Loop:
    """The steps of one run."""

    def __init__(self, policy: Policy, reference: Policy, optimizer: Optimizer, settings: Rlvr) -> None:
        self._policy, self._reference, self._optimizer, self._settings = policy, reference, optimizer, settings

    def step(self, number: int, folder: Path) -> Values:
        """Samples, verifies, follows the gradient; what was measured."""
        settings, policy = self._settings, self._policy
        stage = f"rlvr/{settings.seed}"
        batch = batch_of(settings.task_at(number), stage, number, settings.prompts)
        prompts = [policy.encode_prompt(problem.prompt) for problem in batch]
        samples = draw(policy, batch, settings.group, f"{stage}/{number}", settings.max_new_tokens,
                       settings.temperature)  # fmt: skip
        rewards = rewards_of(samples, batch)
        completions = [tokens_of(sample) for sample in samples]
        keep_samples(folder, number, prompts, completions, rewards)
        rate = settings.rate.at(number, settings.steps)
        values: Values = {
            "reward": rewards.mean().item(),
            "length": sum(map(len, completions)) / len(completions),
            "lr": rate,
        }
        if number % WATCHED == 0 or number + 1 == settings.steps:
            values |= grpo_measures(policy, self._reference, prompts, completions[:: settings.group])
        # A group whose rewards are all equal has no advantage: it is left out of the backward pass, not of the divisor.
        live = (rewards.std(1) > 0).nonzero()[:, 0].tolist()
        values |= {"live_groups": len(live), "loss": 0.0}
        group, total = settings.group, 0.0
        longest = {g: max(map(len, completions[g * group : (g + 1) * group])) for g in live}
        sizes = [len(prompts[g]) + group * longest[g] for g in live]
        for some in in_parts(live, sizes, room(policy)):
            with arithmetic():
                loss = grpo_loss(
                    policy,
                    [prompts[place] for place in some],
                    [completions[place * group + number] for place in some for number in range(group)],
                    grpo_advantages(rewards[some], settings.advantage),
                    rewards.numel(),
                    settings.max_new_tokens,
                    settings.temperature,
                )
            loss.backward()
            total += loss.item()
        if live:
            values |= {"loss": total, "gradient_norm": self._optimizer.follow(rate)}
        return values


WATCHED = 5
"""Entropy and KL are measured once in so many steps: an eighth of a step's time, and no part of what is trained."""
ACTIVATIONS = 2**23
"""Hidden numbers (tokens × layers × hidden size) whose activations are held for a backward pass: about 1 GB. Groups are
padded to the longest answer of a pass, so that passes of many groups take longer, too.
"""


def room(policy: Policy) -> int:
    """Tokens that go through one backward pass; gradients of several passes add up."""
    config = policy.model.config
    return max(1, ACTIVATIONS // (config.hidden_size * config.num_hidden_layers))


def in_parts(groups: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """The groups in order, in parts of at most `most` tokens; a larger group is a part of its own."""
    found: list[list[int]] = []
    held = 0
    for group, size in zip(groups, sizes, strict=True):
        if found and held + size <= most:
            found[-1].append(group)
            held += size
        else:
            found.append([group])
            held = size
    return found


def grpo_measures(
    policy: Policy, reference: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Values:
    """Entropy and KL from the base, nats a token, exact at the positions of these completions, one a prompt."""
    with torch.no_grad(), arithmetic():
        own = completion_logits(policy, prompts, completions)[0].log_softmax(-1)
        base = completion_logits(reference, prompts, completions)[0].log_softmax(-1)
    chances = own.exp()
    return {"entropy": -(chances * own).sum(-1).mean().item(), "kl": (chances * (own - base)).sum(-1).mean().item()}


def keep_samples(
    folder: Path,
    number: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rewards: torch.Tensor,
) -> None:
    """Appends the right samples of a step to samples.jsonl."""
    group = rewards.shape[1]
    lines: list[Any] = [
        {"step": number, "prompt": list(prompts[place // group]), "completion": list(completions[place])}
        for place, reward in enumerate(rewards.flatten().tolist())
        if reward
    ]
    with (folder / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
