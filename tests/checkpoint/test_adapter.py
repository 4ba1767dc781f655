"""A LoRA folder read here, added to its base, is what PEFT's own merge gives; what is no plain LoRA is refused."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import random, write_model, write_tensors

from rlmerge.checkpoint.adapter import Adapter, open_adapter
from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.errors import AdapterError

# --- against PEFT ---


def values(info: TensorInfo) -> np.ndarray:
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        raw = stream.read(info.nbytes)
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    array = np.frombuffer(raw, kinds[info.dtype]).reshape(info.shape)
    if info.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def merged(base: Checkpoint, adapter: Adapter) -> dict[str, np.ndarray]:
    """Base plus adapter, from the definition in the module's first lines."""
    result = {}
    for name, info in base.tensors.items():
        if name in adapter.saved:
            result[name] = values(adapter.saved[name])
            continue
        result[name] = values(info)
        if pair := adapter.pairs.get(name):
            delta = pair.scale * (values(pair.b) @ values(pair.a))
            result[name] = result[name] + (delta.T if pair.transposed else delta)
    return result


@functools.cache
def libraries() -> Any:
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return peft, torch, transformers


def llama(tied: bool = False) -> Any:
    _, torch, transformers = libraries()
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    _, torch, transformers = libraries()
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, tie_word_embeddings=False))


