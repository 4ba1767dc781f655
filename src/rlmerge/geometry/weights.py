"""A loaded model that takes the weights of any point around a base and its experts, in place; nothing is written.

A point is θ0 + Σ ck·(θk − θ0): shares of the stored models, which add up to 1. Sums are fp64 and rounded once to fp32.
A point that is one of the models has its stored values, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlmerge.errors import MismatchError

BASE = ""
"""The key of the base among the models."""
PIECE = 2**22
"""Coordinates that are summed in fp64 at once."""
NOTHING = 1e-12
"""A share below this is what rounding leaves of 0."""
NARROW = (torch.bfloat16, torch.float16)

Point = tuple[tuple[str, float], ...]
"""Experts and how much of their deltas, sorted by key, without zeros; () is the base."""
Direction = Callable[[str], Tensor | None]
"""What is added to a tensor of that name, flat, fp32 or fp64; None for nothing."""


def make_point(parts: Iterable[tuple[str, float]]) -> Point:
    """The point with so much of each expert's delta; parts of one expert are added up, the base's count as nothing."""
    found: dict[str, float] = {}
    for key, share in parts:
        if key != BASE:
            found[key] = found.get(key, 0.0) + share
    rounded = ((key, round(share, 12)) for key, share in sorted(found.items()))
    return tuple((key, share) for key, share in rounded if share != 0.0)


def between(start: str, end: str, alpha: float) -> Point:
    """(1 − α)·start + α·end."""
    return make_point(((start, 1.0 - alpha), (end, alpha)))


class Weights:
    """The stored weights of a base and its experts, by key, and a model that is set to points.

    model    loaded with the base's weights, fp32; its tensors are overwritten
    stored   tensors of each model under the names that the loaded model has; a tied one once. What bf16 or fp16 holds
             exactly is kept so; a tensor that an expert shares with the base is the same object
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.live = tensors_of(model)
        self.stored: dict[str, dict[str, Tensor]] = {BASE: {name: kept(value) for name, value in self.live.items()}}

    def add(self, key: str, model: Any, reference: str) -> None:
        """Takes an expert's weights from its loaded model. Raises MismatchError if they do not fit the base's."""
        base, found = self.stored[BASE], tensors_of(model)
        for name in sorted(base.keys() ^ found.keys()):
            who, other = (reference, "the base") if name in found else ("the base", reference)
            raise MismatchError(
                f"{reference}: {who} has {name!r}, and {other} has not. Paths lead between models of one architecture, "
                "with or without tied embeddings alike."
            )
        taken = {}
        for name, value in found.items():
            if value.shape != base[name].shape:
                raise MismatchError(
                    f"{reference}: {name} is {list(value.shape)}, and {list(base[name].shape)} in the base. Paths lead "
                    "between models of one shape; of vocabularies, too."
                )
            narrow = kept(value)
            taken[name] = base[name] if same_bits(narrow, base[name]) else narrow
        self.stored[key] = taken

    @torch.no_grad()
    def place(self, point: Point, moves: Sequence[tuple[float, Direction]] = ()) -> Any:
        """Sets the model to a point, moved by scale·direction for each of `moves`, and returns it."""
        shares = shares_of(point)
        for name, live in self.live.items():
            pushes = [(scale, push) for scale, of in moves if (push := of(name)) is not None]
            only = self._single(shares, name)
            if only is not None and not pushes:
                live.copy_(only)
                continue
            flat = live.view(-1)
            parts = [(share, self.stored[key][name].view(-1)) for key, share in shares]
            for start in range(0, flat.numel(), PIECE):
                here = slice(start, start + PIECE)
                total = torch.zeros(flat[here].shape, dtype=torch.float64)
                for share, part in (*parts, *pushes):
                    total.add_(part[here].double(), alpha=share)
                flat[here].copy_(total)
        return self.model

    def _single(self, shares: Sequence[tuple[str, float]], name: str) -> Tensor | None:
        """The stored tensor that the point has: of one model, or one that all models of the point share."""
        found = [self.stored[key][name] for key, _ in shares]
        alike = all(one is found[0] for one in found)
        return found[0] if alike and (len(found) > 1 or shares[0][1] == 1.0) else None

    @torch.no_grad()
    def delta(self, key: str, name: str) -> Tensor:
        """The delta of an expert in one tensor, flat fp64: to the base, or to the base in the expert's narrower dtype,
        or rounding would pass for training (design, section 1).
        """
        base, own = self.stored[BASE][name], self.stored[key][name]
        reference = base if own.dtype in (torch.float32, base.dtype) else base.to(own.dtype)
        return (own.double() - reference.double()).view(-1)

    def distance(self, start: str, end: str) -> float:
        """‖end − start‖₂ of two models."""
        pairs = ((self.stored[start][name], self.stored[end][name]) for name in self.live)
        return sum(float((b.double() - a.double()).square().sum()) for a, b in pairs if a is not b) ** 0.5


def shares_of(point: Point) -> list[tuple[str, float]]:
    """What a point has of each model, the base first; shares add up to 1."""
    base = 1.0 - sum(share for _, share in point)
    return [*([(BASE, base)] if abs(base) > NOTHING else []), *point]


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The weights and stored buffers of a loaded model that are floating-point numbers; a tied one once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    state: Mapping[str, Tensor] = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and value.numel() and value.data_ptr() not in seen:
            found[name] = value
            seen.add(value.data_ptr())
    return found


def kept(value: Tensor) -> Tensor:
    """A copy, in bf16 or fp16 where that changes nothing, else in fp32."""
    for dtype in NARROW:
        narrow = value.to(dtype)
        if torch.equal(narrow.to(value.dtype), value):
            return narrow.clone() if narrow.data_ptr() == value.data_ptr() else narrow
    return value.to(torch.float32, copy=True)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same words."""
    if one.dtype != other.dtype:
        return False
    words = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.view(words), other.view(words))
