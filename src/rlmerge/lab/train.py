"""Training on CPU: the cold start that gives RLVR something to reward, and the on-policy GRPO loop that makes experts.

Both compute with bf16-rounded weights over fp32 master weights, as large-scale trainers do, so the bf16 folder they
write is exactly the trained policy; the log has one JSON line per step. One thread per run (OMP_NUM_THREADS=1) and one
run per core is the best use of a small machine: two threads wait for each other when anything else runs.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlmerge.lab.policy import (
    Policy,
    arithmetic,
    log_probabilities,
    read_policy,
    refuse_existing,
    sample,
    write_policy,
)
from rlmerge.lab.tasks import DOMAINS, Problem, problems

PROBE_PROBLEMS = 96


@dataclass(frozen=True)
class ColdStart:
    """Settings of the supervised cold start.

    Every `probe_every` steps the expected pass@1 is measured on training-side problems of both domains; the next steps
    train the domains still below their target, and the run ends when none is left, or after `steps`.
    """

    seed: int = 0
    steps: int = 150
    batch: int = 64
    lr: float = 1e-4
    warmup: int = 5
    probe_every: int = 5
    target_math: float = 0.15
    target_code: float = 0.33


@dataclass(frozen=True)
class Rlvr:
    """Settings of one RLVR run: `prompts` problems a step, `group` completions each, one AdamW step per batch."""

    domain: str
    seed: int
    steps: int = 100
    prompts: int = 8
    group: int = 8
    lr: float = 1e-5
    warmup: int = 5


class Log:
    """A JSON-lines file: one object per training step, with the seconds since the line before."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)
        self._last = time.perf_counter()

    def write(self, **values: Any) -> None:
        """Append one line; floats are rounded to six digits."""
        now = time.perf_counter()
        values["seconds"], self._last = now - self._last, now
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
        self._file.write(json.dumps(rounded) + "\n")


