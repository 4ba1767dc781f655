"""Recipes that other people wrote for mergekit: each passes `check` and merges, or is refused for a reason that holds.

`recipes/` holds them as their authors published them, each with a first line that says where. Only what they name as
models is replaced, by tiny checkpoints with the tensors of the same architecture. What a merge writes is compared with
what mergekit would write: names, shapes, dtype, layers; where tensors are only copied, also their values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.methods.small_models import read_values, read_words, refusal
from wild_models import WildRecipe, find_slices, lay_out, layer_shapes, model_shapes, read_wild

import rlmerge

FILES = {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yml"))}

KINDS = {"13-embeddings-dare-ties": "bert", "14-layers-in-lists": "tied", "25-gemma-moon-dare-ties": "gemma2"}
"""Architectures other than Llama's, which Mistral shares."""

REFUSED: dict[str, tuple[str, ...]] = {
    # keys that mergekit ignores although its method has such a parameter: what the author wanted did not happen
    "21-genetic-lemonade-sce": ("'select_topk' is a parameter of method 'sce'", "dype: unknown key", "'dtype'"),
    "31-sapphira-multislerp": ("17: pad_to_multiple_of: 'pad_to_multiple_of' is a key of 'tokenizer:'",),
    # mergekit ignores it, and takes both halves from the main revision
    "28-dpopenhermes-revision": ("5: slices[0].sources[0].revision: unknown key",),
    # mergekit cannot merge it either
    "11-same-model-twice": ("'m0' is listed twice (also slices[0].sources[0])",),
    "22-megamoon-karcher": ("models[15]: 'm12' is listed twice (also models[12])",),
    # mergekit returns the base with its LoRA: a copy, which another method says plainly
    "34-lorablated-base-alone": ("found 0. The base is the only model", "merge_method: passthrough"),
    # a method of a fork of mergekit, which shares no more than the name with the one here
    "40-preconditioner-ota": ("epsilon: unknown parameter of method 'ota'", "preconditioner_path"),
}
"""What a refusal says; every other recipe passes."""

MASK = ("parameters.int8_mask",)
WARNED: dict[str, tuple[str, ...]] = {
    "03-ties": MASK,
    "04-bio-merge": MASK,
    "05-arcee_fusion": ("models[0]",),
    "13-embeddings-dare-ties": (*MASK, "models[0]"),
    "17-angel-slayer-della-linear": (*MASK, "models[1]"),
    "20-aurora-sce-lora-base": ("parameters.normalize",),
    "24-eggs-breadcrumbs-ties": (*MASK, "models[0]"),
    "25-gemma-moon-dare-ties": (*MASK, "models[0]"),
    "27-sapientia-della": ("models[0]",),
    "30-hekate-model-stock-weights": tuple(f"models[{k}].parameters.weight" for k in range(5)),
    "32-symbiosis-multislerp": ("parameters.normalize",),
    "35-smarteaz-model-stock": ("normalize", "models[0].parameters.weight", "models[1].parameters.weight"),
    "41-tiefighter-task-arithmetic": ("models[0]",),
}
"""The places that a passing recipe is warned about, as they have no effect; none where a recipe is not listed."""

SCHEMA = jsonschema.Draft202012Validator(rlmerge.recipe_schema())
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", None: "BF16"}


def place_of(warning: str) -> str:
    """'file.yml:3: models[0].name: text' → 'models[0].name'."""
    return warning.split(": ")[1]


def test_there_are_enough_and_each_says_where_it_stands():
    assert len(FILES) >= 24
    for file in FILES.values():
        first = file.read_text().splitlines()[0]
        assert first.startswith(("# github.com/", "# huggingface.co", "# a fork of mergekit")), file.name
    unknown = {*REFUSED, *WARNED, *KINDS} - FILES.keys()
    assert not unknown


def test_the_recipes_are_a_wide_spread():
    methods = {document["merge_method"] for file in FILES.values() for document in read_wild(file).documents}
    assert methods >= {
        "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
        "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "sce", "slerp",
        "task_arithmetic", "ties",
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_recipes_of_other_people(tmp_path, name):
    wild = read_wild(FILES[name])
    recipe = lay_out(wild, KINDS.get(name, "llama"), tmp_path)
    if name in REFUSED:
        message = refusal(lambda: rlmerge.check(recipe))
        assert message is not None, "it passes"
        for part in REFUSED[name]:
            assert part in message
        return
    assert rlmerge.check(recipe).alarms == []
    assert not [problem for data in wild.documents for problem in SCHEMA.iter_errors(data)]
    warnings = [place_of(text) for each in rlmerge.load_stages(recipe).recipes for text in each.warnings]
    assert warnings == list(WARNED.get(name, ()))
    rlmerge.merge_to_folder(recipe, tmp_path / "out", threads=1)
    as_mergekit_writes(wild, KINDS.get(name, "llama"), tmp_path / "out")
    if wild.last["merge_method"] == "passthrough":
        layers_are_copies(wild, tmp_path)


def as_mergekit_writes(wild: WildRecipe, kind: str, out: Path) -> None:
    """Names, shapes and dtype of every tensor, the number of layers, and finite values."""
    found = read_words(out)
    expected = model_shapes(kind, wild.layers)
    assert {name: array.shape for name, (_, array) in found.items()} == expected
    dtype = DTYPES[wild.last.get("out_dtype") or wild.last.get("dtype")]
    assert {kind for kind, _ in found.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == wild.layers
    assert all(np.isfinite(value).all() for value in read_values(out).values())


def layers_are_copies(wild: WildRecipe, folder: Path) -> None:
    """Every layer of a frankenmerge is the layer that its slice names, times what `scale` says."""
    found = read_values(folder / "out")
    rows = [(part["sources"][0], layer) for part in find_slices(wild.last) for layer in layers_of(part)]
    assert len(rows) == wild.layers
    models = {reference: read_values(folder / place) for reference, place in wild.places.items()}
    for number, (source, layer) in enumerate(rows):
        for name in layer_shapes("llama") if source["model"] in models else ():
            value = models[source["model"]][f"model.layers.{layer}.{name}"] * np.float32(scale_of(source, name))
            value = value.astype(np.float16).astype(np.float32) if wild.last.get("dtype") == "float16" else value
            np.testing.assert_array_equal(found[f"model.layers.{number}.{name}"], value, f"{number} {name}")


def layers_of(part: dict[str, Any]) -> range:
    """The layers that a slice takes from its source."""
    start, end = part["sources"][0]["layer_range"]
    return range(start, end)


def scale_of(source: dict[str, Any], name: str) -> float:
    """What a source multiplies a tensor by."""
    entries = source.get("parameters", {}).get("scale", [{"value": 1.0}])
    return next(entry["value"] for entry in entries if entry.get("filter", "") in name)
