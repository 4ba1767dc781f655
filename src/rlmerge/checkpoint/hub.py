"""Models of the Hugging Face hub: how they are written (`owner/name@revision`), and how they lie in its cache here.

The cache is the one that all of the hub's libraries share. Nothing here touches the network or needs a package;
`checkpoint.download` does both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(\w[\w./+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
MARK = ".rlmerge-headers"
"""A file in a folder that `checkpoint.download` made of headers: its weights are holes."""


def split_id(reference: str) -> tuple[str, str | None] | None:
    """'owner/name@revision' as id and revision (None where none is written); None for what cannot be such an id."""
    found = _ID.fullmatch(reference)
    if found is None or ".." in reference or "--" in found[1]:
        return None
    return found[1], found[2]


def cache_folder() -> Path:
    """The cache of the hub's libraries: HF_HUB_CACHE, else `hub` in HF_HOME, else in ~/.cache/huggingface."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(os.path.expandvars(given)).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def repository_folder(home: Path, repository: str) -> Path:
    """Where a cache keeps a model: its refs, snapshots and blobs are in it."""
    return home / f"models--{repository.replace('/', '--')}"


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision (a branch, a tag or a whole commit; 'main' by default) in the cache, if it is there.

    It may hold some of the model's files only: see `lacking`.
    """
    folder = repository_folder(cache_folder(), repository)
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):  # no branch and no tag of this name, but perhaps a commit
        commit = (folder / "refs" / commit).read_text().strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def lacking(snapshot: Path) -> str:
    """What the folder of a model needs and does not hold, in words; '' where nothing is known to be missing."""
    for index in sorted(snapshot.glob("*.safetensors.index.json")):
        try:
            placed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # whoever opens the folder says what is wrong with it
        missing = sorted(name for name in placed if isinstance(name, str) and not (snapshot / name).exists())
        if missing:
            return f"{missing[0]}" + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
        return ""
    return "" if any(file.exists() for file in snapshot.glob("*.safetensors")) else "every safetensors file"


def origin(folder: Path) -> tuple[str, str] | None:
    """Id and commit of a folder in a cache; None for every other folder."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not _COMMIT.fullmatch(parts[-1]):
        return None
    kind, _, name = parts[-3].partition("--")
    return (name.replace("--", "/", 1), parts[-1]) if kind == "models" else None


def has_headers_only(folder: Path) -> bool:
    """Whether a folder holds headers, and in place of weights nothing."""
    return (folder / MARK).exists()
