"""A run that is interrupted ends as one that was not; folders appear whole and are nobody else's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.lab.smallest import SMALLEST, TASKS, smallest_policy

from rlmerge.evaluate.tasks import TaskError
from rlmerge.lab import runs
from rlmerge.lab.errors import LabError
from rlmerge.lab.optimizer import Rate
from rlmerge.lab.rlvr import Rlvr, rlvr
from rlmerge.lab.runs import Progress
from rlmerge.lab.supervised import (
    ColdStart,
    Pretraining,
    Rft,
    Sft,
    cold_start,
    pretrain,
    pupils_answer,
    read_samples,
    rft,
    sft,
)
from rlmerge.lab.text import batch_of, is_right

STEPS = 6
SFT = Sft("math:0", 1, steps=STEPS, batch=4, rate=Rate(1e-3, 2))
RLVR = Rlvr("math:0", 1, steps=STEPS, prompts=2, group=2, rate=Rate(1e-3, 2), max_new_tokens=8)


def make(kind: str, base: Path, out: Path, tell: Any = runs.silent) -> None:
    if kind == "pretrain":
        pretrain(out, Pretraining(TASKS, steps=STEPS, batch=4, shape=SMALLEST), tell)
    elif kind == "cold-start":
        cold_start(base, out, ColdStart(TASKS, steps=STEPS, batch=4), tell)
    elif kind == "sft":
        sft(base, out, SFT, tell)
    else:
        rlvr(base, out, RLVR, tell)


def lines_of(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines()


def test_a_cold_start_can_do_without_a_right_answer(base: Path, tmp_path: Path) -> None:
    settings = ColdStart(TASKS, steps=1)
    problems = [problem for task in TASKS for problem in batch_of(task, "tests", 0, 200)]
    right = [is_right(problem, pupils_answer(problem, settings)) for problem in problems]
    assert 0.3 < sum(right) / 400 < 0.7
    wrong = replace(settings, never_right=True)
    assert not any(is_right(problem, pupils_answer(problem, wrong)) for problem in problems)
    with pytest.raises(LabError, match="without slips"):
        cold_start(base, tmp_path / "none", replace(wrong, slip=0.0))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["pretrain", "cold-start", "sft", "rlvr"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    make(kind, base, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        make(kind, base, tmp_path / "cut", stop)
    assert not (tmp_path / "cut").exists()
    make(kind, base, tmp_path / "cut")
    for dtype in ("bf16", "fp32"):
        one, other = (tmp_path / name / dtype / "model.safetensors" for name in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines_of(out)]
        for out in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(STEPS))
    assert not list((tmp_path / "cut").glob("state*"))


@pytest.mark.parametrize("kind", ["sft", "rlvr"])
def test_a_run_keeps_the_models_of_some_steps(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of shorter runs, and a kill between a kept model and the next state leaves them so."""
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)

    def train(out: Path, steps: int, keep: tuple[int, ...], tell: Any = runs.silent) -> None:
        if kind == "sft":
            sft(base, out, replace(SFT, steps=steps, keep=keep), tell)
        else:
            rlvr(base, out, replace(RLVR, steps=steps, keep=keep), tell)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Interrupted

    for steps in (3, 4):
        train(tmp_path / f"short{steps}", steps, ())
    with pytest.raises(Interrupted):
        train(tmp_path / "long", STEPS, (3, 4), stop)
    train(tmp_path / "long", STEPS, (3, 4))
    assert sorted(file.name for file in (tmp_path / "long" / "steps").iterdir()) == ["3", "4"]
    for steps in (3, 4):
        for dtype in ("bf16", "fp32"):
            ours, theirs = (
                (tmp_path / name / dtype / "model.safetensors").read_bytes()
                for name in (f"long/steps/{steps}", f"short{steps}")
            )
            assert ours == theirs


