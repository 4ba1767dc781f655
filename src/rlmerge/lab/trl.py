"""The same RLVR run by TRL's GRPOTrainer: same problems, rewards, advantages and loss; its own sampler and loop.

fp32 weights under bf16 autocast where the processor has it: its bf16 checkpoint is these weights rounded, where that of
the lab's own loop is what it trained. A run is continued from TRL's own checkpoints, which it leaves in OUT.unfinished
every `SAVE_STEPS` steps; random numbers of its sampler are its own, so the two trainers draw other samples.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.verifiers import completed, verify
from rlmerge.lab.errors import LabError
from rlmerge.lab.optimizer import Optimizer
from rlmerge.lab.policy import Policy, fast_bf16, read_policy
from rlmerge.lab.rlvr import Rlvr, grpo_measures, keep_samples
from rlmerge.lab.runs import LOG, Progress, Tell, Values, finish, log_line, truncate, unfinished
from rlmerge.lab.text import batch_of

SAVE_STEPS = 25
CHECKPOINTS = "checkpoints"


def rlvr_by_trl(base: Path, out: Path, said: Values, settings: Rlvr, tell: Tell) -> None:
    """One run; what `rlvr.rlvr` writes."""
    with unfinished(out, said) as folder:
        policy, reference = read_policy(base), read_policy(base)
        problems = [
            problem
            for step in range(settings.steps)
            for problem in batch_of(settings.task, f"rlvr/{settings.seed}", step, settings.prompts)
        ]
        record = _Record(out, folder, policy, reference, settings, tell)
        trainer = make_trainer(policy, problems, settings, folder / CHECKPOINTS, record.rewards)
        trainer.add_callback(record.callback())
        saved, record.first = _last_checkpoint(folder / CHECKPOINTS)
        truncate(folder, record.first)
        trainer.train(resume_from_checkpoint=saved)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        finish(folder, said, policy, Optimizer(policy))


def _last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint and its step; what a kill left half written is removed."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    for path in set(folder.glob("checkpoint-*")) - set(found):
        shutil.rmtree(path)
    steps = {int(path.name.split("-")[1]): str(path) for path in found}
    return (steps[max(steps)], max(steps)) if steps else (None, 0)


def make_trainer(policy: Policy, problems: Sequence[Problem], settings: Rlvr, folder: Path, rewards: Any) -> Any:
    """TRL's trainer on these problems, `settings.prompts` a step in their order.

    rewards   TRL's reward function: lists of prompts, completions and completion_ids -> one number each
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    disable_progress_bar()
    tokenizer = policy.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": fast_bf16(),
        "beta": 0.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "group",
        "temperature": 1.0,
        "top_k": 0,
        "num_generations": settings.group,
        "per_device_train_batch_size": settings.prompts * settings.group,
        "max_completion_length": settings.max_new_tokens,
        "generation_kwargs": {"eos_token_id": sorted(_ends(policy, problems))},
        "max_grad_norm": 1.0,
        "max_steps": settings.steps,
        "shuffle_dataset": False,
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    rows = [{"prompt": problem.prompt, "place": place} for place, problem in enumerate(problems)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers changes between versions
        config = GRPOConfig(**options)
        adam = torch.optim.AdamW(policy.model.parameters(), lr=settings.rate.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: settings.rate.at(step, settings.steps) / settings.rate.lr
        )
        trainer = GRPOTrainer(
            policy.model,
            rewards,
            config,
            Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(adam, schedule),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _ends(policy: Policy, problems: Sequence[Problem]) -> set[int]:
    """Tokens that end a completion: end of sequence, and the end string of the problems, which must be one token."""
    ends = {policy.tokenizer.eos_token_id}
    for text in sorted({problem.meta.get("end", "") for problem in problems} - {""}):
        ids = policy.encode(text)
        if len(ids) != 1:
            raise LabError(f"{text!r} ends the answers and is no token of this model: TRL cannot stop there. Use fast.")
        ends.add(ids[0])
    return ends


class _Record:
    """Rewards by our verifiers, and a log line a step as the fast loop writes it."""

    def __init__(self, out: Path, folder: Path, policy: Policy, reference: Policy, settings: Rlvr, tell: Tell) -> None:
        self._out, self._folder, self._settings, self._tell = out, folder, settings, tell
        self._policy, self._reference = policy, reference
        self._values: Values = {}
        self.first = 0
        self._started = self._last = time.monotonic()

    def rewards(self, prompts: list[str], completion_ids: list[list[int]], place: list[int], **_: Any) -> list[float]:
        """1 for right, 0 for wrong, one for each completion."""
        settings, policy = self._settings, self._policy
        step = place[0] // settings.prompts
        problems = batch_of(settings.task, f"rlvr/{settings.seed}", step, settings.prompts)
        problems = [problems[number % settings.prompts] for number in place]
        ends = _ends(policy, problems)
        texts = []
        for ids, problem in zip(completion_ids, problems):
            stopped = bool(ids) and ids[-1] in ends
            text = policy.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
            texts.append(completed(text, "stop" if stopped else "length", problem))
        found = [float(verdict.correct) for verdict in verify(texts, problems)]
        encoded = [policy.encode_prompt(problem.prompt) for problem in problems[:: settings.group]]
        rewards = torch.tensor(found).view(-1, settings.group)
        keep_samples(self._folder, step, encoded, completion_ids, rewards)
        self._values = {
            "reward": rewards.mean().item(),
            "length": sum(map(len, completion_ids)) / len(completion_ids),
            **grpo_measures(policy, self._reference, encoded, completion_ids[:: settings.group]),
            "lr": settings.rate.at(step, settings.steps),
            "live_groups": int((rewards.std(1) > 0).sum()),
        }
        return found

    def callback(self) -> Any:
        """Writes the line of a step when TRL reports its loss."""
        from transformers import TrainerCallback

        record = self

        class Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:  # the summary at the end has none
                    record.step_done(state.global_step, float(logs["loss"]), float(logs["grad_norm"]))

        return Callback()

    def step_done(self, step: int, loss: float, gradient_norm: float) -> None:
        """One line of the log."""
        now = time.monotonic()
        values = {**self._values, "loss": loss, "gradient_norm": gradient_norm, "seconds": now - self._last}
        self._last = now
        with (self._folder / LOG).open("a") as log:
            log.write(log_line({"step": step - 1, **values}))
        self._tell(Progress(self._out, step, self._settings.steps, values, now - self._started, self.first))
