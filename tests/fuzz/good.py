"""The good files from which fuzzing starts, and what is done with them once they are spoiled."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.cli.command_line import SHAPES, fishers, good_set, weights
from tests.execute.test_same_bytes import contents
from tests.methods.small_models import read_values, some_grams

import rlmerge
from rlmerge.execute.journal import is_signed, signed
from rlmerge.planner import make_plan

HOW: dict[str, Any] = {"threads": 1, "kernels": "numpy"}
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 16, "torch_dtype": "bfloat16",
          "tie_word_embeddings": True, "eos_token_id": 1}  # fmt: skip
VOCABULARY = {**{chr(97 + n): n for n in range(10)}, "ab": 10, "abc": 11}
GENERATION = {"eos_token_id": 1, "bos_token_id": [0, 1]}
RECIPES = {
    "sar.yml": """\
merge_method: sar
base_model: base
models:
  - {model: e0, fisher: f0, name: a, parameters: {density: 0.5, weight: 1.0}}
  - {model: e1, fisher: f1, name: b}
parameters: {lambda: 1.0, scope: model, rescale: l2}
""",
    "compact.yml": """\
merge_method: sar
base_model: base
models: [{model: e0, fisher: f2}, {model: e1, fisher: f3}]
""",
    "filters.yml": """\
merge_method: ties
base_model: base
models:
  - model: e0
    <<: &some {parameters: {weight: 0.5}}
  - model: e1
    parameters:
      weight:
        - {filter: q_proj, value: [0, 0.5, 1]}
        - {filter: up, value: 1e-1}
        - value: 0.25
parameters: {density: 0.7, normalize: true}
dtype: bfloat16
exclude: ["norm"]
""",
    "packed.yml": """\
merge_method: task_arithmetic
base_model: base
models: [{model: p0, parameters: {weight: 1}}, {model: base+l0, parameters: {weight: 0.3}}]
""",
    "regmean.yml": """\
merge_method: regmean
base_model: base
models: [{model: e0, gram: g0, parameters: {weight: 1}}, {model: e1, gram: g1, parameters: {weight: 1}}]
""",
    "union.yml": """\
merge_method: linear
base_model: base
models: [{model: e0, parameters: {weight: 1}}, {model: e2, parameters: {weight: 0.5}}]
tokenizer:
  source: union
  tokens:
    "<new>": {source: e2, force: true}
    a: {source: {kind: zero}}
  pad_to_multiple_of: 4
chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"
""",
    "slices.yml": """\
merge_method: passthrough
slices:
  - sources: [{model: e0, layer_range: [0, 2]}]
  - sources: [{model: e1, layer_range: [1, 2], parameters: {scale: {filter: up, value: 0.5}}}]
""",
    "stages.yml": """\
