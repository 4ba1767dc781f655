"""Documents of `inspect` for pages: of small models, and one as large as that of a model of 36 layers."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tests.geometry.geometry_models import document, make_base, train, write

KINDS = (
    *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"),
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)


def small(names: tuple[str, ...] = ("a", "b"), **options: Any) -> Any:
    """The document of experts of a base of two layers; a copy, to be changed at will."""
    return copy.deepcopy(_small(names, tuple(sorted(options.items()))))


@functools.cache
def _small(names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        base = make_base()
        experts = {name: train(base, 1 + number) for number, name in enumerate(names)}
        return document(write(Path(folder), base, experts), **dict(options))


def large(layers: int = 36) -> Any:
    """A document of three experts with spectra, as of a model of so many layers; every number is another."""
    found, rng = small(("a", "b", "c"), spectra=True), np.random.default_rng(0)
    for section in (found["coordinates"], found["spectra"]):
        named = {tensor["name"]: tensor for tensor in section["tensors"]}
        models = {1: "model.norm.weight", 2: "model.layers.0.mlp.up_proj.weight"}
        made = [_shaken(named["model.embed_tokens.weight"], rng)]
        for layer in range(layers):
            for kind in KINDS:
                dimensions = 1 if "layernorm" in kind else 2
                if (model := named.get(models[dimensions])) is None:
                    continue  # spectra are of matrices
                made.append(_shaken(model, rng) | {"name": f"model.layers.{layer}.{kind}"})
        section["tensors"] = made
    one = found["coordinates"]["layers"][0]
    found["coordinates"]["layers"] = [_shaken(one, rng) | {"layer": layer} for layer in range(layers)]
    return found


def _shaken(value: Any, rng: np.random.Generator) -> Any:
    """The same structure with other numbers, so that nothing is compressed that would not be in earnest."""
    if isinstance(value, dict):
        return {key: _shaken(part, rng) for key, part in value.items()}
    if isinstance(value, list):
        return [_shaken(part, rng) for part in value]
    return value * float(rng.uniform(0.3, 1.0)) if isinstance(value, float) else value
