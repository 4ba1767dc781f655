"""The layers of a model that have parameters, and by which rule the gradient of each is formed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Call:
    """One call of a layer in the forward pass: its inputs, and the gradients of its outputs as they come."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: int = 0
    grads: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Layer:
    """A module with parameters of its own: local → full names, the rule, and its calls since the last batch.

    rule    'linear' (weight [out, in]), 'transposed' (weight [in, out], GPT-2's), 'embedding', or 'product': any other
    """

    name: str
    module: nn.Module
    rule: str
    parameters: dict[str, str]
    calls: list[Call] = field(default_factory=list)


def layers_of(model: nn.Module, names: Mapping[int, str], wanted: set[str]) -> tuple[list[Layer], set[str]]:
    """Layers that have wanted parameters, and the parameters that no rule is for: those that several layers share, but
    for a linear head that is tied to an embedding. `names` has the first name of each parameter by its id.
    """
    found: list[Layer] = []
    owners: dict[str, list[Layer]] = {}
    for name, module in model.named_modules():
        own = {local: names[id(parameter)] for local, parameter in module.named_parameters(recurse=False)}
        if not wanted & set(own.values()):
            continue
        layer = Layer(name, module, _rule(module), own)
        found.append(layer)
        for full in own.values():
            owners.setdefault(full, []).append(layer)
    shared = {full for full, layers in owners.items() if len(layers) > 1 and not _is_tied_pair(layers)} & wanted
    return found, shared


def tied_pairs(layers: list[Layer]) -> set[str]:
    """Names of weights that an embedding and a linear head share."""
    owners: dict[str, list[Layer]] = {}
    for layer in layers:
        for full in layer.parameters.values():
            owners.setdefault(full, []).append(layer)
    return {full for full, found in owners.items() if len(found) > 1 and _is_tied_pair(found)}


def _is_tied_pair(layers: list[Layer]) -> bool:
    return sorted(layer.rule for layer in layers) == ["embedding", "linear"]


def _rule(module: nn.Module) -> str:
    """By type, and only where nobody has changed what the type computes."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "transposed"
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
        # a subclass may scale what it looks up; one that is called with more (a mask, say) is something else
        takes = list(inspect.signature(type(module).forward).parameters)
        return "embedding" if takes in (["self", "input"], ["self", "input_ids"]) else "product"
    return "product"


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [found for entry in value for found in tensors_in(entry)]
    if isinstance(value, Mapping):
        return [found for entry in value.values() for found in tensors_in(entry)]
    return []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, change) for entry in value)
    if type(value) is dict:
        return {key: mapped(entry, change) for key, entry in value.items()}
    return value
