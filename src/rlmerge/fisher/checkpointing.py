"""Activations that are computed twice instead of kept, in models of transformers."""

from __future__ import annotations

from typing import Any

from rlmerge.errors import FisherError


def enable_checkpointing(model: Any) -> list[tuple[Any, str, float]]:
    """Layer by layer, as transformers has it, which wants the layers in training mode; but without their dropout.

    Returns (module, attribute, value) of the rates that were set to 0.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FisherError(
            "this model knows no gradient checkpointing, so its activations must fit: give more --memory, or shorter "
            "sequences."
        )
    # renamed in transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    rates: list[tuple[Any, str, float]] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of the layer alone, not of what is in it
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float) and value:
                    rates.append((module, name, value))
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    return rates
