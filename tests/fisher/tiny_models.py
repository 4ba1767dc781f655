"""Small random models of several architectures, and random sequences for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from rlmerge.fisher.sequences import Sequence, Unit

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=6),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=6, tie_word_embeddings=True, final_logit_softcapping=5.0),
}


def make_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random model; weights large enough that no gradient is tiny."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config._experts_implementation = "eager"  # the grouped product of torch has no float64
    return model.to(dtype).eval()


def make_units(count: int, rows: int = 1, seed: int = 1, longest: int = 20) -> list[Unit]:
    """Random sequences of different lengths, with tokens that repeat."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        sequences = []
        for row in range(rows):
            length = int(torch.randint(4, longest, (1,), generator=generator))
            ids = torch.randint(0, VOCABULARY // 2, (length,), generator=generator).tolist()
            start = int(torch.randint(1, length - 1, (1,), generator=generator))
            sequences.append(Sequence(tuple(ids), start, 1.0 if rows == 1 else (-1.0) ** row * 0.5 + 0.1))
        found.append(Unit(tuple(sequences)))
    return found
