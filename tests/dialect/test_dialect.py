"""How a recipe is read, rule by rule, as mergekit 0.1.5 reads it (expected.json: `python benchmarks/dialect.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.dialect.models import read_depth, read_numbers, write_models

import rlmerge

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialect")
    write_models(folder)
    return folder


def read(name: str, home: Path) -> rlmerge.Recipe:
    return rlmerge.parse_recipe((HERE / "recipes" / f"{name}.yml").read_text(), name, home)


def test_every_recipe_has_an_answer():
    assert {file.stem for file in (HERE / "recipes").glob("*.yml")} == EXPECTED.keys()
    assert not [name for name, entry in EXPECTED.items() if "error" in entry]


@pytest.mark.parametrize("name", EXPECTED)
def test_as_mergekit(name, home, tmp_path):
    """Every number but one rounding: so each came from the same layers, by the same parameters."""
    out = rlmerge.merge_to_folder(read(name, home), tmp_path / "out").out
    found, expected = read_numbers(out), EXPECTED[name]
    assert read_depth(out) == expected["layers"]
    assert found.keys() == expected["tensors"].keys()
    wrong = {key: (found[key], value) for key, value in expected["tensors"].items() if abs(found[key] - value) > 4e-6}
    assert not wrong


@pytest.mark.parametrize("name", EXPECTED)
def test_the_resolved_recipe_means_the_same(name, home):
    recipe = read(name, home)
    again = rlmerge.parse_recipe(recipe.to_yaml(), name, home)
    assert again.to_dict() == recipe.to_dict()
    assert again.models == recipe.models
