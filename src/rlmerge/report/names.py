"""Where a tensor stands in a picture: its layer, and what is left of its name; several in one place are one cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlmerge.figures import short_names
from rlmerge.geometry import scopes

OUTSIDE = "–"
"""The layer of what is in no layer."""


def called(keys: Sequence[str]) -> dict[str, str]:
    """What experts are called on a page, by key."""
    return dict(zip(keys, short_names(keys), strict=True))


def place_of(name: str) -> tuple[int | str, str]:
    """Layer and module: 'model.layers.3.mlp.up_proj.weight' → 3, 'mlp.up_proj'; OUTSIDE is the layer of the others."""
    layer, kind = scopes.place_of(name)
    return OUTSIDE if layer is None else layer, kind.removesuffix(".weight")


def spot(row: Mapping[str, Any]) -> str:
    """'mlp.up_proj of layer 3'."""
    return row["module"] if row["layer"] == OUTSIDE else f"{row['module']} of layer {row['layer']}"


def cells(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: of rows that differ in nothing but `value`, as those of the experts of a mixture do, the mean."""
    found: dict[tuple[Any, ...], list[float]] = {}
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(value for name, value in row.items() if name != "value")
        found.setdefault(key, []).append(row["value"])
        kept.setdefault(key, dict(row))
    return [row | {"value": sum(found[key]) / len(found[key])} for key, row in kept.items()]
