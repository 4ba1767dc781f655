"""Gram folders end to end: data to folder to merge, by command and by function; resumed, in several passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from tests.cli.command_line import refused, rlmerge, succeeded  # noqa: E402
from tests.evaluate.test_run import write_model  # noqa: E402
from tests.fisher.test_estimate import write_expert  # noqa: E402

import rlmerge as api  # noqa: E402
from rlmerge.errors import NonFiniteError  # noqa: E402
from rlmerge.evaluate.run import load_model  # noqa: E402
from rlmerge.fisher.data import SequenceChoice  # noqa: E402
from rlmerge.gram import estimate  # noqa: E402
from rlmerge.gram.estimate import GramSettings, estimate_gram  # noqa: E402
from rlmerge.gram.room import Room, plan_room  # noqa: E402

GOLD = GramSettings(SequenceChoice("gold"))
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, two experts, their data and Gram folders."""
    home = tmp_path_factory.mktemp("gram")
    write_model(home / "base", 0)
    for number in (0, 1):
        expert = write_expert(home / "base", home / f"expert{number}", 20 + number, torch.float32)
        lines = [
            {
                "id": str(n),
                "prompt": f"{number + 7 * n} and {n}:",
                "completion": " what it says"[: 4 + (n + number) % 9],
            }
            for n in range(40)
        ]
        (home / f"data{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        estimate_gram(expert, home / f"data{number}.jsonl", home / f"gram{number}", GOLD)
    return home


def inputs_of(folder: Path, data: Path) -> dict[str, Any]:
    """What every linear layer sees of the gold completions, [positions, in], by plain hooks."""
    model, tokenizer = load_model(folder)
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0][0].double())
            )
    for line in map(json.loads, data.read_text().splitlines()):
        ids = [*tokenizer(line["prompt"])["input_ids"]]
        ids += [*tokenizer(line["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            model(torch.tensor([ids]))
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_the_folder_holds_what_plain_hooks_see(home: Path) -> None:
    wanted = inputs_of(home / "expert0", home / "data0.jsonl")
    stored, meta = (
        load_file(home / "gram0" / "gram.safetensors"),
        json.loads((home / "gram0" / "gram.json").read_text()),
    )
    assert {*stored, *meta["aliases"]} == set(wanted)
    assert meta["aliases"]["model.layers.0.self_attn.v_proj.weight"] == "model.layers.0.self_attn.q_proj.weight"
    assert len(stored) == 2 * 4 + 1
    for name, rows in wanted.items():
        found = stored[meta["aliases"].get(name, name)]
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)
        assert torch.allclose(found.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6), name
        if name in stored:
            assert meta["tensors"][name]["inputs"] == len(rows) == meta["counted"]
            assert meta["tensors"][name]["trace"] == pytest.approx(float(found.double().trace()))
    assert meta["positions"] == "all"
    assert meta["sequences"] == 40
    assert (home / "gram0" / "sequences.jsonl").exists()
    assert sorted(file.name for file in (home / "gram0").iterdir()) == [
        "gram.json", "gram.safetensors", "sequences.jsonl"
    ]  # fmt: skip


def test_the_merge_minimises_the_distance_on_the_data_themselves(home: Path) -> None:
    """Of a real model: no matrix is nearer to both experts' outputs than the merged one, and the average is farther."""
    inputs = [inputs_of(home / f"expert{k}", home / f"data{k}.jsonl") for k in (0, 1)]
    experts = [load_file(home / f"expert{k}" / "model.safetensors") for k in (0, 1)]
    folders = [str(home / f"expert{k}") for k in (0, 1)]
    grams = [str(home / f"gram{k}") for k in (0, 1)]
    recipe = api.recipe_from_parts(str(home / "base"), folders, "regmean", {"alpha": 1.0}, grams=grams)
    merged = dict(api.merge(recipe, threads=1))
    for name in (DOWN, "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
        rows = [x[name].numpy() / np.sqrt(len(x[name])) for x in inputs]
        outputs = [x @ expert[name].double().numpy().T for x, expert in zip(rows, experts)]
        stacked, wanted = np.vstack(rows), np.vstack(outputs)

        def loss(solution: Any, stacked: Any = stacked, wanted: Any = wanted) -> float:
            return float(np.sum((stacked @ solution - wanted) ** 2))

        best = loss(np.linalg.lstsq(stacked, wanted, rcond=None)[0])
        average = loss(sum(expert[name].double().numpy() for expert in experts).T / 2)
        found = loss(merged[name].astype(np.float64).T)
        assert best * (1 - 1e-9) <= found <= best + 0.01 * (average - best), name
        assert average > 1.02 * best, name


def test_command_and_recipe(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "g"
    done = succeeded(
        rlmerge("gram", home / "expert0", "--data", home / "data0.jsonl", "-o", out, "--source", "gold", "--threads", 1)
    )
    assert "9 Gram matrices for 15 weights" in done.out
    assert "one pass" in done.err
    assert (out / "gram.safetensors").read_bytes() == (home / "gram0" / "gram.safetensors").read_bytes()
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: regmean\nbase_model: {home}/base\nmodels:\n"
        + "".join(f"- {{model: {home}/expert{k}, gram: {home}/gram{k}}}\n" for k in (0, 1))
    )
    succeeded(rlmerge("merge", recipe, tmp_path / "one"))
    parts = [x for k in (0, 1) for x in ("--expert", home / f"expert{k}", "--gram", home / f"gram{k}")]
    succeeded(rlmerge("merge", tmp_path / "two", "--base", home / "base", "--method", "regmean", *parts))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert "--gram is given 1 times" in refused(
        rlmerge("merge", tmp_path / "x", "--base", home / "base", "--method", "regmean", *parts[:4], *parts[4:6])
    )


def test_several_passes_are_the_same_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for all sums at once, and small files."""
    monkeypatch.setattr("rlmerge.gram.store.SHARD", 3 * 4 * 32**2)
    rooms: list[Any] = []
    monkeypatch.setattr(estimate, "plan_room", lambda *given: rooms.append(plan_room(*given)) or rooms[-1])
    estimate_gram(home / "expert0", home / "data0.jsonl", tmp_path / "h", GOLD)
    said: list[str] = []
    settings = GramSettings(SequenceChoice("gold"), memory=rooms[0].held - 3 * 8 * 32**2)
    made = estimate_gram(home / "expert0", home / "data0.jsonl", tmp_path / "g", settings, tell=said.append)
    assert rooms[1].held <= settings.memory
    assert made.meta["passes"] == 2
    assert f"{made.meta['passes']} passes" in said[0]
    whole = load_file(home / "gram0" / "gram.safetensors")
    found: dict[str, Any] = {}
    for file in sorted((tmp_path / "g").glob("gram-*.safetensors")):
        found |= load_file(file)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert made.meta["tensors"] == json.loads((home / "gram0" / "gram.json").read_text())["tensors"]
    recipe = api.recipe_from_parts(str(home / "base"), [str(home / "expert0")], "regmean", grams=[str(tmp_path / "g")])
    assert dict(api.merge(recipe))


@pytest.mark.parametrize("passes", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    monkeypatch.setattr(estimate, "PATIENCE", -1.0)
    monkeypatch.setattr(estimate, "CHUNK", 8)
    if passes:
        monkeypatch.setattr(estimate, "plan_room", _halves)
    whole = estimate_gram(home / "expert0", home / "data0.jsonl", tmp_path / "whole", GOLD)
    stop_at = 56 if passes else 16

    def stop(step: Any) -> None:
        if step.what == "activations" and step.done > stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_gram(home / "expert0", home / "data0.jsonl", tmp_path / "cut", GOLD, progress=stop)
    assert not (tmp_path / "cut").exists()
    made = estimate_gram(home / "expert0", home / "data0.jsonl", tmp_path / "cut", GOLD)
    # sums are put on disk if that takes less than a tenth of the time
    assert (40 if passes else 0) < made.resumed <= stop_at
    assert made.meta == whole.meta | {"model": made.meta["model"]}
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes(), file.name


def _halves(model: Any, widths: Any, tokens: int, memory: int | None) -> Room:
    order = list(widths)
    return Room([order[:4], order[4:]], 0, 0)


def test_a_recipe_may_describe_them_by_data(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: regmean\nbase_model: {home}/base\nmodels:\n"
        + "".join(
            f"- {{model: {home}/expert{k}, gram: {{data: {home}/data{k}.jsonl, source: gold, positions: all}}}}\n"
            for k in (0, 1)
        )
    )
    report = api.check(recipe)
    assert sum("will be estimated" in note for note in report.notes) == 2
    api.merge_to_folder(recipe, tmp_path / "out")
    assert not any("will be estimated" in note for note in api.check(recipe).notes)
    folders = [str(home / f"expert{k}") for k in (0, 1)]
    grams = [str(home / f"gram{k}") for k in (0, 1)]
    expected = dict(api.merge(api.recipe_from_parts(str(home / "base"), folders, "regmean", grams=grams)))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(found[name].numpy(), value) for name, value in expected.items())
    assert len(list((tmp_path / "cache" / "rlmerge" / "grams").iterdir())) == 2
    recipe.write_text(recipe.read_text().replace("positions: all", "position: all"))
    assert "no setting of an estimate. Did you mean 'positions'?" in refused(rlmerge("check", recipe))
    recipe.write_text(recipe.read_text().replace("position: all", "reduce: sum"))
    assert "no setting of an estimate" in refused(rlmerge("check", recipe))


def test_methods_that_always_read_fishers_may_have_them_estimated(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at headers before must not ask for Fishers that are yet to come."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher\nbase_model: {home}/base\nmodels:\n"
        f"- {{model: {home}/expert0, fisher: {{data: {home}/data0.jsonl, source: gold, sequences: 4}}}}\n"
    )
    assert any("will be estimated" in note for note in api.check(recipe).notes)
    api.merge_to_folder(recipe, tmp_path / "out")


def test_what_cannot_be_measured(home: Path, tmp_path: Path) -> None:
    command = ["gram", home / "expert0", "--data", home / "data0.jsonl", "-o", tmp_path / "g"]
    assert "weighs the gradients" in refused(rlmerge(*command, "--source", "policy"))
    assert "write one of: all, answer" in refused(rlmerge(*command, "--source", "gold", "--positions", "prompt"))
    assert "Give" in refused(rlmerge(*command, "--source", "gold", "--memory", "100MB", "-q"))
    assert "no 'verifier'" in refused(rlmerge(*command))
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "mine.txt").write_text("x")
    assert "'mine.txt', which no Gram folder has" in refused(rlmerge(*command, "--source", "gold"))
    broken = write_expert(home / "base", tmp_path / "broken", 1, torch.float32)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="infinite or no numbers"):
        estimate_gram(broken, home / "data0.jsonl", tmp_path / "h", GOLD)


def test_answers_only(home: Path, tmp_path: Path) -> None:
    made = estimate_gram(
        home / "expert0", home / "data0.jsonl", tmp_path / "g", GramSettings(SequenceChoice("gold"), "answer")
    )
    every = json.loads((home / "gram0" / "gram.json").read_text())
    assert 0 < made.meta["counted"] < every["counted"]
    assert made.meta["tensors"].keys() == every["tensors"].keys()
