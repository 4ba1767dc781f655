"""Plain references of linear, task arithmetic, TIES and RAM, in fp64, one coordinate at a time where it matters."""

import math

import numpy as np

Tensors = dict[str, np.ndarray]


def _weights(experts: dict[str, Tensors], weight: dict[str, float] | None) -> dict[str, float]:
    return {key: 1.0 if weight is None else float(weight.get(key, 1.0)) for key in sorted(experts)}


def _delta(base: Tensors, expert: Tensors, name: str) -> np.ndarray:
    return expert[name].astype(np.float64) - base[name].astype(np.float64)


def linear(models: dict[str, Tensors], *, weight: dict[str, float] | None = None, normalize: bool = True) -> Tensors:
    """Σ w·θ, divided by Σ w if `normalize`. The base, if it takes part, is one of the models."""
    w = _weights(models, weight)
    total = sum(w.values()) if normalize else 1.0
    names = models[next(iter(w))]
    return {name: sum(w[key] * models[key][name].astype(np.float64) for key in w) / total for name in names}


def task_arithmetic(
    base: Tensors, experts: dict[str, Tensors], *, weight: dict[str, float] | None = None, lam: float = 1.0
) -> Tensors:
    """θ0 + λ·Σ w·δ."""
    w = _weights(experts, weight)
    return {
        name: base[name].astype(np.float64) + lam * sum(w[key] * _delta(base, experts[key], name) for key in w)
        for name in base
    }


def ram(base: Tensors, experts: dict[str, Tensors], *, epsilon: float = 1e-5, lam: float = 1.0) -> Tensors:
    """θ0 + λ·(mean of the deltas of those experts that changed the coordinate, |δ| > epsilon). arXiv 2601.13572."""
    merged = {}
    for name in base:
        deltas = [_delta(base, experts[key], name).reshape(-1) for key in sorted(experts)]
        values = base[name].astype(np.float64).reshape(-1)
        for x in range(values.size):
            changed = [float(delta[x]) for delta in deltas if abs(delta[x]) > epsilon]
            if changed:
                values[x] += lam * (sum(changed) / len(changed))
        merged[name] = values.reshape(base[name].shape)
    return merged


def ties(
    base: Tensors,
    experts: dict[str, Tensors],
    *,
    weight: dict[str, float] | None = None,
    density: dict[str, float] | float = 0.2,
    lam: float = 1.0,
    normalize: bool = True,
    scope: str = "tensor",
    count: str = "nonzero",
    rescale: bool = False,
) -> Tensors:
    """TIES-Merging (arXiv 2306.01708): trim, elect the sign, mean (or sum, normalize=False) of those who agree.

    Trim keeps the max(1, int(density·n)) entries with the largest |δ|, and all that tie with the last of them; n counts
    the non-zero entries (count="nonzero", the design's density) or all entries (count="all": mergekit, the authors).
    `rescale` gives each trimmed delta its sum of |δ| back (mergekit). Where the weighted sum is 0, the sign is + at
    scope tensor (mergekit), the whole model's at scope model (authors).
    """
    w = _weights(experts, weight)
    trimmed: dict[str, Tensors] = {}
    for key in w:
        deltas = {name: _delta(base, experts[key], name) for name in base}
        rho = density[key] if isinstance(density, dict) else density
        groups = [list(base)] if scope == "model" else [[name] for name in base]
        for group in groups:
            before = sum(np.abs(deltas[name]).sum() for name in group)
            _trim(deltas, group, rho, count, scope == "model" and count == "all")
            after = sum(np.abs(deltas[name]).sum() for name in group)
            for name in group if rescale and after > 0.0 else ():
                deltas[name] = deltas[name] * (before / after)
        trimmed[key] = deltas
    cancelled = dict.fromkeys(base, 1.0)
    if scope == "model":
        signs = [np.sign(sum(w[key] * trimmed[key][name] for key in w)) for name in base]
        majority = 1.0 if sum(float(sign.sum()) for sign in signs) >= 0.0 else -1.0
        cancelled = dict.fromkeys(base, majority)
    return {
        name: _agreeing(
            base[name], [trimmed[key][name] for key in w], list(w.values()), cancelled[name], lam, normalize
        )
        for name in base
    }


def _trim(deltas: Tensors, group: list[str], density: float, count: str, one_more: bool) -> None:
    """Set all but the largest entries of the tensors in `group`, taken together, to zero (authors: one more stays)."""
    sizes = sorted((abs(float(v)) for name in group for v in deltas[name].reshape(-1)), reverse=True)
    n = len(sizes) if count == "all" else sum(v > 0.0 for v in sizes)
    if n == 0 or density >= 1.0:
        return
    threshold = sizes[min(n, max(1, int(density * n) + one_more)) - 1]
    for name in group:
        deltas[name] = np.where(np.abs(deltas[name]) >= threshold, deltas[name], 0.0)


def _agreeing(
    base: np.ndarray, deltas: list[np.ndarray], weight: list[float], cancelled: float, lam: float, normalize: bool
) -> np.ndarray:
    values = base.astype(np.float64).reshape(-1)
    flat = [delta.reshape(-1) for delta in deltas]
    for x in range(values.size):
        weighted = [w * float(delta[x]) for w, delta in zip(weight, flat)]
        total = sum(weighted)
        sign = cancelled if total == 0.0 else math.copysign(1.0, total)
        agree = [i for i, d in enumerate(weighted) if d * sign > 0.0]
        if agree:
            share = sum(weight[i] for i in agree) if normalize else 1.0
            values[x] += lam * (sum(weighted[i] for i in agree) / share)
    return values.reshape(base.shape)
