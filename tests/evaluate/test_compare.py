"""Comparisons of small results files against numbers by hand, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlmerge.evaluate import statistics
from rlmerge.evaluate.compare import compare
from rlmerge.evaluate.results import Header, ResultsError, ResultsWriter, Sample

Right = Sequence[Sequence[int]]


def results(path: Path, label: str, right: Right | Any, task: str = "math", **header: Any) -> str:
    """A results file: right[problem][sample]."""
    settings = header.pop("settings", {"temperature": 0.7})
    with ResultsWriter.open(path, Header(label, task, settings, **header)) as writer:
        for problem, samples in enumerate(right):
            for number, one in enumerate(np.atleast_1d(samples)):
                writer.append(Sample(f"p{problem:04d}", number, bool(one)))
    return str(path)


@pytest.fixture
def trio(tmp_path: Path) -> list[str]:
    """100 problems, one sample: base 20 right, expert 60, merged 50: 45 of the expert's and 5 others."""
    base, expert, merged = np.arange(100) < 20, np.arange(100) < 60, (np.arange(100) + 5) % 100 < 50
    return [
        results(tmp_path / f"{name}.jsonl", name, right, role=name)
        for name, right in (("base", base), ("expert", expert), ("merged", merged))
    ]


def test_one_sample_by_hand(trio: list[str]):
    (task,) = compare(trio).tasks
    assert (task.task, task.problems, task.samples) == ("math", 100, (1, 1))
    assert (task.base, task.reference, task.experts) == ("base", "base", ("expert",))
    base, expert, merged = task.models
    assert [model.accuracy.value for model in task.models] == [0.2, 0.6, 0.5]
    assert (base.accuracy.low, base.accuracy.high) == pytest.approx([*map(float, statistics.wilson(0.2, 100))])
    assert base.difference is None
    assert base.retention == expert.retention == ()
    change = merged.difference
    assert change is not None
    assert change.interval.value == pytest.approx(0.3)
    assert change.right_to_wrong == ()
    assert change.wrong_to_right == (*(f"p{i:04d}" for i in range(20, 45)), *(f"p{i:04d}" for i in range(95, 100)))
    assert change.test == "McNemar mid-p"
    assert (change.p_exact, change.p) == pytest.approx(statistics.mcnemar(0, 30))
    assert change.p_holm == pytest.approx(change.p)  # the larger of two; the other doubles
    assert expert.difference is not None
    assert expert.difference.p_holm == pytest.approx(2 * expert.difference.p)
    low, high = change.bootstrap
    assert 0.15 < low < 0.3 < high < 0.45
    (kept,) = merged.retention
    assert kept.expert == "expert"
    assert kept.expert_gain.value == pytest.approx(0.4)
    assert kept.gain_retention is not None
    assert kept.plain is not None
    assert kept.gain_retention.value == pytest.approx(0.75)
    assert kept.plain.value == pytest.approx(5 / 6)


def test_a_small_gain_shows_no_gain_retention(tmp_path: Path):
    rights = {"base": np.arange(100) < 50, "expert": np.arange(100) < 60, "merged": np.arange(100) < 55}
    files = [results(tmp_path / name, name, right, role=name) for name, right in rights.items()]
    kept = compare(files).tasks[0].models[2].retention[0]
    assert kept.expert_gain.error is not None
    assert kept.expert_gain.value < 4 * kept.expert_gain.error
    assert kept.gain_retention is None
    assert kept.plain is not None
    assert kept.plain.value == pytest.approx(55 / 60)


def test_a_gain_just_above_the_gate_is_shown_with_a_note(tmp_path: Path):
    rights = {"base": np.arange(100) < 50, "expert": np.arange(100) < 67, "merged": np.arange(100) < 60}
    files = [results(tmp_path / name, name, right, role=name) for name, right in rights.items()]
    (task,) = compare(files).tasks
    assert task.models[2].retention[0].gain_retention is not None
    assert any("only just above 4 standard errors" in note for note in task.notes)


def test_flags_say_what_headers_do_not(tmp_path: Path, trio: list[str]):
    plain = [results(tmp_path / f"x{i}", f"m{i}", np.arange(100) % (i + 2) == 0) for i in range(3)]
    (task,) = compare(plain).tasks
    assert (task.base, task.reference, task.experts) == (None, "m0", ())
    (task,) = compare(plain, base="m1", experts=[plain[0]], reference=plain[2]).tasks
    assert (task.base, task.reference, task.experts) == ("m1", "m2", ("m0",))
    (task,) = compare(plain[1:], base=plain[0]).tasks  # --base adds the file
    assert {model.label for model in task.models} == {"m0", "m1", "m2"}
    with pytest.raises(ResultsError, match="m9: is neither a results file nor one of the models: m0, m1, m2"):
        compare(plain, base="m9")


def test_tasks_are_apart(tmp_path: Path, trio: list[str]):
    code = [results(tmp_path / f"c{name}", name, np.arange(7) < 3, "code", role=name) for name in ("base", "merged")]
    found = compare([*trio, *code])
    assert [task.task for task in found.tasks] == ["code", "math"]
    assert found.tasks[0].experts == ()
    assert any("only 0 problems differ" in note for note in found.tasks[0].notes)
    assert json.loads(json.dumps(found.as_dict()))["tasks"][1]["models"][0]["label"] == "base"


