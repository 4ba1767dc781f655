"""Small models with real tokenizers, trained here and saved by transformers, and a plain twin of new vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.checkpoint.checkpoint_files import write_model
from tests.methods.small_models import representable
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import rlmerge

TEXT = ["the cat sat on the mat and the dog ran", "numbers 12 and 34 add to 46", "print(x) for x in range(10)"] * 5
MORE = ["schrödinger equation hamiltonian eigenvalue", "merging models of reinforcement learning"] * 5
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
HIDDEN = 8
EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
INNER = "model.layers.0.mlp.up_proj.weight"


def byte_bpe(text: Sequence[str] = TEXT, size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about so many tokens, ending texts with <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=sorted(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def with_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    """A copy with special tokens more."""
    copy = deepcopy(tokenizer)
    copy.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return copy


def extended(tokenizer: PreTrainedTokenizerFast, *merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A copy whose vocabulary was trained on: further merges after the old ones."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    for first, second in merges:
        whole["model"]["vocab"][first + second] = len(whole["model"]["vocab"])
        whole["model"]["merges"].append([first, second])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="<eos>")


def tensors(seed: int, rows: int, tied: bool = False, dtype: str = "F32") -> dict[str, np.ndarray]:
    """Random weights that a dtype holds: embedding, head with a bias, one matrix between them."""
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (rows, HIDDEN), INNER: (6, HIDDEN), HEAD: (rows, HIDDEN), BIAS: (rows,)}
    return {
        name: representable(rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
        if not (tied and name in (HEAD, BIAS))
    }


def write(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None, weights: Mapping[str, np.ndarray], dtype: str = "F32",
    **config: Any,
) -> Path:  # fmt: skip
    """A model folder."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    settings = {"vocab_size": len(weights[EMBED]), "tie_word_embeddings": HEAD not in weights, **config}
    return write_model(folder, dict(weights), settings, dtype)


def recipe(folder: Path, method: str, models: Sequence[str], base: str | None = "base", **top: Any) -> rlmerge.Recipe:
    """A recipe over folders below `folder`; parameters that a method needs are weights of 0.5."""
    parameters = dict(top.pop("parameters", {}))
    for spec in rlmerge.get_method(method).parameters:
        if spec.default is None and spec.name not in parameters:
            parameters[spec.name] = 0.5
    data = {"merge_method": method, "models": [{"model": name} for name in models], "parameters": parameters, **top}
    if base is not None:
        data["base_model"] = base
    return rlmerge.parse_recipe(yaml.safe_dump(data, sort_keys=False), folder=folder)


Vocab = Mapping[str, int]
Model = tuple[Vocab, Mapping[str, np.ndarray]]


def resized(
    models: Mapping[str, Model], out: Vocab, rows: int, base: str | None, dtype: str = "F32",
    forced: Mapping[str, tuple[str, int]] | None = None,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """The plain twin: every model as if it had been given the vocabulary `out` by hand, row by row.

    models  by name, in order; the first lends padding; `forced` has the model and row of tokens that are forced
    """
    home = next(iter(models))
    spare = {name: set(range(len(weights[EMBED]))) - set(vocab.values()) for name, (vocab, weights) in models.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    by_id = {number: token for token, number in out.items()}
    for name, (vocab, weights) in models.items():
        found[name] = dict(weights)
        for tensor in (EMBED, HEAD, BIAS):
            if tensor not in weights:
                continue
            every = {key: other[tensor] for key, (_, other) in models.items()}
            new = np.zeros((rows, *weights[tensor].shape[1:]), np.float32)
            for row in range(rows):
                token = by_id.get(row)
                if token is None:
                    new[row] = _padding(row, name, home, spare, every, dtype, set(models[home][0].values()))
                    continue
                having = {key: v[token] for key, (v, _) in models.items() if token in v}
                if forced and token in forced:
                    key, source = forced[token]
                    new[row] = every[key][source]
                elif token in vocab:
                    new[row] = weights[tensor][vocab[token]]
                elif base in having:
                    new[row] = every[base][having[base]]
                elif len(having) == 1:
                    new[row] = next(every[key][source] for key, source in having.items())
                elif having:
                    new[row] = rounded(
                        sum(every[k][s].astype(np.float64) for k, s in having.items()) / len(having), dtype
                    )
            found[name][tensor] = new
    return found


def _padding(
    row: int, name: str, home: str, spare: Mapping[str, set[int]], every: Mapping[str, np.ndarray], dtype: str,
    used: set[int],
) -> Any:  # fmt: skip
    for key in (name, home):
        if row in spare[key]:
            return every[key][row]
    total = np.zeros(every[home].shape[1:])
    for number in sorted(used):
        total = total + every[home][number]
    return rounded(total / len(used), dtype)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp64 to the nearest value of a dtype, ties to even, as fp32."""
    if dtype != "BF16":
        return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)
    low = np.atleast_1d(representable(values.astype(np.float32), "BF16"))
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    wide = np.atleast_1d(values)
    even = (low.view(np.uint32) >> 16) % 2 == 0
    near, far = np.abs(wide - low), np.abs(high.astype(np.float64) - wide)
    return np.where((near < far) | ((near == far) & even), low, high).reshape(np.shape(values))
