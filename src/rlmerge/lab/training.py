"""What a training run of an expert is set to: a preset's sizes, and what this expert has of its own."""

from __future__ import annotations

from typing import Any

from rlmerge.lab.optimizer import Rate
from rlmerge.lab.presets import Preset
from rlmerge.lab.rlvr import Rlvr
from rlmerge.lab.supervised import Rft, Sft

WARMUP = 5
"""Steps over which the learning rate of an expert rises."""


def rlvr_settings(preset: Preset, task: str, seed: int, lr: float | None = None, **own: Any) -> Rlvr:
    """Of an RLVR run; own: fields of Rlvr that are not the preset's."""
    sizes = {
        "steps": preset.steps, "prompts": preset.prompts, "group": preset.group,
        "rate": Rate(lr or preset.lr, WARMUP), "max_new_tokens": preset.max_new_tokens,
    }  # fmt: skip
    return Rlvr(task, seed, **{**sizes, **own})


def sft_settings(preset: Preset, task: str, seed: int, lr: float | None = None, **own: Any) -> Sft:
    """Of SFT on gold solutions; own: fields of Sft that are not the preset's."""
    return Sft(task, seed, **{**_supervised(preset, lr), **own})


def rft_settings(preset: Preset, task: str, seed: int, lr: float | None = None, **own: Any) -> Rft:
    """Of SFT on verified samples; own: fields of Rft that are not the preset's."""
    return Rft(task, seed, **{**_supervised(preset, lr), "max_new_tokens": preset.max_new_tokens, **own})


def _supervised(preset: Preset, lr: float | None) -> dict[str, Any]:
    return {"steps": preset.steps, "batch": preset.batch, "rate": Rate(lr or preset.lr, WARMUP)}
