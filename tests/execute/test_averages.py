"""Averages of bf16 models without a base: from stored words to stored words, and nothing else may show it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model
from tests.methods.small_models import (
    fitting,
    make_recipe,
    needed_weights,
    read_words,
    representable,
    small_blocks,
    sparse_model,
    write_all,
)

import rlmerge
from rlmerge.errors import NonFiniteError

KERNELS = pytest.mark.parametrize("kernels", ["numba", "numpy"])
KEYS = ["e0", "e1", "e2"]
KEPT = ["breadcrumbs", "dare_ties", "della", "della_linear", "model_stock", "ramplus", "ramplus_tl", "sce"]


def merged(recipe, out, **options):
    """The stored words, and what rlmerge.json says of the bytes that were read and of the result."""
    rlmerge.merge_to_folder(recipe, out, **options)
    said = json.loads((out / "rlmerge.json").read_text())
    words = {name: array.tolist() for name, (_, array) in read_words(out).items()}
    return words, [said[key] for key in ("inputs", "units", "statistics")]


@KERNELS
@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp", "passthrough"])
def test_words_give_what_decoded_values_give(tmp_path, method, kernels):
    """With `allow_nonfinite` the same average is taken of decoded values and rounded on its own."""
    base, experts = sparse_model(np.random.default_rng(3), 3, "BF16", grid=False)
    write_all(tmp_path, base, experts, dtype="BF16")
    keys = fitting(method, KEYS)
    own = needed_weights(method, keys) and {key: {"weight": 0.2 + 0.3 * k} for k, key in enumerate(keys)}
    found = []
    for allowed in (False, True):
        recipe = make_recipe(tmp_path, method, keys, own=own, base=None,
                             allow_nonfinite=allowed)  # fmt: skip
        with small_blocks(50, 100):
            found.append(merged(recipe, tmp_path / f"out{allowed}", kernels=kernels))
    assert found[0] == found[1]


@KERNELS
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_copy_keeps_every_finite_word(tmp_path, kernels, dtype):
    """The signs of zeros, too."""
    words = np.arange(2**16, dtype=np.uint16)
    values = (words.view(np.float16) if dtype == "F16" else (words.astype(np.uint32) << 16).view(np.float32)).copy()
    values[~np.isfinite(values)] = -0.0
    write_model(tmp_path / "e0", {"w": values.reshape(256, 256).astype(np.float32)}, dtype=dtype)
    recipe = make_recipe(tmp_path, "passthrough", ["e0"], base=None)
    rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)
    before, after = (read_words(tmp_path / name)["w"] for name in ("e0", "out"))
    assert before[0] == after[0]
    assert before[1].tobytes() == after[1].tobytes()


@KERNELS
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_number_that_is_none_is_found_in_words(tmp_path, kernels, value, weight):
    values = {"w": representable(np.ones((50, 50)), "BF16")}
    hurt = {"w": values["w"].copy()}
    hurt["w"][40, 40] = value
    write_model(tmp_path / "e0", values, dtype="BF16")
    write_model(tmp_path / "e1", hurt, dtype="BF16")
    own = {"e0": {"weight": 1.0}, "e1": {"weight": weight}}
    recipe = make_recipe(tmp_path, "linear", ["e0", "e1"], own=own, base=None)
    with small_blocks(100, 200), pytest.raises(NonFiniteError, match="coordinate 2040") as caught:
        rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)
    assert str(tmp_path / "e1" / "model.safetensors") in str(caught.value)


@KERNELS
def test_an_average_that_overflows_is_an_error(tmp_path, kernels):
    for key in ("e0", "e1"):
        write_model(tmp_path / key, {"w": representable(np.full((4, 4), 3e38), "BF16")}, dtype="BF16")
    own = {key: {"weight": 1.0} for key in ("e0", "e1")}
    recipe = make_recipe(tmp_path, "linear", ["e0", "e1"], {"normalize": False}, own, base=None)
    with pytest.raises(NonFiniteError, match="the merged tensor 'w' holds inf at coordinate 0"):
        rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)


@pytest.mark.parametrize("method", KEPT)
def test_what_stages_keep_changes_nothing(tmp_path, method, monkeypatch):
    """With memory for it, the merge takes what a stage has made; without, it makes it again."""
    base, experts = sparse_model(np.random.default_rng(4), 3, "BF16")
    write_all(tmp_path, base, experts, dtype="BF16")
    cuts = {"density": 0.5, "epsilon": 0.2, "select_topk": 0.5, "rescale": "l1"}
    names = {spec.name for spec in rlmerge.get_method(method).parameters}
    if method.startswith("ramplus"):
        cuts.pop("epsilon")
    own = needed_weights(method, KEYS)
    per_model = {spec.name for spec in rlmerge.get_method(method).parameters if spec.per_model}
    own = {key: own[key] | {name: cuts[name] for name in cuts if name in per_model} for key in KEYS}
    parameters = {name: value for name, value in cuts.items() if name in names - per_model}
    recipe = make_recipe(tmp_path, method, KEYS, parameters, own)
    found = [merged(recipe, tmp_path / "kept")]
    monkeypatch.setattr("rlmerge.api.KEPT_BYTES", 0)
    found.append(merged(recipe, tmp_path / "made"))
    assert found[0] == found[1]
