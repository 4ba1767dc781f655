"""The pilot's cells on a tiny model: what they need, what they leave, how they are continued and extended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.lab.demo_base import put_base

from rlmerge.lab.cells import read_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.pilot import (
    AGAIN,
    MERGES,
    ColdBase,
    Expert,
    PilotPreset,
    Regime,
    merge_named,
    merges_of,
    pilot_cells,
    run_pilot,
    sets_of,
    tasks_from,
    tasks_of,
)  # fmt: skip
from rlmerge.lab.pilot_page import write_page
from rlmerge.lab.pilot_work import _is_base
from rlmerge.lab.regimes import PILOT, PLUMBING

PAIR = Regime(
    "pair", "two domains",
    (Expert("m1", "math:0", 1), Expert("c1", "code:0", 1), Expert("s", "code:0", 1, kind="sft"),
     Expert("r", "math:0", 1, kind="rft", of="m1")),
    (("fusion", ("m1", "c1")),),
)  # fmt: skip
SEEDS = Regime(
    "seeds", "two runs that differ by more than a seed",
    (Expert("m1", "math:0", 1), Expert("m2", "math:0", 2, temperature=0.8, advantage="rloo", lora=2)),
    (("both", ("m1", "m2")),),
)  # fmt: skip
OTHERS = Regime(
    "others", "another cold start, merged onto what both began with",
    (Expert("m1", "math:0", 1), Expert("k1", "code:0", 1, base="second")), (("both", ("m1", "k1")),), onto="pretrain",
)  # fmt: skip
SMALL = PilotPreset(
    **{
        **vars(PLUMBING), "name": "pilot-test", "steps": 2, "prompts": 2, "group": 2, "problems": 4, "fisher": 4,
        "batch": 4, "pretraining_steps": 2, "cold_steps": 2, "max_new_tokens": 48, "eval_batch": 8,
        "regimes": (PAIR,), "samples": 2, "merges": tuple(one for one in MERGES if one.label in ("mean", "sar")),
    },
)  # fmt: skip


def test_cells_come_after_what_they_need():
    both = replace(SMALL, regimes=(PAIR, SEEDS))
    seen: set[str] = set()
    for cell in pilot_cells(both):
        assert set(cell.needs) <= seen, cell
        assert cell.name not in seen
        seen.add(cell.name)
    assert {"m1", "m2", "c1", "fisher-m2", "measure-base", "geometry-pair.fusion", "merge-seeds.both-bf16-sar"} <= seen
    assert tasks_of(both, ("m1", "m2")) == ("math:0",)


def test_the_name_of_a_merge_says_what_it_is():
    named = [merge_named(cell.name) for cell in pilot_cells(PILOT) if cell.kind == "merge"]
    assert named == [(name, *one) for name in sets_of(PILOT) for one in merges_of(PILOT, name)]
    assert ("cold-control.math", "fp32", "ties") in named


@pytest.mark.parametrize(
    ("regime", "message"),
    [
        (replace(SEEDS, experts=(Expert("m1", "math:0", 9), Expert("m2", "math:0", 2))), "two different runs"),
        (replace(SEEDS, sets=(("both", ("m1", "c1")),)), "seeds has"),
        (replace(SEEDS, sets=(("one", ("m1",)),)), "merges"),
    ],
)
def test_regimes_that_contradict_themselves(regime, message):
    with pytest.raises(LabError, match=message):
        pilot_cells(replace(SMALL, regimes=(PAIR, regime)))


def test_another_cold_start_has_cells_of_its_own():
    both = replace(SMALL, regimes=(OTHERS,), bases=(ColdBase("second", ("math:0", "code:0"), 1),))
    cells = {cell.name: cell for cell in pilot_cells(both)}
    assert cells["k1"].needs == cells["texts-second"].needs == ("second",)
    assert cells["measure-k1"].needs == ("k1", "texts-second")
    assert cells["merge-others.both-fp32-mean"].needs[-1] == "texts"
    shared = replace(both, bases=(ColdBase("second", ("math:0", "code:0"), 1, texts="base"),))
    cells = {cell.name: cell for cell in pilot_cells(shared)}
    assert "texts-second" not in cells
    assert cells["measure-k1"].needs == ("k1", "texts")
    assert tasks_from(shared, "base") == ("math:0", "code:0")


def test_a_cold_start_among_the_experts_is_measured_as_a_base():
    control = Regime(
        "control", "cold starts", (Expert("base", "math:0", 0, kind="cold"), Expert("m1", "math:0", 1)), ()
    )
    preset = replace(SMALL, regimes=(PAIR, control))
    assert _is_base(preset, "base")
    assert not _is_base(preset, "m1")
    assert tasks_from(preset, "base") == ("math:0", "code:0")


def begin(root: Path, pair: Regime) -> dict[str, Any]:
    """Runs one regime; what its first expert was measured to do."""
    put_base(root, replace(SMALL, regimes=(), merges=(), note="", paired=(), pairs=0))
    run_pilot(root, replace(SMALL, regimes=(pair,)), 1)
    merged = {name: read_cell(root, f"merge-pair.fusion-{name}") for name in ("fp32-mean", "bf16-mean", "bf16-sar")}
    assert set(merged["bf16-mean"]["tasks"]) == {"math:0", "code:0"}
    traces = {str(merged["fp32-mean"]["tasks"]["math:0"]["trace"])} | {
        str(read_cell(root, f"measure-{name}")["tasks"]["math:0"]["trace"]) for name in ("base", "m1", "c1")
    }
    assert len(traces) == 4, "the merge is none of what it is made of"
    one = read_cell(root, "measure-m1")["tasks"]["math:0"]
    assert len(one["greedy"]) == len(one["right"]) == len(one["trace"]) == 4
    assert np.isfinite(one["trace"]).all()
    assert one["problems"] == merged["bf16-sar"]["tasks"]["math:0"]["problems"]
    geometry = read_cell(root, "geometry-pair.fusion")
    assert geometry["coordinates"]["pairs"][0]["a"] == "c1"
    assert read_cell(root, "m1")["curve"][-1]["step"] == 2
    return one


def test_a_pilot_runs(tmp_path: Path):
    begin(tmp_path / "pilot", replace(PAIR, experts=PAIR.experts[:2]))


@pytest.mark.long
def test_a_pilot_takes_other_regimes(tmp_path: Path):
    pytest.importorskip("peft")
    root = tmp_path / "pilot"
    one = begin(root, PAIR)
    before = {path.name: path.read_bytes() for path in (root / "cells").iterdir()}
    shutil.copytree(root / "models" / "base", root / "models" / "pretrain")
    more = replace(SMALL, regimes=(PAIR, SEEDS), paired=(("rlvr", "seeds.both"),))
    second = ColdBase("second", ("math:0", "code:0"), 1)
    more = replace(more, regimes=(PAIR, SEEDS, OTHERS), bases=(second,))
    run_pilot(root, more, 1, only=tuple(one.name for one in more.regimes[1:]))
    after = {path.name: path.read_bytes() for path in (root / "cells").iterdir()}
    assert before.items() <= after.items()
    assert "merge-seeds.both-fp32-sar.json" in after
    looked = {name.removesuffix(".json") for name in after if name.startswith("again-")}
    models = {"again-base", "again-m1", "again-m2", "again-merge-seeds.both-fp32-mean"}
    assert looked >= {*models, "again-merge-seeds.both-fp32-sar"}
    again = read_cell(root, "again-m1")["tasks"]["math:0"]
    assert again["problems"] != one["problems"]
    assert again["samples"] == AGAIN == 4
    said = yaml.safe_load((root / "recipes" / "others.both-fp32-mean.yml").read_text())
    assert "pretrain" in said["base_model"]
    assert json.loads((root / "models" / "second" / "run.json").read_text())["seed"] == 1
    assert write_page(root, more, tmp_path / "more.md")["sets"]["others.both"]["members"] == ["m1", "k1"]
    assert json.loads((root / "models" / "m2" / "run.json").read_text())["lora"] == 2
    page = write_page(root, replace(SMALL, regimes=(PAIR, SEEDS)), tmp_path / "pilot.md")
    assert set(page["sets"]) == {"pair.fusion", "seeds.both"}
    assert page["experts"]["m2"]["other"]["dtype"] == "bf16"
    with pytest.raises(LabError, match="there are pair"):
        run_pilot(root, SMALL, 1, only=("others",))
    with pytest.raises(LabError, match="another samples"):
        run_pilot(root, replace(SMALL, samples=3), 1)