def train(tmp_path: Path, model: Any, base_model: Any = None, **config: Any) -> tuple[Checkpoint, Checkpoint, Any]:
    """Base folder, adapter folder with random weights, and the state dict that PEFT merges them to."""
    peft, torch, _ = libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (base_model or model).save_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "lora")
        state = {} if config.get("lora_bias") else adapted.merge_and_unload().state_dict()  # PEFT cannot merge these
    return open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "lora"), state


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"k_proj": 4, r"^model\.layers\.0\.self_attn\.q_proj": 5, r"layers\.1\..*v_proj": 1, "proj": 7},
    "alpha_pattern": {r"self_attn\.k_proj": 9, "_proj": 100, r".*\.0\.self_attn\.(q|v)_proj": 5, "o_proj": 1},
}
VARIETIES = {
    "plain": (llama, {"target_modules": PROJECTIONS}),
    "rslora": (llama, {"target_modules": PROJECTIONS, "use_rslora": True, "r": 3}),
    "patterns": (llama, {"target_modules": PROJECTIONS, **PATTERNS}),
    "patterns with rslora": (llama, {"target_modules": PROJECTIONS, **PATTERNS, "use_rslora": True}),
    "saved modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "kept tie of saved modules": (
        functools.partial(llama, True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied embedding": (functools.partial(llama, True), {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "square conv1d alone": (gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d and linear, a flag for the last": (gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "conv1d and embeddings": (gpt2, {"target_modules": ["c_proj", "wte", "wpe"], "fan_in_fan_out": True}),
    "gaussian": (llama, {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("variety", VARIETIES)
def test_agrees_with_peft(tmp_path: Path, variety: str) -> None:
    make, config = VARIETIES[variety]
    base, lora, state = train(tmp_path, make(), **config)
    adapter = open_adapter(lora, base)
    assert adapter.pairs
    for name, array in merged(base, adapter).items():
        # PEFT multiplies and adds in fp32: a few ulp of values of order 10
        np.testing.assert_allclose(array, state[name].double().numpy(), rtol=1e-6, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("adapter_has_prefix", [True, False])
def test_prefixes_may_differ(tmp_path: Path, adapter_has_prefix: bool) -> None:
    full = llama()
    body = full.model
    if adapter_has_prefix:
        base, lora, state = train(tmp_path, full, body, target_modules=PROJECTIONS)
        assert "layers.0.self_attn.q_proj.weight" in base.tensors
        state = {name.removeprefix("model."): value for name, value in state.items()}
    else:
        base, lora, state = train(tmp_path, body, full, target_modules=PROJECTIONS)
        state = {f"model.{name}": value for name, value in state.items()}
    adapter = open_adapter(lora, base)
    assert len(adapter.pairs) == 12
    for name, array in merged(base, adapter).items():
        if name in state:
            np.testing.assert_allclose(array, state[name].double().numpy(), rtol=1e-6, atol=4e-6, err_msg=name)


@pytest.mark.parametrize(("config", "words"), [
    ({"target_modules": ["q_proj"], "use_dora": True}, ["use_dora", "DoRA"]),
    ({"target_modules": ["q_proj"], "lora_bias": True}, ["lora_bias"]),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
    ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, ["pissa", "path_initial_model"]),
    ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, ["olora"]),
    ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
])  # fmt: skip
def test_refuses_what_peft_saves_beside_plain_lora(tmp_path: Path, config: Any, words: list[str]) -> None:
    base, lora, _ = train(tmp_path, llama(), **config)
    with pytest.raises(AdapterError) as caught:
        open_adapter(lora, base)
    assert all(word in str(caught.value) for word in [*words, "adapter_config.json"])
    # the tensors alone give it away as well, when they can
    settings = json.loads((lora.folder / "adapter_config.json").read_text())
    settings |= {"use_dora": False, "lora_bias": False, "trainable_token_indices": None}
    (lora.folder / "adapter_config.json").write_text(json.dumps(settings))
    if words[0] in ("use_dora", "lora_bias", "trainable_token_indices"):
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            open_adapter(open_checkpoint(lora.folder), base)


# --- without PEFT ---

Q = "base_model.model.model.layers.0.q_proj"
GOOD = {f"{Q}.lora_A.weight": random(1, 2, 4), f"{Q}.lora_B.weight": random(2, 6, 2)}
BASE = {
    "model.embed_tokens.weight": random(0, 12, 4),
    "model.layers.0.q_proj.weight": random(3, 6, 4),
    "model.layers.1.q_proj.weight": random(3, 6, 4),
    "model.norm.weight": random(4, 4),
}


def lora(tmp_path: Path, tensors: dict[str, Any] = GOOD, base: dict[str, Any] = BASE, **config: Any) -> Adapter:
    write_tensors(tmp_path / "lora" / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    base_folder = write_model(tmp_path / "base", base, {"tie_word_embeddings": True})
    return open_adapter(open_checkpoint(tmp_path / "lora"), open_checkpoint(base_folder, "base"))


def test_plain(tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    assert list(adapter.pairs) == ["model.layers.0.q_proj.weight"]
    pair = adapter.pairs["model.layers.0.q_proj.weight"]
    assert (pair.a.shape, pair.b.shape, pair.scale, pair.transposed) == ((2, 4), (6, 2), 2.0, False)


def test_names_with_the_adapters_name(tmp_path: Path) -> None:
    named = {key.replace(".weight", ".default.weight"): value for key, value in GOOD.items()}
    assert list(lora(tmp_path, named).pairs) == ["model.layers.0.q_proj.weight"]
    second = {key.replace(".weight", ".second.weight"): value for key, value in GOOD.items()}
    with pytest.raises(AdapterError, match="more than one"):
        lora(tmp_path, named | second)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other kind": (GOOD, {"peft_type": "IA3"}, "IA3"),
    "no kind": (GOOD, {"peft_type": None}, "peft_type"),
    "biases": (GOOD, {"bias": "all"}, "bias"),
    "loftq": (GOOD, {"init_lora_weights": "loftq"}, "loftq"),
    "pissa_niter": (GOOD, {"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "corda": (GOOD, {"init_lora_weights": "corda"}, "corda"),
    "experts": (GOOD, {"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    "alora": (GOOD, {"alora_invocation_tokens": [1]}, "alora"),
    "rank in the config": (GOOD, {"r": 3}, "rank 2"),
    "rank in a pattern": (GOOD, {"rank_pattern": {"q_proj": 8}}, "rank 2"),
    "rank zero": (GOOD, {"r": 0}, "'r'"),
    "rank a word": (GOOD, {"r": "two"}, "'r'"),
    "alpha a word": (GOOD, {"lora_alpha": [4]}, "lora_alpha"),
    "alpha not finite": (GOOD, {"lora_alpha": float("nan")}, "lora_alpha"),
    "pattern no expression": (GOOD, {"alpha_pattern": {"(": 8}}, "alpha_pattern"),
    "patterns a list": (GOOD, {"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "magnitudes": (GOOD | {f"{Q}.lora_magnitude_vector": random(5, 6)}, {}, "DoRA"),
    "a bias of B": (GOOD | {f"{Q}.lora_B.bias": random(5, 6)}, {}, "bias"),
    "a diagonal": (GOOD | {f"{Q}.lora_diag": random(5, 2)}, {}, "lora_diag"),
    "A alone": ({A: GOOD[A]}, {}, "lora_B"),
    "B alone": ({B: GOOD[B]}, {}, "lora_A"),
    "convolution": ({A: random(1, 2, 4, 3, 3), B: GOOD[B]}, {}, "convolution"),
    "not gathered": ({A: random(1, 0), B: GOOD[B]}, {}, "gathered"),
    "ranks differ": ({A: GOOD[A], B: random(2, 6, 3)}, {}, "ranks"),
    "wrong width": ({A: random(1, 2, 5), B: GOOD[B]}, {}, "another base"),
    "whole numbers": ({A: (np.ones((2, 4)), "I64"), B: GOOD[B]}, {}, "I64"),
    "absent target": (
        {key.replace("layers.0", "layers.7"): value for key, value in GOOD.items()}, {}, "does not have"),
    "head of a tied base": (
        {"base_model.model.lm_head.lora_A.weight": random(1, 2, 4),
         "base_model.model.lm_head.lora_B.weight": random(2, 12, 2)}, {}, "ties its head"),
    "resized embedding": (
        GOOD | {"base_model.model.model.embed_tokens.weight": random(1, 14, 4)}, {}, "resized"),
    "another base's copy": (
        GOOD | {f"{Q}.base_layer.weight": random(99, 6, 4)}, {}, "another or a changed base"),
    "both whole and adapted": (GOOD | {f"{Q}.weight": random(1, 6, 4)}, {}, "adapted as well"),
    "nothing": ({f"{Q}.original_module.weight": random(1, 6, 4)}, {}, "changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, case: str) -> None:
    tensors, config, word = CASES[case]
    with pytest.raises(AdapterError) as caught:
        lora(tmp_path, tensors, **config)
    assert word in str(caught.value), str(caught.value)
    assert str(tmp_path / "lora") in str(caught.value)


def test_embedding_with_a_wrong_shape(tmp_path: Path) -> None:
    module = "base_model.model.model.embed_tokens.lora_embedding_"
    swapped = {f"{module}A": random(1, 2, 4), f"{module}B": random(2, 12, 2)}
    with pytest.raises(AdapterError, match="embed_tokens"):
        lora(tmp_path, swapped)


def test_a_square_embedding_is_transposed(tmp_path: Path) -> None:
    module = "base_model.model.model.embed_tokens.lora_embedding_"
    pair = {f"{module}A": random(1, 2, 4), f"{module}B": random(2, 4, 2)}
    (found,) = lora(tmp_path, pair, {"model.embed_tokens.weight": random(0, 4, 4)}).pairs.values()
    assert found.transposed


def test_a_narrower_copy_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F818001, 0x3F807FFF], np.uint32)
    even = np.array([0x3F800000, 0x3F820000, 0x3F820000, 0x3F800000], np.uint32)
    weight, copy = (np.tile(b.view(np.float32), (6, 1)) for b in (bits, even))
    base = BASE | {"model.layers.0.q_proj.weight": weight}
    assert lora(tmp_path, GOOD | {f"{Q}.base_layer.weight": (copy, "BF16")}, base).pairs


def test_a_copy_of_the_base_in_another_type_is_a_copy(tmp_path: Path) -> None:
    weight = BASE["model.layers.0.q_proj.weight"]
    halves = weight.astype(np.float16)
    assert lora(tmp_path, GOOD | {f"{Q}.base_layer.weight": (halves, "F16")}).pairs
    wide = {"model.layers.0.q_proj.weight": (weight, "BF16")}
    stored = (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert lora(tmp_path, GOOD | {f"{Q}.base_layer.weight": stored}, BASE | wide).pairs
    with pytest.raises(AdapterError, match="changed base"):
        lora(tmp_path, GOOD | {f"{Q}.base_layer.weight": weight}, BASE | wide)


def test_a_saved_head_of_a_tied_base_repeats_its_embedding(tmp_path: Path) -> None:
    trained = random(7, 12, 4)
    saved = {f"base_model.model.{name}.weight": trained for name in ("model.embed_tokens", "lm_head")}
    assert list(lora(tmp_path, GOOD | saved).saved) == ["model.embed_tokens.weight"]
    with pytest.raises(AdapterError, match=r"lm_head.*ties its head"):
        lora(tmp_path, GOOD | saved | {"base_model.model.lm_head.weight": trained + 1})


def test_ambiguous_names(tmp_path: Path) -> None:
    towers = {f"{tower}.layers.0.q_proj.weight": random(3, 6, 4) for tower in ("text", "vision")}
    bare = {key.replace("model.model.layers", "model.layers"): value for key, value in GOOD.items()}
    with pytest.raises(AdapterError, match=r"may mean 'model\.layers.*text\.layers"):
        lora(tmp_path, bare, BASE | towers | {"x.q_proj.weight": random(1, 2)})
    assert list(lora(tmp_path, bare).pairs) == ["model.layers.0.q_proj.weight"]


def test_square_layers_stored_both_ways_round_are_unclear(tmp_path: Path) -> None:
    def pair(name: str, rows: int, columns: int) -> dict[str, Any]:
        module = f"base_model.model.{name}"
        return {f"{module}.lora_A.weight": random(1, 2, columns), f"{module}.lora_B.weight": random(2, rows, 2)}

    tensors = pair("h.0.up", 8, 4) | pair("h.0.down", 4, 8) | pair("h.0.mix", 4, 4)
    base = {"h.0.up.weight": random(0, 4, 8), "h.0.down.weight": random(0, 4, 8), "h.0.mix.weight": random(0, 4, 4)}
    with pytest.raises(AdapterError, match=r"h\.0\.mix.*square"):
        lora(tmp_path, tensors, base)
    consistent = base | {"h.0.down.weight": random(0, 8, 4)}
    assert {pair.transposed for pair in lora(tmp_path, tensors, consistent).pairs.values()} == {True}
