"""Fishers end to end: data to folder to merge, by command and by function; resumed, divided, sparse, factored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.cli.command_line import refused, rlmerge, succeeded  # noqa: E402
from tests.evaluate.test_run import write_model  # noqa: E402

from rlmerge.errors import FisherError  # noqa: E402
from rlmerge.evaluate.run import load_model  # noqa: E402
from rlmerge.fisher.combine import combine_fishers  # noqa: E402
from rlmerge.fisher.estimate import FisherSettings, estimate_fisher  # noqa: E402
from rlmerge.fisher.sources import SequenceChoice, make_units  # noqa: E402

GOLD = FisherSettings(SequenceChoice("gold"))


def write_data(file: Path, count: int = 40, **more: Any) -> Path:
    lines = [
        {"id": str(n), "prompt": f"{n} + {n % 7} =", "completion": f" {n + n % 7}", "answer": str(n + n % 7)} | more
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_expert(base: Path, folder: Path, seed: int, dtype: Any = torch.bfloat16) -> Path:
    """A copy of the base with a tenth of the weights changed, as sparse training leaves it."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        chosen = torch.rand(value.shape, generator=generator) < 0.1
        step = torch.randn(value.shape, generator=generator) * 0.02
        weights[name] = (value.float() + torch.where(chosen, step, torch.zeros_like(step))).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, expert0, expert1 and data.jsonl."""
    home = tmp_path_factory.mktemp("fisher")
    write_model(home / "base", 0)
    weights = load_file(home / "base" / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, home / "base" / "model.safetensors")
    for number in (0, 1):
        write_expert(home / "base", home / f"expert{number}", 10 + number)
    write_data(home / "data.jsonl")
    return home


def by_hand(folder: Path, data: Path) -> dict[str, Any]:
    """The Fisher of gold completions, from the definition."""
    model, tokenizer = load_model(folder)
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        prompt = tokenizer(line["prompt"])["input_ids"]
        answer = [*tokenizer(line["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        model.zero_grad()
        logs = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        logs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum().backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad**2
    return {name: value / len(lines) for name, value in total.items()}


def test_gold_is_the_definition(home: Path, tmp_path: Path) -> None:
    made = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD)
    found = load_file(tmp_path / "f" / "fisher.safetensors")
    expected = by_hand(home / "expert0", home / "data.jsonl")
    assert list(found) == list(load_file(home / "expert0" / "model.safetensors"))
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name
        record = made.meta["tensors"][name]
        assert record["sum"] == pytest.approx(float(found[name].double().sum()), rel=1e-12)
        assert record["count"] == value.numel()
    assert made.meta["units"] == made.meta["sequences"] == 40
    assert made.meta["source"] == "gold"
    assert "end-of-sequence" in made.meta["token_rule"]
    assert str(tmp_path) not in (tmp_path / "f" / "fisher.json").read_text()


def test_fused_experts_are_taken_apart_as_their_files_have_them(home: Path, tmp_path: Path) -> None:
    from tests.fisher.tiny_models import CONFIGS

    folder = shutil.copytree(home / "base", tmp_path / "mixtral")
    (folder / "model.safetensors").unlink()
    config = CONFIGS["mixtral"]()
    config.vocab_size, config.eos_token_id, config.max_position_embeddings = 90, 1, 512
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    estimate_fisher(folder, home / "data.jsonl", tmp_path / "f", GOLD)
    found, expected = load_file(tmp_path / "f" / "fisher.safetensors"), by_hand(folder, home / "data.jsonl")
    assert found.keys() == load_file(folder / "model.safetensors").keys()
    fused = expected["model.layers.0.mlp.experts.gate_up_proj"]
    gate, up = fused[1].chunk(2)
    stem = "model.layers.0.block_sparse_moe.experts.1"
    for name, value in ((f"{stem}.w1.weight", gate), (f"{stem}.w3.weight", up)):
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def test_the_command_and_a_merge_with_it(home: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        done = succeeded(
            rlmerge("fisher", home / f"expert{number}", "--data", home / "data.jsonl", "--source", "gold",
                    "-o", tmp_path / f"f{number}")
        )  # fmt: skip
        assert "40 sequences" in done.out
    recipe = tmp_path / "sar.yml"
    recipe.write_text(recipe_text(home, tmp_path, "f"))
    done = succeeded(rlmerge("merge", recipe, tmp_path / "merged"))
    assert "wins" in done.out
    stats = succeeded(rlmerge("fisher-stats", tmp_path / "f0", tmp_path / "f1", "--base", home / "base", "--json"))
    found = json.loads(stats.out)
    assert found["winners"]["conflicts"] > 10
    assert 0.0 < found["winners"]["same_in_both_halves"] <= 1.0
    assert set(found["winners"]["after"]) == {"16", "32"}
    text = succeeded(rlmerge("fisher-stats", tmp_path / "f0", tmp_path / "f1", "--base", home / "base"))
    assert "the same winner by both halves" in text.out


def recipe_text(home: Path, folder: Path, prefix: str, more: str = "") -> str:
    entries = "".join(f"- {{model: {home}/expert{n}, name: e{n}, fisher: {folder}/{prefix}{n}}}\n" for n in (0, 1))
    return f"merge_method: sar\nbase_model: {home}/base\nmodels:\n{entries}{more}"


def test_sparse_fishers_merge_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    recipes = {}
    for prefix in ("whole", "sparse"):
        recipes[prefix] = tmp_path / f"{prefix}.yml"
        recipes[prefix].write_text(recipe_text(home, tmp_path, prefix))
    for number in (0, 1):
        model, data = home / f"expert{number}", home / "data.jsonl"
        whole = estimate_fisher(model, data, tmp_path / f"whole{number}", GOLD)
        sparse = estimate_fisher(
            model, data, tmp_path / f"sparse{number}", GOLD, only=recipes["sparse"], sparse=True
        )  # fmt: skip
        assert sparse.meta["bytes"] < 0.05 * whole.meta["bytes"]
    for prefix, recipe in recipes.items():
        succeeded(rlmerge("merge", recipe, tmp_path / f"m-{prefix}", "--quiet"))
        succeeded(rlmerge("verify", tmp_path / f"m-{prefix}", "--quiet"))
    weights = [(tmp_path / f"m-{prefix}" / "model.safetensors").read_bytes() for prefix in recipes]
    assert weights[0] == weights[1]


def test_sparse_fishers_know_the_scale_of_what_is_not_merged(home: Path, tmp_path: Path) -> None:
    more = "exclude: ['embed']\nparameters: {agreement: winner}\n"
    recipes = {}
    for prefix in ("whole", "sparse"):
        recipes[prefix] = tmp_path / f"{prefix}.yml"
        recipes[prefix].write_text(recipe_text(home, tmp_path, prefix, more))
    for dtype in ("fp32", "bf16"):
        settings = FisherSettings(SequenceChoice("gold"), dtype=dtype)
        weights = []
        for number in (0, 1):
            model, data = home / f"expert{number}", home / "data.jsonl"
            estimate_fisher(model, data, tmp_path / f"whole{number}", settings, overwrite=True)
            estimate_fisher(
                model, data, tmp_path / f"sparse{number}", settings, only=recipes["sparse"], sparse=True, overwrite=True
            )
        for prefix, recipe in recipes.items():
            succeeded(rlmerge("merge", recipe, tmp_path / f"m-{prefix}", "--quiet", "--overwrite"))
            weights.append((tmp_path / f"m-{prefix}" / "model.safetensors").read_bytes())
        assert weights[0] == weights[1], dtype


def test_a_sparse_fisher_of_another_recipe_is_refused(home: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.yml"
    asked.write_text(recipe_text(home, tmp_path, "s"))
    for number in (0, 1):
        estimate_fisher(home / f"expert{number}", home / "data.jsonl", tmp_path / f"s{number}", GOLD,
                        only=asked, sparse=True)  # fmt: skip
    other = tmp_path / "other.yml"
    other.write_text(recipe_text(home, tmp_path, "s", "parameters: {sparsify: fisher_magnitude}\n"))
    done = refused(rlmerge("merge", other, tmp_path / "out"))
    assert "estimated for another recipe" in done


def test_only_leaves_out_what_the_recipe_leaves_out(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(recipe_text(home, tmp_path, "o", "exclude: ['embed', 'norm']\n"))
    made = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "o0", GOLD, only=recipe)
    assert made.meta["tensors"]
    assert all("embed" not in name and "norm" not in name for name in made.meta["tensors"])
    whole = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "w", GOLD)
    found, all_ = (load_file(folder / "fisher.safetensors") for folder in (tmp_path / "o0", tmp_path / "w"))
    assert all(torch.equal(value, all_[name]) for name, value in found.items())
    assert whole.meta["bytes"] > made.meta["bytes"]


def test_factored_is_the_outer_product(home: Path, tmp_path: Path) -> None:
    factored = FisherSettings(SequenceChoice("gold"), storage="factored")
    for number in (0, 1):
        estimate_fisher(home / f"expert{number}", home / "data.jsonl", tmp_path / f"x{number}", factored)
    whole = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "w", GOLD)
    full, parts = (load_file(folder / "fisher.safetensors") for folder in (tmp_path / "w", tmp_path / "x0"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(parts[f"{name}#rows"], full[name].sum(1), rtol=1e-5)
    assert torch.allclose(parts[f"{name}#columns"], full[name].sum(0), rtol=1e-5)
    assert torch.equal(parts["model.norm.weight"], full["model.norm.weight"])
    # the merge reads it as the product that a dense file would hold
    expected = {}
    for number in (0, 1):
        dense = {}
        for key, value in load_file(tmp_path / f"x{number}" / "fisher.safetensors").items():
            name, _, part = key.partition("#")
            if not part:
                dense[name] = value
            elif part == "rows":
                columns = load_file(tmp_path / f"x{number}" / "fisher.safetensors")[f"{name}#columns"].double()
                dense[name] = torch.outer(value.double() / value.double().sum(), columns).float()
        (tmp_path / f"d{number}").mkdir()
        save_file(dense, tmp_path / f"d{number}" / "fisher.safetensors")
    for prefix in ("x", "d"):
        recipe = tmp_path / f"{prefix}.yml"
        recipe.write_text(recipe_text(home, tmp_path, prefix))
        succeeded(rlmerge("merge", recipe, tmp_path / f"m-{prefix}", "--quiet"))
        expected[prefix] = (tmp_path / f"m-{prefix}" / "model.safetensors").read_bytes()
    assert expected["x"] == expected["d"]
    assert whole.meta["bytes"] > 3 * sum(value.nbytes for value in parts.values())


def test_shares_add_up(home: Path, tmp_path: Path) -> None:
    whole = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "whole", GOLD)
    for place in (1, 2, 3):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / f"p{place}",
                        FisherSettings(SequenceChoice("gold"), part=(place, 3)))  # fmt: skip
    folders = [tmp_path / f"p{place}" for place in (3, 1, 2)]
    succeeded(rlmerge("fisher", "--combine", *folders, "-o", tmp_path / "sum"))
    found, expected = (load_file(tmp_path / name / "fisher.safetensors") for name in ("sum", "whole"))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=0)
    meta = json.loads((tmp_path / "sum" / "fisher.json").read_text())
    assert meta["sequences"] == whole.meta["sequences"]
    assert meta["tokens"] == whole.meta["tokens"]
    again = combine_fishers(folders[::-1], tmp_path / "sum2")
    assert (tmp_path / "sum2" / "fisher.safetensors").read_bytes() == (
        tmp_path / "sum" / "fisher.safetensors"
    ).read_bytes()
    assert again["combined"] == [[1, 3], [2, 3], [3, 3]]


def test_shares_of_groups_add_up(home: Path, answered: Path, tmp_path: Path) -> None:
    choice = SequenceChoice("policy", sequences=40, group=4, max_new_tokens=1, temperature=0.7)
    whole = estimate_fisher(home / "expert0", answered, tmp_path / "whole", FisherSettings(choice))
    for place in (1, 2):
        estimate_fisher(home / "expert0", answered, tmp_path / f"p{place}", FisherSettings(choice, part=(place, 2)))
    meta = combine_fishers([tmp_path / "p1", tmp_path / "p2"], tmp_path / "sum")
    assert meta["units"] == whole.meta["units"] == 10
    found, expected = (load_file(tmp_path / name / "fisher.safetensors") for name in ("sum", "whole"))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-12)
    with pytest.raises(FisherError, match="missing"):
        combine_fishers([tmp_path / "p1", tmp_path / "p1"][:1] * 1 + [_as_part(tmp_path, 1, 3)], tmp_path / "x")


def _as_part(folder: Path, place: int, parts: int) -> Path:
    """A copy of p2 that says it is another part, so that one is missing."""
    copy = shutil.copytree(folder / "p2", folder / "odd")
    meta = json.loads((copy / "fisher.json").read_text())
    (copy / "fisher.json").write_text(json.dumps(meta | {"part": [place + 1, parts]}))
    first = json.loads((folder / "p1" / "fisher.json").read_text())
    (folder / "p1" / "fisher.json").write_text(json.dumps(first | {"part": [1, parts]}))
    return copy


def test_what_cannot_be_combined(home: Path, tmp_path: Path) -> None:
    for place, model in ((1, "expert0"), (2, "expert1")):
        estimate_fisher(home / model, home / "data.jsonl", tmp_path / f"p{place}",
                        FisherSettings(SequenceChoice("gold"), part=(place, 2)))  # fmt: skip
    done = refused(rlmerge("fisher", "--combine", tmp_path / "p1", tmp_path / "p2", "-o", tmp_path / "sum"))
    assert "differ in" in done
    with pytest.raises(FisherError, match="each once"):
        combine_fishers([tmp_path / "p1", tmp_path / "p1"], tmp_path / "sum")


def test_a_killed_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "many.jsonl", 400)
    options = ["--source", "gold", "--threads", "1"]
    whole = tmp_path / "whole"
    succeeded(rlmerge("fisher", home / "expert0", "--data", data, "-o", whole, *options))
    slow = (
        "import sys; import rlmerge.fisher.estimate as e; e.PATIENCE = 0.0\n"
        "from rlmerge.cli.main import main\n"
        "import time; old = e.make_batches\n"
        "def batches(*a):\n    time.sleep(0.03)\n    return old(*a)\n"
        "e.make_batches = batches; sys.argv = ['rlmerge', *sys.argv[1:]]; main()\n"
    )
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        slow,
        "fisher",
        str(home / "expert0"),
        "--data",
        str(data),
        "-o",
        str(out),
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    sums = tmp_path / "killed.unfinished" / "sums.safetensors"
    until = time.monotonic() + 120
    while not sums.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sums.exists()
    assert not out.exists()
    made = estimate_fisher(home / "expert0", data, out, FisherSettings(SequenceChoice("gold"), threads=1))
    assert made.resumed >= 16
    for name in ("fisher.safetensors", "fisher.json", "course.safetensors"):
        found, expected = (out / name).read_bytes(), (whole / name).read_bytes()
        if name == "course.safetensors":
            assert all(torch.equal(v, load_file(whole / name)[k]) for k, v in load_file(out / name).items())
        else:
            assert found == expected, name


def test_an_unfinished_run_of_something_else_is_not_continued(home: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "f.unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(FisherError, match="another model"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD)
    estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD, overwrite=True)
    with pytest.raises(FisherError, match="holds a Fisher already"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("mine")
    with pytest.raises(FisherError, match=r"thesis\.tex"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "strange", GOLD, overwrite=True)
    assert (tmp_path / "strange" / "thesis.tex").read_text() == "mine"


def test_an_unfinished_run_of_a_changed_model_is_not_continued(home: Path, tmp_path: Path) -> None:
    model = shutil.copytree(home / "expert0", tmp_path / "model")
    unfinished = tmp_path / "f.unfinished"

    def stop(step: Any) -> None:
        if step.what == "gradients":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, home / "data.jsonl", tmp_path / "f", GOLD, progress=stop)
    assert unfinished.exists()
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 0.1}))
    with pytest.raises(FisherError, match="another model"):
        estimate_fisher(model, home / "data.jsonl", tmp_path / "f", GOLD)
    (model / "config.json").write_text(config)
    # other settings of the same sequences cost nothing that was done, so they may go on
    made = estimate_fisher(
        model, home / "data.jsonl", tmp_path / "f", FisherSettings(SequenceChoice("gold"), reduce="mean")
    )
    assert made.meta["reduce"] == "mean"
    assert not unfinished.exists()


def test_nothing_of_others_is_deleted(home: Path, tmp_path: Path) -> None:
    for name in ("f.unfinished", "f.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FisherError, match="in the way"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD, overwrite=True)
    (tmp_path / "f.replaced" / "model.safetensors").unlink()
    (tmp_path / "f.replaced").rmdir()
    with pytest.raises(FisherError, match="in the way"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD, overwrite=True)
    assert (tmp_path / "f.unfinished" / "model.safetensors").read_bytes() == b"mine"
    (tmp_path / "link").symlink_to(tmp_path / "f.unfinished")
    with pytest.raises(FisherError, match="is a link"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "link", GOLD, overwrite=True)


def test_two_processes_do_not_share_a_folder(home: Path, tmp_path: Path) -> None:
    from rlmerge.fisher.folder import RunFolder

    with RunFolder(tmp_path / "f", False).opened({"draw": {}}), pytest.raises(FisherError, match="another process"):
        estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "f", GOLD)


def test_the_merge_is_checked_before_fishers_are_estimated(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    entries = "".join(
        f"- {{model: {home}/expert{n}, fisher: {{data: {home}/data.jsonl, source: gold}}}}\n" for n in (0, 1)
    )
    recipe.write_text(f"merge_method: sar\nbase_model: {home}/base\nmodels:\n{entries}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    message = refused(rlmerge("merge", recipe, tmp_path / "out"))
    assert "estimating" not in message


@pytest.fixture(scope="module")
def answered(home: Path) -> Path:
    """Problems of which the model answers some: one greedy word of the model itself is the answer."""
    model, tokenizer = load_model(home / "expert0")
    lines = []
    for number in range(12):
        prompt = f"{number} of"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
        said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        lines.append({"id": str(number), "prompt": prompt, "answer": said.strip() or "x", "verifier": "exact"})
    file = home / "answered.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_own_keeps_what_is_right(home: Path, answered: Path, tmp_path: Path) -> None:
    choice = SequenceChoice("own", sequences=8, attempts=40, max_new_tokens=1, temperature=0.7)
    made = estimate_fisher(home / "expert0", answered, tmp_path / "f", FisherSettings(choice))
    right, tried = made.meta["accepted"]
    assert 8 <= right <= tried
    drawn = [json.loads(line) for line in (tmp_path / "f" / "sequences.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in answered.read_text().splitlines()]
    assert all(one["correct"] == (one["text"].strip() == answers[one["problem"]]) for one in drawn)
    again = estimate_fisher(home / "expert0", answered, tmp_path / "g", FisherSettings(choice))
    assert again.meta["tensors"] == made.meta["tensors"]


def test_own_says_how_few_were_right(home: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "hard.jsonl", 4, verifier="exact")
    done = refused(
        rlmerge("fisher", home / "expert0", "--data", data, "--sequences", "6", "--attempts", "2",
                "--max-new-tokens", "2", "-o", tmp_path / "f", "--quiet")
    )  # fmt: skip
    assert "of 8 completions were right" in done
    assert not (tmp_path / "f").exists()


def test_sampled_and_policy(home: Path, answered: Path, tmp_path: Path) -> None:
    sampled = estimate_fisher(
        home / "expert0",
        answered,
        tmp_path / "s",
        FisherSettings(SequenceChoice("sampled", sequences=30, max_new_tokens=3)),
    )
    assert sampled.meta["sequences"] == 30
    assert sampled.meta["accepted"] is None
    choice = SequenceChoice("policy", sequences=40, group=4, max_new_tokens=1, temperature=0.7)
    policy = estimate_fisher(home / "expert0", answered, tmp_path / "p", FisherSettings(choice))
    assert policy.meta["units"] == 10  # groups without a gradient count in the mean
    assert policy.meta["sequences"] < 40
    assert policy.meta["sequences"] % 4 == 0


def test_policy_weights_are_advantages() -> None:
    from rlmerge.fisher.sources import Drawn

    drawn = [Drawn(p, a, (1,), (2, 3), "", bool(a == 0 or p == 1)) for p in (0, 1) for a in range(4)]
    units = make_units(drawn, SequenceChoice("policy", group=4))
    assert units[1] is None  # all right: no advantage, but it counts in the mean
    assert units[0] is not None
    weights = np.array([sequence.weight for sequence in units[0].sequences])
    reward = np.array([1.0, 0.0, 0.0, 0.0])
    assert np.allclose(weights, (reward - 0.25) / reward.std(ddof=1) / 4)


def test_messages_use_the_chat_template(home: Path, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "hi"}], "completion": "yes"}
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps(line) + "\n" + json.dumps(line | {"completion": "no"}) + "\n")
    made = estimate_fisher(home / "expert0", data, tmp_path / "f", GOLD)
    drawn = json.loads((tmp_path / "f" / "sequences.jsonl").read_text().splitlines()[0])
    _, tokenizer = load_model(home / "expert0")
    assert drawn["prompt"] == tokenizer("<user>hi\n")["input_ids"]
    assert drawn["ids"] == [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]
    assert made.meta["sequences"] == 2


def test_estimated_by_the_merge(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = "".join(
        f"- {{model: {home}/expert{n}, name: e{n}, fisher: {{data: {home}/data.jsonl, source: gold}}}}\n"
        for n in (0, 1)
    )
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: sar\nbase_model: {home}/base\nmodels:\n{entries}")
    done = succeeded(rlmerge("check", recipe))
    assert "will be estimated" in done.err + done.out
    assert not (tmp_path / "cache" / "rlmerge" / "fishers").exists()
    done = succeeded(rlmerge("merge", recipe, tmp_path / "out"))
    assert "estimating the Fisher of e0" in done.err
    done = succeeded(rlmerge("merge", recipe, tmp_path / "again"))
    assert "estimating" not in done.err
    for number in (0, 1):
        estimate_fisher(home / f"expert{number}", home / "data.jsonl", tmp_path / f"f{number}", GOLD)
    written = tmp_path / "w.yml"
    written.write_text(recipe_text(home, tmp_path, "f"))
    succeeded(rlmerge("merge", written, tmp_path / "by-folder"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "by-folder")]
    assert weights[0] == weights[1] == weights[2]
    assert str(tmp_path / "cache") not in (tmp_path / "out" / "rlmerge.json").read_text()


@pytest.mark.parametrize(
    ("fisher", "says"),
    [
        ("{source: gold}", "needs data"),
        ("{data: d.jsonl, sorce: gold}", "Did you mean 'source'"),
        ("{data: d.jsonl, source: golden}", "Did you mean 'gold'"),
        ("{data: d.jsonl, sequences: 0}", ">= 1"),
        ("{data: missing.jsonl}", "does not exist"),
    ],
)
def test_bad_descriptions_in_recipes(home: Path, tmp_path: Path, fisher: str, says: str) -> None:
    recipe = tmp_path / "r.yml"
    entries = "".join(f"- {{model: {home}/expert{n}, fisher: {fisher}}}\n" for n in (0, 1))
    recipe.write_text(f"merge_method: sar\nbase_model: {home}/base\nmodels:\n{entries}")
    assert says in refused(rlmerge("check", recipe))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "golden"], "unknown"),
        (["--source", "own"], "no 'verifier'"),
        (["--source", "gold", "--sequences", "99"], "fewer than"),
        (["--source", "gold", "--part", "3/2"], "1 ≤ I ≤ N"),
        (["--source", "gold", "--part", "x"], "I/N"),
        (["--source", "gold", "--dtype", "fp8"], "one of"),
        (["--source", "gold", "--sparse"], "--only"),
        (["--source", "gold", "--memory", "1MB"], "too little"),
        (["--source", "policy", "--sequences", "10"], "verifier"),
        (["--source", "gold", "--combine", "a", "b"], "give MODEL and --data"),
    ],
)
def test_mistakes_cost_one_message(home: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = refused(
        rlmerge("fisher", home / "expert0", "--data", home / "data.jsonl", "-o", tmp_path / "f", "--quiet", *arguments)
    )
    assert says in done
    assert not (tmp_path / "f").exists()


def test_a_lora_folder_is_differentiated_on_its_base(home: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    a, b = torch.randn(2, 32) * 0.1, torch.randn(32, 2) * 0.1
    prefix = f"base_model.model.{name}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FisherError, match="--base"):
        estimate_fisher(adapter, home / "data.jsonl", tmp_path / "f", GOLD)
    made = estimate_fisher(adapter, home / "data.jsonl", tmp_path / "f", GOLD, base=home / "base")
    whole = shutil.copytree(home / "base", tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    weights[f"{name}.weight"] = (weights[f"{name}.weight"].float() + 2.0 * b @ a).bfloat16()
    save_file(weights, whole / "model.safetensors")
    expected = estimate_fisher(whole, home / "data.jsonl", tmp_path / "g", GOLD)
    assert made.meta["weights"] == expected.meta["weights"]
    assert made.meta["tensors"] == expected.meta["tensors"]


def test_memory_computes_activations_twice_or_refuses(home: Path, tmp_path: Path) -> None:
    from rlmerge.fisher.room import AROUND, fit

    model, _ = load_model(home / "base")
    assert fit(model, 20, 1024, None) == (1024, False)
    assert fit(model, 20, 1024, 10**10) == (1024, False)
    seen = [_how(model, 200, AROUND + room) for room in range(0, 9_000_000, 50_000)]
    assert list(dict.fromkeys(seen)) == ["too little", "twice", "kept"]
    memory = next(m for m in range(AROUND, 10**9, 10_000) if _how(model, 20, m) == "twice")
    small = estimate_fisher(
        home / "expert0", home / "data.jsonl", tmp_path / "s", FisherSettings(SequenceChoice("gold"), memory=memory)
    )
    large = estimate_fisher(home / "expert0", home / "data.jsonl", tmp_path / "l", GOLD)
    found, expected = (load_file(tmp_path / name / "fisher.safetensors") for name in ("s", "l"))
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-12) for name, value in expected.items())
    assert small.meta["batch"] != large.meta["batch"]


def _how(model: Any, longest: int, memory: int) -> str:
    from rlmerge.fisher.room import fit

    try:
        return "twice" if fit(model, longest, 1024, memory)[1] else "kept"
    except FisherError as error:
        return "too little" if "too little" in str(error) else str(error)
