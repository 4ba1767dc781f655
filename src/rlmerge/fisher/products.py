"""Gradients of a layer of any kind, one a unit: vector-Jacobian products of that layer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Call, tensors_in


class Splitter:
    """Takes the inputs of a layer apart by unit: tensors whose first dimension is the batch's rows, or all its tokens.

    Everything else is given to every unit whole. `found` says whether anything was taken apart.
    """

    def __init__(self, rows: int, width: int, units: int) -> None:
        self.rows = rows
        self.width = width
        self.units = units
        self.found = False

    def one(self, value: Tensor) -> Tensor | None:
        """[units, …] of a tensor, or None if it is not divided by rows."""
        if value.dim() and value.shape[0] in (self.rows, self.rows * self.width):
            self.found = True
            return value.reshape(self.units, -1, *value.shape[1:])
        return None

    def pick(self, value: Any, unit: int) -> Any:
        """The part of a nested value that belongs to a unit."""
        if isinstance(value, Tensor):
            split = self.one(value)
            return value if split is None else split[unit]
        if type(value) in (tuple, list):
            return type(value)(self.pick(entry, unit) for entry in value)
        if type(value) is dict:
            return {key: self.pick(entry, unit) for key, entry in value.items()}
        return value


def pull_back(
    module: nn.Module, parameters: Mapping[str, Tensor], calls: Sequence[Call], splitter: Splitter
) -> list[dict[str, Tensor]] | None:
    """For each unit, the gradient of each parameter (by local name); None if the inputs cannot be told apart.

    Units are done together by vmap where the layer allows it, else one by one.
    """
    if any(splitter.one(grad) is None for call in calls for grad in call.grads.values()):
        return None
    together = _together(module, parameters, calls, splitter)
    if together is not None:
        return [{name: value[unit] for name, value in together.items()} for unit in range(splitter.units)]
    found = []
    for unit in range(splitter.units):
        total: dict[str, Tensor] = {}
        for call in calls:
            for name, value in _alone(module, parameters, call, splitter, unit).items():
                total[name] = total[name] + value if name in total else value
        found.append(total)
    return found


def _alone(
    module: nn.Module, parameters: Mapping[str, Tensor], call: Call, splitter: Splitter, unit: int
) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_(True) for name, value in parameters.items()}
    args, kwargs = splitter.pick(call.args, unit), splitter.pick(call.kwargs, unit)
    upstream = {place: splitter.one(grad)[unit] for place, grad in call.grads.items()}  # type: ignore[index]
    with torch.enable_grad():
        output = torch.func.functional_call(module, leaves, args, kwargs)
    outputs = [value for value in tensors_in(output) if value.is_floating_point()]
    places = [place for place in upstream if outputs[place].requires_grad]
    found = torch.autograd.grad(
        [outputs[place] for place in places],
        list(leaves.values()),
        [upstream[place].to(outputs[place].dtype).view_as(outputs[place]) for place in places],
        allow_unused=True,
    )
    return {name: value for name, value in zip(leaves, found) if value is not None}


def _together(
    module: nn.Module, parameters: Mapping[str, Tensor], calls: Sequence[Call], splitter: Splitter
) -> dict[str, Tensor] | None:
    """[units, …] for each parameter by vmap, for layers of one input and one output and few parameters (norms)."""
    if len(calls) != 1 or calls[0].outputs != 1 or calls[0].kwargs or len(calls[0].args) != 1:
        return None
    given = calls[0].args[0]
    if not isinstance(given, Tensor) or sum(value.numel() for value in parameters.values()) > 2**16:
        return None
    x, g = splitter.one(given), splitter.one(calls[0].grads[0])
    if x is None or g is None:
        return None

    def one(x: Tensor, g: Tensor) -> dict[str, Tensor]:
        found = torch.func.vjp(lambda own: torch.func.functional_call(module, own, (x,)), dict(parameters))
        return found[1](g)[0]

    try:
        return torch.func.vmap(one)(x, g)
    except (RuntimeError, ValueError):
        return None  # something in it that vmap does not know: one by one
