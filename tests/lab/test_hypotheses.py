"""Estimates and words of the study: against the definition, and by simulation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlmerge.evaluate.statistics import paired_difference
from rlmerge.lab.errors import LabError
from rlmerge.lab.hypotheses import INTEREST, Numbers, by_domain, hypotheses, in_both_parts, words
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
    assert all_of([row(0.0095), None]) == "open", "what is not known counts in Holm's adjustment"
    small, unknown = row(0.01, 0.002), row(0.03, 0.02)
    assert (small["verdict"], unknown["verdict"]) == ("holds, below interest", "open")
    assert all_of([small, unknown]) == "open", "nothing here says that one of them is not above 0"
    assert all_of([None, row(-0.05)]) == "refuted"
    assert all_of([]) == "open"


def test_refuting_one_of_eight_is_wrong_once_in_forty() -> None:
    """Where all eight are exactly of interest, and independent."""
    random, wrong = np.random.default_rng(3), 0
    for _ in range(150):
        rows = [as_row(paired_difference(random.normal(INTEREST, 0.3, 100)), INTEREST) for _ in range(8)]
        wrong += all_of(rows) == "refuted"
    assert wrong <= 9


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
    arms=("rlvr", "rft", "sft", "sft-accuracy", "sft-norm", "other"),
)  # fmt: skip


def level_of(cell: str, arm: str, seeds: tuple[int, ...], domain: str) -> float:
    """The share of right answers in the made-up world: averaging costs RLVR half of its gain and SFT nothing, SAR is
    above all, the Fisher matters, rounding costs 4 points. Every seed and domain is different.
    """
    other = 0.01 * seeds[0] + (0.03 if domain == "code" else 0.0)
    if cell.startswith("measure-"):
        return 0.6 + other if f"-{domain}-" in cell else 0.35 + other
    if arm == "other":
        return 0.35 + other
    if arm != "rlvr":
        return 0.6 + other
    if cell.endswith(("fp32-sar", "F-delta2")) or "-agree-" in cell:
        return 0.55 + other
    return (0.41 if cell.endswith("bf16-mean") else 0.45) + other


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of that world, in which one checkpoint matched by accuracy is far off."""
    root = tmp_path_factory.mktemp("study")
    (root / "cells").mkdir()
    random = np.random.default_rng(0)
    ease = {domain: (random.permutation(300) + 0.5) / 300 for domain in PRESET.tasks}

    def scores(level: dict[str, float]) -> dict:
        found = {}
        for domain, one in level.items():
            right = ease[domain] + random.normal(0, 0.02, 300) < one
            mass = np.clip(one - ease[domain][:50] + 0.5, 0, 1)
            found[PRESET.tasks[domain]] = {
                "problems": domain, "greedy": "".join("01"[int(one)] for one in right), "samples": 4,
                "right": (4 * right).tolist(), "mass": mass.tolist(), "trace": [-1.0] * 50,
            }  # fmt: skip
        return found

    by_name = {one.name: one for one in sets(PRESET)}
    for cell in study_cells(PRESET):
        note: dict = {}
        if cell.name == "measure-base":
            note = {"tasks": scores(dict.fromkeys(PRESET.tasks, 0.3))}
        elif cell.name == "measure-cold-other":
            note = {"tasks": scores(dict.fromkeys(PRESET.tasks, 0.1))}
        elif cell.name.startswith("measure-"):
            seed = int(cell.name.rsplit("-", 1)[1])
            note = {"tasks": scores({domain: level_of(cell.name, "", (seed,), domain) for domain in PRESET.tasks}),
                    "master": scores(dict.fromkeys(PRESET.tasks, 0.5))}  # fmt: skip
        elif cell.kind == "match":
            off = 0.2 if cell.name == "match-code-4" else 0.01
            note = {"accuracy": 10, "norm": 20, "aim": {"greedy": 0.6, "norm": 1.0},
                    "seen": {"10": {"greedy": 0.6 + off, "norm": 1.0}, "20": {"greedy": 0.7, "norm": 1.0}}}  # fmt: skip
        elif cell.kind == "geometry":
            one = by_name[cell.name.removeprefix("geometry-")]
            support, cosine = (0.1, 0.02) if one.arm == "rlvr" else (0.3, 0.3)
            support = 0.02 if one.arm == "sft-accuracy" else support
            pair = {"cosine": cosine + 0.001 * one.seeds[0], "jaccard": 0.1, "conflict_overlap": 0.5}
            own = {
                "experts": {name: {"support": support + 0.001 * one.seeds[0]} for name in one.members},
                "pairs": [pair], "null": {"pairs": [{"cosine": 0.0, "jaccard": 0.05, "conflict_overlap": 0.5}]},
            }  # fmt: skip
            note = {"bf16": own, "fp32": own}
        elif cell.kind in ("merge", "half"):
            one = by_name[cell.name.removeprefix("merge-").split("-fp32-")[0].split("-bf16-")[0]]
            note = {
                "tasks": scores({domain: level_of(cell.name, one.arm, one.seeds, domain) for domain in one.domains})
            }
        (root / "cells" / f"{cell.name}.json").write_text(json.dumps({"cell": cell.name, "seconds": 1.0, **note}))
    return root


