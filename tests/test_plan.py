"""The plan knows every byte before one is computed, is plain JSON, and its digest covers what a result depends on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_model, write_shards
from tests.methods.small_models import (
    make_recipe,
    needed_weights,
    read_words,
    small_blocks,
    small_shards,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip

import rlmerge
from rlmerge.checkpoint.layout import WIDTH
from rlmerge.plan import sum_bytes
from rlmerge.planner import make_plan


def shaped(folder, shapes, dtype="F32"):
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    write_all(folder, base, {"a": base}, dtype=dtype)
    return make_recipe(folder, "ram", ["a"])


SHAPES = st.dictionaries(
    st.text("abcxyz.", min_size=1, max_size=6),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


@given(SHAPES, st.sampled_from([1, 7, 16]), st.sampled_from([1, 3]), st.sampled_from([1, 64, 200, 10**9]))
def test_units_blocks_and_files_cover_everything_once(tmp_path_factory, shapes, block, blocks, shard_bytes):
    folder = tmp_path_factory.mktemp("plan")
    recipe = shaped(folder, shapes)
    with small_blocks(block, block * blocks):
        plan = make_plan(recipe, shard_bytes=shard_bytes)
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == shapes
    for tensor in plan.tensors:
        edges = [0, *(stop for _, stop in tensor.units)]
        assert [start for start, _ in tensor.units] == edges[:-1]
        assert edges[-1] == tensor.size == int(np.prod(tensor.shape, dtype=int))
        row = int(np.prod(tensor.shape[1:], dtype=int)) if len(tensor.shape) > 1 else 1
        assert all(start % tensor.block == 0 for start, _ in tensor.units)
        if 0 < row <= block:
            assert tensor.block % row == 0  # row-aligned
    names = [name for file in plan.outputs for name in file.offsets]
    assert sorted(names) == sorted(shapes)
    sizes = {tensor.name: tensor.size * WIDTH[tensor.dtype] for tensor in plan.tensors}
    for file in plan.outputs:
        end = len(file.header)
        for name, offset in sorted(file.offsets.items(), key=lambda entry: (entry[1], sizes[entry[0]])):
            assert offset == end
            end += sizes[name]
        assert end == file.size
        assert file.size - len(file.header) <= shard_bytes or len(file.offsets) == 1
    assert plan.unit_list() == [(t, u) for t, tensor in enumerate(plan.tensors) for u in range(len(tensor.units))]
    json.dumps(plan.to_dict())


def test_the_planned_bytes_are_those_written(tmp_path):
    recipe = shaped(tmp_path, {"a": (5, 4), "b": (3,), "c": (2, 2, 2)})
    plan = make_plan(recipe, shard_bytes=40)
    with small_shards(40):
        out = rlmerge.merge_to_folder(recipe, tmp_path / "out").out
    assert {file.name: file.size for file in plan.outputs} == {
        p.name: p.stat().st_size for p in out.glob("*.safetensors")
    }
    for file in plan.outputs:
        assert (out / file.name).read_bytes().startswith(file.header)
    assert len(plan.outputs) == 3
    assert sum_bytes(plan)["written"] == (20 + 3 + 8) * 4
    assert sum_bytes(plan)["read"] == 2 * (20 + 3 + 8) * 4


def digests(folder, **changes):
    parameters = {"sensitivity": changes.pop("sensitivity", "fisher_delta2"), "lambda": changes.pop("lam", 1.0)}
    top = {key: changes.pop(key) for key in list(changes) if key in ("seed", "dtype", "rounding", "min_change")}
    recipe = make_recipe(folder, "sar", changes.pop("order", ["e0", "e1"]), parameters, fishers=True, **top)
    assert not changes or set(changes) == {"sweep"}
    variants = [recipe.with_settings(settings) for settings in changes.get("sweep", [])]
    return make_plan(recipe, variants).digest()


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 2, "BF16")
    write_all(tmp_path, base, experts, some_fishers(rng, list(experts)), "BF16")
    return tmp_path


def test_the_digest_covers_what_the_result_depends_on(models, monkeypatch):
    first = digests(models)
    assert digests(models) == first
    changes = [{"lam": 0.5}, {"seed": 1}, {"dtype": "float32"}, {"rounding": "stochastic"}, {"min_change": 0.1},
               {"sensitivity": "fisher"}, {"sweep": [{"lambda": 0.5}, {"lambda": 1.0}]}]  # fmt: skip
    found = {first} | {digests(models, **change) for change in changes}
    assert len(found) == len(changes) + 1
    monkeypatch.setattr("rlmerge.plan.VERSION", "0.0.0+other")
    assert digests(models) not in found
    monkeypatch.undo()
    with small_blocks(8, 16):
        assert digests(models) not in found


@pytest.mark.parametrize("where", ["base", "e0"])
def test_the_digest_covers_headers(models, where):
    first = digests(models)
    values = {name: words for name, (_, words) in read_words(models / where).items()}
    tensors = {name: ((words.astype(np.uint32) << 16).view(np.float32), "BF16") for name, words in values.items()}
    reordered = dict(reversed(tensors.items()))
    write_model(models / where, reordered, dtype="BF16")
    assert digests(models) != first


def test_a_sharded_base_is_planned_in_the_order_of_its_files(tmp_path):
    rng = np.random.default_rng(0)
    parts = [{"z": rng.random((2, 2)), "a": rng.random(3)}, {"m": rng.random((4, 1))}]
    write_shards(tmp_path / "base", parts)
    write_shards(tmp_path / "a", parts[::-1])
    recipe = make_recipe(tmp_path, "linear", ["a"], {}, needed_weights("linear", ["a"]))
    assert sorted(tensor.name for tensor in make_plan(recipe).tensors) == ["a", "m", "z"]
    found = dict(rlmerge.merge(recipe))
    for name, value in (parts[0] | parts[1]).items():
        assert found[name].tobytes() == value.astype(np.float32).tobytes()


def test_every_error_comes_before_a_weight_is_read(models, monkeypatch):
    """The plan reads headers only."""
    monkeypatch.setattr("os.preadv", None)
    monkeypatch.setattr("os.pread", None)
    assert digests(models)


def test_scope_model_takes_one_density(models):
    parameters = {"scope": "model", "density": [{"filter": "a", "value": 0.5}, {"value": 0.2}]}
    with pytest.raises(rlmerge.RlmergeError, match="scope: model"):
        make_plan(make_recipe(models, "sar", ["e0", "e1"], {**parameters, "sensitivity": "delta2"}))
