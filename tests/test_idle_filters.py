"""A filter that matches nothing is never silent; one that matches under any name under which it is asked is."""

from __future__ import annotations

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model

import rlmerge

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.weight", "model.layers.1.self_attn.weight",
         "model.layers.2.mlp.weight", "model.norm.weight")  # fmt: skip


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        tensors = {tensor: rng.standard_normal((4, 3)).astype(np.float32) for tensor in NAMES}
        write_model(tmp_path / name, tensors, {"num_hidden_layers": 3})
    return tmp_path


def notes(models, text):
    """What `check` says of filters, without the part that every message has."""
    (models / "r.yml").write_text(text)
    return [note for note in rlmerge.check(models / "r.yml").notes if "part of no" in note]


PLAIN = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [{filter: %s, value: 0.5}, {value: 1}]
  - model: b
parameters:
  weight:
    - {filter: %s, value: 0.1}
    - {value: 1}
"""


def test_each_is_named_with_its_line_and_names_as_they_are(models):
    assert notes(models, PLAIN % ("mlp", "self_attn")) == []
    first, second = notes(models, PLAIN % ("nlp", "self_atn"))
    assert first.startswith(f"{models / 'r.yml'}:6: models[0].parameters.density[0].filter: 'nlp' is part of no ")
    assert second.startswith(f"{models / 'r.yml'}:10: parameters.weight[0].filter: 'self_atn' is part of no ")
    assert "Did you mean 'self_attn'?" in second
    assert second.endswith("'model.layers.1.self_attn.weight' and 'model.norm.weight'.")


def test_a_tensor_that_is_not_merged_is_no_match(models):
    found = notes(models, PLAIN % ("mlp", "norm") + "exclude: norm\n")
    assert [note.split(": ")[1] for note in found] == ["parameters.weight[0].filter"]


SLICES = """\
merge_method: linear
parameters: {weight: [{filter: %s, value: 1}, {value: 2}]}
slices:
  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: [{filter: %s, value: 1}, {value: 2}]}}]
  - sources: [{model: b, layer_range: [1, 3]}]
    parameters: {weight: [{filter: %s, value: 1}, {value: 2}]}
"""


@pytest.mark.parametrize(
    ("shared", "own", "slice_", "idle"),
    [
        ("mlp", "layers.0", "mlp", []),  # the shared one matches in one slice only
        ("layers.2", "layers.0", "layers.2", []),
        ("mpl", "mlp", "embed", ["parameters", "slices[0].sources[0].parameters", "slices[1].parameters"]),
    ],
)
def test_of_slices_each_where_it_holds(models, shared, own, slice_, idle):
    found = notes(models, SLICES % (shared, own, slice_))
    assert sorted(note.split(": ")[1].removesuffix(".weight[0].filter") for note in found) == idle


def test_of_slices_a_models_own_name_is_a_match(models):
    """A filter of a model looks for its text in the names of that model, which a slice may move."""
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [2, 3], parameters: {scale: [{filter: %s, value: 2}, {value: 1}]}}]
"""
    assert notes(models, text % "layers.2") == notes(models, text % "layers.0") == []
    assert len(notes(models, text % "layers.1")) == 1


def test_of_modules(models):
    text = """\
merge_method: linear
parameters: {weight: 1}
modules:
  model.layers:
    models: [{model: a}]
    parameters: {weight: [{filter: %s, value: 2}, {value: 1}]}
  default:
    models: [{model: b}]
"""
    assert notes(models, text % "mlp") == []
    (found,) = notes(models, text % "norm")
    assert ":6: modules.'model.layers'.parameters.weight[0].filter: " in found


def test_a_merge_says_it_too(models):
    (models / "r.yml").write_text(PLAIN % ("mlp", "self_atn"))
    said = []
    outcome = rlmerge.merge_to_folder(models / "r.yml", models / "out", kernels="numpy", progress=said.append)
    assert [note for note in outcome.notes if "'self_atn'" in note]
    assert [step for step in said if step.message.startswith("warning: ") and "'self_atn'" in step.message]
