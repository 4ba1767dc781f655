"""Small checkpoints on disk, merges of them through the public API, and outputs read back bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from tests.checkpoint.checkpoint_files import write_model, write_tensors

import rlmerge
from rlmerge import planner

Tensors = dict[str, np.ndarray]
KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?",
         "C64": "<c8", "I16": "<i2", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "i1"}  # fmt: skip
DTYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FORMS = ("F32", "BF16", "F16")


def representable(array: Any, dtype: str) -> np.ndarray:
    """The fp32 values nearest to zero-side of these that a dtype holds exactly."""
    array = np.asarray(array, np.float32)
    if dtype == "BF16":
        return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return array.astype(np.float16).astype(np.float32) if dtype == "F16" else array


def read_words(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor of a folder as (dtype, array); bf16 as uint16 words. Reads the bytes itself."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                array = np.frombuffer(raw[start:stop], KINDS[entry["dtype"]]).reshape(entry["shape"])
                found[name] = (entry["dtype"], array)
    return found


def read_values(folder: Path) -> Tensors:
    """Every tensor of a folder; bf16 and fp16 as fp32."""
    found = {}
    for name, (dtype, array) in read_words(folder).items():
        if dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[name] = array.astype(np.float32) if dtype == "F16" else array
    return found


def write_all(
    folder: Path, base: Tensors, experts: Mapping[str, Tensors], fishers: Mapping[str, Tensors] | None = None,
    dtype: str = "F32",
) -> None:  # fmt: skip
    """base, one folder an expert, and their Fishers, under `folder`."""
    write_model(folder / "base", base, dtype=dtype)
    for key, tensors in experts.items():
        write_model(folder / key, tensors, dtype=dtype)
    for key, tensors in (fishers or {}).items():
        write_tensors(folder / f"fisher_{key}" / "fisher.safetensors", tensors, "F32")


def make_recipe(
    folder: Path, method: str, keys: list[str], parameters: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None, fishers: bool | None = None, base: str | None = "",
    grams: bool | None = None, **top: Any,
) -> rlmerge.Recipe:  # fmt: skip
    """A recipe over folders below `folder`; `own` are per-model parameters, `top` further top-level keys.

    Global parameters that a method requires are 1; a method that requires Fishers gets Fishers of ones, one that
    requires Gram matrices random ones, unless told.
    """
    if grams is None and method == "regmean":
        donor = folder / (keys[0] if base is None else base or "base")
        shapes = {name: array.shape for name, (kind, array) in read_words(donor).items() if kind in FORMS}
        write_grams(folder, {key: some_grams(key, shapes) for key in keys})
        grams = True
    if method in rlmerge.method_names():
        parameters = needed_globals(method) | dict(parameters or {})
    if fishers is None and method in ("fisher", "ota"):
        ones = {
            n: np.ones(a.shape, np.float32) for n, (kind, a) in read_words(folder / "base").items() if kind in FORMS
        }
        for key in keys:
            write_tensors(folder / f"fisher_{key}" / "fisher.safetensors", ones, "F32")
        fishers = True
    models = []
    for key in keys:
        entry: dict[str, Any] = {"model": key}
        if fishers:
            entry["fisher"] = f"fisher_{key}"
        if grams:
            entry["gram"] = f"gram_{key}"
        if own and own.get(key):
            entry["parameters"] = dict(own[key])
        models.append(entry)
    data = {"merge_method": method, "models": models, "parameters": dict(parameters or {}), **top}
    if base == "" and method == "karcher":  # takes a base as one more model, as in mergekit
        base = None
    if base is not None:
        data["base_model"] = base or "base"
    return rlmerge.parse_recipe(yaml.safe_dump(data), folder=folder)


def fitting(method: str, keys: Sequence[str]) -> list[str]:
    """As many of these models as the method takes (the first by name), in this order; skips a test with too few."""
    arity = rlmerge.get_method(method).arity
    if len(keys) < arity.minimum:
        pytest.skip(f"{method} takes at least {arity.minimum} models")
    chosen = sorted(keys)[: arity.maximum]
    return [key for key in keys if key in chosen]


def needed_weights(method: str, keys: list[str], weight: float = 1.0) -> dict[str, dict[str, float]]:
    """`weight` for each model where a method requires it."""
    names = {spec.name for spec in rlmerge.get_method(method).parameters if spec.per_model and spec.default is None}
    return {key: dict.fromkeys(names, weight) for key in keys}


def needed_globals(method: str, value: float = 1.0) -> dict[str, float]:
    """`value` for every global parameter that a method requires."""
    specs = rlmerge.get_method(method).parameters
    return {spec.name: value for spec in specs if not spec.per_model and spec.default is None}


def merge_values(recipe: rlmerge.Recipe, **options: Any) -> Tensors:
    """The merged tensors, without a folder."""
    return dict(rlmerge.merge(recipe, threads=1, **options))


@contextmanager
def small_blocks(block: int, unit: int | None = None):
    """Plans made inside have blocks and units of so many coordinates."""
    with (
        mock.patch.object(planner, "BLOCK", block),
        mock.patch.object(planner, "UNIT", max(unit or planner.UNIT, block)),
    ):
        yield


@contextmanager
def small_shards(shard_bytes: int):
    """Merges inside write shards of so many bytes (the API asks for a megabyte at least)."""

    def make_plan(recipe: Any, variants: Any = (), _: int = 0) -> Any:
        return planner.make_plan(recipe, variants, shard_bytes)

    with mock.patch("rlmerge.api.make_plan", make_plan):
        yield


def refusal(call: Callable[[], Any]) -> str | None:
    """What an RlmergeError says, or None if the call went through."""
    try:
        call()
    except rlmerge.RlmergeError as error:
        return str(error)
    return None


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Whether two models have the same names and bits."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def same_values(a: Tensors, b: Tensors) -> bool:
    """Whether two models have equal values (-0 equals +0)."""
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


SHAPES = {"a.weight": (6, 8), "b.bias": (9,), "c.weight": (5, 7), "d.norm.weight": (1, 11)}


def sparse_model(rng: np.random.Generator, count: int, dtype: str = "F32", density: float = 0.5, grid: bool = True):
    """base and `count` experts whose values a dtype holds. grid: deltas are few multiples of a step, so many tie."""
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    experts = {}
    for k in range(count):
        tensors = {}
        for name, value in base.items():
            step = rng.integers(-3, 4, value.shape) * 2.0**-4 if grid else rng.standard_normal(value.shape) * 0.1
            changed = rng.random(value.shape) < density
            tensors[name] = np.where(changed, representable(value + step.astype(np.float32), dtype), value)
        experts[f"e{k}"] = tensors
    return base, experts


def some_fishers(rng: np.random.Generator, keys: list[str]) -> dict[str, Tensors]:
    """Fishers in steps of 1/8, with zeros, so that their sums are exact in any order."""
    return {
        key: {name: (rng.integers(0, 9, shape) / 8).astype(np.float32) for name, shape in SHAPES.items()}
        for key in keys
    }


def some_grams(seed: str, shapes: Mapping[str, tuple[int, ...]], rows: int | None = None) -> Tensors:
    """For every matrix the mean of xᵀx over `rows` random inputs (by default more than it has)."""
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and 0 not in shape:
            rng = np.random.default_rng([*seed.encode(), *name.encode()])
            inputs = rng.standard_normal((rows or 2 * shape[1], shape[1])) * rng.uniform(0.1, 3.0, shape[1])
            found[name] = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return found


def write_grams(folder: Path, grams: Mapping[str, Tensors]) -> None:
    """A Gram folder for each model, under `folder`."""
    for key, tensors in grams.items():
        write_tensors(folder / f"gram_{key}" / "gram.safetensors", tensors, "F32")
