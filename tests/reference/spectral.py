"""Plain references of the spectral methods, for one matrix: every matrix is kept, formulas are as printed.

They make no exception for rank-deficient updates, so they are for inputs of full rank.
"""

import numpy as np

Matrices = list[np.ndarray]


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V (not its transpose), thin, by way of the symmetric eigenproblems' vectors as LAPACK gives them."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


def nearest_frame(matrix: np.ndarray) -> np.ndarray:
    """X·(XᵀX)^(-1/2), or (XXᵀ)^(-1/2)·X: the polar factor by an eigenproblem."""
    if matrix.shape[0] < matrix.shape[1]:
        return nearest_frame(matrix.T).T
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def tsv_m(deltas: Matrices, scaling: float = 1.0) -> np.ndarray:
    """TSV-M: rank r/K of each."""
    keep = max(1, min(deltas[0].shape) // len(deltas))
    parts = [svd(delta) for delta in deltas]
    left = nearest_frame(np.concatenate([u[:, :keep] for u, _, _ in parts], axis=1))
    right = nearest_frame(np.concatenate([v[:, :keep] for _, _, v in parts], axis=1))
    return scaling * left @ np.diag(np.concatenate([s[:keep] for _, s, _ in parts])) @ right.T


def iso_c(deltas: Matrices, scaling: float = 1.0) -> np.ndarray:
    """Iso-C: the polar factor of the sum, at its mean singular value."""
    total = np.sum(deltas, axis=0)
    return scaling * np.linalg.norm(total, "nuc") / min(total.shape) * nearest_frame(total)


def iso_cts(deltas: Matrices, scaling: float = 1.0, fraction: float = 0.8) -> np.ndarray:
    """Iso-CTS."""
    rank = min(deltas[0].shape)
    apart = rank - int(rank * fraction)
    own = int(np.rint(apart / len(deltas)))
    while own * len(deltas) > rank:
        own -= 1
    left, values, right = svd(np.sum(deltas, axis=0))
    common = rank - own * len(deltas)
    lefts, sizes, rights = [left[:, :common]], [values[:common]], [right[:, :common]]
    for delta in deltas:
        outside = np.eye(delta.shape[0]) - lefts[0] @ lefts[0].T
        u, s, v = svd(outside @ delta)
        lefts, sizes, rights = [*lefts, u[:, :own]], [*sizes, s[:own]], [*rights, v[:, :own]]
    frames = nearest_frame(np.concatenate(lefts, axis=1)) @ nearest_frame(np.concatenate(rights, axis=1)).T
    return scaling * float(np.mean(np.concatenate(sizes))) * frames


def iso_merger(base: np.ndarray, experts: Matrices, keep: float = 0.9, clip: float = 1.5) -> np.ndarray:
    """ISO-Merger, with the products r of its Gram matrix written out; the merged matrix itself."""
    left, values, right = svd(base)
    first = max(1, round(keep * len(values)))
    pairs, products = [], []
    for expert in experts:
        u, _, v = svd(expert)
        sign = np.where(np.diag(left.T @ u) >= 0, 1.0, -1.0)
        pair = [_tangent(left, u * sign - left), _tangent(right, v * sign - right)]
        for side in pair:
            side[:, first:] = 0
        pairs.append(pair)
        products.append(pair[0] @ np.diag(values) @ right.T + left @ np.diag(values) @ pair[1].T)
    gram = np.array([[np.sum(a * b) for b in products] for a in products])
    try:
        factors = np.clip(np.linalg.solve(gram, np.diag(gram)), 0, clip)
    except np.linalg.LinAlgError:  # nothing turns
        factors = np.ones(len(gram))
    frames = []
    for side, frame in enumerate((left, right)):
        step = sum(factor * pair[side] for factor, pair in zip(factors, pairs))
        frames.append(nearest_frame(frame + _tangent(frame, step)))
    return frames[0] @ np.diag(values) @ frames[1].T


def _tangent(frame: np.ndarray, step: np.ndarray) -> np.ndarray:
    symmetric = frame.T @ step
    return step - frame @ (symmetric + symmetric.T) / 2


def resmerge(deltas: Matrices, rank: int = 1, rho: float = 0.2, betas: tuple[float, float] = (0.7, 1.0),
             family: bool = True) -> np.ndarray:  # fmt: skip
    """ResMerge."""
    count = len(deltas)
    heads = [u[:, :rank] @ np.diag(s[:rank]) @ v[:, :rank].T for u, s, v in map(svd, deltas)]
    rests = [delta - head for delta, head in zip(deltas, heads)]
    units = [rest / np.linalg.norm(rest) for rest in rests]
    common = np.sum(units, axis=0) / np.linalg.norm(np.sum(units, axis=0))
    coherence = max(0.0, float(np.mean([np.sum(unit * common) for unit in units])))
    pairs = [(i, j) for i in range(count) for j in range(i)]
    similar = float(np.mean([np.sum(units[i] * units[j]) for i, j in pairs])) if pairs else 1.0
    score = ((similar + 1) / 2 + (coherence + 1) / 2) / 2 if family else 0.0
    beta = betas[1] - (betas[1] - betas[0]) * score
    backbone = np.mean(rests, axis=0)
    if coherence > 1 / np.sqrt(count):
        backbone = coherence**beta * np.mean([np.linalg.norm(rest) for rest in rests]) * common
    agreement = [max(0.0, np.sum(heads[i] * heads[j]) / np.linalg.norm(heads[i]) / np.linalg.norm(heads[j]))
                 for i, j in pairs]  # fmt: skip
    head = np.mean(heads, axis=0)
    budget = rho * (float(np.mean(agreement)) if agreement else 1.0)
    return backbone + budget * np.linalg.norm(backbone) / np.linalg.norm(head) * head


def subspace_rewiring(base: np.ndarray, delta: np.ndarray, rank: int, fraction: float) -> np.ndarray:
    """Projectors onto the base's leading vectors around the leading part of the update."""
    u, s, v = svd(delta)
    keep = max(1, int(len(s) * fraction))
    left, _, right = svd(base)
    left, right = left[:, :rank], right[:, :rank]
    return left @ left.T @ (u[:, :keep] @ np.diag(s[:keep]) @ v[:, :keep].T) @ right @ right.T
