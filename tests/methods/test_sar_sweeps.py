"""Points of a sweep that agree at some tensors and not at others: each is what a merge of its own makes."""

from __future__ import annotations

import numpy as np
import pytest
from tests.methods.small_models import make_recipe, read_words, sparse_model, write_all

import rlmerge

NAMES = {"a.weight": "model.layers.0.w.weight", "c.weight": "model.layers.1.w.weight"}


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(
    "points",
    [
        [{"density": [0.5, 0.8]}, {"density": [0.5, 0.6]}],
        [{"density": 0.5}, {"density": 0.8}, {"density": 0.5, "lambda": 0.5}],
        [{"rescale": "l1"}, {"rescale": "l2"}],
    ],
    ids=["gradients", "scalars", "rescale"],
)
def test_every_point_is_the_merge_alone(tmp_path, points, scope) -> None:
    if scope == "model" and isinstance(points[0].get("density"), list):
        pytest.skip("scope model wants one density")
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    base, *changed = ({NAMES.get(name, name): t for name, t in m.items()} for m in (base, *experts.values()))
    write_all(tmp_path, base, dict(zip(experts, changed)), dtype="BF16")
    recipe = make_recipe(tmp_path, "sar", list(experts), {"sensitivity": "delta2", "scope": scope, "density": 0.7})
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "sweep", sweep=points, threads=2)
    for number, (name, point) in enumerate(zip(outcome.names, points)):
        rlmerge.merge_to_folder(recipe.with_settings(point), tmp_path / f"alone{number}", threads=1)
        one, other = read_words(tmp_path / "sweep" / name), read_words(tmp_path / f"alone{number}")
        assert all(one[key][1].tobytes() == other[key][1].tobytes() for key in one), (name, point)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_pruned_updates_leave_a_base_of_minus_zero_alone(tmp_path, kernels) -> None:
    base = np.full((16, 16), -0.0, np.float32)
    expert = np.where(np.random.default_rng(0).random(base.shape) < 0.5, np.float32(0.5), base)
    write_all(tmp_path, {"a.weight": base}, {"e0": {"a.weight": expert}}, dtype="BF16")
    parameters = {"sensitivity": "delta2", "sparsify": "magprune", "rescale": "none", "density": 0.5, "lambda": 0.5}
    rlmerge.merge_to_folder(make_recipe(tmp_path, "sar", ["e0"], parameters), tmp_path / "out", kernels=kernels)
    words = read_words(tmp_path / "out")["a.weight"][1]
    assert not (words == 0).any()
    assert ((words == 0x8000) | (words == 0x3E80)).all()
