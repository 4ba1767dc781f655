"""AdamW over fp32 master weights; the model computes with them rounded to bf16, as it will be stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from rlmerge.lab.policy import Policy


@dataclass(frozen=True)
class Rate:
    """The learning rate: warmed up linearly over `warmup` steps, then constant, or a cosine down to a twentieth."""

    lr: float
    warmup: int = 5
    decays: bool = False

    def at(self, step: int, steps: int) -> float:
        """Of one step, the first being 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        return rate * (0.05 + 0.475 * (1 + math.cos(math.pi * step / max(1, steps)))) if self.decays else rate


class Optimizer:
    """AdamW without weight decay on fp32 masters, gradients clipped to norm 1.

    The model's own weights stay fp32 tensors that hold bf16 numbers, so that a bf16 checkpoint is the trained policy
    itself. The masters are what fp32 checkpoints hold.
    """

    def __init__(self, policy: Policy, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        trained = [(name, one) for name, one in policy.model.named_parameters() if one.requires_grad]
        self.names = [name for name, _ in trained]
        self._rounded = [parameter for _, parameter in trained]
        self.masters = [parameter.detach().clone() for parameter in self._rounded]
        self._adam = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
        self._round()

    def step(self, loss: torch.Tensor, rate: float) -> float:
        """Follow the gradient of the loss once; returns its norm before clipping."""
        loss.backward()
        return self.follow(rate)

    def follow(self, rate: float) -> float:
        """Follow the gradients that have been added up since; returns their norm before clipping."""
        for settings in self._adam.param_groups:
            settings["lr"] = rate
        for master, parameter in zip(self.masters, self._rounded, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self._adam.step()
        for master in self.masters:
            master.grad = None
        self._round()
        return float(norm)

    @torch.no_grad()
    def _round(self) -> None:
        for master, parameter in zip(self.masters, self._rounded, strict=True):
            parameter.copy_(master.bfloat16())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name."""
        found = {f"master/{name}": master for name, master in zip(self.names, self.masters)}
        for name, master in zip(self.names, self.masters):
            for key, value in self._adam.state.get(master, {}).items():
                found[f"{key}/{name}"] = value
        return found

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave."""
        moments: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind != "master":
                moments[name][kind] = value
        for name, master in zip(self.names, self.masters):
            master.copy_(state[f"master/{name}"])
            self._adam.state[master] = moments[name]
        self._round()
