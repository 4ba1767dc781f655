"""The pilot's numbers on made-up cells: losses and shares are what was put in, and the gate is met twice or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.lab.test_pilot import SMALL

from rlmerge.lab.errors import LabError
from rlmerge.lab.pilot import Expert, PilotPreset, Regime
from rlmerge.lab.pilot_page import outcome, write_page
from rlmerge.lab.pilot_summary import met_once, summary

TASKS = ("math:0", "code:0")
PRESET: PilotPreset = replace(
    SMALL, problems=200,
    regimes=(
        Regime(
            "seeds", "pairs", tuple(Expert(f"{task[0]}{seed}", task, seed) for seed in (1, 2) for task in TASKS),
            (("pair1", ("m1", "c1")), ("pair2", ("m2", "c2"))), masters=True,
        ),
    ),
)  # fmt: skip


def scored(right: float, tasks: tuple[str, ...], seed: int) -> dict[str, Any]:
    """So many right answers, at random places."""
    found = {}
    for number, task in enumerate(tasks):
        letters = np.array(["0"] * 200)
        letters[np.random.default_rng([seed, number]).permutation(200)[: round(200 * right)]] = "1"
        found[task] = {
            "greedy": "".join(letters), "samples": 4, "right": [4 * int(letter) for letter in letters],
            "mass": [right / 2] * 5, "trace": [-1.0] * 5,
        }  # fmt: skip
    return found


def put(root: Path, cell: str, **values: Any) -> None:
    (root / "cells").mkdir(exist_ok=True)
    (root / "cells" / f"{cell}.json").write_text(json.dumps({"cell": cell, "seconds": 1.0, **values}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Base 20 %, experts 60 %, the mean of the first pair 40 %, all else 60 %."""
    put(tmp_path, "measure-base", tasks=scored(0.2, TASKS, 0))
    for number, expert in enumerate(PRESET.regimes[0].experts):
        curve = [{"step": 10, "reward": 0.5, "entropy": 0.2, "kl": 0.1, "length": 30.0}]
        put(tmp_path, expert.name, curve=curve, step_seconds=1.0)
        other = {"dtype": "fp32", "tasks": scored(0.3, (expert.task,), 50 + number)}
        put(tmp_path, f"measure-{expert.name}", tasks=scored(0.6, (expert.task,), number), other=other)
    pair = {"cosine": 0.1, "jaccard": 0.1, "conflict_overlap": 0.5}
    for name, (one, two) in PRESET.regimes[0].sets:
        total = {
            "pairs": [{"a": one, "b": two, **pair}],
            "null": {"pairs": [{"a": one, "b": two, **pair}]},
            "experts": {key: {"support": 0.1, "support_bf16": 0.1} for key in (one, two)},
        }
        put(tmp_path, f"geometry-seeds.{name}", coordinates={**total})
        for dtype in ("fp32", "bf16", "masters"):
            for label in ("mean", "sar") if dtype != "masters" else ("mean",):
                right = 0.4 if (name, label) == ("pair1", "mean") else 0.6
                put(tmp_path, f"merge-seeds.{name}-{dtype}-{label}", tasks=scored(right, TASKS, 7))
    return tmp_path


def test_what_is_lost_and_kept(root: Path) -> None:
    found = summary(root, PRESET)
    mean = found["sets"]["seeds.pair1"]["merges"]["fp32"]["mean"]
    assert mean["loss"]["greedy"]["value"] == pytest.approx(0.2)
    assert 0.0 < mean["loss"]["greedy"]["low"] < 0.2 < mean["loss"]["greedy"]["high"]
    assert mean["retained"]["greedy"]["value"] == pytest.approx(0.5)
    assert mean["retained"]["mass"]["value"] == pytest.approx(0.5)
    assert found["sets"]["seeds.pair2"]["merges"]["fp32"]["mean"]["loss"]["greedy"]["value"] == pytest.approx(0.0)
    assert found["experts"]["m1"]["greedy"]["gain"]["value"] == pytest.approx(0.4)
    assert found["experts"]["m1"]["other"]["less"]["value"] == pytest.approx(-0.3)
    row = next(one for one in found["power"] if one["difference"] == "sar − mean" and one["metric"] == "greedy")
    assert row["mean"] == pytest.approx(0.1)
    assert row["seeds_upper"] > row["seeds"] > 0.0
    alone = next(
        one for one in found["together"] if (one["metric"], one["effect"], one["problems"]) == ("greedy", 0.02, 400)
    )
    assert alone["bounds"] == pytest.approx((row["power"]["400"],) * 2), "of one comparison, its own power"
    assert row["detectable_upper"]["400"] > row["detectable"]["400"]
    assert row["detectable"]["160"] > row["detectable"]["400"]


