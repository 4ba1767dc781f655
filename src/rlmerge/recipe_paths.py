"""Where a reference of a recipe leads: a folder or a file, what was fetched from the hub, or what its cache has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rlmerge.checkpoint.hub import cached_snapshot, lacking, split_id
from rlmerge.errors import RecipeError, did_you_mean
from rlmerge.parameters import show


def places_of(reference: str, folder: Path | None) -> list[Path]:
    """Where a reference is looked for: in the recipe's folder, then in the working directory."""
    try:
        path = Path(reference).expanduser()
    except RuntimeError:
        path = Path(reference)
    folders = [Path.cwd()] if path.is_absolute() or folder is None else [folder, Path.cwd()]
    return list(dict.fromkeys(folder / path for folder in folders))


def find_path(reference: str, folder: Path | None, fetched: Mapping[str, Path], small: bool = False) -> Path:
    """The path that a reference means. Raises RecipeError, with what is near it, where nothing is there.

    fetched   folders of what was fetched from the hub, as written
    small     small files are enough: a model may be in the hub's cache without its weights
    """
    tried = places_of(reference, folder)
    for candidate in tried:
        if os.path.exists(candidate):
            return candidate
    if reference in fetched:
        return fetched[reference]
    named = split_id(reference)
    snapshot = cached_snapshot(*named) if named else None
    if snapshot is not None and not small and (lacks := lacking(snapshot)):
        raise RecipeError(
            f"{show(reference)} is only in part in the hub's cache ({snapshot}): it lacks {lacks}.\n"
            "  Nothing is downloaded unless asked: add --download, which fetches the rest."
        )
    if snapshot is not None:
        return snapshot
    places = list(dict.fromkeys(os.path.abspath(candidate) for candidate in tried))
    missing = f"there is {'neither' if len(places) > 1 else 'no'} {' nor '.join(places)}."
    raise RecipeError(f"{show(reference)} does not exist: {missing}" + path_hint(reference, tried))


def path_hint(reference: str, tried: list[Path]) -> str:
    """What to say of a path that is not there: what may have been meant, on a line of its own; or nothing."""
    for candidate in tried:
        if os.path.lexists(candidate):
            return f"\n  {candidate} is a symbolic link that leads nowhere."
    for candidate in tried:
        try:
            siblings = sorted(os.listdir(candidate.parent))[:1000]
        except (OSError, ValueError):
            continue
        if hint := did_you_mean(candidate.name, siblings):
            return f"\n {hint}"
    if "+" in reference:
        return "\n  'model+adapter' means a model with a LoRA adapter on it, and neither of these is there."
    if named := split_id(reference):
        revision = f" --revision {named[1]}" if named[1] else ""
        return (
            "\n  It looks like a Hugging Face id: nothing is downloaded unless asked, and the hub's cache on this "
            f"machine does not have it.\n  Add --download, or fetch it first ('hf download {named[0]}{revision}')."
        )
    if "@" in reference and os.path.exists(reference.rpartition("@")[0]):
        return "\n  '@revision' belongs to models of the Hugging Face hub; a folder has none. Leave it out."
    return ""
