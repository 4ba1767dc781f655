"""Tallies as numbers with names: shares, norms, cosines, as the document has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from .document import Null, Number, OfExpert, Pair, Regions, Scope, Stored, Threshold, Trajectory
from .tally import ABSOLUTE, RELATIVE, Tally


def describe(
    tally: Tally,
    null: Tally | None,
    experts: Sequence[str],
    dtypes: Sequence[str],
    energy: Sequence[float],
    order: Sequence[int] = (),
) -> Scope:
    """One scope of the document.

    energy   Σ δ² of each expert over the whole model
    order    the numbers of the experts as checkpoints of one run, or none
    """
    found: Scope = {
        "coordinates": int(tally["size"][0]),
        "base_norm": math.sqrt(float(tally["base"][0])),
        "experts": {key: _expert(tally, k, dtypes[k], energy[k]) for k, key in enumerate(experts)},
        "pairs": _pairs(tally, experts),
        "regions": _regions(tally, experts),
    }
    if order:
        found["trajectory"] = _trajectory(tally, order[-1])
    if null is not None:
        found["null"] = _null(null, experts)
    return found


def ratio(part: float, whole: float) -> Number:
    """part / whole, or null of nothing."""
    return float(part) / float(whole) if whole else None


def _null(tally: Tally, experts: Sequence[str]) -> Null:
    size = int(tally["size"][0])
    return {
        "looked_at": int(tally["looked"][0]),
        "experts": {
            key: {
                "support": ratio(float(tally["support"][k]), size),
                "norm": math.sqrt(float(tally["squares"][k])),
            }
            for k, key in enumerate(experts)
        },
        "pairs": _pairs(tally, experts),
        "regions": _regions(tally, experts),
    }


def _expert(tally: Tally, k: int, dtype: str, energy: float) -> OfExpert:
    size, support, square = int(tally["size"][0]), int(tally["support"][k]), float(tally["squares"][k])
    base = float(tally["base"][0])
    above = tally["above"][k].tolist()
    steps = tally["steps"][k].tolist()
    steps[0] = support - sum(steps)  # a delta that is not stored may be less than a step
    last = max((place for place, count in enumerate(steps) if count), default=1)
    return {
        "support": ratio(support, size),
        "support_bf16": ratio(int(tally["cast"][k]), size),
        "sweep": {
            "absolute": _sweep(ABSOLUTE, above[: len(ABSOLUTE)], size),
            "relative": _sweep(RELATIVE, above[len(ABSOLUTE) :], size),
        },
        "norm": math.sqrt(square),
        "rms": math.sqrt(square / size) if size else None,
        "relative_norm": math.sqrt(square / base) if base else None,
        "energy_share": ratio(square, energy),
        "steps": {
            "dtype": dtype,
            "at_least": [0 if place == 0 else 2 ** (place - 1) for place in range(last + 1)],
            "share": [ratio(count, support) for count in steps[: last + 1]],
        },
    }


def _sweep(bounds: Sequence[float], counts: Sequence[int], size: int) -> list[Threshold]:
    return [{"above": bound, "share": ratio(count, size)} for bound, count in zip(bounds, counts)]


def _pairs(tally: Tally, experts: Sequence[str]) -> list[Pair]:
    return [_pair(tally, a, b, experts) for a, b in combinations(range(len(experts)), 2)]


def _pair(tally: Tally, a: int, b: int, experts: Sequence[str]) -> Pair:
    size, both, apart = int(tally["size"][0]), float(tally["overlap"][a, b]), float(tally["conflict"][a, b])
    one, other = float(tally["support"][a]), float(tally["support"][b])
    union, chance = one + other - both, float(tally["chance"][a, b])
    dot, square_a, square_b, least, least_apart, product, product_apart = tally["pairs"][a, b].tolist()
    whole_a, whole_b = float(tally["squares"][a]), float(tally["squares"][b])
    return {
        "a": experts[a],
        "b": experts[b],
        "overlap": ratio(both, size),
        "union": ratio(union, size),
        "jaccard": ratio(both, union),
        "chance_jaccard": ratio(chance, one + other - chance),
        "lift": ratio(both, chance),
        "cosine": cosine(dot, whole_a, whole_b),
        "overlap_cosine": cosine(dot, square_a, square_b),
        "energy_a": ratio(square_a, whole_a),
        "energy_b": ratio(square_b, whole_b),
        "conflict_overlap": ratio(apart, both),
        "conflict_union": ratio(apart, union),
        "conflict_energy": ratio(least_apart, least),
        "conflict_norm": math.sqrt(product_apart),
        "conflict_norm_relative": math.sqrt(product_apart / product) if product else None,
    }


def cosine(product: float, one: float, other: float) -> Number:
    """product / √(one·other), or null where one of both is zero; the roots first, or tiny squares would vanish."""
    return product / math.sqrt(one) / math.sqrt(other) if one and other else None


def _regions(tally: Tally, experts: Sequence[str]) -> Regions:
    size, several, agreed = int(tally["size"][0]), float(tally["changers"][2:].sum()), float(tally["agreement"][0])
    return {
        "inactive": ratio(float(tally["changers"][0]), size),
        "unique": {key: ratio(float(tally["alone"][k]), size) for k, key in enumerate(experts)},
        "agreement": ratio(agreed, size),
        "conflict": ratio(several - agreed, size),
        "changers": [ratio(count, size) for count in tally["changers"].tolist()],
    }


def _trajectory(tally: Tally, last: int) -> Trajectory:
    size, never, kept = int(tally["size"][0]), int(tally["changers"][0]), int(tally["support"][last])
    return {
        "never": ratio(never, size),
        "consistently": ratio(kept, size),
        "cancelled": ratio(size - never - kept, size),
    }


def describe_stored(method: str, settings: dict[str, float | str], counts: Any, sums: Any) -> Stored:
    """One merge that was not written, from what `realised` counted."""
    intended, survived = (int(count) for count in counts)
    wanted, real, product = (float(value) for value in sums)
    return {
        "method": method,
        "settings": settings,
        "survival": ratio(survived, intended),
        "cosine": cosine(product, wanted, real),
        "norm_ratio": math.sqrt(real / wanted) if wanted else None,
    }
