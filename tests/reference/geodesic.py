"""Plain references of the means on spheres and of Model Stock: whole vectors in fp64, and no Gram matrix anywhere."""

import math

import numpy as np

Tensors = dict[str, np.ndarray]
Vectors = list[np.ndarray]


def length(vector: np.ndarray) -> float:
    """‖v‖, exact but for one rounding of each square."""
    return math.sqrt(math.fsum((vector.reshape(-1) ** 2).tolist()))


def unit(vector: np.ndarray) -> np.ndarray:
    """The direction; zeros stay zeros."""
    size = length(vector)
    return vector / size if size else vector


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Between two vectors, from the chords of their directions; a right angle where one has none."""
    a, b = unit(one), unit(other)
    if not a.any() or not b.any():
        return math.pi / 2
    return 2 * math.atan2(length(a - b), length(a + b))


def between(one: np.ndarray, other: np.ndarray, t: float, threshold: float = 1.0) -> np.ndarray:
    """Share t of the way on the great circle; straight for opposite vectors and where |cos| > threshold."""
    phi = angle(one, other)
    if math.sin(phi) < 1e-6 or abs(math.cos(phi)) > threshold:
        return (1 - t) * one + t * other
    return (math.sin((1 - t) * phi) * one + math.sin(t * phi) * other) / math.sin(phi)


def slerp(one: Tensors, other: Tensors, t: float, threshold: float = 0.9995) -> Tensors:
    """Tensor by tensor, each as one vector."""
    return {name: between(_wide(one[name]), _wide(other[name]), t, threshold) for name in one}


def nuslerp(base: Tensors | None, one: Tensors, other: Tensors, t: float, axis: int | None) -> Tensors:
    """Deltas (weights without a base) as one vector (axis None), or as vectors along an axis."""
    merged = {}
    for name in one:
        start = _wide(base[name]) if base is not None else np.zeros(one[name].shape)
        a, b = _wide(one[name]) - start, _wide(other[name]) - start
        if axis is None or a.ndim == 0:
            moved = between(a, b, t)
        else:
            a, b, moved = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1), np.empty(np.moveaxis(a, axis, -1).shape)
            for place in np.ndindex(moved.shape[:-1]):
                moved[place] = between(a[place], b[place], t)
            moved = np.moveaxis(moved, -1, axis)
        merged[name] = start + moved
    return merged


def multislerp(base: Tensors | None, experts: dict[str, Tensors], weight: dict[str, float], normalize: bool) -> Tensors:
    """mergekit's two steps: the mean of unit vectors, then along the mean of what is orthogonal to it."""
    merged, total = {}, sum(weight.values()) if normalize else 1.0
    for name in next(iter(experts.values())):
        start = _wide(base[name]) if base is not None else 0.0
        deltas = [_wide(experts[key][name]) - start for key in sorted(experts)]
        w = [weight[key] / total for key in sorted(experts)]
        mean = sum(share * unit(delta) for share, delta in zip(w, deltas))
        if length(mean) < 1e-8:
            merged[name] = start + sum(share * delta for share, delta in zip(w, deltas))
            continue
        mean = unit(mean)
        away = sum(share * (unit(delta) - float(np.sum(unit(delta) * mean)) * mean) for share, delta in zip(w, deltas))
        size = length(away)
        place = math.cos(size) * mean + (math.sin(size) / size * away if size else 0.0)
        merged[name] = start + sum(share * length(delta) for share, delta in zip(w, deltas)) * place
    return merged


def karcher(experts: dict[str, Tensors], steps: int = 10, tol: float = 1e-5) -> Tensors:
    """Logarithms and exponentials of whole unit vectors."""
    merged = {}
    for name in next(iter(experts.values())):
        vectors = [_wide(experts[key][name]) for key in sorted(experts)]
        units = [unit(vector) for vector in vectors if vector.any()]
        if not units:
            merged[name] = vectors[0]
            continue
        mean = sum(units) / len(units)
        place = units[0] if length(mean) < tol else unit(mean)
        for _ in range(steps):
            step = np.zeros(place.shape)
            for towards in units:
                phi = angle(place, towards)
                part = towards - float(np.sum(place * towards)) * place
                step += (phi / math.sin(phi) if phi else 1.0) * part / len(units)
            size = length(step)
            if size < tol:
                break
            place = unit(math.cos(size) * place + math.sin(size) / size * step)
        merged[name] = sum(map(length, vectors)) / len(vectors) * place
    return merged


def model_stock(base: Tensors, experts: dict[str, Tensors], rows: bool = False) -> Tensors:
    """t·mean + (1 - t)·base, by tensor or by row; a negative t no further than the longest delta reaches."""
    merged = {}
    for name, value in base.items():
        start = _wide(value)
        deltas = [_wide(experts[key][name]) - start for key in sorted(experts)]
        if rows and start.ndim > 1:
            moved = np.empty(start.shape)
            for place in np.ndindex(start.shape[:-1]):
                moved[place] = _stock([delta[place] for delta in deltas])
        else:
            moved = _stock(deltas)
        merged[name] = start + moved
    return merged


def _stock(deltas: Vectors) -> np.ndarray:
    count, mean = len(deltas), sum(deltas) / len(deltas)
    if not mean.any():
        return mean
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[:i]]
    cosine = sum(math.cos(angle(a, b)) for a, b in pairs) / len(pairs)
    divisor = 1 + (count - 1) * cosine
    longest = max(map(length, deltas)) / length(mean)
    return max(count * cosine / divisor, -longest) * mean if divisor > 0 else -longest * mean


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
