"""Measures the function around a base and its experts on data: paths, planes, fragility, KL from the base.

Needs the extra `model`. Models are evaluated in memory, in fp32: one is loaded and takes the weights of every point. On
one machine the numbers are the same in every run; with another number of threads, matrix products round otherwise,
which shows in about the seventh digit of a loss, and in a pass rate only where two tokens are as good as tied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlmerge.errors import GeometryError
from rlmerge.evaluate.run import load_model
from rlmerge.fisher.data import SequenceChoice
from rlmerge.fisher.given import TOKEN_RULE, Progress, as_source
from rlmerge.recipe import Recipe

from .directions import size_of
from .divergence import measure_divergence
from .fragility import count_moves, robustness, sharpness
from .function_types import Function
from .landscape import Landscape, count_passes, make_paths
from .problem_sets import TOKENS, Asked, ProblemSet, ask, draw_set
from .weights import BASE, Weights, make_point

GRID = (-0.25, 0.0, 0.5, 1.0, 1.25)
"""Shares of each delta on a plane: base, experts, average and sum are among its points."""
SIGMAS = (1e-3, 3e-3, 1e-2)
SCALES = (0.5, 1.0)


@dataclass(frozen=True)
class FunctionSettings:
    """What is measured, and how closely.

    choice      which sequences: 'own' right answers of each expert (default), 'gold' or 'sampled'; 64 unless it says
    points      of each path, both ends included; 0 leaves paths out
    grid        shares of both deltas on a plane; () leaves planes out
    sigmas      relative sizes of random moves; () leaves sharpness out
    scales      shares of another expert's delta that are added to an expert; () leaves robustness out
    directions  random ones of each kind
    divergence  whether KL from the base is measured
    pass_rate   problems that are answered at each point of a path, greedily; 0 for none
    tokens      padded tokens of a batch, at most
    draws       of the bootstrap over problems
    seed        of directions and bootstrap; `choice` has that of problems and samples
    """

    choice: SequenceChoice = field(default_factory=SequenceChoice)
    points: int = 11
    grid: tuple[float, ...] = GRID
    sigmas: tuple[float, ...] = SIGMAS
    scales: tuple[float, ...] = SCALES
    directions: int = 3
    divergence: bool = True
    pass_rate: int = 0
    tokens: int = TOKENS
    draws: int = 2000
    seed: int = 0
    unsafe: bool = False
    threads: int | None = None


def measure_function(
    base: Path | str,
    experts: Mapping[str, Path | str],
    data: Path | str | Mapping[str, Path | str],
    settings: FunctionSettings | None = None,
    progress: Callable[[Progress], None] = lambda step: None,
    *,
    tell: Callable[[str], None] = lambda text: None,
    download: bool = False,
) -> Function:
    """The section `function` of a geometry report: JSON-able, without NaN.

    experts    references by key: folders, delta packs, LoRA folders, 'A+B', or recipes (.yml), merged in memory
    data       a .jsonl or a task for all experts, or by key: each expert's own task
    tell       is told once what the measures will take, before most of them are taken
    download   fetches models of the hub
    Generated tasks give problems of their test split, which nothing of ours was trained on. Raises GeometryError or
    FisherError for what cannot be measured, TaskError for the data, EvaluationError for a model, MismatchError for
    models that do not fit together, NonFiniteError for a point whose model answers with no numbers.
    """
    settings = settings or FunctionSettings()
    keys, asked = check_function(experts, data, settings)
    weights, tokenizers = _load_all(base, experts, settings, download, progress)
    sets = []
    for one in asked:
        model = weights.place(make_point([(one.experts[0], 1.0)]))
        sets.append(draw_set(one, model, tokenizers[one.experts[0]], settings.unsafe, settings.tokens, progress))
    return _Measures(weights, sets, keys, settings, progress, tell).run()


def check_function(
    experts: Mapping[str, Path | str], data: Path | str | Mapping[str, Path | str], settings: FunctionSettings | None
) -> tuple[list[str], list[Asked]]:
    """The keys of the experts in order, and the sets to draw. Loads no model; raises what `measure_function` raises
    for settings and data.
    """
    settings = settings or FunctionSettings()
    keys = _check(settings, experts)
    return keys, ask(data, keys, settings.choice, settings.pass_rate)


class _Measures:
    """One run over all measures."""

    def __init__(
        self, weights: Weights, sets: list[ProblemSet], keys: list[str], settings: FunctionSettings,
        progress: Callable[[Progress], None], tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.keys = keys
        self.settings = settings
        self.owned = {key: number for number, one in enumerate(sets) for key in one.experts}
        self.alphas = np.linspace(0.0, 1.0, settings.points).round(12)
        self.paths = make_paths(keys, self.owned) if settings.points else []
        self.planes = list(combinations(keys, 2)) if settings.grid else []
        self._progress, self._tell = progress, tell
        self._what, self._done = "models", 0
        self.space = Landscape(
            weights, sets, settings.pass_rate, settings.choice, settings.unsafe, settings.draws, settings.seed,
            self._heard,
        )  # fmt: skip
        self.models = [BASE, *keys]
        self.first = len(self.models) * len(sets) * (2 if settings.pass_rate else 1)
        self.total = self.first + self._count()

    def run(self) -> Function:
        """All sections, cheapest first."""
        space, settings, owned = self.space, self.settings, self.owned
        began = time.monotonic()
        found: dict[str, Any] = {"settings": self._said(), "sets": [one.to_dict() for one in space.sets]}
        found["models"] = [space.model(key) for key in self.models]
        self._tell(self._cost(time.monotonic() - began))
        sizes = {key: size_of(space.weights, key) for key in self.keys}
        found["deltas"] = [{"expert": key, "norm": n, "support": s} for key, (n, s) in sizes.items()]
        if settings.divergence:
            self._what = "divergence"
            numbers = range(len(space.sets))
            rows = [measure_divergence(space, self.keys, number, self._heard) for number in numbers]
            found["divergence"] = [row for part in rows for row in part]
        if settings.points:
            self._what = "paths"
            found["paths"] = [space.path(path, self.alphas) for path in self.paths]
        if settings.grid:
            self._what = "planes"
            of = {pair: tuple(dict.fromkeys(owned[key] for key in pair)) for pair in self.planes}
            found["planes"] = [space.plane(*pair, settings.grid, of[pair]) for pair in self.planes]
        if settings.sigmas:
            self._what = "sharpness"
            where = [(BASE, number) for number in range(len(space.sets))] + [(key, owned[key]) for key in self.keys]
            options = (settings.sigmas, settings.directions, settings.seed)
            found["sharpness"] = [sharpness(space, key, number, *options) for key, number in where]
        if settings.scales:
            self._what = "robustness"
            pairs = [(key, other) for key in self.keys for other in self.keys if key != other]
            options = (settings.scales, settings.directions, settings.seed)
            found["robustness"] = [robustness(space, a, b, owned[a], *options) for a, b in pairs]
        return cast(Function, found)

    def _count(self) -> int:
        """Passes beyond those over the models."""
        settings, sets = self.settings, len(self.space.sets)
        known = {(make_point([(key, 1.0)]), number) for key in self.models for number in range(sets)}
        grid = settings.grid
        count = count_passes(self.paths, self.alphas, self.planes, grid, self.owned, known)
        if settings.pass_rate:
            count += count_passes(self.paths, self.alphas, [], grid, self.owned, known)
        count += len(self.keys) * sets if settings.divergence else 0
        return count + count_moves(self.keys, sets, settings.sigmas, settings.scales, settings.directions)

    def _cost(self, seconds: float) -> str:
        each = seconds / max(self.first, 1)
        sequences = sum(one.sequences for one in self.space.sets) / len(self.space.sets)
        left = self.total - self.first
        return (
            f"{left} passes over {sequences:.0f} sequences follow, about {each:.1f} s each: "
            f"{left * each / 60.0:.1f} min. Fewer points, directions or sequences take less."
        )

    def _said(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        for name in ("threads", "unsafe"):
            del settings[name]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return plain | {"compute": "fp32", "token_rule": TOKEN_RULE}

    def _heard(self) -> None:
        self._done += 1
        self._progress(Progress(self._what, self._done, self.total))


def _check(settings: FunctionSettings, experts: Mapping[str, Path | str]) -> list[str]:
    """The keys of the experts in order. Raises GeometryError for what means nothing."""
    if not experts or BASE in experts:
        raise GeometryError("no experts, or one with an empty name: give each expert and a key for it.")
    if settings.points == 1 or settings.points < 0:
        raise GeometryError(f"{settings.points} points of a path: it has two ends; write 2 or more, or 0 for no paths.")
    if settings.directions < 1 and (settings.sigmas or settings.scales):
        raise GeometryError(f"{settings.directions} random directions: write at least 1, or leave the measures out.")
    for name in ("grid", "sigmas", "scales"):
        values = getattr(settings, name)
        if not all(np.isfinite(value) for value in values) or (name == "sigmas" and any(s <= 0.0 for s in values)):
            raise GeometryError(f"{name} {list(values)}: write finite numbers, and sizes above 0.")
    if settings.draws < 1 or settings.tokens < 1 or settings.pass_rate < 0:
        raise GeometryError("draws and tokens are at least 1, and pass_rate is a number of problems, or 0.")
    return sorted(experts)


def _load_all(
    base: Path | str, experts: Mapping[str, Path | str], settings: FunctionSettings, download: bool,
    progress: Callable[[Progress], None],
) -> tuple[Weights, dict[str, Any]]:  # fmt: skip
    """The weights of all models, and the tokenizer of each expert; one loaded model stays."""
    total = len(experts) + 1
    progress(Progress("loading", 0, total))
    model, _ = load_model(_source(base, None, download), settings.threads)
    weights, tokenizers = Weights(model), {}
    for place, key in enumerate(sorted(experts), 1):
        progress(Progress("loading", place, total))
        source = _source(experts[key], base, download)
        packed = base if isinstance(source, Path) else None
        expert, tokenizers[key] = load_model(source, settings.threads, base=packed)
        weights.add(key, expert, str(experts[key]))
        del expert  # before the next is loaded
    return weights, tokenizers


def _source(reference: Path | str, base: Path | str | None, download: bool) -> Path | Recipe:
    """What a reference means; a model with an adapter on it is never rounded to the base's dtype."""
    source = as_source(str(reference), base, download)
    own = isinstance(source, Recipe) and Path(str(reference)).suffix not in (".yml", ".yaml")
    return source.with_settings({"out_dtype": "float32"}) if own and isinstance(source, Recipe) else source