def test_samples_of_the_first_steps_alone(tmp_path: Path) -> None:
    lines = [{"step": step, "prompt": [step], "completion": [9]} for step in (0, 1, 1, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_samples(tmp_path / "samples.jsonl", 2) == [([0], [9]), ([1], [9]), ([1], [9])]
    assert len(read_samples(tmp_path / "samples.jsonl")) == 4


def test_what_a_run_leaves(base: Path, tmp_path: Path) -> None:
    make("rlvr", base, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("bf16", "curve.svg", "fp32", "log.jsonl", "run.json", "samples.jsonl")
    ]
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().split("\n")[0])
    assert {"step", "reward", "kl", "entropy", "length", "lr", "loss", "seconds"} <= set(line)
    assert abs(line["kl"]) < 1e-4  # the first step is sampled from the base
    half, whole = (load_file(tmp_path / "out" / dtype / "model.safetensors") for dtype in ("bf16", "fp32"))
    assert all((whole[name].bfloat16() == half[name]).all() for name in half)


def test_a_finished_run_is_not_made_again_and_another_is_refused(base: Path, tmp_path: Path) -> None:
    sft(base, tmp_path / "out", SFT)
    stamp = (tmp_path / "out" / "bf16" / "model.safetensors").stat().st_mtime_ns
    sft(base, tmp_path / "out", SFT)
    assert (tmp_path / "out" / "bf16" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(LabError, match="another seed"):
        sft(base, tmp_path / "out", Sft("math:0", 2, steps=STEPS, batch=4, rate=Rate(1e-3, 2)))


@pytest.mark.parametrize("name", ["out", "out.unfinished"])
def test_a_folder_of_somebody_else_stays(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(LabError):
        sft(base, tmp_path / "out", SFT)
    assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def test_an_unfinished_run_of_other_settings_is_refused(base: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        sft(base, tmp_path / "out", SFT, stop)
    with pytest.raises(LabError, match="other settings"):
        sft(base, tmp_path / "out", Sft("code:0", 1, steps=STEPS, batch=4, rate=Rate(1e-3, 2)))


def test_rft_without_a_right_sample_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="nothing to learn from"):
        rft(base, tmp_path / "out", Rft("math:0", 1, steps=2, problems=4, group=2, max_new_tokens=4))


def test_rft_learns_from_a_file_of_samples(base: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"step": 0, "prompt": [5, 6], "completion": [7, 1]}) + "\n")
    rft(base, tmp_path / "out", Rft("math:0", 1, steps=20, batch=2, rate=Rate(1e-2, 1), samples=str(samples)))
    losses = [json.loads(line)["loss"] for line in lines_of(tmp_path / "out")]
    assert losses[-1] < losses[0] / 2
    samples.write_text("no JSON\n")
    with pytest.raises(LabError, match="cannot be read"):
        rft(base, tmp_path / "other", Rft("math:0", 1, steps=2, samples=str(samples)))


def test_a_model_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match=r"no config\.json"):
        sft(tmp_path / "empty", tmp_path / "out", SFT)


def test_progress_is_one_line() -> None:
    line = Progress(Path("code-1"), 40, 100, {"reward": 0.5}, 20.0, 20).line
    assert line == "code-1: step 40 of 100, reward 0.500, 1.00 s a step, 60 s left"


@pytest.mark.parametrize("place", ["write_curve", "write_inside", "rename"])
def test_a_kill_while_models_are_written_costs_no_step(
    place: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved before the end begins, and goes last."""
    sft(base, tmp_path / "whole", SFT)
    inside, rename = runs.write_inside, os.rename

    def die(*arguments: Any) -> None:
        if place != "write_inside" or b"made_by" in arguments[2]:
            raise Interrupted
        inside(*arguments)

    with monkeypatch.context() as patch:
        if place == "write_curve":
            patch.setattr("rlmerge.lab.curves.write_curve", die)
        elif place == "write_inside":
            patch.setattr(runs, "write_inside", die)
        else:
            patch.setattr(os, "rename", lambda a, b: die(a, b) if Path(a).name.endswith("unfinished") else rename(a, b))
        with pytest.raises(Interrupted):
            sft(base, tmp_path / "cut", SFT)
    told: list[int] = []
    sft(base, tmp_path / "cut", SFT, lambda progress: told.append(progress.step))
    assert told == []
    one, other = (tmp_path / name / "bf16" / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert len(lines_of(tmp_path / "cut")) == STEPS
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )


def test_a_wrong_task_leaves_nothing(base: Path, tmp_path: Path) -> None:
    for task in ("maths:0", "math:9", "gym:chain_sum", "humaneval"):
        with pytest.raises(TaskError):
            sft(base, tmp_path / "out", replace(SFT, task=task))
        with pytest.raises(TaskError):
            rlvr(base, tmp_path / "out", replace(RLVR, task=task))
    assert list(tmp_path.iterdir()) == []


def test_training_that_diverges_stops(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="diverged"):
        sft(base, tmp_path / "out", replace(SFT, rate=Rate(1e30, 1)))


def test_a_model_that_the_loop_does_not_know_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = smallest_policy()
    config = GPT2Config(
        vocab_size=len(made.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    made.tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LabError, match="type 'gpt2'"):
        rlvr(tmp_path / "gpt2", tmp_path / "out", RLVR)
    assert not list(tmp_path.glob("out*"))
