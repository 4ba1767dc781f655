"""A thread that fails anywhere fails the run, and what it left undone never becomes a result."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlmerge
from rlmerge.errors import RecipeError
from rlmerge.execute.schedule import Total
from rlmerge.methods import get_method
from rlmerge.methods.topk import Coarse
from rlmerge.recipe import parse_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = """
merge_method: sar
base_model: base
models: [{model: expert0}, {model: expert1}]
parameters: {sensitivity: delta2, scope: model}
"""


def recipe():
    return parse_recipe(RECIPE, folder=GOLDEN)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("calls", [3, 20, 60])
def test_a_failing_callback_stops_the_run_and_leaves_no_partial_sum(tmp_path, calls):
    rlmerge.merge_to_folder(recipe(), tmp_path / "right", kernels="numpy")
    left = [calls]

    def progress(step):
        left[0] -= 1
        if left[0] == 0:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        rlmerge.merge_to_folder(recipe(), tmp_path / "out", kernels="numpy", progress=progress, threads=1)
    assert not (tmp_path / "out").exists()
    rlmerge.merge_to_folder(recipe(), tmp_path / "out", kernels="numpy")
    assert weights(tmp_path / "out") == weights(tmp_path / "right")


def test_a_sum_over_too_few_units_is_refused():
    stage = get_method("ties").stages({"density_of": "all", "scope": "tensor", "rescale": "none"})[0]
    assert isinstance(stage, Coarse)
    total = Total(stage, 2)
    total.add(1, stage.empty(2))
    with pytest.raises(RuntimeError, match="0 of 2"):
        total.check(2)
    total.add(0, stage.empty(2))
    total.check(2)


@pytest.mark.parametrize(("key", "values"), [("scope", ["tensor", "model"]), ("agreement", ["mean", "multiplicity"])])
def test_points_that_measure_different_things_do_not_share_a_reading(tmp_path, key, values):
    with pytest.raises(RecipeError, match="share one reading"):
        rlmerge.merge_to_folder(recipe(), tmp_path / "out", sweep=[{key: value} for value in values])
    assert not any(tmp_path.iterdir())


def test_check_and_explain_can_be_called_again():
    for _ in range(2):
        assert rlmerge.explain(recipe())
        assert rlmerge.check(recipe()).summary["method"] == "sar"