def test_what_samples_could_see_is_foreseen_from_the_second_look(root: Path) -> None:
    assert "sampled" not in {one["metric"] for one in summary(root, PRESET)["power"]}
    models = ["base", *(one.name for one in PRESET.regimes[0].experts)]
    merges = [f"merge-seeds.pair{pair}-fp32-{label}" for pair in (1, 2) for label in ("mean", "sar")]
    for number, name in enumerate((*models, *merges)):
        right = {"base": 0.2, "merge-seeds.pair2-fp32-mean": 0.2}.get(name, 0.5)
        tasks = scored(right, TASKS, 100 + number)
        for one in tasks.values():  # of samples, half of what greedy answers say
            one["right"] = [count // 2 for count in one["right"]]
        put(root, f"again-{name}", tasks=tasks)
    rows = {one["difference"]: one for one in summary(root, PRESET)["power"] if one["metric"] == "sampled"}
    assert rows["sar − mean"]["mean"] == pytest.approx(0.075)
    assert rows["sar − mean"]["pairs"] == 2
    (root / "cells" / "again-c2.json").unlink()
    (alone,) = [one for one in summary(root, PRESET)["power"] if one["metric"] == "sampled"]
    assert alone["pairs"] == 1, "of which nothing is known of how pairs differ"
    assert alone["mean"] == pytest.approx(0.0)
    assert alone["alike"]["140"] > alone["apart"]["140"] > 0.0
    assert "again-c2" in summary(root, PRESET)["missing"]
    assert "From one pair" in write_text(root)


def write_text(root: Path) -> str:
    """The page of these cells."""
    write_page(root, PRESET, root / "pilot.md")
    return (root / "pilot.md").read_text()


def test_the_gate_is_met_twice_or_not(root: Path) -> None:
    assert met_once(root, PRESET) == [("seeds.pair1", dtype, "mean") for dtype in ("fp32", "bf16")]
    found = summary(root, PRESET)
    assert {one["holds"] for one in found["gate"]} == {None}
    assert "the second look" in outcome(found)
    for name, right in (("base", 0.2), ("m1", 0.6), ("c1", 0.6), ("merge-seeds.pair1-fp32-mean", 0.4),
                        ("merge-seeds.pair1-bf16-mean", 0.58)):  # fmt: skip
        put(root, f"again-{name}", tasks=scored(right, TASKS, 9))
    found = summary(root, PRESET)
    holds = {(one["dtype"], one["by"], one["then"]): one["holds"] for one in found["gate"]}
    assert holds == {
        (dtype, *by): dtype == "fp32"
        for dtype in ("fp32", "bf16")
        for by in (("greedy", "greedy"), ("mass", "sampled"))
    }
    assert outcome(found) == "averaging costs 5 points of accuracy or more in 1 of 2 sets so far: seeds.pair1"
    sampled = {**found, "gate": [one for one in found["gate"] if one["by"] == "mass"]}
    assert "(of greedy answers in 0, of samples in the others)" in outcome(sampled)
    put(root, "again-merge-seeds.pair1-fp32-mean", tasks=scored(0.58, TASKS, 9))
    assert outcome(summary(root, PRESET)).startswith(
        "averaging was seen to cost 5 points in none of 2 sets so far; intervals"
    )


def test_the_gate_is_about_rlvr_on_its_own_base(root: Path) -> None:
    regime = PRESET.regimes[0]
    for other in (
        replace(regime, onto="pretrain"),
        replace(regime, experts=tuple(replace(one, kind="sft") for one in regime.experts)),
    ):
        changed = replace(PRESET, regimes=(other,))
        assert met_once(root, changed) == []
        assert outcome(summary(root, changed)) == "no set is measured yet"


def test_another_run_by_the_same_name_is_an_error(root: Path) -> None:
    run = json.loads((root / "cells" / "m1.json").read_text())
    expert = {**vars(PRESET.regimes[0].experts[0]), "curriculum": [], "steps": 250}
    put(root, "m1", **{key: value for key, value in run.items() if key not in ("cell", "seconds")}, expert=expert)
    with pytest.raises(LabError, match="other settings"):
        summary(root, PRESET)


def test_the_page(root: Path) -> None:
    page = root / "pilot.md"
    found = write_page(root, PRESET, page)
    text = page.read_text()
    assert text.startswith(f"# The pilot: {outcome(found)}\n")
    for piece in (
        PRESET.note,
        "## seeds",
        "### seeds.pair2",
        "masters",
        "## What a study could see",
        "Not done yet",
    ):
        assert piece in text
    for name in ("curves", "losses"):
        assert "<svg" in (root / f"pilot-{name}.svg").read_text()
    assert json.loads((root / "pilot.json").read_text()) == json.loads(json.dumps(found))
    (root / "cells" / "geometry-seeds.pair1.json").unlink()
    (root / "cells" / "merge-seeds.pair1-bf16-mean.json").unlink()
    shown = write_page(root, PRESET, page)
    assert shown["judged"] == found["judged"], "a set is judged by its mean in fp32, and shown as far as it is done"
    assert "mean" not in shown["sets"]["seeds.pair1"]["merges"]["bf16"]
    for number in (1, 2):
        (root / "cells" / f"merge-seeds.pair{number}-fp32-mean.json").unlink()
    assert "no set is measured yet" in outcome(write_page(root, PRESET, page))
