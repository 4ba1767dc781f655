"""Estimates and words of the study: against the definition, and by simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlmerge.evaluate.statistics import paired_difference
from rlmerge.lab.hypotheses import INTEREST, Numbers, hypotheses
from rlmerge.lab.study import sets, study_cells
from rlmerge.lab.study_presets import SKETCH
from rlmerge.lab.verdicts import (
    all_of,
    as_row,
    difference,
    over_runs,
    retained,
    retained_difference,
    uncut,
    verdict,
)


def test_words() -> None:
    assert verdict(0.001, 0.3, 0.02) == "holds"
    assert verdict(0.001, 0.01, 0.02) == "holds, below interest"
    assert verdict(-0.3, 0.01, 0.02) == "refuted"
    assert verdict(-0.3, 0.3, 0.02) == "open"


def row(value: float, error: float = 0.005) -> dict:
    """Of a normal estimate."""
    random = np.random.default_rng(0).standard_normal(400)
    numbers = value + error * np.sqrt(399) * (random - random.mean()) / random.std()
    return as_row(paired_difference(numbers), INTEREST)


def test_one_word_for_several() -> None:
    assert all_of([row(0.05), row(0.04)]) == "holds"
    assert all_of([row(0.05), row(0.015, 0.002)]) == "holds, below interest"
    assert all_of([row(0.05), row(0.005)]) == "refuted", "one that is surely below 2 points is enough"
    assert all_of([row(0.05), row(0.0095)]) == "open", "under 2 points by 2.1 errors: of two, that is no refutation"
    assert all_of([row(0.0095)]) == "refuted", "alone it is"
    assert all_of([row(0.05), None]) == "open"
    assert all_of([None, row(-0.05)]) == "refuted"
    assert all_of([]) == "open"


def test_refuting_one_of_eight_is_wrong_once_in_forty() -> None:
    """Where all eight are exactly of interest, and independent."""
    random, wrong = np.random.default_rng(3), 0
    for _ in range(300):
        rows = [as_row(paired_difference(random.normal(INTEREST, 0.3, 100)), INTEREST) for _ in range(8)]
        wrong += all_of(rows) == "refuted"
    assert wrong <= 15


def test_p_is_one_sided_and_numbers_are_not_cut() -> None:
    random = np.random.default_rng(0)
    worse = as_row(difference(random.normal(-1.5, 0.1, (4, 200))), 0.01)
    assert worse["p"] > 0.999
    assert worse["p_below"] < 1e-6
    assert worse["low"] < -1.45
    assert worse["high"] == pytest.approx(-1.5, abs=0.1)
    assert worse["verdict"] == "refuted"
    better = as_row(paired_difference(random.normal(0.5, 0.1, 200)), 0.01)
    assert better["p"] < 1e-6
    assert better["p_below"] > 0.999
    runs = over_runs([0.1, 0.2, 0.3], 0.02)
    assert runs is not None
    assert (runs["low"], runs["high"]) == pytest.approx((0.2 - 4.3027 * 0.057735, 0.2 + 4.3027 * 0.057735), abs=1e-4)
    assert over_runs([0.1], 0.02) is None


def tables(random: np.random.Generator, kept: float, sets: int, problems: int) -> tuple[np.ndarray, np.ndarray]:
    """(merge − base, experts − base) of 0s and 1s: a gain of .3 of which a share is kept, seeds that differ."""
    level = random.uniform(0.2, 0.5, problems)
    base = random.random(problems) < level
    gain = np.clip(0.3 + random.normal(0, 0.03, (sets, 1)), 0, 1)
    expert = random.random((sets, problems)) < np.clip(level + gain, 0, 1)
    merge = random.random((sets, problems)) < np.clip(level + kept * gain, 0, 1)
    return merge - base.astype(float), expert - base.astype(float)


@pytest.mark.parametrize("sets", [1, 6])
def test_differences_of_retentions_are_covered(sets: int) -> None:
    """Near 95 %, for one pair and for six; the intervals of both retentions are about their own."""
    random, inside, runs = np.random.default_rng(1), 0, 300
    for _ in range(runs):
        one, other = tables(random, 0.9, sets, 300), tables(random, 0.7, sets, 300)
        found = retained_difference(one, other, 0.1)
        assert found is not None
        inside += found["low"] <= 0.2 <= found["high"]
    assert 0.91 <= inside / runs <= 0.99
    assert retained(*one)["low"] < 0.9 < retained(*one)["high"]


def test_no_gain_no_difference() -> None:
    random = np.random.default_rng(2)
    nothing = random.choice([-1.0, 0.0, 1.0], (3, 100))
    assert retained_difference((nothing, nothing), tables(random, 0.9, 3, 100), 0.1) is None


def test_an_interval_is_about_its_centre() -> None:
    estimate = difference(np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    low, high = uncut(estimate)
    assert (low + high) / 2 == pytest.approx(float(estimate.centre))


PRESET = replace(
    SKETCH, seeds=(1, 2, 3, 4, 5, 6), problems=300, texts=50, methods=("sar", "ties"), controls=(), caliper=0.03,
    arms=("rlvr", "rft", "sft", "sft-accuracy"),
)  # fmt: skip


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of a world in which averaging costs RLVR 15 points of 30 and SFT none, SAR is 10 above all, the Fisher
    matters, rounding does not, and one matched checkpoint is far off.
    """
    root = tmp_path_factory.mktemp("study")
    (root / "cells").mkdir()
    random = np.random.default_rng(0)
    ease = {domain: random.random(300) for domain in PRESET.tasks}

    def scores(level: float, domains: tuple[str, ...]) -> dict:
        found = {}
        for domain in domains:
            right = ease[domain] + random.normal(0, 0.03, 300) < level
            mass = np.clip(level - ease[domain][:50] + 0.5, 0, 1)
            found[PRESET.tasks[domain]] = {
                "greedy": "".join("01"[int(one)] for one in right), "samples": 4, "right": [int(4 * level)] * 40,
                "mass": mass.tolist(), "trace": [-1.0] * 50,
            }  # fmt: skip
        return found

    both = tuple(PRESET.tasks)
    by_name = {one.name: one for one in sets(PRESET)}
    for cell in study_cells(PRESET):
        note: dict = {}
        if cell.name == "measure-base":
            note = {"tasks": scores(0.3, both)}
        elif cell.name.startswith("measure-"):
            note = {"tasks": scores(0.6, both), "master": scores(0.5, both)}
        elif cell.kind == "match":
            off = 0.2 if cell.name == "match-code-4" else 0.01
            note = {"accuracy": 10, "norm": 20, "aim": {"greedy": 0.6, "norm": 1.0},
                    "seen": {"10": {"greedy": 0.6 + off, "norm": 1.0}, "20": {"greedy": 0.7, "norm": 1.0}}}  # fmt: skip
        elif cell.kind == "geometry":
            one = by_name[cell.name.removeprefix("geometry-")]
            support, cosine = (0.1, 0.02) if one.arm == "rlvr" else (0.3, 0.3)
            pair = {"cosine": cosine + 0.001 * one.seeds[0], "jaccard": 0.1, "conflict_overlap": 0.5}
            own = {
                "experts": {name: {"support": support + 0.001 * one.seeds[0]} for name in one.members},
                "pairs": [pair], "null": {"pairs": [{"cosine": 0.0, "jaccard": 0.05, "conflict_overlap": 0.5}]},
            }  # fmt: skip
            note = {"bf16": own, "fp32": own}
        elif cell.kind in ("merge", "half", "sampled"):
            one = by_name[cell.name.removeprefix("merge-").split("-fp32-")[0].split("-bf16-")[0]]
            level = 0.45 if one.arm == "rlvr" else 0.6
            level = 0.55 if cell.name.endswith(("sar", "F-delta2")) and one.arm == "rlvr" else level
            note = {"tasks": scores(level, one.domains)}
        (root / "cells" / f"{cell.name}.json").write_text(json.dumps({"cell": cell.name, "seconds": 1.0, **note}))
    return root


def test_a_made_up_world_comes_back(made_up: Path) -> None:
    found = hypotheses(Numbers(made_up, PRESET))
    said = found["words"]
    assert said["H1 in bf16"] == "holds"
    assert said["H2 fusion: |cosine| is below 0.1"] == "holds"
    assert said["H2 fusion: |cosine| is less than SFT's"] == "holds"
    assert said["H2 single: signs conflict more than by chance"] == "refuted"
    assert said["H3 fusion"] == said["H3 single"] == "holds"
    assert said["H4 fusion"] == said["H4 single"] == "holds"
    assert said["H5"] == "holds"
    assert said["H6 rounding"] in ("refuted", "open")
    mean = next(
        one for one in found["H3"] if (one["what"], one["merge"], one["metric"]) == ("fusion", "mean", "greedy")
    )
    assert mean["kept"]["rlvr"]["value"] == pytest.approx(0.5, abs=0.07)
    assert mean["kept"]["sft"]["value"] == pytest.approx(1.0, abs=0.07)
    assert (mean["kept"]["sft"]["sets"], mean["kept"]["sft-accuracy"]["sets"]) == (6, 5), "one is outside the caliper"
    assert mean["more"]["sft-accuracy"]["value"] == pytest.approx(0.5, abs=0.1)
