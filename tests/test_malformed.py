"""Malformed inputs, run through the real command line: exit code 2, one message that names the culprit, no output.

Each case spoils the good set of `tests/cli/command_line.py` and says which words the message must hold.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import header_bytes, write_index, write_tensors
from tests.cli.command_line import (
    CONFIG,
    FIRST,
    INDEX,
    RECIPE,
    SECOND,
    TIES,
    TOKENIZER,
    TOKENS,
    Done,
    fishers,
    good_set,
    refused,
    rlmerge,
    rlmerge_process,
    snapshot,
    succeeded,
    weights,
)

Spoil = Callable[[Path], list[str] | None]
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
Q0, Q1 = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
E1 = "e1/model.safetensors"


@dataclass(frozen=True)
class Case:
    """spoil      makes the good set bad; may return arguments that are added to the command
    words      all of them must be in the message
    process    run in a process of its own
    begun      the error can only come while weights are read, so OUT.unfinished may stay
    """

    name: str
    spoil: Spoil
    words: tuple[str, ...]
    process: bool = False
    begun: bool = False


STAGES = """\
{name: one, merge_method: ties, base_model: base, models: [{model: e0, parameters: {weight: 1}}]}
---
{name: two, merge_method: ties, base_model: one, models: [{model: e1, parameters: {weight: 1}}]}
"""
CASES: list[Case] = []


def case(name: str, spoil: Spoil, *words: str, process: bool = False, begun: bool = False) -> None:
    CASES.append(Case(name, spoil, words, process, begun))


# ---- How to spoil things -------------------------------------------------------------------------------------------


def put(path: str, data: bytes | str) -> Spoil:
    """Replaces, or makes, a file."""

    def spoil(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def put_json(path: str, value: Any) -> Spoil:
    return put(path, json.dumps(value))


def remove(*paths: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for path in paths:
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> list[str] | None:
        found = [each(folder) for each in spoils]
        return next((arguments for arguments in found if arguments), None)

    return spoil


def bytes_of(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / path).write_bytes(change((folder / path).read_bytes()))

    return spoil


def header(change: Callable[[dict[str, Any]], Any], path: str = E1) -> Spoil:
    """Changes the header of a safetensors file; `change` edits the dict, or returns another header."""

    def edit(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        return header_bytes(change(entries) or entries) + raw[8 + length :]

    return bytes_of(path, edit)


def entry(key: str, value: Any, name: str = Q0) -> Spoil:
    return header(lambda entries: entries[name].__setitem__(key, value))


def tensors(path: str, values: dict[str, Any], dtype: str = "BF16") -> Spoil:
    """Writes the tensors as this file."""

    def spoil(folder: Path) -> None:
        write_tensors(folder / path, values, dtype)

    return spoil


def recipe(*changes: tuple[str, str]) -> Spoil:
    """Replaces parts of the good recipe, each of which must be there."""
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return put("recipe.yml", text)


def index(change: Callable[[dict[str, str]], Any]) -> Spoil:
    """Changes the base's weight_map, or returns another one."""

    def spoil(folder: Path) -> None:
        placed = json.loads((folder / "base" / INDEX).read_text())["weight_map"]
        write_index(folder / "base", change(placed) or placed)

    return spoil


def arguments(*extra: str) -> Spoil:
    return lambda folder: list(extra)


def with_value(values: dict[str, Any], name: str, value: float, place: int = 3) -> dict[str, Any]:
    changed = values[name].copy()
    changed.reshape(-1)[place] = value
    return {**values, name: changed}


def adapter(config: dict[str, Any] | None = None, pairs: dict[str, Any] | None = None, drop: str = "") -> Spoil:
    """Puts a LoRA in the place of the second expert."""
    prefix = "base_model.model.model.layers.0.q_proj."
    rng = np.random.default_rng(5)
    held = {
        f"{prefix}lora_A.weight": rng.standard_normal((2, 8)),
        f"{prefix}lora_B.weight": rng.standard_normal((8, 2)),
        **(pairs or {}),
    }
    held = {name: value for name, value in held.items() if not (drop and drop in name)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / "e1")
        write_tensors(folder / "e1/adapter_model.safetensors", held)
        (folder / "e1/adapter_config.json").write_text(json.dumps(settings | (config or {})))

    return spoil


# ---- Headers -------------------------------------------------------------------------------------------------------

