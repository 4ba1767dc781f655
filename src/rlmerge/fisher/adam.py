"""A stand-in for a Fisher from what training left: the second moments of Adam in a Hugging Face trainer's checkpoint.

They are a decayed mean of squared gradients of whole batches of the training loss, which is not a mean over sequences
(merging notes, section 3.2): free, and often near enough in rank. fisher.json says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlmerge.checkpoint.folder import open_checkpoint, read_json_object
from rlmerge.errors import FisherError
from rlmerge.version import VERSION

from .folder import RunFolder
from .names import as_stored
from .store import DTYPES, write_fisher

NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names that the trainer of transformers 5 puts into the group without weight decay."""
MEANING = (
    "Adam's second moments, corrected for their start at zero: a decayed mean of squared gradients of whole batches of "
    "the training loss. Not a per-sequence Fisher."
)


def fisher_from_adam(
    checkpoint: Path | str, out: Path | str, *, dtype: str = "fp32", overwrite: bool = False
) -> dict[str, Any]:
    """Writes exp_avg_sq / (1 - β2^step) of `optimizer.pt` as a Fisher folder. Returns its fisher.json.

    Integer ids are resolved by the order in which the trainer hands parameters over (two groups, with and without
    weight decay) and checked by shape; the pickle is loaded weights-only. Raises FisherError for everything else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if dtype not in DTYPES:
        raise FisherError(f"dtype {dtype!r}: write one of: {', '.join(DTYPES)}.")
    folder = RunFolder(out, overwrite)
    state = _read_state(checkpoint)
    stored = open_checkpoint(checkpoint)
    model = _empty_model(checkpoint)
    groups = state["param_groups"]
    names = _names_of(groups, model, state["state"], checkpoint)
    betas = {place: float(group["betas"][1]) for group in groups for place in group["params"]}
    values: dict[str, Tensor] = {}
    steps = set()
    for place, name in names.items():
        entry = state["state"].get(place)
        if entry is None or float(entry["step"]) == 0.0:
            continue  # never had a gradient
        step = float(entry["step"])
        steps.add(step)
        values[name] = entry["exp_avg_sq"].float() / (1.0 - betas[place] ** step)
    if not values:
        raise FisherError(
            f"{checkpoint / 'optimizer.pt'}: holds no second moments (exp_avg_sq). Was it trained by Adam?"
        )
    meta = {
        "format": 1,
        "rlmerge": VERSION,
        "model": str(checkpoint),
        "source": "adam",
        "meaning": MEANING,
        "steps": max(steps),
        "beta2": sorted(set(betas.values())),
        "missing": sorted(set(names.values()) - set(values)),
    }
    with folder.opened() as unfinished:
        write_fisher(unfinished, as_stored(model, values, stored.tensors), meta, dtype)
    return read_json_object(out / "fisher.json")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "optimizer.pt"
    if not file.is_file():
        raise FisherError(
            f"{checkpoint}: holds no optimizer.pt. A trainer of Hugging Face leaves one in checkpoint-N unless "
            "save_only_model is set; those of DeepSpeed, FSDP and verl are sharded and cannot be read."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler's own errors, for whatever a file may hold
        raise FisherError(
            f"{file}: cannot be loaded as weights only: {str(error).splitlines()[0][:200]}. It may hold code, which is "
            "never run."
        ) from None
    groups = state.get("param_groups") if isinstance(state, dict) else None
    entries = state.get("state") if isinstance(state, dict) else None
    if isinstance(entries, dict) and any(
        not isinstance(entry, dict) or "exp_avg_sq" not in entry or "step" not in entry for entry in entries.values()
    ):
        raise FisherError(
            f"{file}: its entries have no exp_avg_sq and step: it is of another optimizer than Adam, or of an "
            "8-bit one, whose moments are quantized."
        )
    if (
        not isinstance(groups, list)
        or not isinstance(state.get("state"), dict)
        or not all("betas" in g for g in groups)
    ):
        raise FisherError(f"{file}: is no state of Adam: it needs 'state' and 'param_groups' with 'betas'.")
    return state


def _empty_model(checkpoint: Path) -> Any:
    """The model without weights: only the names, order and shapes of its parameters matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers raises for a folder that it does not know
        raise FisherError(f"{checkpoint}: transformers cannot tell its parameters: {error}") from None


def _names_of(groups: Sequence[dict[str, Any]], model: Any, state: dict[Any, Any], checkpoint: Path) -> dict[Any, str]:
    """The name of each integer id, by the first division into groups that has their sizes and shapes."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    sizes = [len(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        return {place: name for group in groups for place, name in zip(group["params"], group["param_names"])}
    found = []
    for division in _divisions(model):
        if [len(part) for part in division] != sizes:
            continue
        names = {place: name for group, part in zip(groups, division) for place, name in zip(group["params"], part)}
        wrong = [
            (name, tuple(state[place]["exp_avg_sq"].shape))
            for place, name in names.items()
            if place in state and tuple(state[place]["exp_avg_sq"].shape) != shapes[name]
        ]
        if not wrong:
            return names
        found.append(f"{wrong[0][0]} is {list(shapes[wrong[0][0]])}, its moments {list(wrong[0][1])}")
    reason = found[0] if found else f"it has groups of {sizes} parameters, the model {len(shapes)}"
    raise FisherError(
        f"{checkpoint / 'optimizer.pt'}: does not fit the model beside it: {reason}. Adapters (LoRA) have moments of "
        "their own factors only, which are no Fisher of the weights; estimate one with `rlmerge fisher MODEL --data …`."
    )


def _divisions(model: nn.Module) -> list[list[list[str]]]:
    """How parameters may have been handed over: transformers 5, transformers 4, one group."""
    names = [name for name, _ in model.named_parameters()]
    normed = {
        f"{name}.{local}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for local, _ in module.named_parameters(recurse=False)
    }
    found = []
    for rule in (
        lambda name: name in normed or NOT_DECAYED.search(name.lower()) is not None,
        lambda name: name in normed or "bias" in name,
    ):
        bare = [name for name in names if rule(name)]
        found.append([[name for name in names if name not in set(bare)], bare])
    return [*found, [names]]
