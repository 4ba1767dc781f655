"""SAR-Merging in all its choices, one coordinate at a time in Python floats (fp64): the check of the fast kernels.

Source: design section 2 (our reading of arXiv 2606.18521). Nothing here is shared with `rlmerge`, and nothing is fast.
Words as in the design: d weighted update, s sensitivity, r share, t = r·d resolved update, g rescale factor.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Hash64 = Callable[[str | None, str, int], int]

EXACT_TIES_UP_TO = 2**20  # elements of a tensor; above it (and at scope model) ties are kept by a hash threshold
MANY_TIES = 2**14  # above that size, from so many ties on, the norm after the cut takes the share of them that stays
CHOICES = {
    "sensitivity": {"fisher_delta2", "fisher", "delta2"},
    "arbitration": {"winner", "soft", "elect", "margin", "random"},
    "agreement": {"sensitivity_mean", "mean", "winner", "sum", "multiplicity"},
    "allies": {"drop", "join"},
    "sparsify": {"magnitude", "magprune", "fisher_magnitude", "none"},
    "score": {"delta", "share", "merged"},
    "scope": {"tensor", "model"},
    "rescale": {"l2", "l1", "inverse_probability", "none"},
}


@dataclass
class Outcome:
    """`merged` before the output cast; `delta` = λ·Σ g·t before the base is added; `shares` and `kept` are [K, n]."""

    merged: Tensors
    stats: dict[str, Any]
    delta: Tensors
    shares: Tensors
    kept: Tensors


@dataclass
class Tensor:
    """One tensor, flat: lists over experts (sorted by key) of lists over coordinates."""

    name: str
    shape: tuple[int, ...]
    base: list[float]
    stored: list[list[float]]
    active: list[list[bool]]
    d: list[list[float]]
    fhat: list[list[float]] | None
    s: list[list[float]]
    r: list[list[float]]
    whole: list[bool]  # the shares at this coordinate make up one undivided update
    kept: list[list[bool]]
    p: list[list[float]]  # keep-probability of magprune

    @property
    def size(self) -> int:
        return len(self.base)

    @property
    def sparsifiable(self) -> bool:
        return sum(length > 1 for length in self.shape) >= 2

    def t(self, i: int, x: int) -> float:
        return self.r[i][x] * self.d[i][x]


@dataclass
class Options:
    keys: list[str]
    weight: list[float]
    density: list[float]
    lam: float
    sensitivity: str
    arbitration: str
    agreement: str
    allies: str
    power: float
    margin: float
    sparsify: str
    score: str
    scope: str
    rescale: str
    rescale_max: float
    epsilon: float
    min_change: float
    hash64: Hash64
    random_hash64: Hash64


def _no_hash(key: str | None, tensor: str, coordinate: int) -> int:
    raise ValueError("this choice needs hash64")


def sar(
    base: Tensors,
    experts: dict[str, Tensors],
    fishers: dict[str, Tensors] | None = None,
    *,
    weight: dict[str, float] | None = None,
    density: dict[str, float] | float = 0.8,
    lam: float = 1.0,
    sensitivity: str = "fisher_delta2",
    arbitration: str = "winner",
    agreement: str = "sensitivity_mean",
    allies: str = "drop",
    power: float = 1.0,
    margin: float = 1.0,
    sparsify: str = "magnitude",
    score: str = "delta",
    scope: str = "tensor",
    rescale: str = "l2",
    rescale_max: float = 1.5,
    epsilon: float = 0.15,
    min_change: float = 0.0,
    seed: int = 0,  # not used: whoever gives hash64 has put the seed into it
    hash64: Hash64 | None = None,
    random_hash64: Hash64 | None = None,
) -> Outcome:
    """Merge. `hash64(expert_key, tensor, coordinate)` decides ties and magprune (key None: `score: merged`);
    `random_hash64` decides `arbitration: random` and is `hash64` unless given (a merge that is random twice needs two).
    """
    weight = {} if weight is None else weight
    keys = sorted(key for key in experts if weight.get(key, 1.0) != 0.0)
    options = Options(
        keys, [float(weight.get(key, 1.0)) for key in keys],
        [float(density.get(key, 0.8) if isinstance(density, dict) else density) for key in keys], float(lam),
        sensitivity, arbitration, agreement, allies, float(power), float(margin), sparsify, score, scope,
        rescale, float(rescale_max), float(epsilon), float(min_change),
        hash64 or _no_hash, random_hash64 or hash64 or _no_hash,
    )  # fmt: skip
    _check(options)
    tensors = _prepare(base, experts, fishers, options)
    stats = _resolve(tensors, options)
    for group in _scopes(tensors, options):
        _sparsify(group, options)
    factors = _factors(tensors, options)
    stats.update(_sparsifier_counts(tensors, options), factors=factors)
    merged, delta = _compose(tensors, factors, options)
    shares = {t.name: np.array(t.r, dtype=np.float64).reshape(len(keys), t.size) for t in tensors}
    kept = {t.name: np.array(t.kept, dtype=bool).reshape(len(keys), t.size) for t in tensors}
    return Outcome(merged, stats, delta, shares, kept)


def _check(o: Options) -> None:
    for option, allowed in CHOICES.items():
        if getattr(o, option) not in allowed:
            raise ValueError(f"{option}: {getattr(o, option)!r} is not one of {sorted(allowed)}")
    if o.rescale == "inverse_probability" and o.sparsify != "magprune":
        raise ValueError("rescale: inverse_probability needs sparsify: magprune")
    if o.sparsify in {"magnitude", "magprune"} and o.score == "merged" and len(set(o.density)) > 1:
        raise ValueError("score: merged needs one density for all experts")


# -- deltas, supports, sensitivities -----------------------------------------------------------------------------------


def _prepare(base: Tensors, experts: dict[str, Tensors], fishers: dict[str, Tensors] | None, o: Options):
    means, covered = _fisher_means(base, fishers, o)
    tensors = []
    for name in sorted(base):
        b = _floats(base[name])
        n, K = len(b), range(len(o.keys))
        stored = [_floats(experts[key][name]) for key in o.keys]
        active, d = [[False] * n for _ in K], [[0.0] * n for _ in K]
        for i in K:
            for x in range(n):
                delta = stored[i][x] - b[x]
                if delta != 0.0 and abs(delta) > o.min_change * max(abs(stored[i][x]), abs(b[x])):
                    active[i][x] = True
                    d[i][x] = o.weight[i] * delta
        fhat = None
        if name in covered:
            fhat = [[f / means[i] for f in _floats(fishers[key][name])] for i, key in enumerate(o.keys)]
        s = [[_sensitivity(fhat, d, i, x, o) for x in range(n)] for i in K]
        zeros, flags, ones = [[0.0] * n for _ in K], [[False] * n for _ in K], [[1.0] * n for _ in K]
        tensors.append(Tensor(name, base[name].shape, b, stored, active, d, fhat, s, zeros, [False] * n, flags, ones))
    return tensors


def _floats(array: np.ndarray) -> list[float]:
    return [float(value) for value in array.reshape(-1)]


def _add(values: Iterable[float]) -> float:
    """Sum from left to right, rounding each step: the builtin `sum` compensates from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


