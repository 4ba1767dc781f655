"""Models whose every tensor holds one number, so that a merged number says which layer of which model it came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tests.checkpoint.checkpoint_files import write_model

LAYERS = {"base": 4, "one": 4, "two": 4, "deep": 12}
SEEING = {"see_one": 5, "see_two": 5}
VISION_LAYERS = 3
"""Models of two stacks: those of Mistral 3, with so many text layers, and with a vision tower of fewer."""
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


OF_VISION_LAYER = {
    "attention_norm.weight": (4,),
    "ffn_norm.weight": (4,),
    **{f"attention.{part}_proj.weight": (4, 4) for part in "qkvo"},
    "feed_forward.gate_proj.weight": (8, 4),
    "feed_forward.up_proj.weight": (8, 4),
    "feed_forward.down_proj.weight": (4, 8),
}


def seeing_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Mistral 3 of so many text layers."""
    found = {f"language_model.{name}": shape for name, shape in shapes(layers).items()}
    found |= {f"multi_modal_projector.linear_{k}.weight": (4, 4) for k in (1, 2)}
    found |= {
        "multi_modal_projector.norm.weight": (4,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (4, 16),
    }
    found |= {"vision_tower.patch_conv.weight": (4, 3, 4, 4), "vision_tower.ln_pre.weight": (4,)}
    for layer in range(VISION_LAYERS):
        found |= {f"vision_tower.transformer.layers.{layer}.{name}": shape for name, shape in OF_VISION_LAYER.items()}
    return found


def value(model: str, name: str) -> float:
    """The number that a tensor of a model holds: exact in fp32, and another for every model and tensor."""
    names = shapes(LAYERS[model]) if model in LAYERS else seeing_shapes(SEEING[model])
    return [*LAYERS, *SEEING].index(model) + 1 + (1 + list(names).index(name)) / 256


def config(layers: int) -> dict[str, object]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2,
        "vocab_size": 16, "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_act": "silu",
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def seeing_config(layers: int) -> dict[str, object]:
    """config.json of a Mistral 3."""
    vision = {
        "model_type": "pixtral", "hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 2,
        "num_hidden_layers": VISION_LAYERS, "image_size": 8, "patch_size": 4, "num_channels": 3,
    }  # fmt: skip
    return {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "image_token_index": 15,
        "spatial_merge_size": 2, "tie_word_embeddings": False, "torch_dtype": "float32", "vision_config": vision,
        "text_config": config(layers) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    }  # fmt: skip


def write_models(folder: Path) -> None:
    """All models, as folders by their names."""
    for model, layers in LAYERS.items():
        tensors = {name: np.full(shape, value(model, name), np.float32) for name, shape in shapes(layers).items()}
        write_model(folder / model, tensors, config(layers))
    for model, layers in SEEING.items():
        tensors = {
            name: np.full(shape, value(model, name), np.float32) for name, shape in seeing_shapes(layers).items()
        }
        write_model(folder / model, tensors, seeing_config(layers))


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
    """num_hidden_layers of a merged model's text model."""
    found = json.loads((folder / "config.json").read_text())
    return found.get("text_config", found)["num_hidden_layers"]