def test_a_made_up_world_comes_back(made_up: Path) -> None:
    found = hypotheses(Numbers(made_up, PRESET))
    said = found["words"]
    assert said["H1 in bf16"] == "holds", "an early checkpoint is sparser, and not asked"
    assert said["H2 fusion: |cosine| is below 0.1"] == "holds"
    assert said["H2 fusion: |cosine| is less than SFT's"] == "holds"
    assert said["H2 single: signs conflict more than by chance"] == "refuted"
    assert said["H3 fusion, greedy"] == said["H3 fusion, sampled"] == "holds"
    assert said["H3 single, greedy"] == "open", "three sets are too few"
    assert said["H4 fusion, greedy"] == said["H4 fusion, sampled"] == "holds"
    assert said["H4 single, greedy"] == "refuted", "each of the two experts is better than their merge"
    assert said["H5, greedy"] == said["H6 rounding, sampled"] == said["H6 conflict, greedy"] == "holds"
    assert said["H6 dilution, greedy"] in ("open", "refuted")
    key = ("fusion", "mean", "greedy")
    mean = next(one for one in found["H3"] if (one["what"], one["merge"], one["metric"]) == key)
    assert mean["kept"]["rlvr"]["value"] == pytest.approx(0.19 / 0.34, abs=0.05)
    assert mean["kept"]["sft"]["value"] == pytest.approx(1.0, abs=0.05)
    assert mean["kept"]["other"]["value"] == pytest.approx(0.30 / 0.55, abs=0.05), "of its own base"
    assert found["words"] == words(json.loads(json.dumps(found)), PRESET)
    assert (mean["kept"]["sft"]["sets"], mean["kept"]["sft-accuracy"]["sets"]) == (6, 5), "one is outside the caliper"
    assert mean["more"]["sft-accuracy"]["value"] == pytest.approx(1 - 0.19 / 0.34, abs=0.08)
    alone = found["H4"][0]["less"]["math expert alone"]
    assert alone["value"] == pytest.approx(0.55 - (0.6 + 0.35) / 2, abs=0.03)


def test_an_arm_without_sets_leaves_its_claim_open(made_up: Path, tmp_path: Path) -> None:
    shutil.copytree(made_up, tmp_path / "root")
    for file in (tmp_path / "root" / "cells").glob("match-*"):
        match = json.loads(file.read_text())
        file.write_text(json.dumps({**match, "aim": {"greedy": 0.1, "norm": 9.0}}))
    said = hypotheses(Numbers(tmp_path / "root", PRESET))["words"]
    assert said["H3 fusion, greedy"] == said["H1 in bf16"] == "open"


