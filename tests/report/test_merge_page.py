"""The page of a merge: its numbers are those of rlmerge.json."""

from __future__ import annotations

import json

import pytest
from tests.methods.small_models import make_recipe, some_fishers, sparse_model, write_all

pytest.importorskip("altair")

import numpy as np
from tests.report.test_geometry_page import figure, rows_of

import rlmerge
from rlmerge.report.merge_page import merge_page
from rlmerge.report.names import place_of
from rlmerge.report.page import embedded, render


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base, experts = sparse_model(np.random.default_rng(0), 2, "BF16")
    write_all(folder, base, experts, some_fishers(np.random.default_rng(1), list(experts)), "BF16")
    found = {}
    for method, fishers in (("sar", True), ("linear", False)):
        recipe = make_recipe(
            folder, method, ["e0", "e1"], {"weight": 0.5} if method == "linear" else {}, fishers=fishers
        )
        out = rlmerge.merge_to_folder(recipe, folder / method, kernels="numpy").out
        found[method] = json.loads((out / "rlmerge.json").read_text())
    return found


def test_the_page_says_what_the_merge_reported(merged):
    provenance = merged["sar"]
    page = merge_page(provenance, "t")
    total = provenance["statistics"]["total"]
    said = " ".join(page.summary)
    for key in ("survival", "conflict", "overlap"):
        assert f"{100 * total[key]['share']:.1f} %" in said, key
    assert embedded(render(page), "numbers") == provenance


def test_wins_by_expert_and_layer(merged):
    """Every share of every tensor, in the cell of its layer and module."""
    provenance = merged["sar"]
    rows = rows_of(figure(merge_page(provenance, "t"), "experts").chart)
    cells = {(row["measure"], row["expert"], row["layer"], row["module"]): row["value"] for row in rows}
    checked = 0
    for name, found in provenance["statistics"]["tensors"].items():
        layer, module = place_of(name)
        for label, key in (("wins (of conflicts)", "wins"), ("kept (of non-zero)", "kept"), ("support", "support")):
            for expert, one in found.get(key, {}).items():
                if "share" in one:
                    assert cells[(label, expert.rsplit("/")[-1], str(layer), module)] == pytest.approx(
                        one["share"], rel=1e-5
                    )
                    checked += 1
    assert checked >= 8


def test_wins_add_up_over_the_tensors_of_a_module(merged):
    provenance = merged["sar"]
    won = figure(merge_page(provenance, "t"), "wins")
    tensors = provenance["statistics"]["tensors"]
    module = place_of(next(name for name, one in tensors.items() if one["conflict"]["count"]))[1]
    same = [one for name, one in tensors.items() if place_of(name)[1] == module]
    for expert in same[0]["wins"]:
        share = sum(one["wins"][expert]["count"] for one in same) / sum(one["conflict"]["count"] for one in same)
        row = [module, expert.rsplit("/")[-1], f"{100 * share:.1f} %"]
        assert row in [list(one) for one in won.table]


def test_a_method_without_conflicts_has_a_page(merged):
    page = merge_page(merged["linear"], "t")
    assert page.summary
    assert "wins" not in [one.id for one in page.figures]
    assert "<figure" in render(page)