def _fisher_means(base: Tensors, fishers: dict[str, Tensors] | None, o: Options) -> tuple[list[float], set[str]]:
    """Mean Fisher of each expert over the tensors that every Fisher has, and the names of those tensors."""
    if o.sensitivity == "delta2" and o.sparsify != "fisher_magnitude":
        return [], set()
    if not o.keys:
        return [], set()
    given = [key for key in o.keys if key in (fishers or {})]
    if not given:
        raise ValueError("no Fisher at all: give Fishers, or write sensitivity: delta2")
    if len(given) < len(o.keys):
        raise ValueError("some experts have a Fisher and some have none")
    covered = {name for name in base if all(name in fishers[key] for key in o.keys)}
    if not covered:
        raise ValueError("no tensor that all Fishers have")
    means = []
    for key in o.keys:
        values = [f for name in sorted(covered) for f in _floats(fishers[key][name])]
        mean = math.fsum(values) / len(values)
        if mean == 0.0:
            raise ValueError(f"the Fisher of {key} is all zero")
        means.append(mean)
    return means, covered


def _sensitivity(fhat: list[list[float]] | None, d: list[list[float]], i: int, x: int, o: Options) -> float:
    if o.sensitivity == "delta2" or fhat is None:
        return d[i][x] * d[i][x]
    if o.sensitivity == "fisher":
        return fhat[i][x]
    return fhat[i][x] * (d[i][x] * d[i][x])


