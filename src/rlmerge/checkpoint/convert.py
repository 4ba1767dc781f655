"""Makes a safetensors folder of a pickled one: the only place that opens pickles, weights-only, in their own process.

The child process imports torch and is told only file names; the parent does not import it. The new folder is built
under a temporary name, so it appears whole.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.copied import other_files
from rlmerge.checkpoint.folder import PICKLE_SUFFIXES, TRAINER_STATE, describe_unusable, read_json_object
from rlmerge.checkpoint.header import read_header
from rlmerge.checkpoint.names import HEAD
from rlmerge.errors import CheckpointError, MissingExtraError, OutputError

_SHARD = re.compile(r"(.+?)-(\d{1,6})-of-(\d{1,6})\.(?:bin|pt|pth)")
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlmerge.checkpoint.convert import _child; _child()"
)


def convert(source: Path | str, out: Path | str, note: Callable[[str], None] | None = None) -> list[Path]:
    """Convert the pickled weights of a folder (or one pickle file) to safetensors in the new folder `out`.

    Tensors that share their memory (tied weights) are stored once, under the name that is not the head's, unless
    config.json says that they are not tied; `note` is told which (default: a log warning). Every other file of the
    folder is copied. Returns the files of `out`. Raises CheckpointError for what is no state dict of tensors,
    OutputError when `out` exists, MissingExtraError without torch. Nothing that a pickle asks for is executed.
    """
    source, out = Path(source), Path(out)
    note = note or logging.getLogger("rlmerge").warning
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already, and nothing is ever overwritten. Write the name of a new folder.")
    jobs, index = _jobs(source)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("Converting a pickle", "torch", "model")
    config = source / "config.json"
    tied = not config.is_file() or read_json_object(config).get("tie_word_embeddings") is not False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.parent / f".{out.name}.unfinished-{os.getpid()}"
        fresh.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be made: {error.strerror or error}. Write another folder.") from error
    try:
        for line in _run([(str(file), str(fresh / name)) for file, name in jobs], tied):
            note(line)
        _finish(fresh, [name for _, name in jobs], index)
        copied = other_files(source) if source.is_dir() else []
        adapter = source / "adapter_config.json"
        for file in [*copied, *([adapter] if adapter.is_file() else [])]:
            target = fresh / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if os.path.lexists(out):
            raise OutputError(f"{out}: appeared while the model was converted. Write the name of a new folder.")
        fresh.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sorted(out.iterdir())


def _jobs(source: Path) -> tuple[list[tuple[Path, str]], str | None]:
    """Each pickle with the name of its safetensors file, and the name of the index when there are shards."""
    if source.is_file():
        if source.suffix.lower() not in PICKLE_SUFFIXES:
            raise CheckpointError(f"{source}: is not a .bin, .pt or .pth file. Write the pickle, or its folder.")
        return [(source, "model.safetensors")], None
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such file or folder. Write the folder that holds the pickles.")
    if any(source.glob("*.safetensors")):
        raise CheckpointError(f"{source}: holds safetensors already, so there is nothing to convert. Use it as it is.")
    index = source / "pytorch_model.bin.index.json"
    if index.is_file():
        files = _indexed(index)
    else:
        named = (file for file in sorted(source.iterdir()) if file.suffix.lower() in PICKLE_SUFFIXES and file.is_file())
        files = [file for file in named if not TRAINER_STATE.match(file.name) and not file.name.startswith(".")]
    if not files or any(re.search(r"_rank_\d+|_(optim|model)_states", file.name) for file in files):
        raise CheckpointError(describe_unusable(source, str(source)))
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        stem = "adapter_model" if files[0].stem == "adapter_model" else "model"
        return [(files[0], f"{stem}.safetensors")], None
    shards = [_SHARD.fullmatch(file.name) for file in files]
    kinds = {(shard[1], int(shard[3])) for shard in shards if shard}
    if None in shards or len(kinds) != 1:
        names = ", ".join(file.name for file in files[:4])
        raise CheckpointError(
            f"{source}: holds {len(files)} pickles ({names}) that are not the numbered shards of one model, so it does "
            f"not say which is meant. Write one of them: rlmerge convert {source / files[0].name} OUT"
        )
    numbers, total = {int(shard[2]) for shard in shards if shard}, next(iter(kinds))[1]
    if numbers != set(range(1, total + 1)) or len(files) != total:
        missing = min(set(range(1, total + 1)) - numbers, default=total)
        raise CheckpointError(f"{source}: shard {missing} of {total} is missing. Download it again.")
    names = [f"model-{int(shard[2]):05d}-of-{total:05d}.safetensors" for shard in shards if shard]
    return list(zip(files, names)), "model.safetensors.index.json"


def _indexed(index: Path) -> list[Path]:
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor names to file names. Restore it.")
    for name in sorted(set(placed.values())):
        if "/" in name or "\\" in name or "\0" in name or name.startswith("."):
            raise CheckpointError(f"{index}: names the file {name!r}; an index may name only files of its own folder.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: this shard is missing; {index.name} names it.")
    return [index.parent / name for name in sorted(set(placed.values()))]


def _finish(fresh: Path, names: list[str], index: str | None) -> None:
    """Check what the child wrote, and write the index of shards."""
    placed: dict[str, str] = {}
    total = 0
    for name in names:
        for tensor in read_header(fresh / name).tensors.values():
            if tensor.name in placed:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in two shards ({placed[tensor.name]}, {name}): these are slices for "
                    "several devices, not a Hugging Face model. Use the trainer's or author's own export."
                )
            placed[tensor.name] = name
            total += tensor.nbytes
    if index:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (fresh / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _run(jobs: list[tuple[str, str]], tied: bool) -> list[str]:
    """Convert in a process of its own. Returns its notes; raises CheckpointError with what it found."""
    paths = json.dumps([path for path in sys.path if path])
    request = json.dumps({"jobs": jobs, "tied": tied})
    done = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, paths], input=request, capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"{jobs[0][0]}: the converting process ended with code {done.returncode} ({last[:300]}). "
            "A negative code means that it was killed, often for want of memory."
        ) from None
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["notes"]


def _child() -> None:
    """The process that opens pickles: reads a request from stdin, answers with one line of JSON."""
    request = json.loads(sys.stdin.read())
    notes: list[str] = []
    try:
        for source, target in request["jobs"]:
            notes += _convert_file(source, target, request["tied"])
        answer: dict[str, Any] = {"notes": notes}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _convert_file(source: str, target: str, tied: bool) -> list[str]:
    import safetensors.torch

    state = _load(source)
    kept, dropped = _drop_repeated(state, tied)
    safetensors.torch.save_file(kept, target, metadata={"format": "pt"})
    return [
        f"{source}: {name} shares its memory with {twin}: stored once, as {twin}." for name, twin in dropped.items()
    ]


def _load(source: str) -> dict[str, Any]:
    """The state dict of a pickle: names to dense tensors, and nothing else."""
    import pickle

    import torch

    try:
        try:
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(source, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|global (\S+)", str(error))
        what = f"it asks for {next(filter(None, asked.groups()))!r}" if asked else "it holds more than tensors"
        raise CheckpointError(
            f"{source}: this pickle cannot be read as weights alone: {what}, which could run code. It was not run. "
            "Use the safetensors of this model, or save its state dict alone."
        ) from None
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{source}: cannot be read as a PyTorch file ({type(error).__name__}: {line[:300]}). Download it again."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{source}: holds a {type(state).__name__}, not a dict from names to tensors.")
    for name, tensor in state.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not dense:
            what = f"a {tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise CheckpointError(
                f"{source}: {name!r} is {what}; a model holds names and dense tensors only. If this is a trainer's "
                "checkpoint, save the state dict of the model alone."
            )
    return state


def _drop_repeated(state: dict[str, Any], tied: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors to store, each with memory of its own, and what was left out: name -> the name it is stored under.

    The convention of Hugging Face: of names for the very same memory, one is stored, the embedding before the head.
    """
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        where = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        groups.setdefault(where if tensor.numel() else name, []).append(name)
    dropped: dict[str, str] = {}
    for names in groups.values():
        keep = next((name for name in names if not HEAD.search(name)), names[0])
        dropped |= {name: keep for name in names if name != keep and tied}
    kept: dict[str, Any] = {}
    used: set[int] = set()
    for name, tensor in state.items():
        if name in dropped:
            continue
        memory = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone().contiguous() if memory in used else tensor.contiguous()
        used.add(memory)
    return kept, dropped
