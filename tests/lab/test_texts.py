"""Texts known to be right: that they are, and their probabilities against the definition and against samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlmerge.demo.assets import DATA
from rlmerge.evaluate.tasks import load_task
from rlmerge.evaluate.verifiers import verify
from rlmerge.lab.measure import Measuring, measure
from rlmerge.lab.policy import Policy, read_policy
from rlmerge.lab.texts import TOGETHER, find_texts, likelihoods, read_texts, right_texts

BASE = DATA / "models" / "base" / "bf16"


@pytest.fixture(scope="module")
def base() -> Policy:
    return read_policy(BASE)


@pytest.fixture(scope="module")
def task():
    return load_task("math:0", "validation", 10)


@pytest.fixture(scope="module")
def texts(base: Policy, task) -> list[list[list[int]]]:
    return right_texts(base, task, 8, 16, 48)


def test_all_are_right_and_different(base: Policy, task, texts) -> None:
    assert len(texts) == 8
    assert max(map(len, texts)) > 1, "the base writes more than one right text"
    for problem, known in zip(task.problems, texts):
        assert 1 <= len({tuple(text) for text in known}) == len(known) <= TOGETHER
        written = [base.tokenizer.decode(text, skip_special_tokens=True).split("\n\n")[0] + "\n" for text in known]
        assert all(one.correct for one in verify(written, [problem] * len(known)))


def test_solutions_are_left_out_on_demand(base: Policy, task, texts) -> None:
    own = right_texts(base, task, 8, 16, 48, solutions=False)
    for problem, some, every in zip(task.problems, own, texts):
        assert {tuple(text) for text in every} <= {tuple(text) for text in some} | {
            tuple(base.encode(problem.completion))
        }
    assert [] in own, "the base has not solved all of them"
    assert len(likelihoods(base, task, own)[0]) == sum(map(bool, own))


def test_by_definition(base: Policy, task, texts) -> None:
    mass, trace = likelihoods(base, task, texts)
    for place in (0, 5):
        prompt = base.encode_prompt(task.problems[place].prompt)
        sums, means = [], []
        for text in texts[place]:
            with torch.no_grad():
                logits = base.model(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
            own = [logits[len(prompt) - 1 + at, token].item() for at, token in enumerate(text)]
            sums.append(np.sum(own))
            means.append(np.mean(own))
        assert mass[place] == pytest.approx(np.exp(sums).sum(), rel=1e-3)
        assert trace[place] == pytest.approx(np.mean(means), abs=1e-4)


def test_problems_that_are_read_together_get_what_each_gets_alone(base: Policy, task, texts, monkeypatch) -> None:
    some = [*texts[:4], [], *texts[5:]]
    together = likelihoods(base, task, some)
    monkeypatch.setattr("rlmerge.lab.texts.LOGITS", 1)
    alone = likelihoods(base, task, some)
    assert len(alone[0]) == 7
    for one, other in zip(together, alone):
        assert one == pytest.approx(other, rel=1e-4)


def test_it_bounds_the_share_of_right_samples(base: Policy, task, texts) -> None:
    found = measure(base, task, Measuring("validation", 10, samples=64, sampled=8, max_new_tokens=48), texts)
    sampled = np.array(found["right"]) / 64
    assert np.mean(found["mass"]) > 0.2 * sampled.mean(), "and is no empty bound"
    assert (np.array(found["mass"]) < sampled + 4 * np.sqrt(0.25 / 64)).all()


def test_written_and_read(tmp_path: Path, task) -> None:
    said = dict(find_texts(tmp_path, BASE, {"math:0": task}, 3, 4, 48))
    found = read_texts(tmp_path, ["math:0"])["math:0"]
    assert said["math:0"] == {"problems": 3, "texts": sum(map(len, found))}
    assert dict(find_texts(tmp_path, BASE, {"math:0": task}, 3, 4, 48)) == said