def test_order_of_files_changes_no_number(trio: list[str]):
    one, other = compare(trio, reference="base"), compare(trio[::-1], reference="base")
    key = lambda comparison: {model.label: model for model in comparison.tasks[0].models}  # noqa: E731
    assert key(one) == key(other)


def test_samples_are_pooled_by_problem(tmp_path: Path):
    rng = np.random.default_rng(0)
    first, second = rng.random((60, 4)) < 0.3, rng.random((60, 4)) < 0.6
    files = [results(tmp_path / "a", "a", first), results(tmp_path / "b", "b", second)]
    a, b = compare(files).tasks[0].models
    assert a.accuracy.value == pytest.approx(first.mean())
    assert set(a.pass_at) == {1, 2, 4}
    assert a.pass_at[4].value == pytest.approx(first.any(1).mean())
    assert b.difference is not None
    assert (b.difference.test, b.difference.p_exact) == ("paired t", None)
    whole = statistics.paired_difference(second.mean(1) - first.mean(1))
    assert (b.difference.interval.low, b.difference.p) == pytest.approx((float(whole.low), statistics.p_value(whole)))
    lost = np.flatnonzero((first.sum(1) > 2) & (second.sum(1) < 2))
    assert b.difference.right_to_wrong == tuple(f"p{i:04d}" for i in lost)


def seeded(folder: Path, label: str, seeds: Sequence[int], chance: float, **header: Any) -> list[str]:
    rng = np.random.default_rng(seeds)
    return [
        results(
            folder / f"{label}{seed}", f"runs/{label}-{seed}", rng.random(50) < chance, name=label, seed=seed, **header
        )
        for seed in seeds
    ]


def test_seeds_are_one_row(tmp_path: Path):
    base = results(tmp_path / "base", "base", np.arange(50) < 10, role="base")
    expert = seeded(tmp_path, "expert", (1, 2, 3), 0.8, role="expert")
    sar = seeded(tmp_path, "sar", (3, 1, 2), 0.7)
    (task,) = compare([base, *expert, *sar]).tasks
    assert [(model.label, model.seeds) for model in task.models] == [
        ("base", ()), ("expert", (1, 2, 3)), ("sar", (1, 2, 3))
    ]  # fmt: skip
    difference = task.models[2].difference
    assert difference is not None
    assert (difference.test, difference.p_exact) == ("crossed t", None)
    assert task.models[2].retention[0].gain_retention is not None
    assert any("3 seeds say little about seeds" in note for note in task.notes)
    with pytest.raises(ResultsError, match=r"expert has seeds \[1, 2\], sar \[1, 2, 3\]"):
        compare([*expert[:2], *sar], reference="expert")
    twin = seeded(tmp_path / "twin", "sar", (1,), 0.5)
    with pytest.raises(ResultsError, match="both are 'sar' on 'math' with seed 1"):
        compare([*sar, *twin])


def test_other_problems_are_refused_even_by_force(tmp_path: Path):
    files = [results(tmp_path / "a", "a", np.ones(5)), results(tmp_path / "b", "b", np.ones(7))]
    with pytest.raises(ResultsError, match=r"same problems, but 2 only in .*b: p0005, p0006\."):
        compare(files, force=True)


@pytest.mark.parametrize(
    ("right", "header", "message"),
    [
        (np.ones(5), {"settings": {"temperature": 1.0}}, r"settings.temperature: 0.7 \(.*a\), 1.0 \(.*b\)"),
        (np.ones(5), {"settings": {}}, "settings.temperature: 0.7 .*, nothing"),
        (np.ones((5, 2)), {}, "samples a problem: 1 .*, 2 "),
        (np.ones(5), {"problems": 9}, "unfinished, 5 of 9 problems"),
        ([[1], [1], [1], [1], [1, 0]], {}, "1 to 2 samples a problem"),
    ],
)
def test_what_was_not_made_alike_needs_force(tmp_path: Path, right: Any, header: dict[str, Any], message: str):
    files = [results(tmp_path / "a", "a", np.ones(5)), results(tmp_path / "b", "b", right, **header)]
    with pytest.raises(ResultsError, match=message):
        compare(files)
    (task,) = compare(files, force=True).tasks
    assert any(note.startswith("compared by force: ") for note in task.notes)


def test_another_sampling_seed_is_no_other_setting(tmp_path: Path):
    files = [results(tmp_path / str(i), f"m{i}", np.arange(50) < 25, settings={"seed": i}) for i in range(2)]
    assert len(compare(files).tasks[0].models) == 2


def test_two_bases_need_a_choice(tmp_path: Path):
    files = [results(tmp_path / str(i), f"m{i}", np.arange(50) < 25, role="base") for i in range(2)]
    with pytest.raises(ResultsError, match="m0 and m1 both say that they are the base"):
        compare(files)
    assert compare(files, base="m1").tasks[0].base == "m1"
