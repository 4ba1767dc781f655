"""All figures of one matrix: what the updates are, what they do to the base's spectrum, and where they fall.

The matrix is read anew wherever it is needed, for LAPACK's arrays are what fills memory: at most six times the matrix
in fp64 at any moment, and K/4 for the subspaces of K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import RecipeError

from .decompositions import (
    F64,
    Make,
    Spectrum,
    effective_rank,
    energy,
    energy_error,
    exact_spectrum,
    sketched_spectrum,
    stable_rank,
)
from .lattice import look_for_lattice
from .masks import Mask, key_of, make_mask, permute_within_bins, standard_error, stored
from .matrices import Matrix, MatrixReader
from .subspaces import angle_figures, pair_figures, shift_figures

NULLS = ("none", "masks", "all")


@dataclass(frozen=True)
class SpectraSettings:
    """What is measured of spectra.

    energies        k of the energy in the leading k directions, and of the subspaces that experts have in common
    angles          k of the principal angles between base and expert, at most half of min(m, n)
    principal_rank  r of the reconstruction whose largest weights are the principal ones, at most a quarter of min(m, n)
    shares          α of the masks
    null            the shuffled update is compared by nothing, by its masks, or also by its spectrum and angles
    exact           never by a random sketch
    limit           m·n·min(m, n) from which a matrix is sketched
    seed            of sketches and shuffles
    memory          bytes that all matrices in work may take together; by default what the largest one takes, and at
                    least 2 GiB
    """

    energies: tuple[int, ...] = (1, 8, 64, 256)
    angles: int = 512
    principal_rank: int = 64
    shares: tuple[float, ...] = (0.3, 0.5)
    null: str = "masks"
    exact: bool = False
    limit: float = 4e11
    seed: int = 0
    memory: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be measured."""
        if self.null not in NULLS:
            raise RecipeError(f"null {self.null!r}: choose none, masks or all.")
        if not self.energies or min(*self.energies, self.angles, self.principal_rank) < 1:
            raise RecipeError("energies, angles and principal_rank count directions: write whole numbers from 1 on.")
        if not all(0.0 < share < 1.0 for share in self.shares):
            raise RecipeError(f"shares {list(self.shares)}: a mask is a part of the weights: between 0 and 1.")

    def sketched(self, matrix: Matrix) -> bool:
        """Whether the exact way is too dear."""
        return not self.exact and float(matrix.size) * matrix.short > self.limit

    def angles_of(self, matrix: Matrix) -> int:
        """k of its principal angles."""
        return max(1, min(self.angles, matrix.short // 2))

    def rank_of(self, matrix: Matrix) -> int:
        """r of its principal weights."""
        return max(1, min(self.principal_rank, matrix.short // 4))

    def energies_of(self, matrix: Matrix) -> tuple[int, ...]:
        """Those k that it has."""
        return tuple(k for k in self.energies if k <= matrix.short)

    def common_of(self, matrix: Matrix) -> tuple[int, ...]:
        """Those k that are at most an eighth of it: random subspaces have little in common then."""
        return tuple(k for k in self.energies if k == 1 or k <= matrix.short // 8)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what changes no figure."""
        found = asdict(self)
        del found["memory"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


Tree = dict[str, Any]
"""Dicts of dicts of numbers or None."""


def measure_matrix(reader: MatrixReader, matrix: Matrix, name: str, experts: Sequence[str], s: SpectraSettings) -> Tree:
    """The figures of one matrix: `base`, `experts` by key, `pairs` by key|key, `null` by key."""
    base = reader.base(matrix)
    lattice = look_for_lattice(base)
    masks = _low_masks(base, s)
    del base
    rank = max(s.angles_of(matrix), s.rank_of(matrix))
    whole = _decompose(lambda: _as_float(reader, matrix), matrix, rank, s, key_of(s.seed, "sketch", name))
    found: Tree = {
        "base": {
            "norm": float(np.sqrt(whole.square)),
            "spectral_norm": whole.top,
            "stable_rank": stable_rank(whole),
            "effective_rank": effective_rank(whole),
            "gap": whole.gap(s.angles_of(matrix)),
            "distinct_in_32": lattice.distinct,
            "lattice": float(lattice.found),
        },
        "experts": {},
        "pairs": {},
        "null": {},
    }
    masks |= _principal_masks(whole, s.rank_of(matrix), s)
    kept: dict[str, Spectrum] = {}
    for number, key in enumerate(experts):
        update, kept[key] = _measure_delta(reader, matrix, number, s, key_of(s.seed, "sketch", name, key))
        found["experts"][key], null = _measure_against(reader, matrix, number, key, whole, kept[key], masks, name, s)
        found["experts"][key]["delta"] = update
        if null:
            found["null"][key] = null
    for one, other in combinations(experts, 2):
        found["pairs"][f"{one}|{other}"] = pair_figures(kept[one], kept[other], s.common_of(matrix))
    return found


def _as_float(reader: MatrixReader, matrix: Matrix) -> F64:
    return reader.base(matrix).astype(np.float64)


def _decompose(make: Make, matrix: Matrix, k: int, s: SpectraSettings, key: int) -> Spectrum:
    return sketched_spectrum(make, k, key) if s.sketched(matrix) else exact_spectrum(make, k)


def _measure_delta(
    reader: MatrixReader, matrix: Matrix, number: int, s: SpectraSettings, key: int
) -> tuple[Tree, Spectrum]:
    """Figures of the update itself, and its subspaces as far as they are compared."""
    common = max(s.common_of(matrix), default=1)
    wanted = max(s.energies_of(matrix), default=1) if s.sketched(matrix) else common
    spectrum = _decompose(lambda: reader.delta(matrix, number), matrix, wanted, s, key)
    counts = s.energies_of(matrix)
    figures: Tree = {
        "norm": float(np.sqrt(spectrum.square)),
        "spectral_norm": spectrum.top,
        "stable_rank": stable_rank(spectrum),
        "effective_rank": effective_rank(spectrum),
        "rank": float(spectrum.rank) if spectrum.exact else None,
        "energy": {str(k): energy(spectrum, k) for k in counts},
        "energy_error": {str(k): energy_error(spectrum, k) for k in counts},
    }
    left, right = spectrum.left[:, :common].copy(), spectrum.right[:, :common].copy()
    small = Spectrum(spectrum.values, spectrum.errors, left, right, spectrum.square, spectrum.exact, spectrum.blur)
    return figures, small


def _measure_against(
    reader: MatrixReader, matrix: Matrix, number: int, key: str, whole: Spectrum, delta: Spectrum,
    masks: dict[str, dict[str, Mask]], name: str, s: SpectraSettings,
) -> tuple[Tree, Tree]:  # fmt: skip
    """Figures of an update against the base, and those of the same update shuffled."""

    def moved() -> F64:
        out = reader.delta(matrix, number)
        out += reader.base(matrix)
        return out

    sketch = key_of(s.seed, "sketch", name)
    figures = _shift_and_angles(moved, matrix, whole, float(np.sqrt(delta.square)), s, sketch)
    figures["shift"]["residual_of_noise"] = 1.0 / float(np.sqrt(max(matrix.rows, matrix.columns)))
    dtype = reader.storage(matrix, number)
    change = reader.delta(matrix, number).reshape(-1)
    support = change != 0.0
    if s.null == "none":
        figures["masks"] = _overlaps(support, masks)
        return figures, {}
    base = reader.base(matrix, dtype).reshape(-1)
    shuffled = permute_within_bins(base, change, key_of(s.seed, "null", name, key))
    del change
    values, there = stored(base, shuffled, dtype, reader.kernels, reader.space)
    del shuffled
    null: Tree = {"masks": _overlaps(there, masks)}
    figures["masks"] = _overlaps(support, masks, there)
    if s.null == "all":
        made = values.astype(np.float32).reshape(matrix.rows, matrix.columns) if dtype else None
        size = float(np.linalg.norm(values - base))
        whole_null = values.reshape(matrix.rows, matrix.columns)
        del base, values, there
        null |= _shift_and_angles(
            lambda: whole_null.copy() if made is None else made.astype(np.float64), matrix, whole, size, s, sketch
        )
    return figures, null


def _shift_and_angles(moved: Make, matrix: Matrix, whole: Spectrum, size: float, s: SpectraSettings, key: int) -> Tree:
    """`shift` and `angles` of base + update. An update of 0 moves nothing, and no rounding says otherwise."""
    k = s.angles_of(matrix)
    other = whole if size == 0.0 else _decompose(moved, matrix, k, s, key)
    angles = angle_figures(whole, other, k)
    if size == 0.0:
        angles = {name: None if value is None else 0.0 for name, value in angles.items()}
    return {"shift": shift_figures(whole, other, size), "angles": angles}


# -- masks -------------------------------------------------------------------------------------------------------------


def _low_masks(base: NDArray[np.float32], s: SpectraSettings) -> dict[str, dict[str, Mask]]:
    size = np.abs(base.reshape(-1))
    return {"low": {str(share): make_mask(size, share, False) for share in s.shares}}


def _principal_masks(whole: Spectrum, rank: int, s: SpectraSettings) -> dict[str, dict[str, Mask]]:
    """The largest entries of the rank-r reconstruction; none of a zero matrix."""
    if whole.top == 0.0:
        return {}
    size = (whole.left[:, :rank] * whole.values[:rank]) @ whole.right[:, :rank].T
    np.abs(size, out=size)
    return {"principal": {str(share): make_mask(size.reshape(-1), share, True) for share in s.shares}}


def _overlaps(
    moved: NDArray[np.bool_], masks: dict[str, dict[str, Mask]], null: NDArray[np.bool_] | None = None
) -> Tree:
    """`density` of an update and its overlap with each mask; what its difference from the null may be by chance."""
    found: Tree = {"density": float(np.count_nonzero(moved)) / moved.size}
    for kind, of_shares in masks.items():
        found[kind] = {share: mask.overlap(moved) for share, mask in of_shares.items()}
        if null is not None:
            counts = int(np.count_nonzero(moved)), int(np.count_nonzero(null))
            found[f"{kind}_error"] = {
                share: standard_error(mask.overlap(null), *counts) for share, mask in of_shares.items()
            }
    return found
