"""Which files of a model folder go into an output beside the weights: configuration, tokenizer, templates, code."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rlmerge.checkpoint.folder import PICKLE_SUFFIXES, TRAINER_STATE
from rlmerge.checkpoint.reading import leads_out, refuse_outside

_WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {
    ".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".onnx", ".npz", ".tflite", ".distcp",
}  # fmt: skip
_NOT_COPIED = frozenset({
    "README.md", "rlmerge.json", "mergekit_config.yml", "trainer_state.json", "adapter_config.json", "fisher.json",
    "gram.json",     "zero_to_fp32.py", "latest", "run.log", "journal.jsonl", "lock",
})  # fmt: skip
NOT_COPIED_FOLDER = re.compile(
    r"\..*|__pycache__|(tmp-)?checkpoint-.*|(global_|epoch_)?step_?\d+|runs|wandb|mlruns|logs|tensorboard|completions"
)


def other_files(folder: Path) -> list[Path]:
    """The files that go into an output beside the weights: configuration, tokenizer, code, licence, chat templates.

    Not among them: weights and indexes of any framework, the model card, trainer and optimizer state, hidden files,
    what a merge writes itself, and what would turn the output into something else (adapter_config.json). Of folders
    below, the regular files, unless the folder holds weights, a trainer's logs or another checkpoint.
    Raises CheckpointError for a link that leads out of the folder: a copy of what it leads to would be published.
    """
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if _is_copied(entry.name) and entry.is_file()]
    for file in files:
        refuse_outside(file)
    return files + [file for entry in entries for file in _files_below(entry, folder)]


def _files_below(entry: Path, model: Path) -> list[Path]:
    """All files of a folder that go into an output; none if it is a link, or anything in it says weights."""
    if entry.is_symlink() or not entry.is_dir() or NOT_COPIED_FOLDER.fullmatch(entry.name):
        return []
    found: list[Path] = []
    for here, folders, names in os.walk(entry):
        if any(map(is_weight_file, names)):
            return []
        folders[:] = sorted(name for name in folders if not NOT_COPIED_FOLDER.fullmatch(name))
        for name in sorted(names):
            file = Path(here) / name
            target = file.resolve()
            if _is_copied(name) and _is_copied(target.name) and target.is_file() and leads_out(file, model) is None:
                found.append(file)
    return found


def is_weight_file(name: str) -> bool:
    """Whether a file says that its folder holds a model, or the state of a training."""
    return Path(name).suffix.lower() in _WEIGHT_SUFFIXES or TRAINER_STATE.match(name) is not None


def _is_copied(name: str) -> bool:
    if name.startswith(".") or name in _NOT_COPIED or name.endswith(".index.json") or not name.isprintable():
        return False
    return Path(name).suffix.lower() not in _WEIGHT_SUFFIXES
