"""Models whose every tensor holds one number, so that a merged number says which layer of which model it came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tests.checkpoint.checkpoint_files import write_model

LAYERS = {"base": 4, "one": 4, "two": 4, "deep": 12}
HIDDEN = 4
OF_LAYER = {
    "input_layernorm.weight": (4,),
    "post_attention_layernorm.weight": (4,),
    "self_attn.q_proj.weight": (4, 4),
    "self_attn.k_proj.weight": (4, 4),
    "self_attn.v_proj.weight": (4, 4),
    "self_attn.o_proj.weight": (4, 4),
    "mlp.gate_proj.weight": (8, 4),
    "mlp.up_proj.weight": (8, 4),
    "mlp.down_proj.weight": (4, 8),
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of so many layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 4)}
    found |= {f"model.layers.{k}.{name}": shape for k in range(layers) for name, shape in OF_LAYER.items()}
    return found | {"model.norm.weight": (4,), "lm_head.weight": (16, 4)}


def value(model: str, name: str) -> float:
    """The number that a tensor of a model holds: exact in fp32, and another for every model and tensor."""
    number = list(shapes(LAYERS[model])).index(name)
    return list(LAYERS).index(model) + 1 + (1 + number) / 256


def config(layers: int) -> dict[str, object]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2,
        "vocab_size": 16, "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_act": "silu",
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def write_models(folder: Path) -> None:
    """All models, as folders by their names."""
    for model, layers in LAYERS.items():
        tensors = {name: np.full(shape, value(model, name), np.float32) for name, shape in shapes(layers).items()}
        write_model(folder / model, tensors, config(layers))


def read_numbers(folder: Path) -> dict[str, float]:
    """The number of every tensor of a merged model. Raises ValueError for one that holds several."""
    from tests.methods.small_models import read_values

    found = {}
    for name, array in read_values(folder).items():
        if np.ptp(array) > 1e-6:
            raise ValueError(f"{folder}: {name} holds {array.min()} to {array.max()}")
        found[name] = float(array.reshape(-1)[0])
    return found


def read_depth(folder: Path) -> int:
    """num_hidden_layers of a merged model."""
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]
