"""Tiny checkpoints with the tensor names of real architectures, made for whatever models a recipe names."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.checkpoint.checkpoint_files import write_tensors

HIDDEN, INNER, HEADS, VOCABULARY = 8, 12, 2, 16
Shapes = dict[str, tuple[int, ...]]


# ---- Architectures ------------------------------------------------------------------------------------------------


def layer_shapes(kind: str) -> Shapes:
    """The tensors of one layer, by their name after 'layers.N.'."""
    square, wide, tall = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    if kind == "bert":
        parts = {f"attention.self.{name}": square for name in ("query", "key", "value")}
        parts |= {"attention.output.dense": square, "intermediate.dense": wide, "output.dense": tall}
        found = {f"{name}.weight": shape for name, shape in parts.items()}
        found |= {f"{name}.bias": shape[:1] for name, shape in parts.items()}
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
        return found | {f"{name}.{end}": (HIDDEN,) for name in norms for end in ("weight", "bias")}
    found = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    found |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": tall}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma2" else []
    found |= {f"{name}.weight": (HIDDEN,) for name in norms}
    return found | ({f"self_attn.{name}_proj.bias": (HIDDEN,) for name in "qkv"} if kind == "qwen2" else {})


def model_shapes(kind: str, layers: int) -> Shapes:
    """Every tensor of a model of so many layers; `gemma2` and `tied` have no lm_head."""
    rows = (VOCABULARY, HIDDEN)
    if kind == "bert":
        found: Shapes = {"embeddings.word_embeddings.weight": rows, "embeddings.LayerNorm.weight": (HIDDEN,)}
        prefix = "encoder.layer"
    else:
        found = {"model.embed_tokens.weight": rows, "model.norm.weight": (HIDDEN,)}
        found |= {} if kind in ("gemma2", "tied") else {"lm_head.weight": rows}
        prefix = "model.layers"
    each = layer_shapes(kind)
    return found | {f"{prefix}.{n}.{name}": shape for n in range(layers) for name, shape in each.items()}


NAMES = {"gemma2": "Gemma2ForCausalLM", "qwen2": "Qwen2ForCausalLM", "bert": "BertModel"}


def config(kind: str, layers: int) -> dict[str, Any]:
    """A config.json with what a merge looks at."""
    return {
        "architectures": [NAMES.get(kind, "LlamaForCausalLM")],
        "model_type": {"tied": "llama"}.get(kind, kind),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "tie_word_embeddings": kind in ("gemma2", "tied"),
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }


# ---- Files --------------------------------------------------------------------------------------------------------


def random_tensors(shapes: Shapes, scale: float, seed: int, share: float = 1.0) -> dict[str, np.ndarray]:
    """Normal numbers, a share of them; the rest is zero."""
    rng = np.random.default_rng(seed)
    total = sum(map(math.prod, shapes.values()))
    flat = rng.standard_normal(total).astype(np.float32) * np.float32(scale) * (rng.random(total) < share)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    }


def write_small_files(folder: Path, settings: dict[str, Any]) -> None:
    """config.json and a tokenizer of words, the same in every model."""
    (folder / "config.json").write_text(json.dumps(settings))
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefghijklm"])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": words[token], "content": token, **special} for token in ("<s>", "</s>", "<unk>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, kind: str, layers: int, seed: int) -> None:
    """A model in bf16: numbers that all models of this kind and depth share, half of them changed by 'training'."""
    shapes = model_shapes(kind, layers)
    start, change = random_tensors(shapes, 1.0, layers), random_tensors(shapes, 0.05, seed, 0.5)
    values = {name: start[name] + change[name] for name in shapes}
    write_tensors(folder / "model.safetensors", values, "BF16", {"format": "pt"})
    write_small_files(folder, config(kind, layers))


def write_lora(folder: Path, kind: str, layers: int, seed: int) -> None:
    """A LoRA of rank 2 for q_proj and v_proj of every layer."""
    pairs: Shapes = {}
    for name, (rows, columns) in (
        (n, s) for n, s in model_shapes(kind, layers).items() if re.search(r"[qv]_proj.w", n)
    ):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        pairs |= {f"{stem}.lora_A.weight": (2, columns), f"{stem}.lora_B.weight": (rows, 2)}
    write_tensors(folder / "adapter_model.safetensors", random_tensors(pairs, 0.2, seed), "F32", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


# ---- Recipes ------------------------------------------------------------------------------------------------------


@dataclass
class WildRecipe:
    """A recipe as its author wrote it; `documents` is its data, `models` and `loras` the references in it."""

    file: Path
    text: str
    documents: list[dict[str, Any]]
    models: list[str] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)

    @property
    def places(self) -> dict[str, str]:
        """The folder of each reference."""
        return {reference: f"m{number}" for number, reference in enumerate([*self.models, *self.loras])}

    @property
    def last(self) -> dict[str, Any]:
        """The document whose output is the result."""
        return self.documents[-1]

    @property
    def depth(self) -> int:
        """Layers of the models: as many as some range asks for, 3 where none is given."""
        ranges = [int(source["layer_range"][1]) for document in self.documents for source in sources(document)]
        return max(ranges, default=3)

    @property
    def layers(self) -> int:
        """Layers of the result: the lengths of its slices, or all."""
        slices = find_slices(self.last)
        lengths = [int(end) - int(start) for start, end in (part["sources"][0]["layer_range"] for part in slices)]
        return sum(lengths) if lengths else self.depth


def find_slices(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The slices of a document, or of its one module."""
    modules = document.get("modules", {})
    return document.get("slices") or [part for module in modules.values() for part in module.get("slices", [])]


def sources(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every source of every slice."""
    for part in find_slices(document):
        yield from part["sources"]


def read_wild(file: Path) -> WildRecipe:
    """A recipe and what it names; names of other documents in the same file are no models."""
    text = file.read_text()
    documents = list(yaml.safe_load_all(text))
    known = {document.get("name") for document in documents}
    wild = WildRecipe(file, text, documents)
    for document in documents:
        entries = [*document.get("models", []), *sources(document)]
        references = [entry["model"] for entry in entries] + [document.get("base_model")]
        for reference in references:
            if reference is None or reference in known:
                continue
            model, *loras = reference.split("+")
            wild.models += [model] if model not in wild.models else []
            wild.loras += [lora for lora in loras if lora not in wild.loras]
    return wild


def seed_of(reference: str) -> int:
    """A number that the reference alone decides."""
    return zlib.crc32(reference.encode())


def lay_out(wild: WildRecipe, kind: str, folder: Path) -> Path:
    """The recipe beside small models; only references are replaced, each by the name of its folder."""
    places = wild.places
    for reference, place in places.items():
        write = write_lora if reference in wild.loras else write_model
        write(folder / place, kind, wild.depth, seed_of(reference))
    longest = sorted(map(re.escape, places), key=len, reverse=True)
    pattern = rf"(?<![\w./\\-])({'|'.join(longest)})(?![\w/\\-]|\.\w)"
    path = folder / wild.file.name
    path.write_text(re.sub(pattern, lambda found: places[found[1]], wild.text))
    return path
