"""oneDNN's linear layers beside PyTorch's own: the same products, in fp32 and not less, and nothing left behind."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from rlmerge.lab.linear import available, by_onednn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 576), (7, 3, 576), (64, 576)])
def test_as_the_definition(bias: bool, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(576, 100, bias=bias)
    model = nn.Sequential(layer)
    numbers = torch.randn(rows)
    wide = numbers.double() @ layer.weight.double().T
    wide = wide + layer.bias.double() if bias else wide
    with torch.no_grad(), by_onednn(model):
        found, again = model(numbers), model(numbers)
        assert ("forward" in vars(layer)) == available()
    assert found.shape == (*rows[:-1], 100)
    assert torch.equal(found, again)
    assert (found - wide).abs().max() < 5e-6, "less than fp32: rounded to bf16 or TF32, it were 1e-3"


def test_nothing_stays_behind() -> None:
    layer, small = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
    model = nn.Sequential(layer, small)
    with by_onednn(model), by_onednn(model):
        assert "forward" not in vars(small), "bf16 layers keep their own"
    with contextlib.suppress(ValueError), by_onednn(model):
        raise ValueError
    (gradient,) = torch.autograd.grad(layer(torch.ones(2, 8)).sum(), [layer.weight])
    assert torch.equal(gradient, torch.full((8, 8), 2.0)), "oneDNN's layer has no gradient"
