"""Σ xᵀx of what a model multiplies by each of its weights, seen where it multiplies.

A mode of torch is asked before every product with a weight, so the class of the layer means nothing: linear layers,
GPT-2's transposed ones, routers and the experts of a mixture, each of which sees the tokens that are sent to it.
Weights that are also looked up in (a head tied to the embedding) are no linear layers, and are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rlmerge.errors import GramError
from rlmerge.fisher.sequences import Batch


class Weight(NamedTuple):
    """A matrix of the loaded model: a parameter, or one of those that a 3-D parameter stacks."""

    parameter: str
    index: int = -1


@dataclass
class Linear:
    """What is known of a weight after the first look.

    width      number of inputs
    first      the inputs run along the first dimension of the matrix (x·W, as in GPT-2), not along the last (x·Wᵀ)
    routed     it sees some tokens only, and which ones cannot be told
    same       the weight that has the same input, and is looked at in its place
    """

    width: int
    first: bool
    routed: bool = False
    same: Weight | None = None
    calls: list[Tensor] = field(default_factory=list)


class InputProducts:
    """Watches a model. `look` first finds its linear layers; then `add` adds batches to `total`.

    model      a causal language model of transformers in eval mode
    answer     only positions that predict a token of the completion count, not all tokens of a sequence
    linear     weight → what is known of it, in the order of first use
    wanted     the weights that are added up; None: all that no other stands for
    total      weight → fp64[in, in]; `rows`: how many inputs are in it
    positions  how many positions have been counted
    """

    def __init__(self, model: Any, answer: bool = False) -> None:
        self.model = model
        self.answer = answer
        self.linear: dict[Weight, Linear] = {}
        self.total: dict[Weight, Tensor] = {}
        self.rows: dict[Weight, int] = {}
        self.positions = 0
        self.notes: list[str] = []
        self._looked_up: set[str] = set()
        self._counted = torch.zeros((0, 0), dtype=torch.bool)
        self._last: dict[Weight, Tensor] = {}
        self._places: dict[int, list[tuple[Weight, tuple[int, ...]]]] = {}
        for name, value in model.named_parameters():
            if value.dim() == 2:
                self._note_place(value, Weight(name))
            elif value.dim() == 3:
                for index in range(value.shape[0]):
                    self._note_place(value[index], Weight(name, index))
        head = model.get_output_embeddings()
        self._head = getattr(head, "weight", None)

    def _note_place(self, value: Tensor, weight: Weight) -> None:
        self._places.setdefault(value.data_ptr(), []).append((weight, tuple(value.shape)))

    @property
    def leaders(self) -> list[Weight]:
        """The weights whose Gram matrices stand for all others."""
        return [weight for weight, linear in self.linear.items() if linear.same is None]

    @property
    def unpadded(self) -> bool:
        """Whether batches must be without padding, since some layer sees tokens that cannot be told apart."""
        return any(linear.routed for linear in self.linear.values())

    # -- the first look -------------------------------------------------------------------------------------------

    def look(self, batch: Batch) -> None:
        """Finds the linear layers, by what the model does with a batch of two equal rows."""
        with self._watched(self._seen):
            self._forward(batch)
        rows = batch.ids.shape[0] * batch.ids.shape[1]
        of_input: dict[int, Weight] = {}
        for weight in [weight for weight in self.linear if weight.parameter in self._looked_up]:
            del self.linear[weight]
        for weight, linear in self.linear.items():
            linear.routed = weight.index >= 0 or any(x.numel() != rows * linear.width for x in linear.calls)
            if len(linear.calls) == 1 and not linear.routed:
                leader = of_input.setdefault(id(linear.calls[0]), weight)
                linear.same = None if leader == weight else leader
        for linear in self.linear.values():
            linear.calls.clear()
        self._add_unseen()
        if self.answer and self.unpadded:
            routed = [weight for weight, linear in self.linear.items() if linear.routed]
            self.notes.append(
                f"{routed[0].parameter} and {len(routed) - 1} more see some tokens only, and which of them belong to "
                "answers cannot be told: they have no Gram matrix. With --positions all they have one."
            )
            self.linear = {weight: linear for weight, linear in self.linear.items() if not linear.routed}

    def _add_unseen(self) -> None:
        """Matrices of a stack to which no token was sent yet, and linear modules that nobody called."""
        stacks = {weight.parameter: linear for weight, linear in self.linear.items() if weight.index >= 0}
        for places in self._places.values():
            for weight, _ in places:
                if weight.parameter in stacks and weight not in self.linear:
                    like = stacks[weight.parameter]
                    self.linear[weight] = Linear(like.width, like.first, routed=True)
        names = {id(value): name for name, value in self.model.named_parameters()}
        for module in self.model.modules():
            if type(module) is torch.nn.Linear:
                weight = Weight(names[id(module.weight)])
                if weight not in self.linear and weight.parameter not in self._looked_up:
                    self.linear[weight] = Linear(module.weight.shape[1], first=False, routed=self.unpadded)

    def _seen(self, weight: Weight, first: bool, x: Tensor) -> None:
        self.linear.setdefault(weight, Linear(x.shape[-1], first)).calls.append(x)

    # -- batches --------------------------------------------------------------------------------------------------

    def want(self, weights: list[Weight]) -> None:
        """Starts sums of zero for these weights, and drops all others."""
        self.total.clear()
        for weight in weights:
            width = self.linear[weight].width
            self.total[weight] = torch.zeros((width, width), dtype=torch.float64)
        self.rows = dict.fromkeys(weights, 0)
        self.positions = 0

    def add(self, batch: Batch) -> None:
        """Adds the inputs of a batch."""
        self._counted = batch.mask.bool()
        if self.answer:
            self._counted = torch.zeros_like(self._counted)
            self._counted[:, :-1] = batch.factor[:, 1:] != 0.0
        self.positions += int(self._counted.sum())
        try:
            with self._watched(self._arrived):
                self._forward(batch)
        finally:
            self._last.clear()

    def _arrived(self, weight: Weight, first: bool, x: Tensor) -> None:
        linear = self.linear.get(weight)
        if linear is None:
            return
        if linear.same is not None:
            if self._last.get(linear.same, x) is not x:
                raise GramError(
                    f"{weight.parameter}: had the same input as {linear.same.parameter} at first, and now another one. "
                    "Please report it."
                )
            return
        if weight not in self.total:
            return
        self._last[weight] = x
        rows = x.detach().reshape(-1, linear.width)
        if len(rows) == self._counted.numel() and not linear.routed:
            rows = rows if bool(self._counted.all()) else rows[self._counted.reshape(-1)]
        elif not bool(self._counted.all()):
            raise GramError(
                f"{weight.parameter}: sees {len(rows)} inputs of a batch of {self._counted.numel()} positions, so it "
                "cannot be told which are padding. Please report it; --batch-tokens 1 does sequences one by one."
            )
        self.rows[weight] += len(rows)
        # fp32 products of one batch, added in fp64
        self.total[weight] += rows.T @ rows

    def _forward(self, batch: Batch) -> None:
        padded = bool((batch.mask == 0).any())
        given = {"attention_mask": batch.mask} if padded else {}
        with torch.no_grad(), _eager_experts(self.model):
            self.model(input_ids=batch.ids, use_cache=False, **given)

    # -- what is multiplied ---------------------------------------------------------------------------------------

    def _watched(self, tell: Callable[[Weight, bool, Tensor], None]) -> TorchFunctionMode:
        return _Watch(self, tell)

    def find(self, value: Any) -> Weight | None:
        """Which matrix of the model a tensor is, whole and unchanged."""
        if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_contiguous():
            return None
        places = self._places.get(value.data_ptr(), ())
        return next((weight for weight, shape in places if shape == tuple(value.shape)), None)

    def is_head(self, value: Any) -> bool:
        """Whether a tensor is the weight of the layer that makes the logits."""
        return self._head is not None and isinstance(value, Tensor) and value.data_ptr() == self._head.data_ptr()

    def looked_up(self, value: Any) -> None:
        """A table in which rows were looked up."""
        if (weight := self.find(value)) is not None:
            self._looked_up.add(weight.parameter)


class _Watch(TorchFunctionMode):
    """Tells what is multiplied by a weight; of the logits only those of one position are made, as nobody reads them."""

    def __init__(self, owner: InputProducts, tell: Callable[[Weight, bool, Tensor], None]) -> None:
        super().__init__()
        self.owner = owner
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.addmm, Tensor.addmm) and len(args) == 3:
            weight = self.owner.find(args[2])
            if weight is not None:
                self.tell(weight, True, args[1])
        elif func is functional.linear:
            x, matrix = _given(args, kwargs, "input"), _given(args[1:], kwargs, "weight")
            weight = self.owner.find(matrix)
            if weight is not None:
                self.tell(weight, False, x)
            if self.owner.is_head(matrix) and x.dim() == 3:
                bias = _given(args[2:], kwargs, "bias")
                return func(x[:, :1], matrix, bias)
        elif func is functional.embedding:
            self.owner.looked_up(_given(args[1:], kwargs, "weight"))
        return func(*args, **kwargs)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    return args[0] if args else kwargs.get(name)


@contextlib.contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Experts one after the other, so that the tokens of each are seen, where transformers knows a faster way."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, getattr(config, "_experts_implementation", None)) for config in found.values()]
    for config, value in before:
        if value is not None:
            config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, value in before:
            if value is not None:
                config._experts_implementation = value
