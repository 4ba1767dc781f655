"""The measures of geometry as plain loops over whole tensors, in fp64, straight from their definitions."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

Arrays = list[np.ndarray]


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.sum(a * b)) / norms if norms else None


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bf16, ties to even, of fp32 values that are finite."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def of_expert(base: Arrays, expert: Arrays) -> dict[str, Any]:
    """One expert, of tensors as fp64 values."""
    old, new = np.concatenate([t.ravel() for t in base]), np.concatenate([t.ravel() for t in expert])
    delta, n = new - old, old.size
    larger = np.maximum(np.abs(old), np.abs(new))
    return {
        "support": _share(np.sum(new != old), n),
        "support_bf16": _share(np.sum(as_bf16(new) != as_bf16(old)), n),
        "above_1e-5": _share(np.sum(np.abs(delta) > 1e-5), n),
        "above_relative_1e-3": _share(np.sum(np.abs(delta) > 1e-3 * larger), n),
        "norm": float(np.linalg.norm(delta)),
        "rms": float(np.sqrt(np.mean(delta**2))),
        "relative_norm": _share(float(np.linalg.norm(delta)), float(np.linalg.norm(old))),
    }


def of_pair(base: Arrays, one: Arrays, other: Arrays) -> dict[str, float | None]:
    """Two experts."""
    chance = sum(np.sum(a != t) * np.sum(b != t) / t.size for t, a, b in zip(base, one, other))
    old, left, right = (np.concatenate([t.ravel() for t in part]) for part in (base, one, other))
    a, b = left - old, right - old
    in_a, in_b = a != 0, b != 0
    both, either = in_a & in_b, in_a | in_b
    apart = both & (np.sign(a) != np.sign(b))
    least = np.minimum(np.abs(a), np.abs(b))
    return {
        "overlap": _share(both.sum(), old.size),
        "union": _share(either.sum(), old.size),
        "jaccard": _share(both.sum(), either.sum()),
        "chance_jaccard": _share(chance, in_a.sum() + in_b.sum() - chance),
        "lift": _share(both.sum(), chance),
        "cosine": _cosine(a, b),
        "overlap_cosine": _cosine(a[both], b[both]),
        "energy_a": _share(np.sum(a[both] ** 2), np.sum(a**2)),
        "energy_b": _share(np.sum(b[both] ** 2), np.sum(b**2)),
        "conflict_overlap": _share(apart.sum(), both.sum()),
        "conflict_union": _share(apart.sum(), either.sum()),
        "conflict_energy": _share(least[apart].sum(), least[both].sum()),
        "conflict_norm": float(np.linalg.norm(np.minimum(a * b, 0))),
        "conflict_norm_relative": _share(np.linalg.norm(np.minimum(a * b, 0)), np.linalg.norm(a * b)),
    }


def of_regions(base: Arrays, experts: dict[str, Arrays]) -> dict[str, Any]:
    """Who changed what."""
    old = np.concatenate([t.ravel() for t in base])
    deltas = np.array([np.concatenate([t.ravel() for t in expert]) - old for expert in experts.values()])
    number = np.sum(deltas != 0, axis=0)
    mixed = np.any(deltas > 0, axis=0) & np.any(deltas < 0, axis=0)
    return {
        "inactive": float(np.mean(number == 0)),
        "unique": {key: float(np.mean((number == 1) & (deltas[k] != 0))) for k, key in enumerate(experts)},
        "agreement": float(np.mean((number > 1) & ~mixed)),
        "conflict": float(np.mean((number > 1) & mixed)),
        "changers": [float(np.mean(number == n)) for n in range(len(experts) + 1)],
    }


def of_storage(base: Arrays, experts: list[Arrays], scale: float) -> dict[str, float | None]:
    """What base + scale·Σ δ keeps in bf16."""
    old = np.concatenate([t.ravel() for t in base])
    wanted = scale * sum(np.concatenate([t.ravel() for t in expert]) - old for expert in experts)
    real = as_bf16(np.float32(old + wanted)) - as_bf16(old)
    return {
        "survival": _share(np.sum((wanted != 0) & (real != 0)), np.sum(wanted != 0)),
        "cosine": _cosine(wanted, real),
        "norm_ratio": _share(np.linalg.norm(real), np.linalg.norm(wanted)),
    }


def pairs_of(keys: list[str]) -> list[tuple[str, str]]:
    """In the document's order."""
    return list(combinations(sorted(keys), 2))
