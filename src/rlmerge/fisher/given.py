"""What an estimate is given: a model in one of several forms, the files that decide its tokens, and its sequences.

Fishers and Gram matrices are estimated on the same sequences.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.checkpoint.folder import Checkpoint, read_json_object
from rlmerge.checkpoint.pack import find_base
from rlmerge.downloads import find_folder, find_model, with_downloads
from rlmerge.errors import FisherError, RecipeError
from rlmerge.evaluate.run import TransformersBackend
from rlmerge.evaluate.tasks import Task
from rlmerge.packs.restore import small_files
from rlmerge.recipe import Recipe, load_recipe
from rlmerge.recipe_flags import recipe_from_parts
from rlmerge.version import VERSION

from .data import SequenceChoice
from .sources import Drawn, gold, sample

SMALL = (
    "*config.json",
    "token*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
"""Files beside the weights that decide what is computed, and of which tokens."""
TOKEN_RULE = (
    "ids of the prompt (for messages: of the model's chat template, with a generation prompt), not scored; then the "
    "completion: as drawn, with the end token where one was drawn, or for gold its text encoded by itself without "
    "special tokens, then the end-of-sequence token, or the string that ends answers of this problem (meta.end)"
)


@dataclass(frozen=True)
class Progress:
    """What is being done ('loading', 'sampling', 'gradients', 'activations', or a sentence that warns), how far it is,
    tokens (or completions tried) by this call, and how far an earlier call had come.
    """

    what: str
    done: int
    total: int
    tokens: int = 0
    before: int = 0


def as_source(reference: str, base: Path | str | None, download: bool) -> Path | Recipe:
    """A model folder, or the recipe that makes one in memory: a .yml, a LoRA folder on its base, or 'A+B'."""
    model = find_model(reference, download)
    if isinstance(model, Recipe):
        return model
    if model.suffix in (".yml", ".yaml"):
        recipe = load_recipe(model)
        return with_downloads(recipe) if download else recipe
    if not (model / "adapter_config.json").exists() or any(model.glob("model*.safetensors")):
        return model
    named = str(base or read_json_object(model / "adapter_config.json").get("base_model_name_or_path") or "")
    home = None
    with contextlib.suppress(RecipeError):
        home = find_folder(named, download) if named else None
    if home is None or not home.is_dir():
        raise FisherError(
            f"{model}: a LoRA folder, and its base {named or '(not named)'} is no folder here. Say where it is: --base."
        )
    return recipe_from_parts(str(home.absolute()), [str(model.absolute())], "task_arithmetic", {"weight": 1.0})


def base_of(recipe: Recipe) -> Path:
    """The folder whose names an estimate has."""
    return recipe.base_path or next(iter(recipe.model_paths.values()))


def read_small_files(stored: Checkpoint, base: Path | str | None) -> dict[str, bytes]:
    """The files beside the weights that decide what is computed, by name."""
    if stored.pack is None:
        found = sorted({file for pattern in SMALL for file in stored.folder.glob(pattern)})
        return {file.name: file.read_bytes() for file in found}
    files = dict(small_files(stored.pack, find_base(stored, base)))
    wanted = (name for name in sorted(files) if any(fnmatch(name, pattern) for pattern in SMALL))
    return {name: files[name] for name in wanted if "/" not in name}


def drawing(
    model: Any, tokenizer: Any, files: dict[str, bytes], task: Task, choice: SequenceChoice
) -> dict[str, dict[str, Any]]:
    """What decides the sequences: under 'draw' all but how many are taken, which is under 'taken'."""
    small = xxhash.xxh3_128()
    for name, data in files.items():
        small.update(name.encode() + b"\0" + data)
    sampling = ("temperature", "max_new_tokens", "seed")
    draw = {
        "version": VERSION,
        "source": choice.source,
        "weights": TransformersBackend(model, tokenizer).identity,
        "small_files": small.hexdigest(),
        "data": task.settings,
        "sampling": None if choice.source == "gold" else {key: getattr(choice, key) for key in sampling},
    }
    taken: dict[str, Any] = {"sequences": choice.sequences}
    taken |= {"attempts": choice.attempts} if choice.source == "own" else {}
    taken |= {"group": choice.group} if choice.source == "policy" else {}
    return {"draw": draw, "taken": taken}


def draw(
    model: Any, tokenizer: Any, task: Task, choice: SequenceChoice, unsafe: bool, folder: Path,
    progress: Callable[[Progress], None],
) -> list[Drawn]:  # fmt: skip
    """The sequences, sampled or gold; those that an earlier run left in `folder` are taken from there."""
    notes = folder / "sequences.jsonl"
    if choice.source == "gold":
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        drawn = gold(tokenizer, task.problems, choice, limit)
        notes.write_text("".join(one.to_json() + "\n" for one in drawn), encoding="utf-8")
        return drawn

    def tell(accepted: int, tried: int) -> None:
        progress(Progress("sampling", accepted, choice.wanted, tried))

    return sample(model, tokenizer, task.problems, choice, notes, unsafe=unsafe, tell=tell)


def count_accepted(folder: Path) -> list[int] | None:
    """Right completions, and all that were verified."""
    verdicts = [
        json.loads(line)["correct"] for line in (folder / "sequences.jsonl").read_text("utf-8").split("\n") if line
    ]
    return None if all(verdict is None for verdict in verdicts) else [sum(map(bool, verdicts)), len(verdicts)]