case("header: empty file", put(E1, b""), E1, "0 bytes")
case("header: cut in its length", put(E1, b"\x10\0\0"), E1, "3 bytes")
case("header: length beyond the file", put(E1, (10**6).to_bytes(8, "little") + b"{}"), E1, "1000000", process=True)
case("header: length of 2**63", put(E1, (2**63).to_bytes(8, "little") + b"{}"), E1, str(2**63))
case("header: not JSON", put(E1, header_bytes(b"{nonsense")), E1, "not JSON")
case("header: not UTF-8", put(E1, header_bytes(b'{"\xff": 1}')), E1, "UTF-8")
case("header: a list", put(E1, header_bytes(b"[1]")), E1, "'{'")
case(
    "header: git lfs pointer", put(E1, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), E1, "git lfs pull"
)
case("header: a renamed pickle", put(E1, b"PK\x03\x04" + bytes(60)), E1, "rlmerge convert")
case("header: overlapping", entry("data_offsets", [0, 128]), E1, Q0, "overlaps", EMBED)
case("header: a hole", header(lambda h: h.pop(Q0) and None), E1, "128 bytes", "belong to no tensor")
case("header: beyond the file", entry("data_offsets", [10**6, 10**6 + 128]), E1, Q0, str(10**6 + 128))
case("header: wrong size", entry("shape", [8, 9]), E1, Q0, "[8, 9]", "128 bytes")
case("header: unknown dtype", entry("dtype", "BF17"), E1, Q0, "'BF17'", "'BF16'", process=True)
case("header: dtype no text", entry("dtype", 16), E1, Q0, "dtype")
case("header: negative shape", entry("shape", [-8, -8]), E1, Q0, "shape")
case("header: shape with a fraction", entry("shape", [8, 8.0]), E1, Q0, "shape")
case("header: offsets backwards", entry("data_offsets", [384, 256]), E1, Q0, "before it begins")
case("header: three offsets", entry("data_offsets", [256, 300, 384]), E1, Q0, "data_offsets")
case("header: missing key", header(lambda h: h[Q0].pop("shape") and None), E1, Q0, "'shape'")
case("header: metadata no text", header(lambda h: h["__metadata__"].update(format=1)), E1, "__metadata__", "format")
case("header: no tensor at all", put(E1, header_bytes({})), E1, "no tensor")
case(
    "header: a key twice",
    put(E1, header_bytes(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
                         b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}') + bytes(4)),
    E1, "'a' twice",
)  # fmt: skip
case("header: trailing bytes", bytes_of(E1, lambda raw: raw + b"xyz"), E1, "3 bytes after")
case("header: truncated in the data", bytes_of(E1, lambda raw: raw[:-200]), E1, "truncated", process=True)
case("header: truncated shard of the base", bytes_of(f"base/{SECOND}", lambda raw: raw[:-1]), f"base/{SECOND}")
case(
    "header: line break in a name",
    header(lambda h: {k.replace("norm", "no\nrm"): v for k, v in h.items()}),
    E1,
    "named",
)
case("header: a folder in its place", both(remove(E1), lambda folder: (folder / E1).mkdir()), E1, "not a regular file")  # type: ignore[func-returns-value]

# ---- Indexes -------------------------------------------------------------------------------------------------------

BASE_INDEX = f"base/{INDEX}"
case("index: missing shard", remove(f"base/{SECOND}"), f"base/{SECOND}", "missing", process=True)
case("index: missing shard, no index", remove(BASE_INDEX, f"base/{FIRST}"), "base", FIRST, "missing")
case(
    "index: leaves its folder by ..",
    index(lambda m: m.update({NORM: "../e0/model.safetensors"})),
    BASE_INDEX,
    "'../e0/model.safetensors'",
    process=True,
)
case("index: absolute file", index(lambda m: m.update({NORM: "/etc/passwd"})), BASE_INDEX, "'/etc/passwd'")
case("index: no safetensors", index(lambda m: m.update({NORM: "config.json"})), BASE_INDEX, "'config.json'")
case("index: tensor that no file has", index(lambda m: m.update(ghost=SECOND)), BASE_INDEX, "'ghost'", SECOND)
case(
    "index: tensor that it does not know", index(lambda m: m.pop(NORM) and None), BASE_INDEX.split("/")[1], SECOND, NORM
)
case("index: tensor in another file", index(lambda m: m.update({NORM: FIRST})), BASE_INDEX, NORM, FIRST)
case("index: not JSON", put(BASE_INDEX, "{"), BASE_INDEX, "not JSON")
case("index: a list", put(BASE_INDEX, "[]"), BASE_INDEX, "object")
case("index: no weight_map", put_json(BASE_INDEX, {"metadata": {}}), BASE_INDEX, "'weight_map'")
case("index: no text", index(lambda m: m.update({NORM: 2})), BASE_INDEX, "'weight_map'")
case("index: empty", index(lambda m: m.clear()), BASE_INDEX, "'weight_map'")
case(
    "index: a single file that disagrees", tensors("base/model.safetensors", {"x": np.ones(3)}),
    BASE_INDEX, "disagrees", "model.safetensors",
)  # fmt: skip
case(
    "index: one tensor in two files", both(remove(BASE_INDEX), tensors(f"base/{SECOND}", weights(0))),
    f"base/{SECOND}", EMBED, FIRST,
)  # fmt: skip

# ---- Recipes -------------------------------------------------------------------------------------------------------

case("recipe: not there", remove("recipe.yml"), "recipe.yml", "no such recipe", process=True)
case("recipe: empty", put("recipe.yml", ""), "recipe.yml", "empty")
case("recipe: comments only", put("recipe.yml", "# nothing\n"), "recipe.yml", "empty")
case("recipe: a list", put("recipe.yml", "- model: e0\n"), "recipe.yml", "mapping", "a list")
case("recipe: not UTF-8", put("recipe.yml", b"merge_method: \xff\n"), "recipe.yml", "UTF-8")
case("recipe: no YAML", put("recipe.yml", RECIPE + "x: [1, 2\n"), "recipe.yml:13", "YAML")
case("recipe: tabs", recipe(("    fisher: f0", "\tfisher: f0")), "recipe.yml:5", "tabs")
case(
    "stages: two outputs", put("recipe.yml", RECIPE + "---\n" + RECIPE), "recipe.yml:1 and", ":13", "no other document"
)
case(
    "stages: a model that does not fit a stage",
    both(put("recipe.yml", STAGES), tensors(E1, {"model.norm.weight": np.ones(9, np.float32)})),
    "out.stages/one", "missing in",
)  # fmt: skip
case("stages: a circle", put("recipe.yml", STAGES.replace(": base", ": two")), "recipe.yml:1", "one → two → one")
case(
    "stages: a name that hides a path", put("recipe.yml", STAGES.replace("one", "f0")), "recipe.yml:1", "also the path"
)
case(
    "stages: a folder in the way",
    both(put("recipe.yml", STAGES), put("out.stages/mine", "")),
    "out.stages",
    "in the way",
)
case(
    "recipe: a folder", both(remove("recipe.yml"), lambda f: (f / "recipe.yml").mkdir()), "recipe.yml", "cannot be read"
)  # type: ignore[func-returns-value]
case(
    "recipe: unknown key",
    recipe(("base_model:", "base_modle:")),
    "recipe.yml:2",
    "base_modle",
    "'base_model'",
    process=True,
)
case("recipe: unknown key of a model", recipe(("fisher: f1", "fischer: f1")), "recipe.yml:9", "fischer", "'fisher'")
case(
    "recipe: duplicate key",
    recipe(("parameters:\n  lambda", "base_model: base\nparameters:\n  lambda")),
    "recipe.yml:10",
    "base_model",
    "line 2",
)
case(
    "recipe: duplicate key of a model",
    recipe(("fisher: f0", "fisher: f0\n    fisher: f1")),
    "recipe.yml:6",
    "fisher",
    "line 5",
)
case("recipe: wrong type", recipe(("base_model: base", "base_model: [base]")), "recipe.yml:2", "base_model", "a list")
case(
    "recipe: models no list",
    put("recipe.yml", "merge_method: sar\nbase_model: base\nmodels: e0\n"),
    "recipe.yml:3",
    "models",
    "- model: path",
)
case(
    "recipe: number as text",
    recipe(("density: 0.5", "density: half")),
    "recipe.yml:7",
    "models[0].parameters.density",
    "'half'",
)
case("recipe: density above one", recipe(("density: 0.5", "density: 1.5")), "recipe.yml:7", "density", "1.5", "<= 1")
case("recipe: density zero", recipe(("density: 0.5", "density: 0")), "recipe.yml:7", "density", "> 0")
case("recipe: nan", recipe(("lambda: 1.0", "lambda: .nan")), "recipe.yml:11", "lambda", "finite")
case("recipe: infinity", recipe(("lambda: 1.0", "lambda: 1e999")), "recipe.yml:11", "lambda", "finite")
case("recipe: a flag for a number", recipe(("lambda: 1.0", "lambda: yes")), "recipe.yml:11", "lambda", "number")
case("recipe: unknown parameter", recipe(("lambda: 1.0", "lamda: 1.0")), "recipe.yml:11", "lamda", "'lambda'")
case(
    "recipe: parameter at the top",
    recipe(("parameters:\n  lambda", "lambda: 1.0\nparameters:\n  lambda")),
    "recipe.yml:10",
    "lambda",
    "parameters:",
)
case(
    "recipe: global parameter of a model",
    recipe(("density: 0.5", "sensitivity: fisher")),
    "recipe.yml:7",
    "sensitivity",
    "top-level",
)
case(
    "recipe: unknown choice",
    recipe(("lambda: 1.0", "sensitivity: delta_2")),
    "recipe.yml:11",
    "sensitivity",
    "'delta_2'",
    "'delta2'",
)
case(
    "recipe: unknown method",
    recipe(("merge_method: sar", "merge_method: sarr")),
    "recipe.yml:1",
    "'sarr'",
    "'sar'",
    process=True,
)
case("recipe: no method", recipe(("merge_method: sar\n", "")), "recipe.yml", "merge_method is missing")
case("recipe: no base", recipe(("base_model: base\n", "")), "recipe.yml", "base_model is missing")
case("recipe: base not there", recipe(("base_model: base", "base_model: bse")), "recipe.yml:2", "'bse'", "'base'")
case("recipe: expert not there", recipe(("model: e1", "model: e7")), "recipe.yml:8", "models[1].model", "'e7'")
case(
    "recipe: hub id",
    recipe(("model: e1", "model: Qwen/Qwen2.5-0.5B")),
    "recipe.yml:8",
    "Qwen/Qwen2.5-0.5B",
    "hf download",
)
case("recipe: model+no lora", recipe(("model: e1", "model: base+e1")), "base+e1", "must be a LoRA", "a full model")
case("recipe: model+nothing", recipe(("model: e1", "model: base+e7")), "recipe.yml:8", "'e7' does not")
case("recipe: base+lora", recipe(("base_model: base", "base_model: base+e1")), "base+e1", "must be a LoRA")
case(
    "recipe: !!python",
    recipe(("lambda: 1.0", "lambda: !!python/object/apply:os.system [touch pwned]")),
    "recipe.yml:11",
    "python/object/apply:os.system",
    "not allowed",
    process=True,
)
case("recipe: an alias of itself", put("recipe.yml", "&a\nmerge_method: sar\nmodels: *a\n"), "recipe.yml", "alias")
case("recipe: models listed twice", recipe(("model: e1", "model: e0")), "recipe.yml:8", "'e0'", "twice", "name:")
case(
    "recipe: one expert alone",
    put("recipe.yml", "merge_method: sar\nbase_model: base\nmodels: []\n"),
    "recipe.yml:3",
    "models",
    "found 0",
)
case(
    "recipe: an entry without a model",
    recipe(("- model: e1\n    fisher: f1", "- fisher: f1")),
    "recipe.yml:8",
    "models[1]",
    "'model' is missing",
)
case(
    "recipe: unknown dtype",
    put("recipe.yml", RECIPE + "dtype: float8\n"),
    "recipe.yml:12",
    "dtype",
    "'float8'",
    "bfloat16",
)
case(
    "recipe: unknown rounding",
    put("recipe.yml", RECIPE + "rounding: stochastc\n"),
    "recipe.yml:12",
    "rounding",
    "'stochastic'",
)
case("recipe: negative seed", put("recipe.yml", RECIPE + "seed: -1\n"), "recipe.yml:12", "seed", "-1")
case(
    "recipe: negative min_change",
    put("recipe.yml", RECIPE + "min_change: -1e-5\n"),
    "recipe.yml:12",
    "min_change",
    ">= 0",
)
case(
    "recipe: no regular expression",
    put("recipe.yml", RECIPE + "exclude: ['(']\n"),
    "recipe.yml:12",
    "exclude",
    "'('",
    "regular expression",
)
case(
    "recipe: expression that finds nothing",
    put("recipe.yml", RECIPE + "include: weight\nexclude:\n- norm\n- experts\n"),
    "recipe.yml:15",
    "exclude",
    "'experts'",
    EMBED,
)
case(
    "recipe: a filter that leaves tensors without a required parameter",
    put("recipe.yml", TIES.replace("  weight: 1\n", "  weight:\n  - {filter: q_proj, value: 1}\n")),
    "recipe.yml:7",
    "parameters.weight",
    EMBED,
    "'- value: ...'",
)
case("recipe: slices", put("recipe.yml", RECIPE + "slices: []\n"), "recipe.yml:12", "either 'models' or 'slices'")
case(
    "recipe: a quoted number for a path",
    recipe(("model: e1", "model: 17")),
    "recipe.yml:8",
    "models[1].model",
    "17",
    "quotes",
)
case(
    "recipe: filters and numbers mixed",
    recipe(("density: 0.5", "density: [0.5, {filter: q, value: 1}]")),
    "recipe.yml:7",
    "density",
    "not both",
)
case(
    "recipe: a filter without a value",
    recipe(("density: 0.5", "density: [{filter: q}]")),
    "recipe.yml:7",
    "density",
    "'value' is missing",
)
case(
    "recipe: filters that leave tensors out",
    put(
        "recipe.yml",
        RECIPE.replace("sar", "ties")
        .replace("density: 0.5", "weight: [{filter: q_proj, value: 0}]")
        .replace("  lambda: 1.0", "  weight: [{filter: q_proj, value: 0}]"),
    ),
    "'weight'",
    EMBED,
    "- value: ",
)
case(
    "recipe: weights that sum to zero",
    put(
        "recipe.yml",
        "merge_method: linear\nmodels:\n"
        "- {model: e0, parameters: {weight: 1}}\n- {model: e1, parameters: {weight: -1}}\n",
    ),
    "recipe.yml",
    "weights sum to 0",
    "normalize: false",
)
case(
    "recipe: the base as the only expert",
    recipe(("model: e0", "model: base"), ("  - model: e1\n    fisher: f1\n", "")),
    "recipe.yml:3",
    "models",
    "found 0",
)

# ---- The command line ----------------------------------------------------------------------------------------------

case("flags: --set without a value", arguments("--set", "lambda"), "--set lambda", "key=value")
case("flags: --set of a wrong value", arguments("--set", "density=2"), "--set density", "2", "<= 1", process=True)
case("flags: --set of an unknown key", arguments("--set", "lamda=1"), "--set lamda", "'lambda'")
case("flags: --set twice", arguments("--set", "lambda=1", "--set", "lambda=2"), "--set lambda", "twice")
case("flags: a wrong value in a sweep", arguments("--set", "density=0.5,1.5"), "--set density", "1.5")
case("flags: a value of a sweep twice", arguments("--set", "lambda=0.5,0.5,1"), "--set", "lambda=0.5", "twice")
case("flags: a sweep of words", arguments("--set", "lambda=0.5,big"), "--set lambda", "'big'")
case("flags: a sweep that varies what must be shared", arguments("--set", "dtype=float32,bfloat16"), "dtype")
case(
    "flags: a sweep of millions",
    arguments("--set", "lambda=" + ",".join(["1"] * 200), "--set", "density=" + ",".join(["1"] * 200)),
    "--set",
    "10000 points",
)
case("flags: a recipe and --expert", arguments("--expert", "e0"), "--expert", "one or the other")
case("flags: a recipe and --fisher", arguments("--fisher", "f0"), "--fisher", "one or the other")
case("flags: --memory of words", arguments("--memory", "lots"), "--memory lots", "600MB")
case("flags: --memory too small", arguments("--memory", "1MB"), "--memory 1 MB", "one thread needs")
case("flags: --shard-size too small", arguments("--shard-size", "1kB"), "shard", "1MB")
case("flags: unknown kernels", arguments("--kernels", "cuda"), "kernels", "'cuda'", "numba")

# ---- Fisher folders ------------------------------------------------------------------------------------------------

F1 = "f1/fisher.safetensors"
case("fisher: not there", remove("f1"), "recipe.yml:9", "models[1].fisher", "'f1'", process=True)
case("fisher: an empty folder", remove(F1), "f1", "fisher.safetensors")
case(
    "fisher: a model in its place",
    both(remove(F1), tensors("f1/model.safetensors", fishers(1))),
    "f1",
    "fisher.safetensors",
    "model.safetensors",
)
case("fisher: wrong shape", tensors(F1, {**fishers(1), Q0: np.ones((8, 4))}, "F32"), F1, Q0, "[8, 4]", "[8, 8]")
case(
    "fisher: wrong name",
    tensors(F1, {("module." + k): v for k, v in fishers(1).items()}, "F32"),
    F1,
    "module.model",
    EMBED,
)
case("fisher: wrong dtype", tensors(F1, fishers(1), "F16"), F1, EMBED, "F16", "F32")
case("fisher: integers", tensors(F1, {**fishers(1), Q0: (np.ones((8, 8)), "I64")}, "F32"), F1, Q0, "I64")
case("fisher: negative", tensors(F1, with_value(fishers(1), Q1, -1.0), "F32"), "'e1'", "negative", process=True)
case("fisher: all zero", tensors(F1, {k: 0 * v for k, v in fishers(1).items()}, "F32"), "'e1'", "zero", begun=True)
case("fisher: NaN", tensors(F1, with_value(fishers(1), Q1, np.nan), "F32"), F1, Q1, "nan")
case("fisher: infinity", tensors(F1, with_value(fishers(1), Q1, np.inf), "F32"), F1, Q1, "inf")
case("fisher: one of two missing", recipe(("\n    fisher: f1", "")), "e1", "fisher")
case(
    "fisher: none at all",
    recipe(("\n    fisher: f1", ""), ("\n    fisher: f0", "")),
    "'sar'",
    "fisher:",
    "sensitivity: delta2",
)
case("fisher: truncated", bytes_of(F1, lambda raw: raw[:-7]), F1)
case("fisher: no tensor", put(F1, header_bytes({})), F1, "no tensor")
case(
    "fisher: none in common",
    both(tensors("f0/fisher.safetensors", {Q0: fishers(0)[Q0]}, "F32"), tensors(F1, {Q1: fishers(1)[Q1]}, "F32")),
    "in common",
)
case("fisher: a mapping", recipe(("fisher: f1", "fisher: {path: f1}")), "recipe.yml:9", "fisher", "mapping")
case("fisher: a pickle", both(remove(F1), put("f1/fisher.bin", b"PK\x03\x04")), "f1", "fisher.bin")
case("fisher: fisher.json is no object", put("f1/fisher.json", "[]"), "f1/fisher.json", "object")
case(
    "fisher: index leaves its folder",
    both(remove(F1), put_json("f1/fisher.safetensors.index.json", {"weight_map": {Q0: "../f0/fisher.safetensors"}})),
    "f1/fisher.safetensors.index.json",
    "../f0",
)

# ---- Adapters ------------------------------------------------------------------------------------------------------

ADAPTER, SETTINGS = "e1/adapter_model.safetensors", "e1/adapter_config.json"
LAYER = "base_model.model.model.layers.0.q_proj"
FISHERLESS = recipe(("\n    fisher: f1", ""), ("\n    fisher: f0", ""), ("lambda: 1.0", "sensitivity: delta2"))
case(
    "adapter: DoRA by its config",
    both(FISHERLESS, adapter({"use_dora": True})),
    SETTINGS,
    "use_dora",
    "merge_and_unload",
)
case(
    "adapter: DoRA by its tensors",
    both(FISHERLESS, adapter(None, {f"{LAYER}.lora_magnitude_vector": np.ones(8)})),
    ADAPTER,
    "lora_magnitude_vector",
    "DoRA",
)
case("adapter: trained biases", both(FISHERLESS, adapter({"bias": "lora_only"})), SETTINGS, "'bias'", "'lora_only'")
case(
    "adapter: trained tokens",
    both(FISHERLESS, adapter({"trainable_token_indices": [1]})),
    SETTINGS,
    "trainable_token_indices",
)
case(
    "adapter: config with another rank", both(FISHERLESS, adapter({"r": 3})), ADAPTER, "rank 2", "says 3", process=True
)
case(
    "adapter: ranks of A and B differ",
    both(FISHERLESS, adapter(None, {f"{LAYER}.lora_B.weight": np.ones((8, 3))})),
    ADAPTER,
    "lora_B",
    "ranks",
)
case(
    "adapter: unknown layer",
    both(
        FISHERLESS,
        adapter(
            None,
            {
                "base_model.model.model.layers.7.q_proj.lora_A.weight": np.ones((2, 8)),
                "base_model.model.model.layers.7.q_proj.lora_B.weight": np.ones((8, 2)),
            },
        ),
    ),
    ADAPTER,
    "layers.7.q_proj",
)
case("adapter: missing B", both(FISHERLESS, adapter(drop="lora_B")), ADAPTER, "lora_A", "lora_B")
case("adapter: another type", both(FISHERLESS, adapter({"peft_type": "IA3"})), SETTINGS, "'IA3'", "LORA")
case(
    "adapter: of another base",
    both(FISHERLESS, adapter(None, {f"{LAYER}.lora_B.weight": np.ones((10, 2))})),
    ADAPTER,
    "layers.0.q_proj",
    "10 x 8",
    "[8, 8]",
)
case("adapter: rank zero", both(FISHERLESS, adapter({"r": 0})), SETTINGS, "'r'")
case("adapter: alpha no number", both(FISHERLESS, adapter({"lora_alpha": "much"})), SETTINGS, "'lora_alpha'", "'much'")
case(
    "adapter: PiSSA", both(FISHERLESS, adapter({"init_lora_weights": "pissa"})), SETTINGS, "init_lora_weights", "pissa"
)
case(
    "adapter: no pair at all",
    both(
        FISHERLESS, adapter(None, {"base_model.model.lm_head.original_module.weight": np.ones((16, 8))}, drop="q_proj")
    ),
    "e1",
    "changes nothing",
)
case("adapter: config no JSON", both(FISHERLESS, adapter(), put(SETTINGS, "{")), SETTINGS, "not JSON")
case(
    "adapter: as the base",
    both(adapter(), recipe(("- model: e1\n    fisher: f1", "- model: base"), ("base_model: base", "base_model: e1"))),
    "e1",
    "adapter",
    "base_model:",
)
case(
    "adapter: NaN",
    both(FISHERLESS, adapter(None, {f"{LAYER}.lora_B.weight": np.full((8, 2), np.nan)})),
    ADAPTER,
    "nan",
    Q0,
)
case(
    "adapter: beside a full model",
    both(FISHERLESS, put_json("e1/adapter_config.json", {"peft_type": "LORA"}), tensors(ADAPTER, {"x": np.ones(1)})),
    "e1",
    "both",
)

# ---- Model folders -------------------------------------------------------------------------------------------------

case(
    "model: pickle only",
    both(remove(E1), put("e1/pytorch_model.bin", b"PK\x03\x04")),
    "e1",
    "pytorch_model.bin",
    "rlmerge convert",
    process=True,
)
case("model: GGUF only", both(remove(E1), put("e1/model-Q4_K_M.gguf", b"GGUF")), "e1", "GGUF", "model-Q4_K_M.gguf")
case(
    "model: verl's shards",
    both(remove(E1), put("e1/model_world_size_2_rank_0.pt", b"PK")),
    "e1",
    "verl",
    "model_merger",
)
case("model: no weights", remove(E1), "e1", "no safetensors", "model.safetensors")
case("model: a file in its place", both(remove("e1"), put("e1", "x")), "e1", "file")
case(
    "model: one folder too high",
    both(
        lambda f: shutil.move(f / "e1", f / "e1_") and None,
        lambda f: shutil.copytree(f / "e1_", f / "e1/step_100") and None,
        remove("e1_"),
    ),
    "e1/step_100",
    "Did you mean",
)
case(
    "model: quantized config",
    put_json("e1/config.json", {**CONFIG, "quantization_config": {"quant_method": "gptq"}}),
    "e1/config.json",
    "gptq",
)
case(
    "model: quantized tensors",
    tensors(E1, {**weights(2), "model.layers.0.q_proj.qweight": (np.ones((8, 1)), "I64")}),
    E1,
    "qweight",
    "quantized",
)
case("model: fp8", tensors(E1, {**weights(2), Q0: (np.ones((8, 8)), "F8_E4M3")}), E1, Q0, "quantized")
case("model: config.json no object", put("e1/config.json", "[1, 2]"), "e1/config.json", "object")
case("model: config.json no JSON", put("base/config.json", "{'a': 1}"), "base/config.json", "not JSON")
case(
    "model: tokenizer with other ids",
    put_json("e1/tokenizer.json", {"model": {**TOKENIZER["model"], "vocab": {"a": 1, "b": 0, "ab": 2}}}),
    "e1",
    "'a' is 0 and 1",
    "--accept-tokenizers",
    process=True,
)
case(
    "model: tokenizer with other merges",
    put_json("e1/tokenizer.json", {"model": {**TOKENIZER["model"], "merges": ["b a"]}}),
    "e1",
    "merges",
    "'b a'",
)
case(
    "model: other special tokens",
    put_json("e1/tokenizer_config.json", {**TOKENS, "eos_token": "<|im_end|>"}),
    "e1",
    "eos_token",
    "'<|im_end|>'",
    "--accept-tokenizers",
)
case(
    "model: another chat template",
    put("e1/chat_template.jinja", "{{ messages }}"),
    "e1",
    "chat template",
    "{{ messages }}",
)
case("model: broken tokenizer", put("e1/tokenizer.json", "{"), "e1/tokenizer.json", "cannot be read")
case("model: a tokenizer that is none", put_json("e1/tokenizer.json", {"model": [1]}), "e1", "tokenizer")
case("model: a tensor less", tensors(E1, {k: v for k, v in weights(2).items() if k != Q0}), "e1", Q0, "missing")
case(
    "model: a tensor more",
    tensors(E1, {**weights(2), "value_head.weight": np.ones((1, 8))}),
    E1,
    "value_head.weight",
    "exclude:",
)
case("model: another shape", tensors(E1, {**weights(2), Q0: np.ones((8, 4))}), E1, Q0, "[8, 4]", "[8, 8]", process=True)
case(
    "model: another vocabulary",
    tensors(E1, {**weights(2), EMBED: np.ones((18, 8))}),
    E1,
    EMBED,
    "vocabularies differ: 16 and 18",
)
case("model: doubles", tensors(E1, {**weights(2), Q0: (np.ones((8, 8)), "F64")}), E1, Q0, "F64")
case(
    "model: a head that differs from the tied embedding",
    tensors(E1, {**weights(2), "lm_head.weight": weights(1)[EMBED]}),
    E1,
    "lm_head.weight",
    "tied base",
    "differs",
)
case(
    "model: NaN in an expert",
    tensors(E1, with_value(weights(2), Q1, np.nan)),
    E1,
    Q1,
    "nan",
    "coordinate 3",
    process=True,
)
case(
    "model: infinity in the base",
    tensors(
        f"base/{FIRST}", with_value({k: v for k, v in weights(0).items() if k in list(weights(0))[:3]}, Q0, -np.inf)
    ),
    f"base/{FIRST}",
    Q0,
    "-inf",
)
case(
    "model: two models in one folder",
    both(lambda f: shutil.move(f / E1, f / "e1/a.safetensors") and None, tensors("e1/b.safetensors", weights(2))),
    "e1",
    "a.safetensors",
    "b.safetensors",
)
case("model: a loop of links", both(remove("e1"), lambda f: (f / "e1").symlink_to("e1")), "e1")  # type: ignore[func-returns-value]
case("model: a link to nowhere", both(remove(E1), lambda f: (f / E1).symlink_to("gone.safetensors")), "e1")  # type: ignore[func-returns-value]


def nan_between_the_samples(folder: Path) -> None:
    """Three megaweights, one of them NaN where the sample does not look, in the last unit but one."""
    for name in ("base", "e0", "e1"):
        shutil.rmtree(folder / name)
        big = np.zeros((48, 65536), np.float32)
        big[:, 7] = 1 if name == "base" else 1.5
        if name == "e1":
            big[40, 20000:60000] = np.nan
            big[40, :17000] = 0
        write_tensors(folder / name / "model.safetensors", {"big.weight": big}, "BF16")
    (folder / "recipe.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n- model: e0\n- model: e1\nparameters: {weight: 1}\n"
    )


# ---- The output ----------------------------------------------------------------------------------------------------

OTHER_OUT: dict[str, str] = {
    "output: an input": "e1",
    "output: below an input": "base/merged",
    "output: above the inputs": "",
    "output: below a file": "recipe.yml/out",
}
case("output: exists and is not empty", put("out/notes.txt", "mine"), "/out", "not empty", "--overwrite", process=True)
case(
    "output: overwrite what is not ours",
    both(put("out/notes.txt", "mine"), arguments("--overwrite")),
    "/out",
    "notes.txt",
)
case("output: a file", put("out", "mine"), "/out", "file")
case(
    "output: a folder of the same name with other things, unfinished",
    put("out.unfinished/notes.txt", "mine"),
    "/out.unfinished",
    "not an unfinished merge",
)
case("output: an input", arguments(), "/e1", "input folder")
case("output: below an input", arguments(), "/base/merged", "input folder")
case("output: above the inputs", arguments(), "input folder")
case("output: below a file", arguments(), "recipe.yml/out", "recipe.yml cannot be written")
case("NaN where the sample does not look", nan_between_the_samples, E1, "big.weight", "nan", "exclude:", begun=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    good_set(folder)
    return folder


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.process for case in CASES) >= 12


def test_the_good_set_merges(good: Path, tmp_path: Path) -> None:
    """What follows is refused for what was spoilt, and for nothing else."""
    before = snapshot(good)
    for recipe in ("recipe.yml", "ties.yml"):
        succeeded(rlmerge("merge", good / recipe, tmp_path / recipe, "--kernels", "numpy", "--threads", "1"))
        assert (tmp_path / recipe / "model.safetensors").is_file()
    assert snapshot(good) == before


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refuses(case: Case, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(good, folder)
    extra = case.spoil(folder) or []
    command = ["merge", folder / "recipe.yml", folder / OTHER_OUT.get(case.name, "out"), "--kernels", "numpy", *extra]
    before = snapshot(folder)
    if not case.begun:  # --dry-run refuses what merge refuses
        check(case, rlmerge(*command, "--dry-run"))
        assert snapshot(folder) == before
    check(case, (rlmerge_process if case.process else rlmerge)(*command, "--threads", "1"))
    after = snapshot(folder)
    if case.begun:
        after = {path: held for path, held in after.items() if not path.startswith("out.unfinished")}
    assert after.keys() == before.keys()
    assert after == before


def check(case: Case, done: Done) -> None:
    message = refused(done)
    for word in case.words:
        assert word in message, message
    assert done.out == ""
    assert len(message) < 3000
    assert "Input should be" not in message, "pydantic's words are not ours"
    assert "?." not in message, message
    if missing := re.search(r"('[^']+') does not exist", message):
        assert f"Did you mean {missing[1]}" not in message, message
