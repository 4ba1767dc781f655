"""Second moments of a real trainer's checkpoint, against those of its own optimizer by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from tests.cli.command_line import refused, rlmerge, succeeded  # noqa: E402
from tests.evaluate.test_run import write_model  # noqa: E402

from rlmerge.errors import FisherError  # noqa: E402
from rlmerge.fisher.adam import fisher_from_adam  # noqa: E402


class Rows(torch.utils.data.Dataset):
    """A few random sequences."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> dict[str, Any]:
        ids = torch.randint(2, 40, (12,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """checkpoint-4 of a run of transformers' Trainer, and the corrected moments by name."""
    home = tmp_path_factory.mktemp("adam")
    write_model(home / "base", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(home / "run"), max_steps=4, per_device_train_batch_size=2, save_steps=4, weight_decay=0.1,
        use_cpu=True, report_to=[], adam_beta2=0.99, disable_tqdm=True, dataloader_pin_memory=False, logging_steps=100,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    state = trainer.optimizer.state
    moments = {
        name: state[parameter]["exp_avg_sq"].clone() / (1 - 0.99 ** float(state[parameter]["step"]))
        for name, parameter in model.named_parameters()
    }
    return home / "run" / "checkpoint-4", moments


def test_moments_find_their_names(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, expected = trained
    succeeded(rlmerge("fisher", "--from-adam", checkpoint, "-o", tmp_path / "f"))
    found = load_file(tmp_path / "f" / "fisher.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6), name
    meta = json.loads((tmp_path / "f" / "fisher.json").read_text())
    assert "Not a per-sequence Fisher" in meta["meaning"]
    assert meta["steps"] == 4
    assert meta["beta2"] == [0.99]


def test_moments_of_another_model(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, _ = trained
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(FisherError, match="does not fit the model"):
        fisher_from_adam(copy, tmp_path / "f")


def test_code_in_a_pickle_is_not_run(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, _ = trained

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    torch.save({"state": Bomb(), "param_groups": []}, copy / "optimizer.pt")
    done = refused(rlmerge("fisher", "--from-adam", copy, "-o", tmp_path / "f"))
    assert "weights only" in done
    assert not (tmp_path / "ran").exists()


def test_no_optimizer(tmp_path: Path) -> None:
    done = refused(rlmerge("fisher", "--from-adam", tmp_path, "-o", tmp_path / "f"))
    assert "no optimizer.pt" in done


@pytest.mark.parametrize("entry", [{"exp_avg": torch.zeros(3)}, {"state1": torch.zeros(3), "step": 1}])
def test_moments_of_other_optimizers(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, entry: dict[str, Any]
) -> None:
    checkpoint, _ = trained
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    torch.save({"state": {0: entry}, "param_groups": [{"params": [0], "betas": (0.9, 0.99)}]}, copy / "optimizer.pt")
    with pytest.raises(FisherError, match="another optimizer"):
        fisher_from_adam(copy, tmp_path / "f")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_trl(tmp_path: Path) -> None:
    """Three steps of GRPO by TRL on a tiny model."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    write_model(tmp_path / "base", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, beta=0.0, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=6, max_steps=3, save_steps=3, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [len(set(text)) / 6 for text in completions],
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one", "two", "three", "four"] * 4}),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    trainer.train()
    state, beta = trainer.optimizer.state, trainer.optimizer.param_groups[0]["betas"][1]
    fisher_from_adam(tmp_path / "run" / "checkpoint-3", tmp_path / "f")
    found = load_file(tmp_path / "f" / "fisher.safetensors")
    for name, parameter in trainer.model.named_parameters():
        expected = state[parameter]["exp_avg_sq"] / (1 - beta ** float(state[parameter]["step"]))
        assert torch.allclose(found[name], expected, rtol=1e-6), name
