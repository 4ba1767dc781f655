"""A pack is a model: what `eval` and `fisher` make of it is what they make of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command_line import refused, rlmerge, succeeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.evaluate.test_run import write_model  # noqa: E402
from tests.fisher.tiny_models import CONFIGS, make_model  # noqa: E402

from rlmerge import pack  # noqa: E402
from rlmerge.errors import MismatchError, PackError  # noqa: E402
from rlmerge.evaluate.lm_eval import evaluate_by_harness  # noqa: E402
from rlmerge.evaluate.run import EvaluationError, TransformersBackend, load_model  # noqa: E402
from rlmerge.fisher.estimate import FisherSettings, estimate_fisher  # noqa: E402
from rlmerge.fisher.sources import SequenceChoice  # noqa: E402

GOLD = FisherSettings(SequenceChoice("gold"))


def write_expert(base: Path, folder: Path, seed: int) -> Path:
    """A copy of the base with a tenth of the weights changed."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        step = torch.randn(value.shape, generator=generator) * 0.02
        chosen = torch.rand(value.shape, generator=generator) < 0.1
        weights[name] = (value.float() + torch.where(chosen, step, torch.zeros_like(step))).to(value.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (bf16), expert0, expert1, their packs, and data."""
    home = tmp_path_factory.mktemp("models")
    write_model(home / "base", 0)
    weights = load_file(home / "base" / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, home / "base" / "model.safetensors")
    for k in range(2):
        write_expert(home / "base", home / f"expert{k}", 10 + k)
        pack(home / f"expert{k}", home / "base", home / f"pack{k}")
    lines = [
        {"id": str(n), "prompt": f"{n} + 1 =", "completion": f" {n + 1}", "answer": str(n + 1), "verifier": "math"}
        for n in range(12)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def state(model: Any) -> dict[str, bytes]:
    return {name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, value in
            model.state_dict().items()}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_model_is_that_of_the_folder(home, dtype):
    one, tokenizer = load_model(home / "expert0", dtype=dtype)
    other, same = load_model(home / "pack0", dtype=dtype)
    assert state(one) == state(other)
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert tokenizer("12 + 3")["input_ids"] == same("12 + 3")["input_ids"]
    assert TransformersBackend(one, tokenizer).identity == TransformersBackend(other, same).identity


@pytest.mark.parametrize("kind", CONFIGS)
def test_architectures(tmp_path, kind):
    """Tied and untied heads, fused experts, Conv1D: transformers takes the tensors as it takes a folder's."""
    for seed, name in enumerate(("base", "expert")):
        make_model(kind, torch.float32, seed).save_pretrained(tmp_path / name)
        write_model(tmp_path / "tokenizer", 0)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / "tokenizer" / file, tmp_path / name)
    pack(tmp_path / "expert", tmp_path / "base", tmp_path / "pack")
    assert state(load_model(tmp_path / "expert")[0]) == state(load_model(tmp_path / "pack")[0])


def test_a_fisher_of_a_pack_is_that_of_the_folder(home, tmp_path):
    for name in ("expert0", "pack0"):
        estimate_fisher(home / name, home / "data.jsonl", tmp_path / name, GOLD)
    one, other = ((tmp_path / name / "fisher.safetensors").read_bytes() for name in ("expert0", "pack0"))
    assert one == other
    said = [json.loads((tmp_path / name / "fisher.json").read_text()) for name in ("expert0", "pack0")]
    for entry in said:
        del entry["model"]
    assert said[0] == said[1]


def test_the_base_is_said_or_wrong(home, tmp_path):
    shutil.copytree(home / "pack0", tmp_path / "far" / "pack")
    with pytest.raises(PackError, match="its base is not at"):
        load_model(tmp_path / "far" / "pack")
    one, _ = load_model(tmp_path / "far" / "pack", base=home / "base")
    assert state(one) == state(load_model(home / "expert0")[0])
    with pytest.raises(MismatchError, match="this pack was made for another base"):
        load_model(tmp_path / "far" / "pack", base=home / "expert1")
    estimate_fisher(tmp_path / "far" / "pack", home / "data.jsonl", tmp_path / "f", GOLD, base=home / "base")
    text = refused(
        rlmerge("eval", tmp_path / "far" / "pack", "--task", home / "data.jsonl", "-o", tmp_path / "r", "--quiet")
    )
    assert "--base FOLDER" in text


def test_a_damaged_pack_is_no_model(home, tmp_path):
    shutil.copytree(home / "pack0", tmp_path / "pack")
    raw = bytearray((tmp_path / "pack" / "delta.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[8 + length + 40] ^= 255
    (tmp_path / "pack" / "delta.safetensors").write_bytes(raw)
    with pytest.raises(PackError, match="damaged"):
        load_model(tmp_path / "pack", base=home / "base")


def test_commands_take_packs(home, tmp_path):
    lines = {}
    for name in ("expert0", "pack0"):
        out = tmp_path / f"r-{name}"
        succeeded(rlmerge("eval", home / name, "--task", home / "data.jsonl", "-o", out, "--quiet",
                          "--max-new-tokens", "4"))  # fmt: skip
        _, *lines[name] = next(out.glob("*.jsonl")).read_text().splitlines()
    assert len(lines["pack0"]) == 12
    assert lines["expert0"] == lines["pack0"]
    succeeded(rlmerge("fisher", home / "pack0", "--data", home / "data.jsonl", "--source", "gold", "-o",
                      tmp_path / "f", "--quiet"))  # fmt: skip
    with pytest.raises(EvaluationError, match="unpack first"):
        evaluate_by_harness(home / "pack0", ["x"], tmp_path / "h")


def test_recipes_that_estimate_fishers_take_packs(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in ("expert", "pack"):
        models = [{"model": f"{kind}{k}", "name": f"m{k}",
                   "fisher": {"data": "data.jsonl", "source": "gold"}} for k in range(2)]  # fmt: skip
        recipe = {"merge_method": "sar", "base_model": "base", "models": models}
        (home / f"{kind}.yml").write_text(json.dumps(recipe))
        succeeded(rlmerge("merge", home / f"{kind}.yml", tmp_path / kind, "--quiet"))
    one, other = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in ("expert", "pack"))
    assert one == other
    # a merge of packs in memory
    merged, _ = load_model(home / "pack.yml")
    assert state(merged) == state(load_model(home / "expert.yml")[0])


def test_fisher_stats_reads_the_deltas_of_packs(home, tmp_path):
    for name in ("expert0", "expert1"):
        estimate_fisher(home / name, home / "data.jsonl", tmp_path / name, GOLD)
    found = []
    for kind in ("expert", "pack"):
        models = [argument for k in range(2) for argument in ("--model", home / f"{kind}{k}")]
        fishers = [tmp_path / f"expert{k}" for k in range(2)]
        found.append(succeeded(rlmerge("fisher-stats", *fishers, "--base", home / "base", *models, "--json")).json)
    assert found[0] == found[1]
