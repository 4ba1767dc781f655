"""Plain references of SCE, NearSwap, Arcee Fusion and RAM+: one coordinate at a time, as their definitions read."""

import math

import numpy as np
from tests.reference.simple import Tensors, _delta


def sce(base: Tensors, experts: dict[str, Tensors], *, select_topk: float = 1.0) -> Tensors:
    """FuseChat's SCE per tensor: variance, energy, erasure. No ties in the variance, please; 0 elects nobody."""
    merged = {}
    for name, old in base.items():
        deltas = np.array([_delta(base, experts[key], name).reshape(-1) for key in sorted(experts)])
        if select_topk < 1.0:
            variance = [0.0 if len(set(column)) == 1 else float(np.var(column)) for column in deltas.T.tolist()]
            order = sorted(range(len(variance)), key=lambda c: -variance[c])
            chosen = order[: int(select_topk * np.count_nonzero(variance))]
            deltas = np.array([[d if c in chosen else 0.0 for c, d in enumerate(row)] for row in deltas.tolist()])
            deltas = deltas.reshape(len(experts), -1)
        energy = (deltas**2).sum(axis=1)
        share = energy / energy.sum() if energy.sum() > 0 else np.full(len(experts), 1 / len(experts))
        values = old.astype(np.float64).reshape(-1)
        for c in range(values.size):
            total = sum(deltas[:, c].tolist())
            joins = [k for k in range(len(experts)) if deltas[k, c] * total > 0]
            if joins:
                values[c] += sum(share[k] * deltas[k, c] for k in joins) / sum(share[k] for k in joins)
        merged[name] = values.reshape(old.shape)
    return merged


def nearswap(base: Tensors, experts: dict[str, Tensors], *, t: float) -> Tensors:
    """Interpolation from the base to the model by min(1, t/|δ|)."""
    (expert,) = experts.values()
    merged = {}
    for name, old in base.items():
        delta = _delta(base, expert, name)
        share = np.array([1.0 if d == 0 else min(1.0, t / abs(d)) for d in delta.reshape(-1).tolist()])
        share = share.reshape(delta.shape)
        merged[name] = share * expert[name].astype(np.float64) + (1 - share) * old.astype(np.float64)
    return merged


def importance(old: np.ndarray, new: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
    """|δ|·KL(softmax(new) + ε ‖ softmax(old) + ε) along the last dimension, by the plain formula."""

    def softmax(values: np.ndarray) -> np.ndarray:
        power = np.exp(values - values.max(axis=-1, keepdims=True))
        return power / power.sum(axis=-1, keepdims=True)

    old, new = np.atleast_1d(old.astype(np.float64)), np.atleast_1d(new.astype(np.float64))
    p, q = softmax(new) + epsilon, softmax(old) + epsilon
    return np.abs(new - old) * np.sum(p * np.log(p / q), axis=-1, keepdims=True)


def fusion_threshold(scores: np.ndarray) -> float:
    """Median + 1.5·(third − first quartile); quartiles are entries, those at int(q·(n − 1)) from below."""
    ordered = np.sort(scores.reshape(-1))
    first, median, third = (float(ordered[int(q * (ordered.size - 1))]) for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)


def arcee_fusion(base: Tensors, experts: dict[str, Tensors]) -> Tensors:
    """The changes whose importance reaches the threshold of their tensor."""
    (expert,) = experts.values()
    merged = {}
    for name, old in base.items():
        if old.size:
            scores = importance(old, expert[name]).reshape(old.shape)
            new = expert[name].astype(np.float64)
            merged[name] = np.where(scores >= fusion_threshold(scores), new, old.astype(np.float64))
        else:
            merged[name] = old.astype(np.float64)
    return merged


def ramplus(
    base: Tensors, experts: dict[str, Tensors], *, r: float, alpha: float, epsilon: float, scope: str
) -> Tensors:
    """RAM with unique changes times 1 + r·min(α, shared/unique), counted over the model or each tensor."""
    keys = sorted(experts)
    deltas = {name: [_delta(base, experts[key], name).reshape(-1) for key in keys] for name in base}
    merged = {}
    for name, old in base.items():
        factors = []
        for k in range(len(keys)):
            shared = unique = 0
            for group in base if scope == "model" else [name]:
                for column in zip(*deltas[group]):
                    if abs(column[k]) > epsilon:
                        others = sum(abs(d) > epsilon for d in column) - 1
                        shared, unique = shared + (others > 0), unique + (others == 0)
            ratio = shared / unique if unique else (math.inf if shared else 0.0)
            factors.append(1 + r * min(alpha, ratio))
        values = old.astype(np.float64).reshape(-1)
        for c in range(values.size):
            changed = [k for k in range(len(keys)) if abs(deltas[name][k][c]) > epsilon]
            if len(changed) == 1:
                values[c] += factors[changed[0]] * deltas[name][changed[0]][c]
            elif changed:
                values[c] += sum(float(deltas[name][k][c]) for k in changed) / len(changed)
        merged[name] = values.reshape(old.shape)
    return merged
