"""The study's cells on a tiny model: what they need, that halves stay sealed, and one run of all of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tests.lab.demo_base import put_base

from rlmerge.lab.cells import read_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.pilot import MERGES, paired_merges
from rlmerge.lab.pilot import merges_of as pilot_merges
from rlmerge.lab.regimes import PILOT, SMOLLM2, SMOLLM2_WRONG, TUNED
from rlmerge.lab.study import StudyPreset, folder_of, run_study, sets, study_cells
from rlmerge.lab.study_merges import ABLATIONS, BASELINES, first_tries, later_tries, merges_of
from rlmerge.lab.study_presets import CONFIRMATION, METHODS, PRESETS, REPLICATION, SKETCH
from rlmerge.lab.study_work import _recipe, sealed_seed

DOCS = Path(__file__).parents[2] / "docs" / "study"
SMALLEST = replace(
    SKETCH, name="smallest", steps=2, prompts=8, group=4, problems=6, fisher=4, batch=4, eval_batch=64,
    methods=("sar", "ties"), tries=5, kept=(1, 2), matching=4, averaged=(1, 2), tuning=4, samples=2, sampled=3,
    texts=3, attempts=4, caliper=1.0,
    arms=("rlvr", "rft", "sft", "sft-accuracy"), lr=1e-4,
)  # fmt: skip


@pytest.mark.parametrize("preset", [*PRESETS.values(), SMALLEST], ids=lambda one: one.name)
def test_cells_come_after_what_they_need(preset: StudyPreset) -> None:
    seen: set[str] = set()
    for cell in study_cells(preset):
        assert set(cell.needs) <= seen, cell
        assert cell.name not in seen
        assert cell.kind in preset.seconds
        seen.add(cell.name)


def test_seeds_are_disjoint_pairs_and_the_tuned_one_is_not_among_them() -> None:
    for pilot, study in ((PILOT, CONFIRMATION), (SMOLLM2, REPLICATION), (SMOLLM2_WRONG, REPLICATION)):
        assert len(study.seeds) >= 6
        seen = {expert.seed for regime in pilot.regimes for expert in regime.experts}
        assert not seen & {study.development, *study.seeds}
        assert study.development not in study.seeds
    assert not set(CONFIRMATION.seeds) & set(REPLICATION.seeds)
    single = [one for one in sets(CONFIRMATION) if one.what == "single" and one.arm == "rlvr"]
    used = Counter(name for one in single for name in one.members)
    assert set(used.values()) == {1}
    assert len(used) == 2 * len(CONFIRMATION.seeds)


@pytest.mark.parametrize("sparse", [False, True])
def test_everybody_has_as_many_tries(sparse: bool) -> None:
    for method in METHODS:
        first = first_tries(method, sparse)
        tries = [*first, *later_tries(first[0][0])]
        assert len(tries) == len({str(one) for one in tries}) == SKETCH.tries == 8
    assert set(BASELINES) < set(METHODS)
    labels = [(one.label, one.dtype) for one in merges_of("fusion", "rlvr", METHODS)]
    assert len(set(labels)) == len(labels)


def test_settings_that_were_frozen_before_need_no_development_pair() -> None:
    frozen = {method: {"setting": {}, "scale": 1.0} for method in METHODS}
    names = {cell.name for cell in study_cells(replace(CONFIRMATION, frozen=frozen))}
    assert not [name for name in names if name.startswith("tune-") or f"-{CONFIRMATION.development}" in name]
    assert "frozen" in names


@pytest.mark.parametrize(("page", "study"), [("rehearsal", CONFIRMATION), ("rehearsal-smollm2", REPLICATION)])
def test_frozen_settings_are_what_the_rehearsal_chose(page: str, study: StudyPreset) -> None:
    found = json.loads((DOCS / f"{page}.json").read_text())
    assert study.frozen == found["frozen"]
    for method, tried in found["tuning"].items():
        best = max(tried, key=lambda row: round(sum(row["greedy"]), 9))
        assert len(tried) == study.tries
        assert study.frozen[method] == {key: best[key] for key in ("setting", "scale")}


def test_the_pilot_of_smollm2_shows_what_its_tuning_chose() -> None:
    for one in TUNED:
        frozen = REPLICATION.frozen[one.method]
        setting = frozen["setting"] if frozen["scale"] == 1.0 else {"weight": frozen["scale"]}
        assert one.settings == setting, "a scale is a weight where there is nothing else"


def test_settings_of_elsewhere_are_not_looked_at_again() -> None:
    seen = {label for _, _, label in paired_merges(SMOLLM2_WRONG)}
    assert seen == {one.label for one in MERGES}
    labels = {label for _, label in pilot_merges(SMOLLM2_WRONG, "wrong.pair1")}
    assert labels == seen | {one.label for one in TUNED}


def test_recipes_have_the_inputs_that_their_labels_say(tmp_path: Path) -> None:
    preset = replace(CONFIRMATION, seeds=(11, 12))
    one = next(found for found in sets(preset) if found.name == "fusion.rlvr.11")
    own, other = ("rlvr-math-11", "rlvr-code-11"), ("rlvr-code-11", "rlvr-math-11")
    fishers = {
        "F-delta2": [f"fishers/{name}" for name in own],
        "F-permuted": [f"permuteds/{name}" for name in own],
        "delta2-ties-drawn": [f"jitters/{name}" for name in own],
        "F-of-other": [f"fishers/{name}" for name in other],
        "F-of-base": ["fishers/base-math", "fishers/base-code"],
        "F-alone": [f"fishers/{name}" for name in own],
    }
    settings = set()
    for merge in ABLATIONS:
        recipe = yaml.safe_load(_recipe(tmp_path, preset, one, merge, merge.label).read_text())
        models = recipe["models"]
        assert [model["model"] for model in models] == [f"../models/{name}/steps/100/bf16" for name in own]
        assert recipe["base_model"] == "../models/base/bf16"
        assert recipe["dtype"] == "float32"
        given = [model.get("fisher", "").removeprefix("../") for model in models]
        assert given == fishers.get(merge.label, ["", ""]), merge.label
        assert (recipe["parameters"]["density"], recipe["parameters"]["agreement"]) == (1.0, "mean")
        settings.add((str(recipe["parameters"]), *given))
    assert len(settings) == len(ABLATIONS)
    matched = next(found for found in sets(preset) if found.name == "fusion.sft-accuracy.12")
    (tmp_path / "cells").mkdir()
    for domain, step in (("math", 15), ("code", 40)):
        (tmp_path / "cells" / f"match-{domain}-12.json").write_text(json.dumps({"accuracy": step, "norm": 80}))
    recipe = yaml.safe_load(_recipe(tmp_path, preset, matched, ABLATIONS[-1], "matched").read_text())
    found = [model["model"] for model in recipe["models"]]
    assert found == ["../models/sft-math-12/steps/15/bf16", "../models/sft-code-12/steps/40/bf16"]


def test_a_half_needs_a_seal_and_the_whole_test_split_is_closed() -> None:
    with pytest.raises(LabError, match="half"):
        study_cells(replace(SMALLEST, half="C"))
    with pytest.raises(LabError, match="seal"):
        study_cells(replace(SMALLEST, half="A"))
    with pytest.raises(LabError, match="only a half"):
        study_cells(replace(SMALLEST, split="test"))
    assert len({sealed_seed(seal, part) for seal in ("one", "another") for part in ("this", "that")}) == 4


def test_a_rehearsal_of_few_merges(tmp_path: Path) -> None:
    """One pair, two arms, no ablations: all kinds of cells but those, and a page that says it is no result."""
    root = tmp_path / "study"
    arms = ("rlvr", "other")
    preset = replace(SMALLEST, seeds=(0,), arms=arms, controls=(), methods=("sar",), tries=1, ablations=False)
    preset = replace(preset, cold_steps=2, samples=6, sampled=3, deep=1)
    put_base(root, preset)
    shutil.copytree(root / "models" / "base", root / "models" / "pretrain")
    found = run_study(root, preset, 1)
    assert "**No result.**" in (root / "study.md").read_text()
    assert "6 samples of the first 1 and 4 of the next 2" in (root / "study.md").read_text()
    assert {"H1", "H2", "H4"} <= set(found)
    one = read_cell(root, "merge-fusion.rlvr.0-fp32-sum")["tasks"]["math:0"]
    assert one["drawn"] == [6, 4, 4]
    assert {"bf16"} == {path.name for path in (root / "models" / "other-math-0").iterdir() if path.is_dir()}, "cleaned"


@pytest.mark.long
def test_a_rehearsal(tmp_path: Path) -> None:
    """One pair, one arm: every merge of it, and a page that says it is no result."""
    root = tmp_path / "study"
    arms = ("rlvr", "rft", "other")
    preset = replace(SMALLEST, seeds=(0,), arms=arms, controls=(), methods=("sar", "ram"), tries=1, cold_steps=2)
    put_base(root, preset)
    shutil.copytree(root / "models" / "base", root / "models" / "pretrain")
    found = run_study(root, preset, 1)
    assert "**No result.**" in (root / "study.md").read_text()
    assert {"H1", "H2", "H4", "H5", "H6"} <= set(found)
    assert found["H5"][0]["one"] == ("F-delta2", "fp32")
    recipe = yaml.safe_load((root / "recipes" / "fusion.other.0-fp32-mean.yml").read_text())
    assert recipe["base_model"] == "../models/cold-other/bf16"
    assert "cold-other" in found["experts"]
    assert read_cell(root, "merge-fusion.rlvr.0-fp32-sum")["tasks"]["math:0"]["right"]
    assert read_cell(root, "merge-fusion.rlvr.0-bf16-mean")["tasks"]["math:0"]["right"]
    texts = json.loads((root / "texts" / "math-0.json").read_text())
    assert len(texts) == 3
    assert [] in texts, "four samples do not solve all three, and solutions are not among the texts"
    assert len(read_cell(root, "merge-fusion.rlvr.0-fp32-F-alone")["tasks"]["math:0"]["mass"]) == sum(map(bool, texts))
    assert {"bf16"} == {path.name for path in (root / "models" / "rft-math-0").iterdir() if path.is_dir()}, "cleaned"


@pytest.mark.long
def test_the_whole_study(tmp_path: Path) -> None:
    root = tmp_path / "study"
    put_base(root, SMALLEST)
    found = run_study(root, SMALLEST, 1)
    page = (root / "study.md").read_text()
    for name in ("H1", "H2", "H3", "H4", "H5", "H6"):
        assert found[name], name
        assert f"## {name}" in page
    assert (root / "study.svg").exists()
    assert json.loads((root / "study.json").read_text())["frozen"] == found["frozen"]

    # Fishers of the controls: the same numbers elsewhere, and 1 but for what breaks ties
    own, permuted, jitter = (
        load_file(root / kind / "rlvr-math-0" / "fisher.safetensors") for kind in ("fishers", "permuteds", "jitters")
    )
    for tensor, values in own.items():
        assert np.array_equal(np.sort(permuted[tensor].ravel()), np.sort(values.ravel()))
        assert np.ptp(jitter[tensor]) < 1e-3
    assert any(not np.array_equal(permuted[tensor], values) for tensor, values in own.items())

    # the expert of a run that goes on is the model that a run of its length ends with
    assert folder_of(root, SMALLEST, "rlvr-math-0").parent.name == "2"
    assert folder_of(root, SMALLEST, "twice-math-0") == root / "models" / "rlvr-math-0" / "bf16"
    match = read_cell(root, "match-math-0")
    assert match["accuracy"] in SMALLEST.kept
    assert match["seen"]["2"]["norm"] > match["seen"]["1"]["norm"] > 0
    assert folder_of(root, SMALLEST, "sft-accuracy-math-0").parent.name == str(match["accuracy"])
    assert read_cell(root, "measure-average-math-0")["tasks"]["math:0"]["greedy"]
    assert set(found["masters"]) == {"rlvr", "rft", "sft"}
    assert found["words"]["H3 fusion, sampled"]

    # the same settings everywhere but on the pair that chose them
    assert read_cell(root, "merge-fusion.sft.1-fp32-ties")["settings"] == found["frozen"]["ties"]
    assert len(found["tuning"]["ties"]) == 5
    assert found["tuning"]["ties"][4]["scale"] == 0.5
    before = {path.name: path.stat().st_mtime_ns for path in (root / "cells").iterdir()}
    run_study(root, SMALLEST, 1)
    assert before == {path.name: path.stat().st_mtime_ns for path in (root / "cells").iterdir()}
