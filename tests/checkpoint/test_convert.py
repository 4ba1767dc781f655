"""A pickled model becomes safetensors with the same numbers; a pickle that wants more is refused and never run."""

from __future__ import annotations

import functools
import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import write_model

from rlmerge.checkpoint import convert as module
from rlmerge.checkpoint.convert import convert
from rlmerge.checkpoint.folder import open_checkpoint
from rlmerge.errors import CheckpointError, MissingExtraError, OutputError


@functools.cache
def torch() -> Any:
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    return torch


class Touch:
    """What an attacker would pickle: reading it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert without the child process, which takes seconds to import torch."""

    def run(jobs: list[tuple[str, str]], tied: bool) -> list[str]:
        return [note for source, target in jobs for note in module._convert_file(source, target, tied)]

    monkeypatch.setattr(module, "_run", run)


def values(folder: Path, name: str) -> np.ndarray:
    info = open_checkpoint(folder).tensors[name]
    raw = info.file.read_bytes()[info.start : info.start + info.nbytes]
    return np.frombuffer(raw, {"F32": "<f4", "I64": "<i8", "BF16": "<u2"}[info.dtype]).reshape(info.shape)


def state() -> dict[str, Any]:
    t = torch()
    embedding = t.arange(12.0).reshape(4, 3)
    return {
        "lm_head.weight": embedding,
        "model.embed_tokens.weight": embedding,
        "turned": t.arange(6.0).reshape(2, 3).T,
        "part": embedding[1:3],
        "half": t.ones(2, dtype=t.bfloat16),
        "n": t.arange(3),
        "scalar": t.tensor(2.0),
        "empty": t.zeros(0, 3),
    }