# -- 1. resolve --------------------------------------------------------------------------------------------------------


def _resolve(tensors: list[Tensor], o: Options) -> dict[str, Any]:
    """Fill in the shares r and `whole`; return the counts."""
    K = len(o.keys)
    stats: dict[str, Any] = {"support": [0] * K, "wins": [0] * K}
    stats.update(dict.fromkeys(("unique", "overlap", "conflict", "agreement", "draws"), 0))
    phi = _sharing(tensors, K)
    for tensor in tensors:
        for x in range(tensor.size):
            active = [i for i in range(K) if tensor.active[i][x]]
            for i in active:
                stats["support"][i] += 1
            if len(active) == 0:
                continue
            if len(active) == 1:
                stats["unique"] += 1
                shares, whole = {active[0]: 1.0}, True
            elif len({_sign(tensor.d[i][x]) for i in active}) == 1:
                stats["overlap"] += 1
                stats["agreement"] += 1
                shares, whole = _agree(tensor, x, active, phi, o)
            else:
                stats["overlap"] += 1
                stats["conflict"] += 1
                shares, whole, winners = _arbitrate(tensor, x, active, phi, o)
                stats["draws"] += not shares
                for i in winners:
                    stats["wins"][i] += 1
            for i, share in shares.items():
                tensor.r[i][x] = share
            contributing = [share for share in shares.values() if share > 0.0]
            tensor.whole[x] = whole or contributing == [1.0]
    return stats


def _sign(value: float) -> int:
    return 1 if value > 0.0 else -1


def _arbitrate(tensor: Tensor, x: int, active: list[int], phi, o: Options):
    """Shares in a conflict (none: a draw), whether they are whole, and who won: T, or the camp that was elected."""
    s = {i: tensor.s[i][x] for i in active}
    if o.arbitration == "winner":
        return _winner_takes(tensor, x, active, _top(tensor, x, active), phi, o)
    if o.arbitration == "random":
        top = max(active, key=lambda i: o.random_hash64(o.keys[i], tensor.name, x))  # equal hashes: the first key
        return _winner_takes(tensor, x, active, [top], phi, o)
    if o.arbitration == "margin":
        first, second = sorted(s.values(), reverse=True)[:2]
        if first >= o.margin * second:
            return _winner_takes(tensor, x, active, _top(tensor, x, active), phi, o)
        return _soft(s, o.power), False, _agreed_top(tensor, x, active)
    if o.arbitration == "soft":
        return _soft(s, o.power), False, _agreed_top(tensor, x, active)
    positive = [i for i in active if tensor.d[i][x] > 0.0]  # elect
    negative = [i for i in active if tensor.d[i][x] < 0.0]
    up, down = _add(s[i] for i in positive), _add(s[i] for i in negative)
    if up == down:
        return {}, False, []
    camp = positive if up > down else negative
    shares, whole = _agree(tensor, x, camp, phi, o)
    return shares, whole, camp


def _top(tensor: Tensor, x: int, among: list[int]) -> list[int]:
    """T: the experts with the largest s and, among them, the largest |d|."""
    largest = max(tensor.s[i][x] for i in among)
    sensitive = [i for i in among if tensor.s[i][x] == largest]
    longest = max(abs(tensor.d[i][x]) for i in sensitive)
    return [i for i in sensitive if abs(tensor.d[i][x]) == longest]


def _agreed_top(tensor: Tensor, x: int, among: list[int]) -> list[int]:
    """T where its signs agree: who has the largest share of a blend."""
    top = _top(tensor, x, among)
    return top if len({_sign(tensor.d[i][x]) for i in top}) == 1 else []


