"""JSON schemas of single values: noted beside the functions that check them, put together by `schema`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlmerge.parameters import NUMBER

Check = Callable[[Any], Any]
Schema = dict[str, Any]

JSON_OF: dict[Check, Schema] = {}
"""What a function that checks a value accepts. It may be more, never less: an editor must not refuse a good recipe."""

TEXT: Schema = {"type": "string", "pattern": r"\S"}
FLAG: Schema = {"type": "boolean"}


def in_json(schema: Mapping[str, Any]) -> Callable[[Check], Check]:
    """Notes the JSON schema of what a function accepts."""

    def note(check: Check) -> Check:
        JSON_OF[check] = dict(schema)
        return check

    return note


def number(kind: str = "number", **bounds: float | None) -> Schema:
    """A number within bounds, or text that is one, of which a schema cannot see the size."""
    given = {key: bound for key, bound in bounds.items() if bound is not None}
    return {"anyOf": [{"type": kind, **given}, {"type": "string", "pattern": rf"^\s*(?:{NUMBER.pattern})\s*$"}]}


def mapping(properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object with these keys and no others."""
    schema: Schema = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return schema | ({"required": list(required)} if required else {})


def either(*schemas: Schema) -> Schema:
    """What one of these accepts; alternatives within alternatives are written side by side."""
    flat = [part for schema in schemas for part in (schema["anyOf"] if set(schema) == {"anyOf"} else [schema])]
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def items(schema: Schema, fewest: int = 0) -> Schema:
    """A list of such values."""
    return {"type": "array", "items": schema} | ({"minItems": fewest} if fewest else {})
