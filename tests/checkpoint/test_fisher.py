"""A Fisher folder fits its base, name by name and shape by shape, or is refused as a FisherError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import random, write_model, write_shards, write_tensors

from rlmerge.checkpoint.fisher import open_fisher
from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.errors import FisherError

EMBED, LAYER = random(0, 10, 4), random(1, 4, 4)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    tensors = {"model.embed_tokens.weight": EMBED, "model.layers.0.w.weight": LAYER}
    return open_checkpoint(write_model(tmp_path / "base", tensors, {"tie_word_embeddings": True}))


def folder(tmp_path: Path, tensors: dict[str, Any], meta: str | None = None, dtype: str = "F32") -> Path:
    write_tensors(tmp_path / "f" / "fisher.safetensors", tensors, dtype)
    if meta is not None:
        (tmp_path / "f" / "fisher.json").write_text(meta)
    return tmp_path / "f"


def refused(path: Path, base: Checkpoint, *words: str) -> None:
    with pytest.raises(FisherError) as caught:
        open_fisher(path, base)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_folder_and_file(tmp_path: Path, base: Checkpoint, dtype: str) -> None:
    path = folder(tmp_path, {"model.layers.0.w.weight": LAYER}, '{"sequences": 8}', dtype)
    for given in (path, path / "fisher.safetensors"):
        opened = open_fisher(given, base)
        assert list(opened.tensors) == ["model.layers.0.w.weight"]
        assert (opened.folder, opened.meta) == (path, {"sequences": 8})
    other = write_tensors(tmp_path / "f" / "mine.safetensors", {"model.layers.0.w.weight": LAYER})
    assert open_fisher(other, base).meta == {}


def test_shards(tmp_path: Path, base: Checkpoint) -> None:
    write_shards(tmp_path / "f", [{"model.layers.0.w.weight": LAYER}, {"model.embed_tokens.weight": EMBED}], "fisher")
    assert set(open_fisher(tmp_path / "f", base).tensors) == set(base.tensors)
    (tmp_path / "f" / "fisher-00002-of-00002.safetensors").unlink()
    refused(tmp_path / "f", base, "fisher-00002-of-00002.safetensors", "missing")


def test_a_tied_head_is_left_out(tmp_path: Path, base: Checkpoint) -> None:
    path = folder(tmp_path, {"model.layers.0.w.weight": LAYER, "lm_head.weight": EMBED})
    assert list(open_fisher(path, base).tensors) == ["model.layers.0.w.weight"]


def test_a_head_of_an_untied_base_is_not(tmp_path: Path, base: Checkpoint) -> None:
    untied = Checkpoint("b", base.folder, base.tensors, base.headers, {"tie_word_embeddings": False}, False)
    path = folder(tmp_path, {"lm_head.weight": EMBED})
    refused(path, untied, "lm_head.weight", "not in the base")
    refused(path, base, "tied head")


def test_refused(tmp_path: Path, base: Checkpoint) -> None:
    refused(tmp_path / "none", base, "none", "no such Fisher folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", base, "no fisher.safetensors", "found: nothing")
    write_model(tmp_path / "model", {"a": LAYER})
    refused(tmp_path / "model", base, "model.safetensors", "no fisher.safetensors")
    name = "model.layers.0.w.weight"
    refused(folder(tmp_path, {}), base, "fisher.safetensors", "no tensor")
    refused(folder(tmp_path, {name: LAYER, "model.layers.1.w.weight": LAYER}), base, "layers.1", "Did you mean")
    refused(folder(tmp_path, {name: LAYER[:2]}), base, name, "[2, 4]", "[4, 4]")
    refused(folder(tmp_path, {name: (LAYER, "F64")}), base, name, "F64")
    refused(folder(tmp_path, {name: (np.ones((4, 4)), "F16")}), base, name, "F16")
    refused(folder(tmp_path, {"lm_head.weight": LAYER[:3]}), base, "lm_head.weight")
    refused(folder(tmp_path, {name: LAYER}, "[]"), base, "fisher.json")
    path = folder(tmp_path, {name: LAYER}) / "fisher.safetensors"
    (tmp_path / "f" / "fisher.json").unlink()
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, base, "fisher.safetensors")
    refused(path.parent, base, "fisher.safetensors")


def test_recorded_sums(tmp_path: Path, base: Checkpoint) -> None:
    entry = {
        "model.layers.0.w.weight": {"sum": 2.5, "count": 16},
        "another": {"sum": 1},
        "model.embed_tokens.weight": 3,
    }
    path = folder(tmp_path, {"model.layers.0.w.weight": LAYER}, json.dumps({"tensors": entry}))
    assert open_fisher(path, base).sums == {"model.layers.0.w.weight": 2.5}
    assert open_fisher(folder(tmp_path, {"model.layers.0.w.weight": LAYER}, "{}"), base).sums == {}


@pytest.mark.parametrize(
    "entry",
    [
        '{"sum": -1, "count": 16}',
        '{"sum": NaN}',
        '{"sum": "2"}',
        '{"sum": true}',
        '{"sum": 1%s}' % ("0" * 400),
        '{"sum": 1, "count": 15}',
    ],
)
def test_sums_that_cannot_be(tmp_path: Path, base: Checkpoint, entry: str) -> None:
    meta = f'{{"tensors": {{"model.layers.0.w.weight": {entry}}}}}'
    refused(folder(tmp_path, {"model.layers.0.w.weight": LAYER}, meta), base, "fisher.json", "model.layers.0.w.weight")
    refused(folder(tmp_path, {"model.layers.0.w.weight": LAYER}, '{"tensors": []}'), base, "fisher.json")