def _winner_takes(tensor: Tensor, x: int, active: list[int], top: list[int], phi, o: Options):
    signs = {_sign(tensor.d[i][x]) for i in top}
    if len(signs) > 1:
        return {}, False, []
    if o.allies == "join":
        camp = [i for i in active if _sign(tensor.d[i][x]) in signs]
        shares, whole = _agree(tensor, x, camp, phi, o)
        return shares, whole, top
    return {i: 1.0 / len(top) for i in top}, True, top


def _soft(s: dict[int, float], power: float) -> dict[int, float]:
    largest = max(s.values())
    raw = {i: (value / largest) ** power if largest > 0.0 else 1.0 for i, value in s.items()}
    total = _add(raw.values())
    return {i: value / total for i, value in raw.items()}


def _agree(tensor: Tensor, x: int, group: list[int], phi, o: Options) -> tuple[dict[int, float], bool]:
    """Shares of experts that agree in sign, and whether these shares are whole by the rule (they add up to one)."""
    m = len(group)
    if o.agreement == "sum":
        return dict.fromkeys(group, 1.0), False
    if o.agreement == "winner":
        top = _top(tensor, x, group)
        return {i: 1.0 / len(top) for i in top}, True
    if o.agreement == "multiplicity":
        return {i: mean_inverse_count([phi[i][j] for j in group if j != i]) for i in group}, False
    total = _add(tensor.s[i][x] for i in group)
    if o.agreement == "mean" or total == 0.0:
        return dict.fromkeys(group, 1.0 / m), True
    return {i: tensor.s[i][x] / total for i in group}, True


def mean_inverse_count(probabilities: list[float]) -> float:
    """E[1/(1+N)], N the number of successes of independent Bernoulli trials: every outcome is enumerated."""
    total = 0.0
    for outcome in range(2 ** len(probabilities)):
        chance, successes = 1.0, 0
        for j, p in enumerate(probabilities):
            success = outcome >> j & 1
            chance *= p if success else 1.0 - p
            successes += success
        total += chance / (1 + successes)
    return total


def _sharing(tensors: list[Tensor], K: int) -> list[list[float]]:
    """phi[i][j]: how far experts i and j share a direction, from the conflict share of their overlap in the model."""
    phi = [[0.0] * K for _ in range(K)]
    for i in range(K):
        for j in range(K):
            overlap = conflict = 0
            for tensor in tensors:
                for x in range(tensor.size):
                    if i != j and tensor.active[i][x] and tensor.active[j][x]:
                        overlap += 1
                        conflict += _sign(tensor.d[i][x]) != _sign(tensor.d[j][x])
            if overlap and conflict / overlap < 0.5:
                c = conflict / overlap
                phi[i][j] = max(0.0, 1.0 - c / (1.0 - c))
    return phi


# -- 2. sparsify -------------------------------------------------------------------------------------------------------


def _scopes(tensors: list[Tensor], o: Options) -> list[list[Tensor]]:
    """The groups of tensors within which scores are compared; 1-D tensors and the like keep everything."""
    for tensor in tensors:
        if not tensor.sparsifiable:
            tensor.kept = [[True] * tensor.size for _ in o.keys]
    sparsifiable = [tensor for tensor in tensors if tensor.sparsifiable]
    return [sparsifiable] if o.scope == "model" else [[tensor] for tensor in sparsifiable]


def _is_merged(o: Options) -> bool:
    return o.score == "merged" and o.sparsify in {"magnitude", "magprune"}


def _sparsify(group: list[Tensor], o: Options) -> None:
    if o.sparsify == "none":
        for tensor in group:
            tensor.kept = [[True] * tensor.size for _ in o.keys]
    elif _is_merged(o):
        if o.keys:
            _sparsify_one(group, None, range(len(o.keys)), o.density[0], o)
    else:
        for i, key in enumerate(o.keys):
            _sparsify_one(group, key, [i], o.density[i], o)


def _sparsify_one(group: list[Tensor], key: str | None, members, density: float, o: Options) -> None:
    """One decision for all experts in `members`: one expert, or all of them with score merged."""
    if density >= 1.0:
        keep, chance = None, {}
    elif o.sparsify == "magprune":
        keep, chance = _magprune(_scores(group, members, o), group, key, density, o)
    else:
        keep, chance = _largest(_scores(group, members, o), group, key, density, o), {}
    for index, tensor in enumerate(group):
        for x in range(tensor.size):
            for i in members:
                tensor.kept[i][x] = keep is None or (index, x) in keep
                tensor.p[i][x] = chance.get((index, x), 1.0)


