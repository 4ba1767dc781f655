"""What a model reference means: `model[@revision][+adapter[@revision]]`; model and adapter are folders or hub ids.

What exists on disk as it is written is what is meant, whatever signs its name has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.checkpoint.hub import split_id
from rlmerge.errors import AdapterError, MismatchError


def split_reference(reference: str, exists: Callable[[str], bool]) -> tuple[str, str | None]:
    """Model and adapter of a reference, as written; the adapter is None where there is none.

    Of several '+' the last one counts that has something known on both sides, else one with something known on one
    side, so that a message can speak of the other. `exists` tells whether a folder of this name is there.
    """
    if "+" not in reference or exists(reference):
        return reference, None

    def known(part: str) -> bool:
        return bool(part) and (exists(part) or split_id(part) is not None)

    places = [place for place in range(len(reference) - 1, 0, -1) if reference[place] == "+"]
    cuts = [(reference[:place], reference[place + 1 :]) for place in places if reference[place + 1 :]]
    for asked in (all, any):
        for cut in cuts:
            if asked(map(known, cut)):
                return cut
    return reference, None


def open_model(
    folder: Path, adapter: Path | None, reference: str, base: Path | None = None, planned: Checkpoint | None = None
) -> Checkpoint:
    """Opens a model, with a LoRA adapter on it where there is one: then `lora` of the result is the opened adapter.

    planned   the model, if its folder does not exist yet
    An adapter on the merge's own base is that adapter alone: its update starts at the base in either case.
    Raises AdapterError for an adapter that is none, or on something that takes none; otherwise as `open_checkpoint`.
    """
    if adapter is None:
        return planned or open_checkpoint(folder, reference)
    lora = open_checkpoint(adapter, reference)
    if not lora.adapter:
        kind = "a delta pack" if lora.pack is not None else "a full model"
        raise AdapterError(
            f"{reference}: what follows '+' must be a LoRA adapter, and {adapter} is {kind}. "
            "List it as a model of its own."
        )
    if base is not None and os.path.realpath(folder) == os.path.realpath(base):
        return lora
    model = planned or open_checkpoint(folder, reference)
    if model.adapter or model.pack is not None:
        kind = "a delta pack: unpack it first (rlmerge unpack)" if model.pack is not None else "itself an adapter"
        raise MismatchError(
            f"{reference}: what stands before '+' must be a full model, and {folder} is {kind}. One adapter can be "
            "written after a model."
        )
    return replace(model, reference=reference, headers=(*model.headers, *lora.headers), lora=lora)
