"""The section `function` of a geometry report as types, for whoever reads it; without torch.

Losses are mean −log p per scored token, divergences and entropies means per scored token, all in nats. Intervals are
95 %, over problems; null where a single problem cannot tell. A model that is null is the base.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Number = float | None


class Interval(TypedDict):
    """A mean over problems."""

    value: float
    low: Number
    high: Number


class Extreme(Interval):
    """The largest or smallest value of a curve, and at which α it is."""

    at: float


class OnSet(Interval):
    """A mean over the problems of a set."""

    set: str


class Problems(TypedDict):
    """Sequences that models were compared on. `accepted` of `tried` completions were right, where any were verified."""

    name: str
    data: str
    experts: list[str]
    problems: int
    sequences: int
    tokens: int
    accepted: int | None
    tried: int | None


class Measured(TypedDict):
    """One model on all sets. Intervals of pass rates are Wilson's."""

    model: str | None
    losses: list[OnSet]
    pass_rates: list[OnSet]


class DeltaSize(TypedDict):
    """‖δ‖₂, and the support as a share of all weights."""

    expert: str
    norm: float
    support: float


class Divergence(TypedDict):
    """An expert beside the base on one set."""

    expert: str
    set: str
    kl_expert_base: Interval
    kl_base_expert: Interval
    entropy: Interval
    entropy_base: Interval


class Curve(TypedDict):
    """A loss, or 1 − pass rate, along a path. The excess is over the chord between the ends; the barrier is the largest
    one, at least 0, the dip the smallest, at most 0.
    """

    set: str
    measure: Literal["loss", "failure"]
    values: list[Interval]
    excess: list[Interval]
    barrier: Extreme
    dip: Extreme


class Line(TypedDict):
    """The straight path (1 − α)·start + α·end, and the distance of its ends."""

    start: str | None
    end: str
    distance: float
    alphas: list[float]
    curves: list[Curve]


class PlaneLosses(TypedDict):
    """Losses at θ0 + a·δa + b·δb: values[i][j] at a = grid[i], b = grid[j]."""

    set: str
    values: list[list[float]]


class Plane(TypedDict):
    """The plane through the base and two experts."""

    a: str
    b: str
    grid: list[float]
    losses: list[PlaneLosses]


class Spread(TypedDict):
    """Rises of a loss along random directions: their mean, standard deviation (null for one), and each."""

    rise: float
    deviation: Number
    directions: list[float]


class Shaken(Spread):
    """Along directions whose norm is σ times that of each tensor."""

    sigma: float


class Sharpness(TypedDict):
    """How much a loss rises along random directions."""

    model: str | None
    set: str
    loss: float
    sigmas: list[Shaken]


class Pushed(TypedDict):
    """Rises of a loss when scale·δ of another expert is added, is subtracted, and of its controls."""

    scale: float
    rise: float
    against: float
    control: Spread


class Robustness(TypedDict):
    """How much an expert's loss on its own set rises along the delta of another."""

    expert: str
    along: str
    set: str
    loss: float
    scales: list[Pushed]


class Function(TypedDict):
    """The whole section; a measure that was not asked for is absent."""

    settings: dict[str, Any]
    sets: list[Problems]
    models: list[Measured]
    deltas: list[DeltaSize]
    divergence: NotRequired[list[Divergence]]
    paths: NotRequired[list[Line]]
    planes: NotRequired[list[Plane]]
    sharpness: NotRequired[list[Sharpness]]
    robustness: NotRequired[list[Robustness]]
