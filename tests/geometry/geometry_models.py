"""Bases and experts with planted geometry, and the documents of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.checkpoint.checkpoint_files import write_model

import rlmerge
from rlmerge.kernels.plain import encode_bf16

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
)
SHAPES = ((40, 16), (16, 16), (24, 16), (16, 16), (24, 16), (16,))
Tensors = dict[str, np.ndarray]


def nearest(values: Any, dtype: str) -> np.ndarray:
    """Rounded to a dtype, as fp32."""
    array = np.asarray(values, np.float64)
    if dtype == "BF16":
        words = np.empty(array.size, np.uint16)
        encode_bf16(array.reshape(-1), words)
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(array.shape)
    return array.astype(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def make_base(seed: int = 0, dtype: str = "BF16") -> Tensors:
    """Weights of N(0, 0.02); zeros, powers of two and values at either end of their binade among them."""
    rng = np.random.default_rng(seed)
    found = {name: nearest(0.02 * rng.standard_normal(shape), dtype) for name, shape in zip(NAMES, SHAPES)}
    found[NAMES[0]].reshape(-1)[:6] = [0.0, -0.0, 2.0**-6, -(2.0**-6), 255 / 2**14, -255 / 2**14]
    return found


def train(base: Tensors, seed: int, dtype: str = "BF16", size: float = 6e-5, share: float = 0.6) -> Tensors:
    """Noise on a share of the coordinates, rounded."""
    rng = np.random.default_rng(seed)
    return {
        name: nearest(
            values.astype(np.float64) + size * rng.standard_normal(values.shape) * (rng.random(values.shape) < share),
            dtype,
        )
        for name, values in base.items()
    }


def write(folder: Path, base: Tensors, experts: dict[str, Tensors], dtypes: dict[str, str] | None = None) -> list[Path]:
    """Model folders 'base' and one an expert; returns them, base first."""
    kinds = dict.fromkeys(("base", *experts), "BF16") | (dtypes or {})
    return [
        write_model(folder / key, tensors, {"architectures": ["LlamaForCausalLM"]}, kinds[key])
        for key, tensors in {"base": base, **experts}.items()
    ]


def document(folders: list[Path], **options: Any) -> Any:
    """`inspect` of folders, the base first; experts are called by their folders' names."""
    names = [folder.name for folder in folders[1:]]
    return rlmerge.inspect(folders[0], folders[1:], names=names, **{"threads": 1, "kernels": "numpy", **options})
