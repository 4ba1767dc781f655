"""Configuration files of an output with another vocabulary: `vocab_size`, and the ids of tokens that moved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlmerge.checkpoint.tokenizer_files import as_json

FILES = ("config.json", "generation_config.json")
_ID = re.compile(r"(^|_)token_(ids?|index)$")
_NESTED = ("text_config", "decoder", "encoder", "thinker_config", "language_config", "llm_config")


def follow_vocabulary(
    name: str, raw: bytes, rows: int, ids: Mapping[int, int | None], lender: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """config.json or generation_config.json for an embedding of so many rows; the same bytes where nothing changes.

    ids     id before -> id in the output, or None where the output lacks the token
    lender  the same files of the model that lends the tokenizer: its value stands in for a token that is gone
    """
    settings = json.loads(raw)
    followed = follow_settings(settings, lender.get(name, {}), ids, rows)
    return raw if followed == settings else as_json(followed)


def follow_settings(
    settings: Mapping[str, Any], theirs: Mapping[str, Any], ids: Mapping[int, int | None], rows: int | None
) -> dict[str, Any]:
    """The settings of one file as `follow_vocabulary` writes them; `rows` None leaves sizes alone."""
    found = {}
    for key, value in settings.items():
        found[key] = value
        if key == "vocab_size" and isinstance(value, int) and rows is not None:
            found[key] = rows
        elif _ID.search(key):
            found[key] = _moved(value, theirs.get(key), ids)
        elif key in _NESTED and isinstance(value, dict):
            inner = theirs.get(key)
            found[key] = follow_settings(value, inner if isinstance(inner, dict) else {}, ids, rows)
    return found


def stops(settings: Mapping[str, Mapping[str, Any]]) -> set[int]:
    """The ids at which a model with these files stops to generate."""
    for name in reversed(FILES):
        value = settings.get(name, {}).get("eos_token_id")
        if value is not None:
            return set(value if isinstance(value, list) else [value])
    return set()


def _moved(value: Any, theirs: Any, ids: Mapping[int, int | None]) -> Any:
    """An id or a list of ids in the output."""
    if isinstance(value, list):
        kept = [new for entry in value if (new := _moved(entry, None, ids)) is not None]
        return kept or theirs
    if isinstance(value, bool) or not isinstance(value, int) or value not in ids:
        return value
    new = ids[value]
    return theirs if new is None else new
