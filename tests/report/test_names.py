"""What tensors and experts are called on a page."""

from __future__ import annotations

import pytest

from rlmerge.report.names import called, place_of


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["runs/math", "runs/code"], ["math", "code"]),
        (["/a/rlvr-math/bf16", "/a/rlvr-code/bf16"], ["rlvr-math", "rlvr-code"]),
        (["a", "a/b/a"], ["a", "a/b/a"]),
    ],
)
def test_experts(keys, names):
    assert list(called(keys).values()) == names
    assert list(called(keys)) == keys


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("model.embed_tokens.weight", ("–", "embed_tokens")),
        ("lm_head.weight", ("–", "lm_head")),
        ("transformer.h.1.attn.c_attn.bias", (1, "attn.c_attn.bias")),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (0, "mlp.experts.*.up_proj")),
    ],
)
def test_tensors(name, place):
    assert place_of(name) == place