def test_a_process_of_its_own_converts(tmp_path: Path) -> None:
    source, out, notes = tmp_path / "old", tmp_path / "below" / "new", []
    source.mkdir()
    torch().save(state(), source / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "README.md", "training_args.bin"):
        (source / name).write_text("{}")
    files = convert(source, out, notes.append)
    assert [file.name for file in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(file.parent == out for file in files)
    assert os.listdir(out.parent) == ["new"]
    opened = open_checkpoint(out)
    assert opened.headers[0].metadata == {"format": "pt"}
    assert set(opened.tensors) == state().keys() - {"lm_head.weight"}
    assert len(notes) == 1
    assert "lm_head.weight shares its memory with model.embed_tokens.weight" in notes[0]
    assert np.array_equal(values(out, "turned"), np.arange(6.0).reshape(2, 3).T)
    assert np.array_equal(values(out, "part"), np.arange(12.0).reshape(4, 3)[1:3])
    assert np.array_equal(values(out, "half"), [0x3F80, 0x3F80])
    assert np.array_equal(values(out, "n"), [0, 1, 2])


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    source, trap = tmp_path / "old", tmp_path / "trap"
    source.mkdir()
    torch().save({"w": torch().ones(2), "x": Touch(trap)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*system.*not run") as caught:
        convert(source, tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["old"]
    torch().load(source / "pytorch_model.bin", weights_only=False)
    assert trap.exists(), "the trap does not work, so this test shows nothing"


@pytest.mark.usefixtures("here")
def test_other_malicious_files(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Touch(trap)))
    torch().save(Touch(trap), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("bare.bin", "legacy.pt"):
        with pytest.raises(CheckpointError, match=name):
            convert(tmp_path / name, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_untied_models_keep_both_names(tmp_path: Path) -> None:
    source = tmp_path / "old"
    source.mkdir()
    torch().save(state(), source / "pytorch_model.bin")
    (source / "config.json").write_text('{"tie_word_embeddings": false}')
    convert(source, tmp_path / "new")
    assert np.array_equal(values(tmp_path / "new", "lm_head.weight"), np.arange(12.0).reshape(4, 3))
    assert np.array_equal(values(tmp_path / "new", "model.embed_tokens.weight"), np.arange(12.0).reshape(4, 3))


def shards(folder: Path, *states: dict[str, Any], index: bool = True) -> Path:
    folder.mkdir()
    names = [f"pytorch_model-{i + 1:05d}-of-{len(states):05d}.bin" for i in range(len(states))]
    for name, tensors in zip(names, states):
        torch().save(tensors, folder / name)
    if index:
        placed = {tensor: name for name, tensors in zip(names, states) for tensor in tensors}
        content = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    return folder


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, index: bool) -> None:
    ones = {name: torch().ones(size) for name, size in (("a", 3), ("b", 4))}
    source = shards(tmp_path / "old", {"a": ones["a"]}, {"b": ones["b"]}, index=index)
    convert(source, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert written["metadata"] == {"total_size": 28}
    assert written["weight_map"]["b"] == "model-00002-of-00002.safetensors"
    assert list(open_checkpoint(tmp_path / "new").tensors) == ["a", "b"]
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        convert(source, tmp_path / "again")


@pytest.mark.usefixtures("here")
def test_slices_of_one_tensor_are_no_shards(tmp_path: Path) -> None:
    half = {"w": torch().ones(2)}
    with pytest.raises(CheckpointError, match="two shards"):
        convert(shards(tmp_path / "old", half, dict(half), index=False), tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.usefixtures("here")
def test_adapters_stay_adapters(tmp_path: Path) -> None:
    source = tmp_path / "lora"
    source.mkdir()
    torch().save({"base_model.model.q.lora_A.weight": torch().ones(2, 2)}, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    convert(source, tmp_path / "new")
    assert open_checkpoint(tmp_path / "new").adapter


@pytest.mark.usefixtures("here")
def test_legacy_format(tmp_path: Path) -> None:
    torch().save({"w": torch().ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "new")
    assert np.array_equal(values(tmp_path / "new", "w"), [1, 1])


@pytest.mark.usefixtures("here")
def test_what_is_no_state_dict(tmp_path: Path) -> None:
    t = torch()
    cases: dict[str, tuple[Any, str]] = {
        "nested": ({"model": {"w": t.ones(2)}, "step": 5}, "'model' is a dict"),
        "number": ({"w": t.ones(2), "epoch": 3}, "'epoch' is a int"),
        "list": ([t.ones(2)], "a list"),
        "sparse": ({"w": t.eye(3).to_sparse()}, "sparse"),
        "key": ({3: t.ones(2)}, "3 is"),
    }
    for name, (content, words) in cases.items():
        t.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=words) as caught:
            convert(tmp_path / f"{name}.pt", tmp_path / "out")
        assert f"{name}.pt" in str(caught.value)
    (tmp_path / "noise.bin").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "text.bin").write_bytes(b"hello")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("noise.bin", "text.bin", "empty.bin"):
        with pytest.raises(CheckpointError, match=name):
            convert(tmp_path / name, tmp_path / "out")
    assert not any(file.is_dir() for file in tmp_path.iterdir())


def test_refuses_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none"):
        convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="safetensors already"):
        convert(write_model(tmp_path / "done", {"w": np.ones(2)}), tmp_path / "out")
    for name, files, words in (
        ("verl", ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "verl"),
        ("two", ["a.pt", "b.pt"], "rlmerge convert .*a.pt OUT"),
        ("trainer", ["optimizer.pt", "rng_state_0.pth", "training_args.bin"], "no safetensors file"),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"")
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(CheckpointError, match="own folder"):
        convert(tmp_path / "index", tmp_path / "out")


def test_never_writes_over_anything(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("x.bin", "link", ""):
        with pytest.raises(OutputError, match="exists"):
            convert(tmp_path / "x.bin", tmp_path / name)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[model\]'"):
        convert(tmp_path / "x.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dying_process_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHILD", "import os; os.kill(os.getpid(), 9)")
    torch()
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"x\.bin.*code -9"):
        convert(tmp_path / "x.bin", tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.bin"]
