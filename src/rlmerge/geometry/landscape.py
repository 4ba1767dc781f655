"""The function on the lines and planes through a base and its experts: losses and pass rates, barriers between models.

Barrier: B = max over α of L((1 − α)·A + α·B) − [(1 − α)·L(A) + α·L(B)] (Frankle et al. 2020, arXiv 1912.05671, whose
error is our 1 − pass rate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import mean_score
from rlmerge.fisher.data import SequenceChoice

from .problem_sets import ProblemSet
from .resampling import Resampling, barrier
from .weights import BASE, Direction, Point, Weights, between, make_point

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """A straight line between two models, and the numbers of the sets on which it is measured."""

    start: str
    end: str
    sets: tuple[int, ...]


class Landscape:
    """Measures points, each once.

    pass_rate   how many problems are answered at the points of paths; 0 for none
    heard       is told of each pass over a set that was made
    """

    def __init__(
        self, weights: Weights, sets: Sequence[ProblemSet], pass_rate: int, choice: SequenceChoice, unsafe: bool,
        draws: int, seed: int, heard: Callable[[], None],
    ) -> None:  # fmt: skip
        self.weights = weights
        self.sets = sets
        self.pass_rate = pass_rate
        self.resampled = [Resampling(one.tokens, draws, seed) for one in sets]
        self._drawing = (choice, unsafe, draws, seed)
        self._heard = heard
        self._losses: dict[tuple[Point, int], Losses] = {}
        self._answers: dict[tuple[Point, int], Losses] = {}

    def losses(self, point: Point, of: Iterable[int]) -> list[Losses]:
        """−Σ log p of each problem, fp64[n], for some sets at a point."""
        wanted = tuple(of)
        missing = [number for number in wanted if (point, number) not in self._losses]
        if missing:
            model = self.weights.place(point)
            for number in missing:
                self._losses[point, number] = self.sets[number].losses(model)
                self._heard()
        return [self._losses[point, number] for number in wanted]

    def moved(self, point: Point, number: int, moves: Sequence[tuple[float, Direction]]) -> float:
        """The loss per token on a set at a point that is moved along directions."""
        losses = self.sets[number].losses(self.weights.place(point, moves))
        self._heard()
        return float(self.resampled[number].mean(losses))

    def loss(self, point: Point, number: int) -> float:
        """The loss per token on a set at a point."""
        return float(self.resampled[number].mean(self.losses(point, (number,))[0]))

    def answers(self, point: Point, number: int) -> Losses:
        """1 for each problem that is answered rightly, else 0, fp64[problems]."""
        if (point, number) not in self._answers:
            choice, unsafe, *_ = self._drawing
            model = self.weights.place(point)
            self._answers[point, number] = self.sets[number].answers(model, self.pass_rate, choice, unsafe)
            self._heard()
        return self._answers[point, number]

    # -- paths ----------------------------------------------------------------------------------------------------

    def path(self, path: Path, alphas: NDArray[np.float64]) -> dict[str, Any]:
        """Curves, barriers and dips of a path on its sets."""
        points = [between(path.start, path.end, float(alpha)) for alpha in alphas]
        curves = []
        for number in path.sets:
            values = np.array([self.losses(point, (number,))[0] for point in points])
            curve = {"set": self.sets[number].name, "measure": "loss"}
            curves.append(curve | barrier(self.resampled[number], values, alphas))
            if self.pass_rate:
                wrong = 1.0 - np.array([self.answers(point, number) for point in points])
                _, _, draws, seed = self._drawing
                sampled = Resampling(np.ones(wrong.shape[1]), draws, seed)
                curve = {"set": self.sets[number].name, "measure": "failure"}
                curves.append(curve | barrier(sampled, wrong, alphas))
        return {
            "start": path.start or None,
            "end": path.end,
            "distance": self.weights.distance(path.start, path.end),
            "alphas": [float(alpha) for alpha in alphas],
            "curves": curves,
        }

    def model(self, key: str) -> dict[str, Any]:
        """Losses, and pass rates where they are asked for, of one of the models on all sets."""
        point = make_point([(key, 1.0)])
        found: dict[str, Any] = {"model": key or None, "losses": [], "pass_rates": []}
        for number, one in enumerate(self.sets):
            losses = self.losses(point, (number,))[0]
            found["losses"].append({"set": one.name} | self.resampled[number].estimate(losses))
            if self.pass_rate:
                rate = mean_score(self.answers(point, number))
                ends = {name: float(getattr(rate, name)) for name in ("value", "low", "high")}
                found["pass_rates"].append({"set": one.name} | ends)
        return found

    # -- planes ---------------------------------------------------------------------------------------------------

    def plane(self, first: str, second: str, grid: Sequence[float], of: Sequence[int]) -> dict[str, Any]:
        """Losses L(θ0 + a·δA + b·δB); rows are a, columns b."""
        rows = [[self.losses(point, of) for point in row] for row in plane_points(first, second, grid)]
        means = [
            [[float(self.resampled[number].mean(losses[place])) for losses in row] for row in rows]
            for place, number in enumerate(of)
        ]
        return {
            "a": first,
            "b": second,
            "grid": [float(step) for step in grid],
            "losses": [{"set": self.sets[number].name, "values": values} for number, values in zip(of, means)],
        }


def plane_points(first: str, second: str, grid: Sequence[float]) -> list[list[Point]]:
    """The points of a plane; rows are shares of the first expert's delta."""
    return [[make_point([(first, a), (second, b)]) for b in grid] for a in grid]


def make_paths(experts: Sequence[str], owned: dict[str, int]) -> list[Path]:
    """From the base to each expert on its own set, and between each two on the sets of both."""
    found = [Path(BASE, key, (owned[key],)) for key in experts]
    for first, second in combinations(experts, 2):
        found.append(Path(first, second, tuple(dict.fromkeys((owned[first], owned[second])))))
    return found


def count_passes(
    paths: Sequence[Path], alphas: NDArray[np.float64], planes: Sequence[tuple[str, str]], grid: Sequence[float],
    owned: dict[str, int], known: Iterable[tuple[Point, int]],
) -> int:  # fmt: skip
    """Passes over a set that paths and planes take beside those that are known."""
    wanted = {
        (between(path.start, path.end, float(alpha)), number)
        for path in paths
        for alpha in alphas
        for number in path.sets
    }
    for first, second in planes:
        points = (point for row in plane_points(first, second, grid) for point in row)
        wanted |= {(point, owned[key]) for point in points for key in (first, second)}
    return len(wanted - set(known))
