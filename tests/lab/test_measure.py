"""Measuring a model: against what evaluation says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlmerge.demo.assets import DATA
from rlmerge.evaluate.backend import Sampling
from rlmerge.evaluate.results import scores
from rlmerge.evaluate.run import TransformersBackend, evaluate
from rlmerge.evaluate.tasks import load_task
from rlmerge.lab.measure import FEW, Measured, Measuring, half_of, measure, measured, scores_of
from rlmerge.lab.policy import Policy, read_policy


@pytest.fixture(scope="module")
def base() -> Policy:
    """The demo's base, which gets about half of the problems right."""
    return read_policy(DATA / "models" / "base" / "bf16")


@pytest.fixture(scope="module")
def task():
    return load_task("math:0", "test", 40)


HOW = Measuring("test", 40, samples=3, max_new_tokens=48, batch=60)


@pytest.fixture(scope="module")
def found(base: Policy, task) -> Measured:
    return measure(base, task, HOW, texts(base, task))


def texts(base: Policy, task) -> list[list[list[int]]]:
    """The solutions of the first six problems."""
    return [[base.encode(problem.completion)] for problem in task.problems[:6]]


def test_it_is_what_evaluation_says(base: Policy, task, found: Measured, tmp_path: Path) -> None:
    backend = TransformersBackend(base.model, base.tokenizer, batch=60)
    greedy = scores(evaluate(backend, task, tmp_path / "g.jsonl", label="base", sampling=Sampling(0.0, 48)))
    sampled = scores(evaluate(backend, task, tmp_path / "s.jsonl", label="base", samples=3, sampling=Sampling(1.0, 48)))
    by_id = {name: (one, several) for name, one, several in zip(greedy.ids, greedy.c, sampled.c, strict=True)}
    own = zip(map(int, found["greedy"]), found["right"], strict=True)
    assert list(own) == [by_id[problem.id] for problem in task.problems]
    assert 0 < found["greedy"].count("1") < 40
    assert 5 < found["tokens"] < 48


def test_the_same_again(base: Policy, task, found: Measured) -> None:
    model = DATA / "models" / "base" / "bf16"
    assert measured(model, HOW, ["math:0"], {"math:0": texts(base, task)}) == {"math:0": found}
    assert measure(base, task, replace(HOW, samples=0))["right"] == []


def test_the_first_problems_alone_are_sampled(base: Policy, task, found: Measured) -> None:
    some = measure(base, task, replace(HOW, sampled=10))
    assert some["right"] == found["right"][:10]
    assert (some["greedy"], some["mass"], some["trace"]) == (found["greedy"], [], [])


def test_few_problems_are_asked_often(base: Policy, task, found: Measured) -> None:
    some = measure(base, task, replace(HOW, samples=7, sampled=10, deep=3))
    assert some["drawn"] == [7] * 3 + [FEW] * 7
    often = measure(base, task, replace(HOW, samples=7, sampled=3))
    assert some["right"][:3] == often["right"]
    rest = measure(base, task, replace(HOW, samples=FEW, sampled=10))
    assert some["right"][3:] == rest["right"][3:]
    assert scores_of([some], "sampled")[0].tolist() == [
        count / of for count, of in zip(some["right"], [7] * 3 + [FEW] * 7, strict=True)
    ]
    assert scores_of([some, found | {"right": found["right"][:10], "drawn": []}], "sampled").shape == (2, 10)


def test_halves_share_no_problem() -> None:
    halves = {half: Measuring("test", 50, seed=7, half=half).task("math:1") for half in "AB"}
    forms = {half: {one.canonical for one in task.problems} for half, task in halves.items()}
    assert [len(forms[half]) for half in "AB"] == [50, 50]
    assert not forms["A"] & forms["B"]
    assert all(half_of(form) == half for half in "AB" for form in forms[half])
    assert halves["A"].settings["problems"] != halves["B"].settings["problems"]
    other = Measuring("test", 50, seed=8, half="A").task("math:1").problems
    assert {one.canonical for one in other} != forms["A"]


def test_tables(found: Measured) -> None:
    assert scores_of([found, found], "greedy").shape == (2, 40)
    assert scores_of([found], "sampled")[0].tolist() == [count / 3 for count in found["right"]]
    assert scores_of([found], "trace")[0].tolist() == found["trace"]
    assert scores_of([found], "mass")[0].tolist() == found["mass"]
    assert len(found["mass"]) == len(found["trace"]) == 6
