"""Plain references of DARE, DELLA, breadcrumbs and DoTS: a coordinate at a time, random numbers in Python integers."""

import math

import numpy as np
import xxhash
from tests.reference.simple import Tensors, _agreeing, _delta

MASK = 2**64 - 1


def uniform(seed: int, method: str, expert: str, tensor: str, coordinate: int) -> float:
    """The random number of a coordinate: SplitMix64's output function on a key of (seed, method, expert, tensor)."""
    key = xxhash.xxh3_64_intdigest("\0".join((str(seed), method, expert, tensor)).encode())
    word = (coordinate * 0x9E3779B97F4A7C15 + key) & MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return ((word ^ word >> 31) >> 11) * 2.0**-53


def generalised(
    base: Tensors, cut: dict[str, Tensors], *, weight: dict[str, float], lam: float, normalize: bool, sign: bool,
) -> Tensors:  # fmt: skip
    """θ0 + λ·Σ w·cut(δ), or the join of those who agree with the elected sign; a sum of 0 elects nobody."""
    keys, w = sorted(cut), [weight[key] for key in sorted(cut)]
    merged = {}
    for name, old in base.items():
        deltas = [cut[key][name] for key in keys]
        if sign:
            merged[name] = _agreeing(old, deltas, w, 0.0, lam, normalize)
        else:
            total = sum(w) if normalize else 1.0
            merged[name] = old.astype(np.float64) + lam / total * sum(v * d for v, d in zip(w, deltas))
    return merged


def drawn(
    base: Tensors, experts: dict[str, Tensors], *, method: str, density: dict[str, float], seed: int = 0,
    epsilon: float = 0.0, rescale: str = "inverse_probability", of_support: bool = False,
) -> dict[str, Tensors]:  # fmt: skip
    """The deltas that DARE (epsilon 0) or DELLA leaves."""
    found: dict[str, Tensors] = {}
    for key, tensors in experts.items():
        found[key] = {}
        for name in base:
            delta = _delta(base, tensors, name)
            chance = chances(np.abs(delta), density[key], epsilon, of_support)
            out = np.zeros(delta.size)
            for c, (value, p) in enumerate(zip(delta.reshape(-1).tolist(), chance.reshape(-1).tolist())):
                if uniform(seed, method, key, name, c) < p:
                    out[c] = value / p if rescale == "inverse_probability" else value
            if rescale == "l1" and density[key] < 1 and np.abs(out).sum() > 0:
                out = out * (np.abs(delta).sum() / np.abs(out).sum())
            found[key][name] = out.reshape(delta.shape)
    return found


def chances(size: np.ndarray, density: float, epsilon: float, of_support: bool = False) -> np.ndarray:
    """density − ε + 2ε·rank, ranks along the second dimension (or the only one) from 0 to 1, ties in the middle."""
    if not 0.0 < density < 1.0:
        return np.full(size.shape, density)
    out = np.zeros(size.shape)
    axis = 1 if size.ndim > 1 else 0
    rows, ranks = np.moveaxis(size, axis, -1), np.moveaxis(out, axis, -1)
    for place in np.ndindex(rows.shape[:-1]):
        row = [v for v in rows[place] if v > 0 or not of_support]
        for i, value in enumerate(rows[place]):
            below, same = sum(v < value for v in row), sum(v == value for v in row)
            middle = below + (same - 1) / 2
            ranks[(*place, i)] = middle / (len(row) - 1) if len(row) > 1 else 0.5
    return (density - epsilon) + (2 * epsilon) * out


def without_outliers(
    base: Tensors, experts: dict[str, Tensors], *, density: float, gamma: float, of_support: bool = False
) -> dict[str, Tensors]:
    """Breadcrumbs: the int(ρ·n) entries below the int(γ·n) largest (fewer if ρ + γ > 1). No ties, please."""
    found: dict[str, Tensors] = {}
    for key, tensors in experts.items():
        found[key] = {}
        for name in base:
            delta = _delta(base, tensors, name).reshape(-1)
            n = np.count_nonzero(delta) if of_support else delta.size
            wanted, top = int(density * n), int(gamma * n)
            top = min(top, n - wanted)
            order = sorted(range(delta.size), key=lambda c: -abs(delta[c]))
            out = delta.copy() if density >= 1 else np.zeros(delta.size)
            if density < 1:
                for c in order[top : top + wanted]:
                    out[c] = delta[c]
            found[key][name] = out.reshape(base[name].shape)
    return found


def dots(base: Tensors, experts: dict[str, Tensors], *, density: float, norm: str = "model") -> dict[str, Tensors]:
    """DoTS: the int(ρ·n) largest of each tensor, then the l2 norm of the model (or of each tensor) given back."""
    found: dict[str, Tensors] = {}
    for key, tensors in experts.items():
        before, after, kept = {}, {}, {}
        for name in base:
            delta = _delta(base, tensors, name).reshape(-1)
            order = sorted(range(delta.size), key=lambda c: -abs(delta[c]))
            out = np.zeros(delta.size)
            for c in order[: int(density * delta.size)]:
                out[c] = delta[c]
            kept[name] = out.reshape(base[name].shape)
            before[name], after[name] = float((delta**2).sum()), float((out**2).sum())
        found[key] = {}
        for name in base:
            some = base if norm == "model" else [name]
            b, a = sum(before[n] for n in some), sum(after[n] for n in some)
            found[key][name] = kept[name] * (math.sqrt(b / a) if a > 0 else 1.0)
    return found
