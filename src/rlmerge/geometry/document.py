"""The document that `rlmerge inspect` makes: its structure as types, and the JSON schema that follows from them.

Numbers are plain: shares lie in 0..1, and what is undefined (a share of nothing, a cosine with zero) is null. A section
is absent when it was not measured.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from rlmerge.in_json import Schema, items, mapping

from .function_types import Function
from .spectra_types import Spectra

SCHEMA = "rlmerge.geometry/1"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Number = float | None
"""Null where it is undefined."""


class Expert(TypedDict):
    """A model that was compared with the base.

    dtype   what most of its coordinates are stored in; 'delta' for an adapter, which is not stored as values
    """

    key: str
    reference: str
    dtype: str


class Base(TypedDict):
    """The base; coordinates are those that are measured, a tied tensor once."""

    reference: str
    dtype: str
    coordinates: int


class Settings(TypedDict):
    """What decides the numbers. Threads and kernels do not.

    null          whether the null model was measured
    seed          of the permutations
    run           coordinates within which, or within an eighth or more of which, the null model permutes
    trajectory    whether the experts are checkpoints of one run, in their order
    """

    null: bool
    seed: int
    run: int
    trajectory: bool


class Threshold(TypedDict):
    """Share of all coordinates that changed by more than `above`."""

    above: float
    share: Number


class Sweep(TypedDict):
    """Absolute: |δ|; relative: |δ| / max(|θ|, |θ0|). Both strictly above."""

    absolute: list[Threshold]
    relative: list[Threshold]


class Steps(TypedDict):
    """Changes in units in the last place of the dtype: share of the changed ones in [at_least[i], 2·at_least[i])."""

    dtype: str
    at_least: list[int]
    share: list[Number]


class OfExpert(TypedDict):
    """One expert in one scope.

    support                 share of coordinates whose stored values differ from the base's (in the narrower dtype)
    support_bf16            the same of both cast to bf16 (relative 1e-3 of bf16 casts is the same thing)
    sweep                   how the share falls with a threshold; 1e-5 and 1e-3 are in it
    norm, rms               of δ; rms over all coordinates of the scope
    relative_norm           ‖δ‖ / ‖θ0‖, which is also the ratio of their rms
    energy_share            the scope's part of the expert's ‖δ‖² over the whole model
    """

    support: Number
    support_bf16: Number
    sweep: Sweep
    norm: float
    rms: Number
    relative_norm: Number
    energy_share: Number
    steps: Steps


class Pair(TypedDict):
    """Two experts in one scope.

    overlap, union      shares of coordinates that both, or at least one, changed
    jaccard             overlap / union; chance_jaccard is what independent supports of the same sizes have per tensor
    lift                overlap / its expectation for independent supports, per tensor
    cosine              of the deltas = overlap_cosine·√(energy_a·energy_b)
    overlap_cosine      of the deltas inside the overlap
    energy_a, energy_b  share of each ‖δ‖² inside the overlap
    conflict_overlap, conflict_union    opposite signs, of the overlap, of the union
    conflict_energy     Σ min(|δa|, |δb|) over conflicts, of the same sum over the overlap
    conflict_norm       ‖min(δa·δb, 0)‖₂; conflict_norm_relative: of ‖δa·δb‖₂
    """

    a: str
    b: str
    overlap: Number
    union: Number
    jaccard: Number
    chance_jaccard: Number
    lift: Number
    cosine: Number
    overlap_cosine: Number
    energy_a: Number
    energy_b: Number
    conflict_overlap: Number
    conflict_union: Number
    conflict_energy: Number
    conflict_norm: float
    conflict_norm_relative: Number


class Regions(TypedDict):
    """Shares of all coordinates; inactive + Σ unique + agreement + conflict = 1.

    changers    share that 0, 1, … K experts changed
    """

    inactive: Number
    unique: dict[str, Number]
    agreement: Number
    conflict: Number
    changers: list[Number]


class Trajectory(TypedDict):
    """Checkpoints of one run: never changed; changed at the end; changed on the way and back at the base at the end."""

    never: Number
    consistently: Number
    cancelled: Number


class NullExpert(TypedDict):
    """As of an expert, in the null model."""

    support: Number
    norm: float


class Null(TypedDict):
    """The same measures of deltas that were permuted among coordinates of one exponent of the base weight.

    looked_at   coordinates that they rest on: of large tensors an eighth or more, spread evenly; they speak of all
    """

    looked_at: int
    experts: dict[str, NullExpert]
    pairs: list[Pair]
    regions: Regions


class Scope(TypedDict):
    """One scope: the whole model, a layer (null: outside of the layers), a kind, a tensor.

    name, shape  of a tensor; layer, kind: of a tensor, or what the scope is made of
    """

    name: NotRequired[str]
    shape: NotRequired[list[int]]
    layer: NotRequired[int | None]
    kind: NotRequired[str]
    coordinates: int
    base_norm: float
    experts: dict[str, OfExpert]
    pairs: list[Pair]
    regions: Regions
    trajectory: NotRequired[Trajectory]
    null: NotRequired[Null]


class Coordinates(TypedDict):
    """The coordinate-wise measures."""

    total: Scope
    layers: list[Scope]
    kinds: list[Scope]
    tensors: list[Scope]


class Stored(TypedDict):
    """A merge, stored in bf16, that was not written.

    survival       share of intended non-zero updates that still differ from the base
    cosine         of the intended and the stored update
    norm_ratio     ‖stored update‖ / ‖intended update‖
    """

    method: str
    settings: dict[str, float | str]
    survival: Number
    cosine: Number
    norm_ratio: Number


class Storage(TypedDict):
    """What becomes of updates when merges are stored."""

    dtype: str
    merges: list[Stored]


class Evidence(TypedDict):
    """One criterion that voted on one expert: 'rlvr', 'sft', or 'none' where its value lies between the thresholds."""

    criterion: str
    value: Number
    rlvr: str
    sft: str
    published: str
    source: str
    vote: Literal["rlvr", "sft", "none"]


class Judged(TypedDict):
    """What one expert looks like."""

    looks: Literal["RLVR-like", "SFT-like", "mixed"]
    evidence: list[Evidence]


class Recommended(TypedDict):
    """A recipe as YAML text that runs, with its reasons."""

    recipe: str
    reasons: list[str]


class Verdict(TypedDict):
    """What kind of experts these are, and what to do with them."""

    looks: Literal["RLVR-like", "SFT-like", "mixed"]
    experts: dict[str, Judged]
    warnings: list[str]
    recommended: Recommended


class Document(TypedDict):
    """The whole document."""

    schema: str
    rlmerge: str
    base: Base
    experts: list[Expert]
    settings: Settings
    coordinates: NotRequired[Coordinates]
    storage: NotRequired[Storage]
    spectra: NotRequired[Spectra]
    function: NotRequired[Function]
    verdict: NotRequired[Verdict]


def geometry_schema() -> Schema:
    """The JSON schema (draft 2020-12) of the document."""
    return schema_of(Document, "rlmerge inspect", SCHEMA)


def schema_of(kind: type, title: str, name: str) -> Schema:
    """The JSON schema (draft 2020-12) of a document, a TypedDict whose key `schema` holds the name."""
    kinds: dict[str, Schema] = {}
    whole = _of_type(kind, kinds)
    kinds[kind.__name__]["properties"]["schema"] = {"const": name}
    return {"$schema": DIALECT, "title": title, **whole, "$defs": dict(sorted(kinds.items()))}


def _of_type(kind: Any, kinds: dict[str, Schema]) -> Schema:
    """The schema of a type; those of TypedDicts go to `kinds` and are referred to."""
    plain = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
    if kind in plain:
        return {"type": plain[kind]}
    if kind is Any:
        return {}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return _of_type(inner[0], kinds)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list:
        return items(_of_type(inner[0], kinds))
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(inner[1], kinds)}
    if origin in (Union, UnionType):
        return {"type": [plain[part] for part in inner]}
    assert is_typeddict(kind), kind
    if kind.__name__ not in kinds:
        kinds[kind.__name__] = {}  # stands while its own parts are made
        hints = get_type_hints(kind, include_extras=True)
        parts = {name: _of_type(part, kinds) for name, part in hints.items()}
        required = [name for name, part in hints.items() if get_origin(part) is not NotRequired]
        kinds[kind.__name__] = mapping(parts, *required)
    return {"$ref": f"#/$defs/{kind.__name__}"}