def _eligible(group: list[Tensor], members) -> list[tuple[int, int]]:
    """(tensor, coordinate) that the sparsifier counts: t != 0 and, with score merged, a sum that is not 0 either."""
    places = []
    for index, tensor in enumerate(group):
        for x in range(tensor.size):
            updates = [tensor.t(i, x) for i in members]
            if any(t != 0.0 for t in updates) and _add(updates) != 0.0:
                places.append((index, x))
    return places


def _scores(group: list[Tensor], members, o: Options) -> dict[tuple[int, int], np.float32]:
    scores = {}
    for index, x in _eligible(group, members):
        tensor = group[index]
        if _is_merged(o):
            value = abs(_add(tensor.t(i, x) for i in members))
        elif o.sparsify == "fisher_magnitude":
            value = abs(tensor.d[members[0]][x])
            if tensor.fhat is not None:
                value *= math.sqrt(tensor.fhat[members[0]][x])
        elif o.score == "share":
            value = abs(tensor.t(members[0], x))
        else:
            value = abs(tensor.d[members[0]][x])
        scores[index, x] = np.float32(value)
    return scores


def _largest(scores, group: list[Tensor], key: str | None, density: float, o: Options) -> set[tuple[int, int]]:
    """The k = max(1, int(ρ·n)) places with the largest scores; hashes decide among equals at the threshold."""
    if not scores:
        return set()
    k = max(1, int(density * len(scores)))
    threshold = sorted(scores.values(), reverse=True)[k - 1]
    above = {place for place, value in scores.items() if value > threshold}
    ties = [place for place, value in scores.items() if value == threshold]
    wanted = k - len(above)
    if wanted == len(ties):
        return above | set(ties)
    hashes = {(index, x): o.hash64(key, group[index].name, x) for index, x in ties}
    if o.scope == "tensor" and group[0].size <= EXACT_TIES_UP_TO:
        return above | set(sorted(ties, key=lambda place: (hashes[place], place))[:wanted])
    limit = wanted * 2**64 // len(ties)
    return above | {place for place in ties if hashes[place] < limit}


def _magprune(scores, group: list[Tensor], key: str | None, density: float, o: Options):
    """Places that survive a draw with keep-probability linear in the mid-rank of the score, and these probabilities."""
    coarse = {place: int(np.float32(value).view(np.uint32)) >> 15 for place, value in scores.items()}
    values, n = list(coarse.values()), len(coarse)
    keep, chance = set(), {}
    for (index, x), value in coarse.items():
        midrank = (sum(v < value for v in values) + sum(v == value for v in values) / 2) / n
        p = (density - o.epsilon) + 2.0 * o.epsilon * midrank
        chance[index, x] = min(1.0, max(0.0, p))
        if o.hash64(key, group[index].name, x) < p * 2.0**64:  # exact: Python compares int and float without rounding
            keep.add((index, x))
    return keep, chance


def _sparsifier_counts(tensors: list[Tensor], o: Options) -> dict[str, list[int]]:
    """n of the sparsifier and how many of them were kept; with score merged the same numbers for each expert."""
    group = [tensor for tensor in tensors if tensor.sparsifiable]
    eligible, kept = [], []
    for i in range(len(o.keys)):
        places = _eligible(group, range(len(o.keys)) if _is_merged(o) else [i])
        eligible.append(len(places))
        kept.append(sum(group[index].kept[i][x] for index, x in places))
    return {"eligible": eligible, "kept": kept}


# -- 3. rescale and compose --------------------------------------------------------------------------------------------


def _factors(tensors: list[Tensor], o: Options) -> dict[str, list[float]]:
    """g per tensor and expert, from norms over the sparsifier's scope."""
    factors = {tensor.name: [1.0] * len(o.keys) for tensor in tensors}
    if o.sparsify == "none" or o.rescale in {"none", "inverse_probability"}:
        return factors
    for group in _scopes(tensors, o):
        for i in range(len(o.keys)):
            if o.density[i] < 1.0:
                g = _factor(group, i, o)
                factors.update({t.name: [*factors[t.name][:i], g, *factors[t.name][i + 1 :]] for t in group})
    return factors


