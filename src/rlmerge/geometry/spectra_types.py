"""The section `spectra` of a geometry report as types, for whoever reads it. What each figure is: docs/spectra.md.

Figures of a scope are means over its matrices, each counted once; null where a figure is defined for none of them.
Keys that are numbers are k (directions) or α (shares of a mask), as text.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

Number = float | None


class SpectraSettingsSaid(TypedDict):
    """What decides the numbers."""

    energies: list[int]
    angles: int
    principal_rank: int
    shares: list[float]
    null: Literal["none", "masks", "all"]
    exact: bool
    limit: float
    seed: int


class OfBase(TypedDict):
    """The base's matrices. `lattice`: the share of them whose weights came out of few bits; `distinct_in_32`: how few
    values stand in a block of 32.
    """

    norm: Number
    spectral_norm: Number
    stable_rank: Number
    effective_rank: Number
    gap: Number
    distinct_in_32: Number
    lattice: Number


class OfDelta(TypedDict):
    """The updates. `energy`: share of ‖δ‖² in the leading k directions."""

    norm: Number
    spectral_norm: Number
    stable_rank: Number
    effective_rank: Number
    rank: Number
    energy: dict[str, Number]
    energy_error: dict[str, Number]


class Shift(TypedDict):
    """What updates do to singular values. `nss`: ‖σ(W₊) − σ(W₀)‖ / ‖σ(W₀)‖."""

    nss: Number
    nss_leading: Number
    relative_norm: Number
    residual: Number
    error: Number
    residual_of_noise: NotRequired[Number]


class Angles(TypedDict):
    """Degrees between the leading subspaces of W₀ and W₊."""

    left_max: Number
    left_mean: Number
    right_max: Number
    right_mean: Number
    error: Number


class Masks(TypedDict):
    """Shares of the changed weights that lie in a mask, by α; errors beside the null model. A zero matrix has no
    principal weights.
    """

    density: Number
    low: dict[str, Number]
    low_error: NotRequired[dict[str, Number]]
    principal: NotRequired[dict[str, Number]]
    principal_error: NotRequired[dict[str, Number]]


class SpectraOfExpert(TypedDict):
    """One expert; `changed`: how many matrices it changed at all."""

    changed: int
    delta: OfDelta
    shift: Shift
    angles: Angles
    masks: Masks


class SpectraOfNull(TypedDict):
    """The same updates, shuffled: masks, and with `null: all` also the rest."""

    masks: Masks
    shift: NotRequired[Shift]
    angles: NotRequired[Angles]


class SpectraNull(TypedDict):
    """By expert; nothing with `null: none`."""

    experts: dict[str, SpectraOfNull]


class Similarity(TypedDict):
    """‖VaᵀVb‖²/k of two updates' leading k directions, and what random subspaces have."""

    left: Number
    right: Number
    left_chance: Number
    right_chance: Number


class SpectraPair(TypedDict):
    """Two experts, by k."""

    a: str
    b: str
    similarity: dict[str, Similarity]


class SpectraScope(TypedDict):
    """The whole model, a layer, a kind, or a tensor: then also its shape, how it was decomposed, and its k and r.

    Without matrices there is no `base`, and nothing of experts.
    """

    name: NotRequired[str]
    layer: NotRequired[int | None]
    kind: NotRequired[str]
    shape: NotRequired[list[int]]
    by: NotRequired[Literal["exact", "sketch"]]
    angles_k: NotRequired[int]
    principal_rank: NotRequired[int]
    matrices: int
    base: NotRequired[OfBase]
    experts: dict[str, SpectraOfExpert]
    pairs: list[SpectraPair]
    null: SpectraNull


class Spectra(TypedDict):
    """The whole section. `left_out`: names of tensors that are not decomposed, by the reason."""

    settings: SpectraSettingsSaid
    total: SpectraScope
    layers: list[SpectraScope]
    kinds: list[SpectraScope]
    tensors: list[SpectraScope]
    left_out: dict[str, list[str]]
    warnings: list[str]