name: one
merge_method: dare_ties
base_model: base
models: [{model: e0, parameters: {weight: 1, density: 0.5}}]
seed: 3
---
name: two
merge_method: slerp
base_model: one
models: [{model: one}, {model: e1}]
parameters: {t: 0.3}
""",
}


def write_good(home: Path) -> None:
    """Models of 10 KB, with everything beside them that a model may have."""
    good_set(home)
    tokenizer = {"version": "1.0", "added_tokens": [_added(12, "<s>"), _added(13, "</s>")], "normalizer": None,
                 "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"], "ab c"]}}  # fmt: skip
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}",
                "added_tokens_decoder": {"12": _added(12, "<s>"), "13": _added(13, "</s>")}}  # fmt: skip
    for name in ("base", "e0", "e1", "e2"):
        folder = home / name
        if name == "e2":
            write_model(folder, dict(weights(3)), dtype="BF16")
            tokenizer["added_tokens"] = [*tokenizer["added_tokens"], _added(14, "<new>")]  # type: ignore[misc]
        put(folder / "config.json", CONFIG)
        put(folder / "tokenizer.json", tokenizer)
        put(folder / "tokenizer_config.json", settings)
        put(folder / "generation_config.json", GENERATION)
        put(folder / "special_tokens_map.json", {"eos_token": "</s>"})
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n")
        (folder / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# A model\n")
    _write_fishers(home)
    for k in (0, 1):
        grams = some_grams(str(k), SHAPES)
        write_tensors(home / f"g{k}" / "gram.safetensors", grams)
        put(home / f"g{k}" / "gram.json", {"aliases": {}, "input_first": [], "tensors": {}, "source": "own"})
    rng = np.random.default_rng(5)
    pair = {f"base_model.model.model.layers.{layer}.{part}_proj.lora_{ab}.weight":
            rng.standard_normal((2, 8) if ab == "A" else ((8 if part == "q" else 12), 2)).astype(np.float32)
            for layer in (0, 1) for part in ("q", "up") for ab in "AB"}  # fmt: skip
    write_tensors(home / "l0" / "adapter_model.safetensors", pair)
    put(home / "l0" / "adapter_config.json", {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"q_proj": 8}, "rank_pattern": {}, "use_rslora": True, "base_model_name_or_path": "base",
    })  # fmt: skip
    rlmerge.pack(home / "e0", home / "base", home / "p0", **HOW)
    for name, text in RECIPES.items():
        (home / name).write_text(text)
    rlmerge.merge_to_folder(home / "filters.yml", home / "merged", **HOW)
    _interrupt(home)


def _added(number: int, content: str) -> dict[str, Any]:
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}  # fmt: skip


def put(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _write_fishers(home: Path) -> None:
    """f0 with sums in fisher.json, f1 plain, f2 sparse and whole, f3 factored and whole."""
    values = fishers(0)
    sums = {name: {"sum": float(value.sum(dtype=np.float64)), "count": value.size} for name, value in values.items()}
    put(home / "f0" / "fisher.json", {"source": "own", "sequences": 4, "tensors": sums})
    sparse: dict[str, Any] = {}
    factored: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        if "q_proj" in name:
            different = np.flatnonzero(weights(1)[name] != weights(0)[name])
            different = np.union1d(different, np.flatnonzero(weights(2)[name] != weights(0)[name]))
            sparse[f"{name}#positions"] = (different.astype("<i4"), "I32")
            sparse[f"{name}#values"] = values[name].reshape(-1)[different]
            factored[f"{name}#rows"] = values[name].sum(1)
            factored[f"{name}#columns"] = values[name].sum(0)
        else:
            sparse[name] = factored[name] = values[name]
        assert shape == values[name].shape
    from tests.checkpoint import checkpoint_files

    checkpoint_files.NUMPY.setdefault("I32", "<i4")
    write_tensors(home / "f2" / "fisher.safetensors", sparse)
    write_tensors(home / "f3" / "fisher.safetensors", factored)
    put(home / "f2" / "fisher.json", {"tensors": sums})
    put(home / "f3" / "fisher.json", {"tensors": sums})


def _interrupt(home: Path) -> None:
    """half.unfinished: a merge that was stopped in its middle."""

    class Stop(Exception):
        pass

    def progress(step: Any) -> None:
        if step.units >= 3:
            raise Stop

    try:
        rlmerge.merge_to_folder(home / "sar.yml", home / "half", progress=progress, **HOW)
    except Stop:
        return
    raise AssertionError("was not stopped")


@dataclass(frozen=True)
class Scenario:
    """files    what is spoiled: paths below the home
    run      what is done with it: (home, a place for outputs)
    """

    files: tuple[str, ...]
    run: Callable[[Path, Path], None]


def merging(recipe: str) -> Callable[[Path, Path], None]:
    def run(home: Path, out: Path) -> None:
        rlmerge.check(home / recipe, out=out, kernels="numpy")
        outcome = rlmerge.merge_to_folder(home / recipe, out, **HOW)
        rlmerge.verify(out)
        for name, value in read_values(out).items():
            assert value.dtype.kind in "iubc" or np.isfinite(value).all(), f"{name} of the output is not finite"
        assert outcome.out == out

    return run


def _unpack(home: Path, out: Path) -> None:
    rlmerge.unpack(home / "p0", out, **HOW)


def _pack(home: Path, out: Path) -> None:
    rlmerge.pack(home / "e0", home / "base", out, **HOW)
    rlmerge.unpack(out, out.with_name("back"), **HOW)
    kept = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {n: d for n, d in contents(out.with_name("back")).items() if n in kept} == {
        n: d for n, d in contents(home / "e0").items() if n in kept}  # fmt: skip


def _verify(home: Path, out: Path) -> None:
    rlmerge.verify(home / "merged")


def _resume(home: Path, out: Path) -> None:
    work = out.with_name("out.unfinished")
    shutil.copytree(home / "half.unfinished", work)
    digest = make_plan(rlmerge.load_recipe(home / "sar.yml")).digest().encode()  # has the paths of this copy
    first, end, rest = (work / "journal.jsonl").read_bytes().partition(b"\n")
    if is_signed(first + end):
        first = re.sub(rb'^{"plan": "[0-9a-f]{32}', b'{"plan": "' + digest, first).rpartition(b', "xxh3"')[0] + b"}"
        first, end = signed(first), b""
    (work / "journal.jsonl").write_bytes(first + end + rest)
    merging("sar.yml")(home, out)


SMALL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
         "chat_template.jinja", "README.md")  # fmt: skip
INDEX = "base/model.safetensors.index.json"
SCENARIOS: dict[str, Scenario] = {
    "recipe: sar": Scenario(("sar.yml",), merging("sar.yml")),
    "recipe: filters": Scenario(("filters.yml",), merging("filters.yml")),
    "recipe: tokens": Scenario(("union.yml",), merging("union.yml")),
    "recipe: slices": Scenario(("slices.yml",), merging("slices.yml")),
    "recipe: stages": Scenario(("stages.yml",), merging("stages.yml")),
    "recipe: packs": Scenario(("packed.yml",), merging("packed.yml")),
    "header": Scenario(("e0/model.safetensors", "e1/model.safetensors"), merging("filters.yml")),
    "shards": Scenario((INDEX, "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors",
                        "base/config.json"), merging("filters.yml")),
    "slices": Scenario(("e0/model.safetensors", "e0/config.json", "e1/model.safetensors"), merging("slices.yml")),
    "small files": Scenario(tuple(f"base/{name}" for name in (*SMALL, "config.json")), merging("filters.yml")),
    "tokenizers": Scenario(tuple(f"{model}/{name}" for model in ("base", "e2") for name in (*SMALL, "config.json")),
                           merging("union.yml")),
    "fishers": Scenario(("f0/fisher.safetensors", "f0/fisher.json", "f1/fisher.safetensors"), merging("sar.yml")),
    "compact fishers": Scenario(("f2/fisher.safetensors", "f2/fisher.json", "f3/fisher.safetensors"),
                                merging("compact.yml")),
    "grams": Scenario(tuple(f"g{k}/gram.{kind}" for k in (0, 1) for kind in ("safetensors", "json")),
                      merging("regmean.yml")),
    "adapter": Scenario(("l0/adapter_config.json", "l0/adapter_model.safetensors"), merging("packed.yml")),
    "pack": Scenario(("p0/pack.json", "p0/delta.safetensors"), merging("packed.yml")),
    "unpack": Scenario(("p0/pack.json", "p0/delta.safetensors", "base/config.json"), _unpack),
    "packing": Scenario(("e0/model.safetensors", "e0/config.json", "e0/README.md", INDEX), _pack),
    "verify": Scenario(("merged/rlmerge.json", "merged/model.safetensors"), _verify),
    "resume": Scenario(("half.unfinished/journal.jsonl", "half.unfinished/model.safetensors"), _resume),
}  # fmt: skip