class Optimizer:
    """AdamW on fp32 master weights; the model gets them rounded to bf16 after every step.

    No weight decay, gradients clipped to norm 1, the rate warmed up linearly.
    """

    def __init__(self, policy: Policy, lr: float, warmup: int) -> None:
        self._rounded = list(policy.model.parameters())
        self._masters = [parameter.detach().clone() for parameter in self._rounded]
        self._adam = torch.optim.AdamW(self._masters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        self._lr, self._warmup, self._steps = lr, warmup, 0

    def step(self, loss: torch.Tensor) -> float:
        """Follow the gradient of the loss once and return its norm before clipping."""
        self._steps += 1
        for settings in self._adam.param_groups:
            settings["lr"] = self._lr * min(1.0, self._steps / self._warmup)
        loss.backward()
        for master, parameter in zip(self._masters, self._rounded, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adam.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._rounded, strict=True):
                parameter.copy_(master.bfloat16())
                master.grad = None
        return float(norm)


def expected_pass(policy: Policy, batch: list[Problem]) -> list[float]:
    """Expected pass@1 of each problem at temperature 1: the probability of the right completion, newline included.

    Exact, by teacher forcing: no sampling noise. A right text in an unusual tokenization is not counted.
    """
    chances: list[float] = []
    for start in range(0, len(batch), 64):
        part = batch[start : start + 64]
        with torch.no_grad(), arithmetic():
            logs, _ = log_probabilities(
                policy, [policy.encode(p.prompt) for p in part], [policy.encode(p.completion) for p in part]
            )
        chances += logs.sum(1).exp().tolist()
    return chances


def cold_start(base: Path, out: Path, settings: ColdStart) -> None:
    """Train `base` on right answers until both domains reach their target; write the common base of all experts.

    The log is written to <out>.jsonl.
    """
    refuse_existing(out)
    torch.manual_seed(settings.seed)
    policy = read_policy(base)
    optimizer = Optimizer(policy, settings.lr, settings.warmup)
    log = Log(out.with_name(f"{out.name}.jsonl"))
    targets = {"math": settings.target_math, "code": settings.target_code}
    streams = {domain: problems(domain, f"cold-start/{settings.seed}") for domain in DOMAINS}
    probes = {domain: list(islice(problems(domain, "cold-start/probe"), PROBE_PROBLEMS)) for domain in DOMAINS}
    chances: dict[str, float] = {}
    wanted: list[str] = list(DOMAINS)
    for step in range(settings.steps + 1):
        if step % settings.probe_every == 0:
            chances = {domain: _mean(expected_pass(policy, probes[domain])) for domain in DOMAINS}
            log.write(step=step, probe=True, **chances)
            wanted = [domain for domain in DOMAINS if chances[domain] < targets[domain]]
        if not wanted or step == settings.steps:
            break
        loss, norm = _supervised_step(policy, optimizer, streams, wanted, settings.batch)
        log.write(step=step, domains=wanted, loss=loss, gradient_norm=norm)
    write_policy(policy, out, {"stage": "cold-start", "base": base.name, **asdict(settings), "probe": chances})


def _supervised_step(
    policy: Policy, optimizer: Optimizer, streams: Mapping[str, Iterator[Problem]], wanted: Sequence[str], size: int
) -> tuple[float, float]:
    losses = []
    for domain in wanted:  # One pass per domain: their prompts differ too much in length to be padded together.
        batch = list(islice(streams[domain], size // len(wanted)))
        with arithmetic():
            logs, mask = log_probabilities(
                policy, [policy.encode(p.prompt) for p in batch], [policy.encode(p.completion) for p in batch]
            )
        losses.append(-logs.sum() / mask.sum())
    loss = torch.stack(losses).mean()
    return float(loss.detach()), optimizer.step(loss)


def rlvr(base: Path, out: Path, settings: Rlvr) -> None:
    """Train one expert from `base` by GRPO with a verifiable reward and write it; the log goes to <out>.jsonl.

    On-policy: each batch serves one step, so there is no ratio to clip; no KL term. Advantages are normalised within
    the group, and a sequence counts by the sum of its log-probabilities (GRPO, arXiv 2402.03300; without the length
    normalisation, as in Dr. GRPO, arXiv 2503.20783).
    """
    refuse_existing(out)
    torch.manual_seed(settings.seed)
    stream = problems(settings.domain, f"rlvr/{settings.seed}")
    generator = torch.Generator().manual_seed(settings.seed)
    policy = read_policy(base)
    optimizer = Optimizer(policy, settings.lr, settings.warmup)
    log = Log(out.with_name(f"{out.name}.jsonl"))
    for step in range(settings.steps):
        batch = list(islice(stream, settings.prompts))
        log.write(step=step, **_rlvr_step(policy, optimizer, batch, settings, generator))
    write_policy(policy, out, {"stage": "rlvr", "base": base.name, **asdict(settings)})


def _rlvr_step(
    policy: Policy, optimizer: Optimizer, batch: list[Problem], settings: Rlvr, generator: torch.Generator
) -> dict[str, Any]:
    prompts = [policy.encode(problem.prompt) for problem in batch]
    with arithmetic():
        samples = sample(policy, prompts, settings.group, generator)
    texts = [policy.decode(tokens) for tokens in samples.tokens]
    rewards = torch.tensor([batch[i // settings.group].reward(text) for i, text in enumerate(texts)])
    rewards = rewards.view(len(batch), settings.group)
    line: dict[str, Any] = {
        "reward": float(rewards.mean()),
        "loss": 0.0,
        "length": _mean([len(tokens) for tokens in samples.tokens]),
        "entropy": samples.entropy,
    }
    # A group whose rewards are all equal has no advantage: it is left out of the backward pass, not of the divisor.
    deviation = rewards.std(1)
    live = deviation.nonzero()[:, 0].tolist()
    line["live_groups"] = len(live)
    if live:
        advantages = ((rewards - rewards.mean(1, keepdim=True))[live] / deviation[live, None]).flatten()
        kept = [samples.tokens[i * settings.group + j] for i in live for j in range(settings.group)]
        with arithmetic():
            logs, _ = log_probabilities(policy, [prompts[i] for i in live], kept)
        loss = -(advantages * logs.sum(1)).sum() / rewards.numel()
        line["loss"] = float(loss.detach())
        line["gradient_norm"] = optimizer.step(loss)
    return line


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
