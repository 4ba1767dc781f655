"""How much a model loses when its weights are moved: along random directions, and along the delta of another expert.

Sharpness: E of L(θ + σ·‖θl‖·ul) − L(θ) over directions u with ‖ul‖ = 1 in every tensor l. A direction is taken both
ways and the two are averaged, which leaves the expectation as it is and takes the slope out of the noise.
Robustness of expert i along expert j: Li(θi + s·δj) − Li(θi), beside directions of equal norm and support (our reading
of arXiv 2607.22039).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .directions import along_delta, random_direction, shuffled_delta
from .landscape import Landscape
from .weights import Direction, make_point


def sharpness(space: Landscape, key: str, number: int, sigmas: Sequence[float], directions: int, seed: int) -> Any:
    """Rises of a model's loss on a set along random directions of relative size σ."""
    point = make_point([(key, 1.0)])
    start = space.loss(point, number)

    def loss(moves: Sequence[tuple[float, Direction]]) -> float:
        return space.moved(point, number, moves)

    drawn = [random_direction(space.weights, key, seed + place) for place in range(directions)]
    steps = [{"sigma": sigma} | spread(both_ways(loss, start, of, sigma) for of in drawn) for sigma in sigmas]
    return {"model": key or None, "set": space.sets[number].name, "loss": start, "sigmas": steps}


def both_ways(
    loss: Callable[[Sequence[tuple[float, Direction]]], float], start: float, direction: Direction, scale: float
) -> float:
    """The mean rise from `start` along a direction and against it."""
    return (loss([(scale, direction)]) - start + loss([(-scale, direction)]) - start) / 2.0


def robustness(
    space: Landscape, expert: str, along: str, number: int, scales: Sequence[float], directions: int, seed: int
) -> Any:
    """Rises of an expert's loss on its set along the delta of another, against it, and along its controls.

    A rise along the delta and a fall of the same size against it are a slope: the expert was not at its best.
    """
    point = make_point([(expert, 1.0)])
    start = space.loss(point, number)
    controls = [shuffled_delta(space.weights, along, seed + place) for place in range(directions)]
    steps = []
    for scale in scales:
        delta = along_delta(space.weights, along)
        rise, against = (space.moved(point, number, [(way * scale, delta)]) - start for way in (1.0, -1.0))
        control = spread(space.moved(point, number, [(scale, of)]) - start for of in controls)
        steps.append({"scale": scale, "rise": rise, "against": against, "control": control})
    return {"expert": expert, "along": along, "set": space.sets[number].name, "loss": start, "scales": steps}


def spread(values: Any) -> dict[str, Any]:
    """Mean of rises over directions, their standard deviation (null for a single one), and themselves."""
    found = [float(value) for value in values]
    deviation = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return {"rise": float(np.mean(found)), "deviation": deviation, "directions": found}


def count_moves(
    experts: Sequence[str], sets: int, sigmas: Sequence[float], scales: Sequence[float], directions: int
) -> int:
    """Passes over a set that sharpness (of each expert on its set, and the base on all) and robustness take."""
    pairs = len(experts) * (len(experts) - 1)
    return 2 * directions * len(sigmas) * (len(experts) + sets) + pairs * len(scales) * (2 + directions)
