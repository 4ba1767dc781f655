"""Linear layers by oneDNN, in fp32: what measuring spends four fifths of its time on.

PyTorch gives fp32 products to MKL, which on AMD's processors stays at 256 bits: 105 GFLOPS of one Zen 5 core at 64
rows, where oneDNN has 220 (docs/log.md). The same fp32, added up in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether this PyTorch has oneDNN's linear layer, and the processor the 512 bits that make it worth while."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def by_onednn(model: nn.Module) -> Iterator[None]:
    """Inside, every fp32 `nn.Linear` of the model computes by oneDNN, without gradient; elsewhere nothing changes.

    Costs a second copy of their weights, which must not change inside.
    """
    patched = [
        one
        for one in model.modules()
        if available() and type(one) is nn.Linear and one.weight.dtype == torch.float32 and "forward" not in vars(one)
    ]
    for layer in patched:
        layer.forward = partial(_linear, layer.weight.detach().to_mkldnn(), layer.bias)
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward


def _linear(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
