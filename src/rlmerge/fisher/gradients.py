"""The square of every unit's gradient, added up: vectorised over the units of a batch, layer by layer.

Parameters are frozen, so that the backward pass makes no gradient of them. Hooks see the input of each layer and the
gradient of its output; from the two the gradient of one unit is a product of matrices, formed in tiles that stay in the
processor's cache, squared there and added to the Fisher. No gradient of a whole layer is ever in memory, but for
layers of other kinds, whose gradient comes from a vector-Jacobian product of that layer alone, unit by unit or by vmap.

What this cannot see (a parameter that is used outside its own layer, say) it must not get wrong: `SquaredGradients`
compares itself with plain backward passes on the first unit, and does the parameters that differ the plain way.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlmerge.errors import FisherError

from .checkpointing import enable_checkpointing
from .layers import Call, Layer, layers_of, mapped, tensors_in, tied_pairs
from .products import Splitter, pull_back
from .sequences import Batch, log_probability_gradient, shortened, units_of
from .squares import add_outer_squares, add_square

LOGITS = 2**26
"""Logits of a single unit that are made at once."""
CHECKED = 64
"""Tokens of a sequence that the comparison with plain passes looks at."""


class SquaredGradients:
    """Adds Σ over units of (∂ Σ log p / ∂θ)² to `total`, batch by batch.

    model     a causal language model of transformers, in eval mode; its parameters are frozen until `close`
    wanted    names of the parameters to accumulate; all of them if None
    compute   'fp32' (the model's own dtype), or 'bf16': products in bf16 by autocast, squares and sums in fp32
    plain     True: one backward pass a unit for everything, the slow twin of the other way
    checkpointing   activations are computed twice and not kept (long sequences)
    columns   scored tokens of a single unit whose logits are made at once; more are made in pieces
    total     name → sum of squares, in the dtype of the model's parameters (fp32 for narrower ones)
    notes     what is not done the fast way, and why
    """

    def __init__(
        self, model: Any, wanted: set[str] | None = None, *, compute: str = "fp32", plain: bool = False,
        checkpointing: bool = False, columns: int | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.compute = compute
        self.plain = plain
        self.columns = columns or max(64, LOGITS // model.config.get_text_config().vocab_size)
        self.notes: list[str] = []
        self.log_probability = 0.0
        """Σ over all units so far of the weighted log-probability."""
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.total = {
            name: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in self._parameters.items()
            if wanted is None or name in wanted
        }
        self._states = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._was_training = model.training
        model.eval()
        self._dropouts = enable_checkpointing(model) if checkpointing else []
        self._checkpointing = checkpointing
        self._layers, slow = layers_of(model, names, set(self.total))
        self._slow: set[str] = set(self.total) if plain else slow
        self._explicit_positions = False
        self._unchecked = not plain
        self._batch: Batch | None = None
        self._finishing = False
        self._handles = [] if plain else [self._watch(layer) for layer in self._layers]
        self._tied = tied_pairs(self._layers)
        self._head: Layer | None = None
        self._own_rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        if slow and not plain:
            self._note(slow, "used by several layers")

    def close(self) -> None:
        """Takes the hooks off and thaws the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(self._states[name])
        for module, name, value in self._dropouts:
            setattr(module, name, value)
        if self._checkpointing:
            model = self.model
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        self.model.train(self._was_training)

    @property
    def _fast(self) -> set[str]:
        return set(self.total) - self._slow

    # -- batches --------------------------------------------------------------------------------------------------

    def add(self, batch: Batch) -> None:
        """Adds the units of a batch. The first batch also shows which parameters must be done the plain way."""
        if self._unchecked:
            self.check(batch)
        if len(self._slow) < len(self.total):
            try:
                self._add_fast(batch)
            except Unsuitable as found:
                raise FisherError(
                    f"layer {found.layer.name}: {found.reason}, in a batch that was no different from those before. "
                    "Please report it; --batch-tokens 1 does sequences one by one."
                ) from None
        if self._slow:
            self._add_slow(batch, self._slow, self.total)

    def _add_fast(self, batch: Batch) -> None:
        self._batch = batch
        try:
            self._backward(batch)
            for layer in self._layers:
                if layer.calls:
                    self._finish(layer)
        finally:
            self._batch = None
            self._own_rows.clear()
            for layer in self._layers:
                layer.calls.clear()

    def _backward(self, batch: Batch) -> None:
        """Forward and backward of a whole batch; the hooks do the rest."""
        first, last = batch.scored
        if batch.units == 1 and last - first > self.columns and self._head is not None:
            self._backward_in_pieces(batch, self._head)
            return
        with torch.enable_grad(), self._arithmetic():
            logits, first, last = self._logits(batch)
        upstream, value = log_probability_gradient(logits, batch, first, last)
        self.log_probability += value
        with self._arithmetic():
            logits.backward(upstream)

    def _backward_in_pieces(self, batch: Batch, head: Layer) -> None:
        """The same for one unit whose logits would be too large: the head is done for some columns at a time, and its
        gradient added up before it is squared.
        """
        weight, bias = head.parameters["weight"], head.parameters.get("bias")
        module: Any = head.module
        with torch.enable_grad(), self._arithmetic():
            hidden = self.model.base_model(input_ids=batch.ids, use_cache=False, **self._given(batch)).last_hidden_state
        upstream = torch.zeros_like(hidden)
        gradient = torch.zeros_like(module.weight, dtype=torch.promote_types(module.weight.dtype, torch.float32))
        of_bias = gradient.new_zeros(gradient.shape[0])
        first, last = batch.scored
        with torch.no_grad():
            for start in range(first, last, self.columns):
                stop = min(start + self.columns, last)
                some = hidden.detach()[:, start - 1 : stop - 1]
                self._finishing = True
                with self._arithmetic():
                    logits = module(some)
                self._finishing = False
                grad, value = log_probability_gradient(logits, batch, start, stop)
                self.log_probability += value
                with self._arithmetic():
                    upstream[:, start - 1 : stop - 1] = (grad @ module.weight.to(grad.dtype)).to(upstream.dtype)
                flat = grad.flatten(0, 1)
                gradient += flat.T @ some.flatten(0, 1).to(flat.dtype)
                of_bias += flat.sum(0)
            if weight in self._tied:
                rows = batch.ids.unique()
                self._own_rows[weight] = [(rows, gradient[rows])]
                gradient[rows] = 0.0
            if weight in self._fast:
                add_square(self.total[weight], gradient)
            if bias is not None and bias in self._fast:
                add_square(self.total[bias], of_bias)
        hidden.backward(upstream)

    def _add_slow(self, batch: Batch, names: set[str], total: dict[str, Tensor], factor: float = 1.0) -> None:
        """A backward pass for each unit, for some parameters; adds `factor` times their squares."""
        wanted = {name: self._parameters[name] for name in sorted(names)}
        parameters = [*wanted.values()]
        if self._checkpointing:  # a layer that is computed again needs an input with a gradient
            parameters.append(self.model.get_input_embeddings().weight)
        alone = len(self._slow) == len(self.total)
        for parameter in self._parameters.values():
            parameter.grad = None
        for unit in range(batch.units):
            part = units_of(batch, [unit])
            found: list[Tensor | None]
            for parameter in parameters:
                parameter.requires_grad_(True)
            try:
                with torch.enable_grad(), self._arithmetic():
                    logits, first, last = self._logits(part)
                upstream, value = log_probability_gradient(logits, part, first, last)
                logits.backward(upstream)
                found = [parameter.grad for parameter in wanted.values()]
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)
                    parameter.grad = None
            if alone and total is self.total:
                self.log_probability += value
            for name, gradient in zip(wanted, found):
                if gradient is not None:
                    add_square(total[name], gradient, factor)

    def _logits(self, batch: Batch) -> tuple[Tensor, int, int]:
        """Logits [R, last - first, V] of the tokens in columns [first, last), from the positions before them."""
        first, last = batch.scored
        given = self._given(batch)
        if self._keeps:
            given["logits_to_keep"] = torch.arange(first - 1, last - 1)
        logits = self.model(input_ids=batch.ids, use_cache=False, **given).logits
        return logits if self._keeps else logits[:, first - 1 : last - 1], first, last

    def _given(self, batch: Batch) -> dict[str, Any]:
        """What the model is told beside the ids."""
        padded = bool((batch.mask == 0).any())
        given: dict[str, Any] = {"attention_mask": batch.mask} if padded else {}
        if self._explicit_positions:
            given["position_ids"] = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)
        return given

    def _arithmetic(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.compute == "bf16" else contextlib.nullcontext()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _watch(self, layer: Layer) -> Any:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._batch is None or self._finishing or not torch.is_grad_enabled():
                return None  # our own calls, or the first of two passes under gradient checkpointing
            call = Call(mapped(args, Tensor.detach), mapped(kwargs, Tensor.detach))
            layer.calls.append(call)
            several = len(tensors_in(output)) > 1

            def watched(value: Tensor) -> Tensor:
                if not value.is_floating_point():
                    return value
                if isinstance(value, nn.Parameter):
                    value = value.detach()  # given out as it is: its own gradient must not be touched
                if not value.requires_grad:
                    # the first layer of the graph, as all parameters are frozen; a copy, which may be changed in place
                    value = value.requires_grad_(True).clone()
                # where one output is made of another, only an alias tells what comes from outside
                value = value.view_as(value) if several else value
                place, call.outputs = call.outputs, call.outputs + 1
                value.register_hook(lambda grad: self._arrived(layer, call, place, grad))
                return value

            return mapped(output, watched)

        return layer.module.register_forward_hook(called, with_kwargs=True)

    def _arrived(self, layer: Layer, call: Call, place: int, grad: Tensor) -> None:
        call.grads[place] = grad.detach()
        if all(len(one.grads) == one.outputs for one in layer.calls):
            self._finish(layer)

    def _finish(self, layer: Layer) -> None:
        """All that will come of a layer has come."""
        calls, layer.calls = [call for call in layer.calls if call.grads], []
        if not calls:
            return
        self._finishing = True
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            rule: dict[str, Callable[[Layer, list[Call]], bool]] = {
                "linear": self._add_linear,
                "transposed": self._add_linear,
                "embedding": self._add_embedding,
                "product": self._add_product,
            }
            try:
                if not rule[layer.rule](layer, calls):
                    raise Unsuitable(layer, "its input has no dimension for the sequences")
            except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError) as error:
                # a layer that is not what its rule takes it for
                raise Unsuitable(layer, f"its gradient cannot be formed by itself ({type(error).__name__})") from None
            finally:
                self._finishing = False

    # -- rules ----------------------------------------------------------------------------------------------------

    def _by_unit(self, values: Tensor, trailing: int) -> Tensor | None:
        """[units, M, …] of a tensor that has rows or rows·tokens in front and `trailing` dimensions at the end."""
        batch = self._batch
        assert batch is not None
        rows, width = batch.ids.shape
        lead = values.shape[: values.dim() - trailing]
        if not lead or (lead[0] != rows and lead != (rows * width,)):
            return None
        return values.reshape(batch.units, -1, *values.shape[values.dim() - trailing :])

    def _add_linear(self, layer: Layer, calls: list[Call]) -> bool:
        weight = layer.parameters.get("weight")
        bias = layer.parameters.get("bias")
        inputs, grads = [], []
        for call in calls:
            x, g = self._by_unit(call.args[0], 1), self._by_unit(call.grads[0], 1)
            if x is None or g is None or x.shape[:2] != g.shape[:2]:
                return False
            inputs.append(x)
            grads.append(g)
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        g = grads[0] if len(grads) == 1 else torch.cat(grads, 1)
        fast = self._fast
        if bias is not None and bias in fast:
            self.total[bias] += _wide(g, self.total[bias]).sum(1).square_().sum(0)
        if weight is None or weight not in fast:
            return True
        total = self.total[weight]
        if self.compute != "bf16":
            x, g = x.to(total.dtype), g.to(total.dtype)
        else:
            x, g = x.bfloat16(), g.bfloat16()
        own = self._own_of(weight, x, g)
        left, right = (x, g) if layer.rule == "transposed" else (g, x)
        add_outer_squares(total, left, right, own)
        return True

    def _own_of(self, weight: str, x: Tensor, g: Tensor) -> list[Tensor] | None:
        """A head that is tied to the embedding: the rows of tokens in the unit itself are left to the embedding, which
        adds its own gradient before squaring; returns these rows of each unit, to be left out here.
        """
        if weight not in self._tied:
            return None
        batch = self._batch
        assert batch is not None
        kept = self._own_rows.setdefault(weight, [])
        tokens = batch.ids.view(batch.units, -1)
        for unit in range(batch.units):
            rows = tokens[unit].unique()
            kept.append((rows, (g[unit][:, rows].T @ x[unit]).to(self.total[weight].dtype)))
        return [rows for rows, _ in kept]

    def _add_embedding(self, layer: Layer, calls: list[Call]) -> bool:
        weight = layer.parameters["weight"]
        if weight not in self._fast:
            return True
        total = self.total[weight]
        batch = self._batch
        assert batch is not None
        pieces = []
        for call in calls:
            ids, g = tensors_in((call.args, call.kwargs))[0], call.grads[0]
            if g.dim() < 3 or g.shape[0] not in (batch.ids.shape[0], 1) or ids.dim() < 2:
                return False
            if g.shape[0] == 1 and batch.ids.shape[0] > 1:
                return False  # one row of positions for all sequences: their gradients are one sum
            pieces.append((ids.expand(g.shape[:2]).reshape(batch.units, -1), g.reshape(batch.units, -1, g.shape[-1])))
        own = self._own_rows.pop(weight, None)
        for unit in range(batch.units):
            ids = torch.cat([piece[0][unit] for piece in pieces])
            g = _wide(torch.cat([piece[1][unit] for piece in pieces]), total)
            rows, place = ids.unique(return_inverse=True)
            found = self._looked_up(layer.module, rows, place, g)
            if own is not None:
                theirs, gradient = own[unit]
                gradient[torch.searchsorted(theirs, rows)] += found
                rows, found = theirs, gradient
            total[rows] += found.square_()
        return True

    def _looked_up(self, module: Any, rows: Tensor, place: Tensor, g: Tensor) -> Tensor:
        """The gradient of the rows of an embedding that a unit has looked up."""
        if type(module) is nn.Embedding:
            found = g.new_zeros((len(rows), g.shape[-1])).index_add_(0, place, g)
        else:  # one that scales, for instance: its own rule, on a table of the looked-up rows only
            table = module.weight[rows].detach()
            with torch.enable_grad():
                table.requires_grad_(True)
                output = torch.func.functional_call(module, {"weight": table}, (place[None],))
                (found,) = torch.autograd.grad(output, table, g.to(output.dtype).view_as(output))
            found = found.to(g.dtype)
        if module.padding_idx is not None:
            found[rows == module.padding_idx] = 0.0
        return found

    def _add_product(self, layer: Layer, calls: list[Call]) -> bool:
        """Any other layer: vector-Jacobian products of that layer alone, one a unit."""
        batch = self._batch
        assert batch is not None
        parameters = {local: self._parameters[name] for local, name in layer.parameters.items() if name in self._fast}
        if not parameters:
            return True
        splitter = Splitter(batch.ids.shape[0], batch.ids.shape[1], batch.units)
        with self._arithmetic():
            found = pull_back(layer.module, parameters, calls, splitter)
        for gradient in found or ():
            for local, value in gradient.items():
                add_square(self.total[layer.parameters[local]], value)
        return found is not None

    def _find_head(self, batch: Batch) -> Layer | None:
        """The linear layer whose output are the logits, if nothing else comes between."""
        module = self.model.get_output_embeddings()
        layer = next((one for one in self._layers if one.module is module and one.rule == "linear"), None)
        if layer is None or self.model.base_model is self.model:
            return None
        part = units_of(batch, [0])
        with torch.no_grad(), self._arithmetic():
            logits, first, last = self._logits(part)
            hidden = self.model.base_model(input_ids=part.ids, use_cache=False, **self._given(part))
            again = module(hidden.last_hidden_state[:, first - 1 : last - 1])
        return layer if torch.allclose(logits, again, rtol=1e-3, atol=1e-3 * float(logits.abs().max())) else None

    # -- the check ------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        """Compares with plain backward passes on two units of a batch; what differs is done the plain way from then on.

        `add` does it with its first batch. Whoever goes on with earlier sums calls it first, with the batch that was
        the first then: it works in `total`, and leaves zeros.
        """
        self._unchecked = False
        places = [0, batch.units - 1]  # of one unit two copies: what cannot tell units apart must be seen now
        part = shortened(units_of(batch, places), CHECKED)
        before = self.log_probability
        while True:
            try:
                self._add_fast(part)
                break
            except Unsuitable as found:
                for value in self.total.values():
                    value.zero_()
                if found.layer.rule == "embedding" and not self._explicit_positions:
                    self._explicit_positions = True  # GPT-2 looks one row of positions up for all sequences
                    continue
                bad = {name for name in found.layer.parameters.values() if name in self.total}
                self._note(bad, found.reason)
                self._slow |= bad
                self._drop(found.layer)
        wrong = self._differing(part, 0.1 if self.compute == "bf16" else 1e-3)
        self.log_probability = before
        self._head = self._find_head(batch)
        if wrong:
            self._note(wrong, "used in a way that its layer does not show")
            self._slow |= wrong
            for layer in list(self._layers):
                if wrong & set(layer.parameters.values()):
                    self._slow |= {name for name in layer.parameters.values() if name in self.total}
                    self._drop(layer)

    def _differing(self, part: Batch, limit: float) -> set[str]:
        """Parameters whose squares in `total` are not those of plain passes; `total` is zero afterwards.

        Some parameters at a time, and in place: no second Fisher and no gradient of the whole model.
        """
        wrong: set[str] = set()
        group: list[str] = []
        most = sum(value.numel() for value in self.total.values()) // 8
        fast = sorted(self._fast)
        noise = 1e-10 * max((float(value.norm()) for value in self.total.values()), default=0.0)
        for place, name in enumerate(fast):
            group.append(name)
            if place + 1 < len(fast) and sum(self.total[one].numel() for one in group) < most:
                continue
            sizes = {one: float(self.total[one].norm()) for one in group}
            self._add_slow(part, set(group), self.total, -1.0)
            # what is zero on paper (the bias of keys, say) is rounding in both
            wrong |= {one for one in group if not float(self.total[one].norm()) <= limit * sizes[one] + noise}
            group = []
        for value in self.total.values():
            value.zero_()
        return wrong

    def _drop(self, layer: Layer) -> None:
        place = self._layers.index(layer)
        self._handles.pop(place).remove()
        self._layers.pop(place)

    def _note(self, names: set[str], reason: str) -> None:
        listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.notes.append(f"{listed}: {reason}; done by one backward pass a sequence, which is slower")


class Unsuitable(Exception):
    """A layer whose calls cannot be told apart by unit."""

    def __init__(self, layer: Layer, reason: str) -> None:
        super().__init__(f"{layer.name}: {reason}")
        self.layer = layer
        self.reason = reason


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)
