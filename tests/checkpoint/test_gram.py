"""Gram folders by their headers: aliases, sides, and every way in which one does not fit a base."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_shards, write_tensors

from rlmerge.checkpoint.folder import open_checkpoint
from rlmerge.checkpoint.gram import open_gram
from rlmerge.errors import GramError


@pytest.fixture
def base(tmp_path):
    tensors = {
        "q.weight": np.zeros((6, 4)),
        "k.weight": np.zeros((2, 4)),
        "c.weight": np.zeros((4, 5)),
        "b": np.zeros(4),
    }
    return open_checkpoint(write_model(tmp_path / "base", {n: v.astype(np.float32) for n, v in tensors.items()}))


def folder(tmp_path, tensors, meta=None, dtype="F32"):
    write_tensors(tmp_path / "g" / "gram.safetensors", {n: np.eye(side) for n, side in tensors.items()}, dtype)
    if meta is not None:
        (tmp_path / "g" / "gram.json").write_text(json.dumps(meta))
    return tmp_path / "g"


def test_aliases_sides_and_digests(tmp_path, base):
    meta = {
        "aliases": {"k.weight": "q.weight"}, "input_first": ["c.weight"], "tensors": {"q.weight": {"xxh3_128": "AB"}}
    }  # fmt: skip
    found = open_gram(folder(tmp_path, {"q.weight": 4, "c.weight": 4}, meta), base)
    assert found.tensors["k.weight"] is found.tensors["q.weight"]
    assert found.first == {"c.weight"}
    assert found.digests == {"q.weight": "ab", "k.weight": "ab"}


def test_shards_and_a_single_file(tmp_path, base):
    write_shards(tmp_path / "g", [{"q.weight": np.eye(4)}, {"c.weight": np.eye(5)}], "gram")
    assert set(open_gram(tmp_path / "g", base).tensors) == {"q.weight", "c.weight"}
    assert open_gram(tmp_path / "g" / "gram-00001-of-00002.safetensors", base).tensors.keys() == {"q.weight"}


@pytest.mark.parametrize(
    ("tensors", "meta", "words"),
    [
        ({"q.wieght": 4}, None, "of another model. Did you mean 'q.weight'?"),
        ({"q.weight": 6}, None, "takes 4 inputs"),
        ({"b": 4}, None, "is no matrix"),
        ({"c.weight": 4}, None, "takes 5 inputs"),
        ({"c.weight": 5}, {"input_first": ["c.weight"]}, "takes 4 inputs"),
        ({"q.weight": 4}, {"input_first": ["k.weight"]}, "'input_first' is not a list of names"),
        ({"q.weight": 4}, {"aliases": {"k.weight": "v.weight"}}, "which is not there"),
        ({"q.weight": 4, "k.weight": 4}, {"aliases": {"k.weight": "q.weight"}}, "has one of its own"),
        ({"q.weight": 4}, {"aliases": ["k.weight"]}, "not an object"),
        ({}, None, "holds no Gram matrix"),
    ],
)
def test_what_does_not_fit(tmp_path, base, tensors, meta, words):
    with pytest.raises(GramError) as caught:
        open_gram(folder(tmp_path, tensors, meta), base)
    assert words in str(caught.value)


def test_other_types_and_places(tmp_path, base):
    with pytest.raises(GramError, match="Store F32"):
        open_gram(folder(tmp_path, {"q.weight": 4}, dtype="BF16"), base)
    with pytest.raises(GramError, match="no such Gram folder"):
        open_gram(tmp_path / "nowhere", base)
    with pytest.raises(GramError, match=r"no gram\.safetensors.*model\.safetensors"):
        open_gram(tmp_path / "base", base)
    (tmp_path / "g" / "gram.safetensors").write_bytes(b"no header")
    with pytest.raises(GramError, match="Gram matrices: "):
        open_gram(tmp_path / "g", base)
