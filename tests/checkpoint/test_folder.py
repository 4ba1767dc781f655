"""A model folder opens with all its tensors, or is refused with a message that names the file and says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import header_bytes, random, write_index, write_model, write_shards, write_tensors

from rlmerge.checkpoint.folder import is_weight_tensor, open_checkpoint
from rlmerge.errors import CheckpointError, HeaderError

A, B = {"a": random(0, 2, 3)}, {"b": random(1, 4)}


def refused(folder: Path, *words: str, reference: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, reference)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


def test_single_file(tmp_path: Path) -> None:
    opened = open_checkpoint(write_model(tmp_path / "m", A | B, {"vocab_size": 3}), "../m")
    assert (opened.reference, opened.folder, opened.adapter) == ("../m", tmp_path / "m", False)
    assert list(opened.tensors) == ["a", "b"]
    assert opened.config == {"vocab_size": 3}
    assert opened.setting("vocab_size") == 3
    assert opened.setting("absent", 7) == 7


def test_shards_with_index_in_shard_order(tmp_path: Path) -> None:
    opened = open_checkpoint(write_shards(tmp_path, [B, A]))
    assert list(opened.tensors) == ["b", "a"]
    assert [header.file.name for header in opened.headers] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert opened.config == {}


def test_files_without_index(tmp_path: Path) -> None:
    write_tensors(tmp_path / "lone" / "weights.safetensors", A)
    assert list(open_checkpoint(tmp_path / "lone").tensors) == ["a"]
    write_shards(tmp_path / "two", [A, B])
    (tmp_path / "two" / "model.safetensors.index.json").unlink()
    assert list(open_checkpoint(tmp_path / "two").tensors) == ["a", "b"]
    (tmp_path / "two" / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path / "two", "model-00002-of-00002.safetensors", "missing")


def test_symlinks_as_in_the_hub_cache(tmp_path: Path) -> None:
    blob = write_tensors(tmp_path / "blobs" / "abc", A)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert list(open_checkpoint(tmp_path / "snapshot").tensors) == ["a"]
    blob.unlink()
    refused(tmp_path / "snapshot", "model.safetensors")


def test_nested_settings(tmp_path: Path) -> None:
    opened = open_checkpoint(write_model(tmp_path, A, {"text_config": {"tie_word_embeddings": True}}))
    assert opened.setting("tie_word_embeddings") is True


def test_adapter_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / "adapter_model.safetensors", A)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_checkpoint(tmp_path).adapter
    write_model(tmp_path, B)
    refused(tmp_path, "adapter", "model.safetensors")


def test_is_weight_tensor(tmp_path: Path) -> None:
    kinds = {"BF16": True, "F16": True, "F32": True, "F64": False, "I64": False, "BOOL": False}
    opened = open_checkpoint(write_model(tmp_path, {k: (np.ones(3), k) for k in kinds} | {"empty": random(0, 0, 3)}))
    assert {name: is_weight_tensor(info) for name, info in opened.tensors.items()} == kinds | {"empty": False}


def test_missing_folders(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    hub = refused(Path("Qwen/Qwen2.5-0.5B"), "Qwen/Qwen2.5-0.5B", "hf download", "unless asked")
    assert "no such folder" in hub
    file = write_tensors(tmp_path / "x.safetensors", A)
    refused(file, "x.safetensors", "is a file")
    refused(Path("a\0b"), "no such folder")


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, [A, B])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/m.safetensors", ".m.safetensors", "x/m.safetensors", "..",
                                  "x\\m.safetensors", "m.bin", "a\0.safetensors", ""])  # fmt: skip
def test_index_may_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path / "m.safetensors", A)
    write_index(tmp_path / "model", {"a": name})
    refused(tmp_path / "model", "model.safetensors.index.json", "own folder")


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}',
                                  b'{"weight_map": {"a": 1}}', b"\xff\xfe", b'{"a":' + b"[" * 200_000])  # fmt: skip
def test_broken_index(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    write_tensors(tmp_path / "model-00001-of-00001.safetensors", A)
    refused(tmp_path, "model.safetensors.index.json")


def test_index_disagrees(tmp_path: Path) -> None:
    one = "model-00001-of-00002.safetensors"
    two = "model-00002-of-00002.safetensors"
    cases: dict[str, tuple[list[dict[str, Any]], dict[str, str], str]] = {
        "tensor not in its file": ([A, B], {"a": one, "b": two, "c": two}, "'c'"),
        "tensor not in the index": ([A, B | {"c": A["a"]}], {"a": one, "b": two}, "'c'"),
        "tensor in another file": ([A, B], {"a": two, "b": two}, "'a'"),
        "tensor in both": ([A, B | A], {"a": one, "b": two}, "'a'"),
    }
    for name, (shards, placed, word) in cases.items():
        write_shards(tmp_path / name, shards)
        write_index(tmp_path / name, placed)
        refused(tmp_path / name, word, "model-0000")


def test_tensor_twice_without_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [A, B | A])
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "'a'", "model-00001-of-00002.safetensors")


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [A, B])
    write_model(tmp_path, A | B)
    assert [header.file.name for header in open_checkpoint(tmp_path).headers] == ["model.safetensors"]
    write_model(tmp_path, A | {"b": random(0, 5)})
    refused(tmp_path, "model.safetensors.index.json", "disagrees")
    write_model(tmp_path, A)
    refused(tmp_path, "model.safetensors.index.json", "disagrees")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "model-00001-of-00002.safetensors", "without an index")


def test_unclear_files(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", A)
    write_tensors(tmp_path / "y.safetensors", B)
    refused(tmp_path, "x.safetensors", "y.safetensors")


@pytest.mark.parametrize("config", [{"quantization_config": {"quant_method": "gptq"}},
                                    {"quantization_config": {"load_in_4bit": True}},
                                    {"text_config": {"quantization_config": {"quant_method": "fp8"}}}])  # fmt: skip
def test_quantized_config(tmp_path: Path, config: Any) -> None:
    refused(write_model(tmp_path, A, config), "config.json", "quantized")


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}])
def test_unquantized_config(tmp_path: Path, config: Any) -> None:
    assert open_checkpoint(write_model(tmp_path, A, config)).config == config


@pytest.mark.parametrize(("name", "dtype"), [
    ("l.qweight", "F32"), ("l.weight_scale_inv", "F32"), ("l.weight_scale", "F32"), ("l.weight", "F8_E4M3"),
    ("l.weight", "I8"), ("l.weight", "U8"), ("experts.gate_up_proj_blocks", "U8"), ("l.weight.absmax", "F32"),
    ("l.weight.quant_state.bitsandbytes__nf4", "U8"), ("l.SCB", "F32"),
])  # fmt: skip
def test_quantized_tensors(tmp_path: Path, name: str, dtype: str) -> None:
    refused(write_model(tmp_path, A | {name: (np.ones((2, 2)), dtype)}), "model.safetensors", name, "quantized")


def test_buffers_are_not_quantized(tmp_path: Path) -> None:
    masks = {"h.0.attn.bias": (np.ones((1, 1, 4, 4)), "U8"), "logit_scale": random(0, 1), "layer_scale": random(0, 4)}
    assert set(open_checkpoint(write_model(tmp_path, masks)).tensors) == set(masks)


@pytest.mark.parametrize(("files", "words"), [
    (["pytorch_model.bin", "config.json"], ["pytorch_model.bin", "rlmerge convert"]),
    (["consolidated.00.pth", "params.json"], ["consolidated.00.pth", "rlmerge convert"]),
    (["model.pt"], ["model.pt", "rlmerge convert"]),
    (["adapter_config.json", "adapter_model.bin"], ["adapter_model.bin", "rlmerge convert"]),
    (["model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt"], ["verl", "verl.model_merger"]),
    (["actor/model_world_size_2_rank_0.pt"], ["verl", "verl.model_merger"]),
    (["pytorch_model_fsdp_0/__0_0.distcp"], ["FSDP", "accelerate merge-weights"]),
    (["global_step_100/actor/x.pt"], ["training steps"]),
    (["global_step5/mp_rank_00_model_states.pt", "zero_to_fp32.py"], ["DeepSpeed", "zero_to_fp32.py"]),
    (["model.Q4_K_M.gguf"], ["GGUF"]),
    (["checkpoint-500/model.safetensors", "training_args.bin"], ["checkpoint-500", "Did you mean"]),
    (["notes.txt"], ["notes.txt", "no safetensors"]),
    ([], ["found: nothing"]),
])  # fmt: skip
def test_other_kinds_of_folders(tmp_path: Path, files: list[str], words: list[str]) -> None:
    (tmp_path / "m").mkdir()
    for name in files:
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "m" / name).write_text("{}")
    refused(tmp_path / "m", str(tmp_path / "m"), *words)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff", b'"x"', b"[" * 200_000])
def test_broken_config(tmp_path: Path, text: bytes) -> None:
    write_model(tmp_path, A)
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path, "config.json")


def test_broken_shard_names_the_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, [A, B])
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HeaderError, match="model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header_bytes({}))
    refused(tmp_path, "no tensor")


def test_a_sharded_1_5b_pair_opens_at_once(tmp_path: Path) -> None:
    """Headers of 2 x 340 tensors over sparse files of 3 GB: the budget of `check` is 1 s, this is a tenth of it."""
    shapes = {f"model.layers.{i}.mlp.w{j}.weight": [1536, 1500] for i in range(28) for j in range(12)}
    for name in ("base", "expert"):
        for shard in (1, 2):
            part = [n for i, n in enumerate(shapes) if i % 2 == shard - 1]
            header = {
                n: {"dtype": "BF16", "shape": shapes[n], "data_offsets": [i * 4608000, (i + 1) * 4608000]}
                for i, n in enumerate(part)
            }
            file = tmp_path / name / f"model-{shard:05d}-of-00002.safetensors"
            file.parent.mkdir(exist_ok=True)
            raw = header_bytes(json.loads(json.dumps(header)))
            file.write_bytes(raw)
            with open(file, "r+b") as stream:
                stream.truncate(len(raw) + len(part) * 4608000)
    start = time.perf_counter()
    assert len(open_checkpoint(tmp_path / "base").tensors) == len(open_checkpoint(tmp_path / "expert").tensors) == 336
    assert time.perf_counter() - start < 0.5


def test_reading_needs_no_heavy_import() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import rlmerge.checkpoint.match, rlmerge.checkpoint.fisher, "
        "rlmerge.checkpoint.tokenizer, rlmerge.checkpoint.convert; "
        "print([m for m in ('torch', 'transformers', 'safetensors', 'numba', 'pydantic', 'numpy') if m in sys.modules])"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
