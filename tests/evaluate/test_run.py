"""Evaluation end to end on a tiny model: prompts, samples, verdicts, files; continued, from memory, by command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command_line import refused, rlmerge, succeeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from rlmerge.errors import NonFiniteError  # noqa: E402
from rlmerge.evaluate import run as module  # noqa: E402
from rlmerge.evaluate.backend import Sampling  # noqa: E402
from rlmerge.evaluate.results import Results, ResultsError  # noqa: E402
from rlmerge.evaluate.run import EvaluationError, TransformersBackend, evaluate, load_model, prompt_ids  # noqa: E402
from rlmerge.evaluate.tasks import load_task  # noqa: E402

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789+-*/=:.,()[]<>'\"_ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def write_model(folder: Path, seed: int, scale: float = 0.3) -> Path:
    """A tiny Llama over characters, with its tokenizer and a chat template."""
    vocabulary = {"<pad>": 0, "</s>": 1, **{c: n + 2 for n, c in enumerate(CHARACTERS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, bos_token_id=None, initializer_range=scale,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base", 0)


@pytest.fixture
def task(tmp_path: Path, folder: Path) -> Any:
    """Four problems of which the model answers the first two: their answers are what it says."""
    model, tokenizer = load_model(folder)
    lines = []
    for number, prompt in enumerate(("one", "two", "three + 3", "four")):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        lines.append({"id": str(number), "prompt": prompt, "answer": said if number < 2 else "no", "verifier": "same"})
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(line | {"verifier": "exact"}) + "\n" for line in lines))
    return load_task(str(file))


def rows(path: Path) -> dict[tuple[str, int], tuple[bool, str, int]]:
    return {(s.id, s.sample): (s.correct, s.completion, s.tokens) for s in Results.load(path)}


def test_one_line_a_sample(tmp_path: Path, folder: Path, task: Any) -> None:
    heard: list[tuple[int, int, int]] = []
    results = evaluate(
        TransformersBackend(*load_model(folder)), task, tmp_path / "r.jsonl", label="base",
        sampling=Sampling(max_new_tokens=5), progress=lambda *now: heard.append(now), name="b", role="base",
        model_seed=3,
    )  # fmt: skip
    found = rows(results.path)
    assert len(found) == 4
    header = results.header
    assert (header.name, header.role, header.seed, header.problems) == ("b", "base", 3, 4)
    assert header.settings["backend"] == {"kind": "transformers", "dtype": "float32"}
    assert heard[-1] == (4, 4, sum(tokens for _, _, tokens in found.values()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interrupted_runs_end_alike(tmp_path: Path, folder: Path, task: Any, temperature: float, monkeypatch) -> None:
    """Whatever batch, and wherever it was cut off: the same samples, none made twice."""
    backend = TransformersBackend(*load_model(folder), batch=3)
    options: dict[str, Any] = {"label": "m", "samples": 3 if temperature else 1, "seed": 4}
    options["sampling"] = Sampling(temperature, 7)
    whole = evaluate(backend, task, tmp_path / "whole.jsonl", **options)
    monkeypatch.setattr(module, "BATCH_OF_VERDICTS", 1)

    class Cut(Exception):
        pass

    def stop(done: int, total: int, tokens: int) -> None:
        if done == 2:
            raise Cut

    with pytest.raises(Cut):
        evaluate(
            TransformersBackend(*load_model(folder), batch=1), task, tmp_path / "cut.jsonl", progress=stop, **options
        )
    assert len(rows(tmp_path / "cut.jsonl")) == 2
    evaluate(TransformersBackend(*load_model(folder), batch=8), task, tmp_path / "cut.jsonl", **options)
    assert rows(tmp_path / "cut.jsonl") == rows(whole.path)
    with pytest.raises(ResultsError, match="another run"):
        evaluate(backend, task, tmp_path / "cut.jsonl", **(options | {"seed": 5}))


def test_a_finished_run_makes_nothing(tmp_path: Path, folder: Path, task: Any) -> None:
    class Never:
        def __init__(self, like: TransformersBackend) -> None:
            self.settings, self.identity = like.settings, like.identity

        def run(self, asked: Any, sampling: Sampling) -> Any:
            raise AssertionError("everything was there")

    options: dict[str, Any] = {"label": "m", "sampling": Sampling(max_new_tokens=5)}
    backend = TransformersBackend(*load_model(folder))
    first = evaluate(backend, task, tmp_path / "r.jsonl", **options)
    before = first.path.read_bytes()
    evaluate(Never(backend), task, tmp_path / "r.jsonl", **options)
    assert first.path.read_bytes() == before


def test_a_recipe_is_merged_in_memory(tmp_path: Path, folder: Path, task: Any) -> None:
    """The same answers as those of the merged folder, and nothing is written but results."""
    write_model(tmp_path / "expert", 1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {folder}\ndtype: float32\nmodels:\n"
        f"  - {{model: {folder}, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {tmp_path}/expert, parameters: {{weight: 0.5}}}}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    model, tokenizer = load_model(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    succeeded(rlmerge("merge", recipe, tmp_path / "merged", "--quiet"))
    from_folder, _ = load_model(tmp_path / "merged")
    for one, other in zip(model.state_dict().values(), from_folder.state_dict().values()):
        assert torch.equal(one, other)
    assert prompt_ids(tokenizer, task.problems[0])


def test_chats_get_the_template(folder: Path, tmp_path: Path) -> None:
    _, tokenizer = load_model(folder)
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}], "answer": "a", "verifier": "exact"}\n')
    problem = load_task(str(file)).problems[0]
    assert tokenizer.decode(prompt_ids(tokenizer, problem)).replace(" ", "") == "<user>hi\n"


def test_what_cannot_be_evaluated(tmp_path: Path, folder: Path, task: Any) -> None:
    backend = TransformersBackend(*load_model(folder))
    with pytest.raises(EvaluationError, match="all alike"):
        evaluate(backend, task, tmp_path / "r.jsonl", label="m", samples=2)
    (tmp_path / "open.jsonl").write_text('{"prompt": "Tell me a story."}\n')
    with pytest.raises(EvaluationError, match="verifier"):
        evaluate(backend, load_task(str(tmp_path / "open.jsonl")), tmp_path / "r.jsonl", label="m")
    with pytest.raises(EvaluationError, match="no such model folder"):
        load_model(tmp_path / "nothing")
    for sampling, word in ((Sampling(-1.0), "temperature"), (Sampling(float("nan")), "temperature"),
                           (Sampling(1.0, top_p=0.0), "top-p")):  # fmt: skip
        with pytest.raises(EvaluationError, match=word):
            evaluate(backend, task, tmp_path / "r.jsonl", label="m", sampling=sampling)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 600, "answer": "a", "verifier": "exact"}) + "\n")
    with pytest.raises(EvaluationError, match="600 tokens"):
        evaluate(backend, load_task(str(tmp_path / "long.jsonl")), tmp_path / "r2.jsonl", label="m")
    for meta in ({"stop": "x"}, {"stop": [5]}, {"stop": None}, {"end": 5}):
        line = {"prompt": "a", "answer": "a", "verifier": "exact", "meta": meta}
        (tmp_path / "stop.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(EvaluationError, match="list of strings"):
            evaluate(backend, load_task(str(tmp_path / "stop.jsonl")), tmp_path / "r3.jsonl", label="m")


def test_damaged_models(tmp_path: Path, folder: Path, task: Any) -> None:
    """A tensor is missing, a file is cut short, the weights are no numbers: errors, and no scores of random weights."""
    from safetensors.torch import load_file, save_file

    for name, damage in (("missing", "up_proj"), ("nan", "lm_head")):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        weights = load_file(copy / "model.safetensors")
        for key in [key for key in weights if damage in key]:
            weights[key] = weights[key] * float("nan")
            if name == "missing":
                del weights[key]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="random numbers"):
        load_model(tmp_path / "missing")
    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate(TransformersBackend(*load_model(tmp_path / "nan")), task, tmp_path / "r.jsonl", label="m")
    (tmp_path / "nan" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(EvaluationError, match="cannot load"):
        load_model(tmp_path / "nan")


def test_another_model_does_not_continue_a_file(tmp_path: Path, folder: Path, task: Any) -> None:
    """The path is the same, the weights are not: as when a recipe was edited."""
    options: dict[str, Any] = {"label": "recipe.yml", "sampling": Sampling(max_new_tokens=4)}
    evaluate(TransformersBackend(*load_model(folder)), task, tmp_path / "r.jsonl", **options)
    other = load_model(write_model(tmp_path / "other", 7))
    with pytest.raises(ResultsError, match="identity"):
        evaluate(TransformersBackend(*other), task, tmp_path / "r.jsonl", **options)


def test_what_was_made_before_a_failure_is_kept(tmp_path: Path, folder: Path, task: Any) -> None:
    class Failing(TransformersBackend):
        def run(self, asked: Any, sampling: Sampling) -> Any:
            for number, made in enumerate(super().run(asked, sampling)):
                if number == 3:
                    raise KeyboardInterrupt
                yield made

    options: dict[str, Any] = {"label": "m", "sampling": Sampling(max_new_tokens=4)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Failing(*load_model(folder)), task, tmp_path / "r.jsonl", **options)
    assert len(rows(tmp_path / "r.jsonl")) == 3


def test_each_problem_has_its_own_stops(tmp_path: Path, folder: Path) -> None:
    """A stop string of one problem does not cut the answers of another."""
    model, tokenizer = load_model(folder)
    ids = torch.tensor([tokenizer("one")["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    said = tokenizer.decode(made[0, ids.shape[1] :])
    file = tmp_path / "p.jsonl"
    lines = [
        {"id": "free", "prompt": "one", "answer": "x", "verifier": "exact"},
        {"id": "cut", "prompt": "one", "answer": "x", "verifier": "exact", "meta": {"stop": [said[2]]}},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = Sampling(max_new_tokens=6)
    evaluate(
        TransformersBackend(model, tokenizer), load_task(str(file)), tmp_path / "r.jsonl", label="m", sampling=sampling
    )
    found = {key[0]: text for key, (_, text, _) in rows(tmp_path / "r.jsonl").items()}
    assert found["free"] == said
    assert found["cut"] == said[: said.index(said[2])]


def test_the_command(tmp_path: Path, folder: Path, task: Any) -> None:
    out = tmp_path / "out"
    options = (
        "--task",
        tmp_path / "problems.jsonl",
        "--task",
        "math:1",
        "--count",
        6,
        "--max-new-tokens",
        8,
        "-o",
        out,
    )
    found = succeeded(rlmerge("eval", folder, *options, "--json")).json
    assert [entry["problems"] for entry in found] == [4, 6]
    done = succeeded(rlmerge("eval", folder, *options))
    assert "of 6 problems" in done.out
    assert "math:1: 6 of 6 samples" in done.err
    assert succeeded(rlmerge("eval", folder, *options, "--quiet")).out == ""
    assert "holds the results of another run" in refused(rlmerge("eval", folder, *options, "--seed", 1, "--quiet"))
    assert "at least one --task" in refused(rlmerge("eval", folder, "-o", out))
