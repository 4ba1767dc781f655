"""What goes into an output beside the weights: small files, chat templates in folders, never weights or strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmerge.checkpoint.copied import other_files


def names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in other_files(folder)]


def write(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_other_files(tmp_path: Path) -> None:
    kept = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "modeling_x.py", "special.JSON",
            "tokenizer.json", "tokenizer.model", "vocab.txt"]  # fmt: skip
    left = ["README.md", "rlmerge.json", "mergekit_config.yml", "model.safetensors", "model.safetensors.index.json",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth",
            "trainer_state.json", "training_args.bin", "m.gguf", ".gitattributes", "adapter_config.json",
            "fisher.safetensors", "flax_model.msgpack", "tf_model.h5"]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "broken.json").symlink_to(tmp_path / "absent")
    assert [file.name for file in other_files(tmp_path)] == sorted(kept)


def test_folders_of_small_files(tmp_path: Path) -> None:
    kept = ["additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja", "code/deep/layers.py"]
    write(tmp_path, *kept, "config.json")
    (tmp_path / "additional_chat_templates" / "empty").mkdir()
    assert names(tmp_path) == ["config.json", *kept]


@pytest.mark.parametrize(
    "name",
    [".git/config", ".cache/huggingface/x.json", "checkpoint-500/config.json", "global_step_10/config.json",
     "runs/events.out.tfevents.1", "wandb/run.json", "__pycache__/x.pyc", "code/.git/config",
     "code/checkpoint-1/config.json"],
)  # fmt: skip
def test_folders_that_are_no_part_of_the_model(tmp_path: Path, name: str) -> None:
    write(tmp_path, "config.json", name)
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "consolidated.00.pth", "model.onnx", "deep/model.gguf", "optimizer.pt", "scheduler.x"]
)
def test_a_folder_that_holds_weights_is_left_out_whole(tmp_path: Path, name: str) -> None:
    write(tmp_path, "config.json", "original/params.json", f"original/{name}", "templates/a.jinja")
    assert names(tmp_path) == ["config.json", "templates/a.jinja"]


def test_links_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "secret/key.txt", "model/config.json", "model/code/a.py", "model/model.safetensors")
    model = tmp_path / "model"
    (model / "code" / "inside.py").symlink_to("a.py")
    (model / "code" / "key.py").symlink_to(tmp_path / "secret" / "key.txt")
    (model / "code" / "weights.py").symlink_to(model / "model.safetensors")
    (model / "code" / "nowhere.py").symlink_to("absent")
    (model / "code" / "secret").symlink_to(tmp_path / "secret", target_is_directory=True)
    (model / "linked").symlink_to(tmp_path / "secret", target_is_directory=True)
    assert names(model) == ["config.json", "code/a.py", "code/inside.py"]


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    """snapshots/REVISION/additional_chat_templates/x.jinja -> ../../../blobs/HASH"""
    write(tmp_path, "blobs/0a1b", "snapshots/abc/config.json")
    snapshot = tmp_path / "snapshots" / "abc"
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/0a1b")
    assert names(snapshot) == ["config.json", "additional_chat_templates/x.jinja"]


def test_names_that_no_text_can_hold_are_left(tmp_path: Path) -> None:
    write(tmp_path, "config.json")
    try:
        (tmp_path / "bad\udcff.json").write_text("{}")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert names(tmp_path) == ["config.json"]
