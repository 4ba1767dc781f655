"""Alarms that the plan raises, and what of the weights a merge's figures are about."""

from __future__ import annotations

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model
from tests.cli.command_line import rlmerge as command
from tests.cli.command_line import succeeded
from tests.methods.small_models import make_recipe, needed_weights, sparse_model, write_all

import rlmerge
from rlmerge.errors import RecipeError
from rlmerge.planner import make_plan
from rlmerge.sample import plan_alarms

NOTHING = "nothing of any update is kept"


@pytest.fixture
def models(tmp_path):
    base, experts = sparse_model(np.random.default_rng(0), 2, "F32")
    write_all(tmp_path, base, experts)
    return tmp_path


def zeroable():
    """Every number of every method that works on a base and may be 0."""
    for name in rlmerge.method_names():
        method = rlmerge.get_method(name)
        for spec in method.parameters:
            free = spec.kind == "number" and spec.above is None and spec.minimum in (None, 0)
            if free and method.arity.base == "required":
                yield name, spec.name


@pytest.mark.parametrize(("method", "parameter"), list(zeroable()))
def test_an_output_that_equals_the_base_is_announced(models, method, parameter):
    """The alarm is raised where, and only where, the zero leaves the base as it is."""
    keys = ["e0", "e1"][: rlmerge.get_method(method).arity.maximum]
    parameters = {parameter: 0} | ({"sensitivity": "delta2"} if method == "sar" else {})
    own = {k: {n: v for n, v in o.items() if n != parameter} for k, o in needed_weights(method, keys).items()}
    try:
        recipe = make_recipe(models, method, keys, parameters, own)
        out = dict(rlmerge.merge(recipe, kernels="numpy", threads=1))
    except RecipeError:
        return  # a zero that is refused needs no alarm
    base = dict(rlmerge.merge(make_recipe(models, "passthrough", ["base"], base=None), kernels="numpy", threads=1))
    same = all(np.array_equal(out[name], base[name]) for name in base)
    assert [NOTHING in text for text in plan_alarms(make_plan(recipe))] == [True] * same


def test_one_model_or_tensor_or_point_that_counts_is_enough(models):
    def said(parameters, own=None, sweep=()):
        recipe = make_recipe(models, "ties", ["e0", "e1"], {"weight": 1, **parameters}, own)
        return plan_alarms(make_plan(recipe, [recipe.with_settings(point) for point in sweep]))

    tensor = next(iter(dict(rlmerge.merge(make_recipe(models, "passthrough", ["base"], base=None)))))
    assert said({"density": 0}) != []
    assert said({}, {"e0": {"weight": 0}, "e1": {"density": 0}}) != []  # each is off by another factor
    assert said({}, {"e0": {"weight": 0}}) == []
    assert said({"density": [{"filter": tensor, "value": 0.5}, {"value": 0}]}) == []
    assert said({}, sweep=[{"lambda": 0}, {"lambda": 1}]) == []
    assert said({}, sweep=[{"lambda": 0}, {"lambda": 0.0, "density": 0.5}]) != []


@pytest.fixture
def renamed(tmp_path):
    """Two matrices of 12 and 4 weights and an expert that calls one of them otherwise; an excluded one of 6."""
    rng = np.random.default_rng(0)
    for name, first in (("base", "a"), ("e0", "a"), ("e1", "x.a")):
        tensors = {first: (3, 4), "b": (2, 2), "c": (2, 3)}
        values = {tensor: rng.standard_normal(shape).astype(np.float32) for tensor, shape in tensors.items()}
        write_model(tmp_path / name, values)
    return tmp_path


RECIPE = "merge_method: %s\nmodels: [{model: e0}, {model: %s}]\nparameters: {weight: 1}\nexclude: c\n"


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_figures_say_of_how_many_weights_they_are(renamed, method):
    base = "base_model: base\n" if method == "ties" else ""
    (renamed / "r.yml").write_text(RECIPE % (method, "e1") + base + "on_mismatch: base\n")
    report = rlmerge.check(renamed / "r.yml")
    assert [text for text in report.alarms if text.startswith("12 of 22 weights (55%) do not fit")]
    done = succeeded(command("merge", renamed / "r.yml", renamed / "out", "--kernels", "numpy"))
    row = "merged (the rest did not fit)"
    assert f" {row}   4 of 22 weights (18.2 %)" in done.out
    assert f"| {row} | 4 of 22 weights (18.2 %) |" in (renamed / "out/README.md").read_text()


def test_a_merge_that_only_excludes_says_nothing_of_it(renamed):
    (renamed / "r.yml").write_text(RECIPE % ("linear", "base"))
    assert rlmerge.check(renamed / "r.yml").alarms == []
    assert "did not fit" not in succeeded(command("merge", renamed / "r.yml", renamed / "out")).out
    assert "merged" not in rlmerge.merge_to_folder(renamed / "r.yml", renamed / "out2").report["total"]