def _factor(group: list[Tensor], i: int, o: Options) -> float:
    before = [(1.0, abs(tensor.t(i, x))) for tensor in group for x in range(tensor.size)]
    if o.sparsify != "magprune" and _ties_are_many(group, o):
        after = _expected_after(group, i, o)
    else:
        after = [(1.0, abs(tensor.t(i, x))) for tensor in group for x in range(tensor.size) if tensor.kept[i][x]]
    if o.rescale == "l2":
        norm_before = math.sqrt(math.fsum(share * t * t for share, t in before))
        norm_after = math.sqrt(math.fsum(share * t * t for share, t in after))
    else:
        norm_before, norm_after = (math.fsum(share * t for share, t in terms) for terms in (before, after))
    if norm_after == 0.0:
        return 1.0
    return min(o.rescale_max, norm_before / norm_after)


def _ties_are_many(group: list[Tensor], o: Options) -> bool:
    """Whether the group is large, and each threshold that cuts a class of ties in two cuts a large one."""
    if sum(tensor.size for tensor in group) <= EXACT_TIES_UP_TO:
        return False
    everyone = range(len(o.keys))
    for i, members in [(0, everyone)] if _is_merged(o) else [(i, [i]) for i in everyone]:
        scores = list(_scores(group, members, o).values())
        if o.density[i] < 1.0 and scores:
            k = max(1, int(o.density[i] * len(scores)))
            threshold = sorted(scores, reverse=True)[k - 1]
            above, ties = sum(s > threshold for s in scores), sum(s == threshold for s in scores)
            if 0 < k - above < ties < MANY_TIES:
                return False
    return True


def _expected_after(group: list[Tensor], i: int, o: Options) -> list[tuple[float, float]]:
    """(share that stays, |t|) where ties are many: all above the threshold and of each tie the share that is kept."""
    members = range(len(o.keys)) if _is_merged(o) else [i]
    scores = _scores(group, members, o)
    if not scores:
        return []
    k = max(1, int(o.density[i] * len(scores)))
    threshold = sorted(scores.values(), reverse=True)[k - 1]
    above = sum(value > threshold for value in scores.values())
    share = (k - above) / sum(value == threshold for value in scores.values())
    return [
        (1.0 if value > threshold else share, abs(group[index].t(i, x)))
        for (index, x), value in scores.items()
        if value >= threshold
    ]


def _compose(tensors: list[Tensor], factors: dict[str, list[float]], o: Options) -> tuple[Tensors, Tensors]:
    merged, deltas = {}, {}
    for tensor in tensors:
        values, delta = list(tensor.base), [0.0] * tensor.size
        for x in range(tensor.size):
            contributing = [i for i in range(len(o.keys)) if tensor.r[i][x] > 0.0]
            survivors = [i for i in contributing if tensor.kept[i][x]]
            if not survivors:
                continue  # the base, bit for bit (base + 0.0 would turn -0.0 into 0.0)
            g = {i: factors[tensor.name][i] for i in survivors}
            terms = [g[i] * tensor.t(i, x) for i in survivors]
            if o.rescale == "inverse_probability":
                g = {i: 1.0 / tensor.p[i][x] for i in survivors}
                terms = [tensor.t(i, x) / tensor.p[i][x] for i in survivors]
            delta[x] = o.lam * _add(terms)
            values[x] = tensor.base[x] + delta[x]
            same = len({tensor.stored[i][x] for i in contributing}) == 1
            plain = all(o.lam * g[i] * o.weight[i] == 1.0 for i in survivors)
            if tensor.whole[x] and survivors == contributing and same and plain:
                values[x] = tensor.stored[survivors[0]][x]
        merged[tensor.name] = np.array(values, dtype=np.float64).reshape(tensor.shape)
        deltas[tensor.name] = np.array(delta, dtype=np.float64).reshape(tensor.shape)
    return merged, deltas