def test_part_2_has_fewer_arms_and_can_contradict(made_up: Path) -> None:
    second = replace(PRESET, arms=("rlvr", "sft"), situations=("fusion",), ablations=False)
    found, numbers = hypotheses(Numbers(made_up, PRESET)), hypotheses(Numbers(made_up, second))
    assert set(numbers) == {"H1", "H2", "H3", "H4", "words"}
    assert numbers["words"]["H1 in bf16 (sft alone)"] == "holds"
    assert not [claim for claim in numbers["words"] if "single" in claim]
    presets = (PRESET, second)
    assert set(in_both_parts(found, numbers, presets).values()) == {"holds"}
    worse = json.loads(json.dumps(numbers))
    worse["H4"][0]["less"]["ties"] |= {"value": -0.05, "low": -0.08, "high": -0.02}
    assert in_both_parts(found, worse, presets) == {
        "H3 fusion, greedy": "holds", "H4 fusion, greedy": "contradicted",
        "H3 fusion, sampled": "holds", "H4 fusion, sampled": "holds",
    }  # fmt: skip


def test_another_machine_is_an_error(made_up: Path, tmp_path: Path) -> None:
    shutil.copytree(made_up, tmp_path / "root")
    file = tmp_path / "root" / "cells" / "merge-fusion.rlvr.1-fp32-sar.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "arithmetic": "bf16"}))
    with pytest.raises(LabError, match="another base"):
        hypotheses(Numbers(tmp_path / "root", PRESET))


def test_rows_are_seeds_and_columns_both_domains(made_up: Path) -> None:
    numbers = Numbers(made_up, PRESET)
    table = numbers.merged("fusion", "rlvr", "sar", "fp32", "greedy")
    assert table.shape == (6, 600)
    for place, seed in enumerate(PRESET.seeds):
        for part, domain in ((table[place, :300], "math"), (table[place, 300:], "code")):
            assert part.mean() == pytest.approx(level_of("merge-x-fp32-sar", "rlvr", (seed,), domain), abs=0.04)
    single = numbers.singles("fusion", "rlvr", "greedy")
    assert single[5, :300].mean() - single[0, :300].mean() == pytest.approx(0.05, abs=0.02)
    both = numbers.merged("single", "sft", "mean", "fp32", "greedy")
    assert both.shape == (3, 600)
    for place, seed in enumerate((1, 3, 5)):
        assert both[place, :300].mean() == pytest.approx(0.6 + 0.01 * seed, abs=0.04)
    assert len(numbers.merged("fusion", "sft-accuracy", "mean", "fp32", "greedy")) == 5


def test_domains_are_shown_apart(made_up: Path) -> None:
    def greedy(cell: str, domain: str) -> np.ndarray:
        tasks = json.loads((made_up / "cells" / f"{cell}.json").read_text())["tasks"]
        return np.array([int(one) for one in tasks[PRESET.tasks[domain]]["greedy"]])

    rows = {(one["arm"], one["merge"], one["metric"]): one for one in by_domain(Numbers(made_up, PRESET))}
    assert {("rlvr", "sar", "sampled"), ("sft", "ties", "greedy"), ("other", "mean", "greedy")} <= set(rows)
    assert ("sft", "sar", "greedy") not in rows, "SFT's are merged by the plain methods alone"
    for domain in PRESET.tasks:
        less = [
            greedy(f"merge-fusion.rlvr.{seed}-fp32-mean", domain) - greedy(f"measure-rlvr-{domain}-{seed}", domain)
            for seed in PRESET.seeds
        ]
        assert rows["rlvr", "mean", "greedy"][domain]["value"] == pytest.approx(np.mean(less), abs=1e-12)


def test_other_problems_are_an_error(made_up: Path, tmp_path: Path) -> None:
    shutil.copytree(made_up, tmp_path / "root")
    file = tmp_path / "root" / "cells" / "merge-fusion.rlvr.1-fp32-sar.json"
    file.write_text(file.read_text().replace('"problems": "math"', '"problems": "others"'))
    with pytest.raises(LabError, match="other problems of math"):
        hypotheses(Numbers(tmp_path / "root", PRESET))
