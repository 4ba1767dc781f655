"""EleutherAI's harness in its own process, on a task that is a file: no hub is asked for anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.command_line import refused, rlmerge, succeeded
from tests.evaluate.test_run import write_model

pytest.importorskip("lm_eval")

from rlmerge.evaluate import lm_eval as module
from rlmerge.evaluate.results import Header, Results, ResultsError

TASK = """\
task: local_sums
dataset_path: json
dataset_kwargs:
  data_files: {test: sums.jsonl}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: plain, filter: [{function: take_first}]}
  - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_local_task(tmp_path: Path) -> None:
    """Scores, and a results file that says which samples were right: those whose answer is what the model says."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = write_model(tmp_path / "model", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = []
    for number, question in enumerate(("1 + 1 =", "2 + 2 =", "3 + 3 =")):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        said = tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]
        lines.append({"question": question, "answer": said if number < 2 else "another"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.yaml").write_text(TASK)
    out = tmp_path / "out"
    found = succeeded(
        rlmerge(
            "eval", folder, "--lm-eval", tmp_path / "task.yaml", "-o", out, "--batch", 2, "--role", "base", "--json"
        )
    ).json
    assert [entry["task"] for entry in found] == ["local_sums"]
    assert next(v for k, v in found[0]["scores"].items() if k.startswith("exact_match,")) == pytest.approx(2 / 3)
    written = json.loads((out / "lm-eval.json").read_text())
    assert written["results"]["local_sums"]
    results = Results.load(out / "lm-eval-local_sums-plain.jsonl")
    assert sorted(sample.correct for sample in results) == [False, True, True]
    assert (results.header.task, results.header.role) == ("lm-eval:local_sums:plain", "base")
    assert len(list(Results.load(out / "lm-eval-local_sums-lower.jsonl"))) == 3


def test_what_the_harness_cannot_do(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", 0)
    (tmp_path / "none.yaml").write_text("- 1\n")
    assert "no `task:`" in refused(rlmerge("eval", folder, "--lm-eval", tmp_path / "none.yaml", "-o", tmp_path / "out"))
    assert "merge first" in refused(rlmerge("eval", tmp_path / "r.yml", "--lm-eval", "x", "-o", tmp_path / "out"))
    assert "no config.json" in refused(rlmerge("eval", tmp_path, "--lm-eval", "x", "-o", tmp_path / "out"))
    assert "--samples means nothing" in refused(
        rlmerge("eval", folder, "--lm-eval", "x", "-o", tmp_path / "out", "--samples", 2)
    )


@pytest.mark.long  # the harness reads thousands of its own tasks first
def test_a_task_that_the_harness_does_not_know(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", 0)
    message = refused(rlmerge("eval", folder, "--lm-eval", "no_such_task", "-o", tmp_path / "out"))
    assert "failed on no_such_task: " in message
    assert "network" not in message


@pytest.mark.parametrize(
    ("task", "whole"),
    [
        ({"task": "sums", "dataset_path": "json"}, True),
        ({"task": "gsm8k", "num_fewshot": 0}, False),  # what lm-eval 0.4.9 takes for an override of its own task
        ({"task": "sums", "dataset_path": "json", "include": "other.yaml"}, False),
    ],
)
def test_its_own_tasks_are_left_alone_where_none_is_built_upon(task: dict, whole: bool) -> None:
    assert module._is_whole(task) == whole


def test_samples_without_a_verdict_make_no_results_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    header = Header("m", "t")
    assert not module.write_samples(path, header, [{"doc_id": 0, "acc": 0.5}, {"doc_id": 1, "acc": 1}])
    assert not module.write_samples(path, header, [{"doc_id": 0, "perplexity": 1}])
    assert not module.write_samples(path, header, [])
    assert not path.exists()
    for _ in range(2):
        assert module.write_samples(path, header, [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "acc": 0}])
        assert [sample.correct for sample in Results.load(path)] == [True, False]
    with pytest.raises(ResultsError, match="another run"):
        module.write_samples(path, Header("another", "t"), [{"doc_id": 0, "acc": 1.0}])


def test_what_json_has_no_word_for() -> None:
    import numpy as np

    given = {"a": np.float32(0.5), "b": float("nan"), "c": [np.bool_(True), np.int64(3)], "d": Path("x"), 1: None}
    assert module._plain(given) == {"a": 0.5, "b": None, "c": [True, 3], "d": "x", "1": None}
