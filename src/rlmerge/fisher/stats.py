"""Judges Fishers: how they are distributed, whether they rest on enough sequences, and what they say of each other.

Everything but the distribution is looked at in the sample of coordinates of which an estimate keeps its halves and its
course (`store.Course`): the same coordinates in every Fisher of one architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint, read_json_object
from rlmerge.checkpoint.pack import check_base
from rlmerge.errors import FisherError
from rlmerge.packs.model import read_tensors
from rlmerge.packs.restore import Reader

from .combine import read_tensor
from .store import sample_positions, sample_stride

QUANTILES = (0.5, 0.9, 0.99, 0.999)
Vector = NDArray[np.float64]
LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class Judged:
    """A Fisher folder and its sample: `full` fp64[m], `halves` fp64[2, m] and `along` {units: fp64[m]} where kept."""

    folder: Path
    meta: dict[str, Any]
    full: Vector
    halves: Vector | None
    along: dict[int, Vector]

    @property
    def mean(self) -> float:
        """Over all entries."""
        entries = self.meta["tensors"].values()
        return sum(entry["sum"] for entry in entries) / sum(entry["count"] for entry in entries)

    def scale(self, part: Vector) -> float:
        """What the mean over all entries would be for another sum at the same sample."""
        return self.mean * float(part.mean() / self.full.mean())


def judge_fishers(
    folders: Sequence[Path | str], base: Path | str | None = None, models: Sequence[Path | str] = ()
) -> dict[str, Any]:
    """Statistics of Fisher folders, JSON-able.

    base      the common base: then also who wins conflicts, by F̂·δ², by δ², by either half, after so many sequences
    models    the models of the Fishers, in their order, where those that fisher.json names have moved
    Raises FisherError for folders that do not belong together.
    """
    paths = [Path(folder) for folder in folders]
    metas = [_meta(path) for path in paths]
    names = _common(paths, metas)
    strides = {sample_stride(entry["count"] for entry in meta["tensors"].values()) for meta in metas}
    if len(strides) > 1:
        raise FisherError(
            f"{', '.join(map(str, paths))}: hold different tensors, so their samples are of different coordinates. "
            "Estimate them with the same --only."
        )
    stride = strides.pop()
    judged = [_read(path, meta, names, stride) for path, meta in zip(paths, metas)]
    found: dict[str, Any] = {
        "fishers": {str(one.folder): _alone(one) for one in judged},
        "pairs": [
            {"fishers": [str(a.folder), str(b.folder)], "rank_correlation": rank_correlation(a.full, b.full)}
            for a, b in combinations(judged, 2)
        ],
        "sample": len(judged[0].full),
    }
    if base is not None:
        if models and len(models) != len(paths):
            raise FisherError(f"{len(models)} models for {len(paths)} Fishers: give one for each, in their order.")
        chosen = [Path(model) for model in models] or [Path(str(meta.get("model"))) for meta in metas]
        deltas = _deltas(Path(base), chosen, names, stride)
        found["delta"] = {
            str(one.folder): {
                "support": float(np.mean(delta != 0.0)),
                "rank_correlation_with_delta2": rank_correlation(one.full[delta != 0.0], delta[delta != 0.0] ** 2),
            }
            for one, delta in zip(judged, deltas)
        }
        if len(judged) > 1:
            found["winners"] = _winners(judged, np.array(deltas))
    return found


def rank_correlation(one: Vector, other: Vector) -> float | None:
    """Spearman's: Pearson's correlation of mid-ranks. None where a side is constant or empty."""
    if len(one) < 2:
        return None
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / norm) if norm > 0.0 else None


def winners(sensitivity: Vector, delta: Vector) -> NDArray[np.int64]:
    """Who wins each coordinate, int64[m], for sensitivities and deltas fp64[K, m]; −1 for a draw (design, section 2).

    Among those that move: the largest sensitivity, then the largest |δ|; a draw where signs of the best differ.
    """
    moves = delta != 0.0
    s = np.where(moves, sensitivity, -1.0)
    best = s == s.max(axis=0)
    size = np.where(best, np.abs(delta), -1.0)
    best &= size == size.max(axis=0)
    signs = np.sign(delta)
    agreed = (np.where(best, signs, 0.0).sum(axis=0) != 0.0) & (
        np.abs(np.where(best, signs, 0.0).sum(axis=0)) == best.sum(axis=0)
    )
    return np.where(agreed, best.argmax(axis=0), -1)


def _meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.unfinished").is_dir()
        raise FisherError(f"{folder}: there is no such folder{'; it is unfinished' if begun else ''}.")
    file = folder / "fisher.json"
    if not file.exists():
        raise FisherError(f"{folder}: has no fisher.json: only what `rlmerge fisher` made can be judged.")
    meta = read_json_object(file)
    entries = meta.get("tensors")
    if (
        not isinstance(entries, dict)
        or not entries
        or not all(isinstance(entry, dict) and {"sum", "count"} <= entry.keys() for entry in entries.values())
    ):
        raise FisherError(
            f"{file}: has no sum and count of each tensor: only what `rlmerge fisher` made can be judged."
        )
    return meta


def _common(paths: Sequence[Path], metas: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tensors and sizes that all have."""
    first = {name: int(entry["count"]) for name, entry in metas[0].get("tensors", {}).items()}
    for path, meta in zip(paths[1:], metas[1:]):
        sizes = {name: int(entry["count"]) for name, entry in meta.get("tensors", {}).items()}
        first = {name: size for name, size in first.items() if sizes.get(name) == size}
        if not first:
            raise FisherError(f"{path}: shares no tensor with {paths[0]}: Fishers of one base are compared.")
    return first


def _read(path: Path, meta: dict[str, Any], names: Mapping[str, int], stride: int) -> Judged:
    full = [
        read_tensor(path, name).double().view(-1).numpy()[sample_positions(name, size, stride)]
        for name, size in names.items()
    ]
    halves, along = None, {}
    if (path / "course.safetensors").exists():
        with safe_open(path / "course.safetensors", "np") as file:
            kept = set(file.keys())
            if all(f"halves/{name}" in kept for name in names):
                halves = np.concatenate([file.get_tensor(f"halves/{name}") for name in names], axis=1)
                counts = {int(key[6:].partition("/")[0]) for key in kept if key.startswith("after-")}
                along = {
                    count: np.concatenate([file.get_tensor(f"after-{count}/{name}") for name in names]).astype(float)
                    for count in sorted(counts)
                }
    return Judged(path, meta, np.concatenate(full), halves, along)


def _alone(one: Judged) -> dict[str, Any]:
    """One Fisher: its distribution by layer, and what its halves say of each other."""
    layers: dict[str, list[tuple[float, int]]] = {}
    for name, entry in one.meta["tensors"].items():
        match = LAYER.search(name)
        layers.setdefault(match[1] if match else name, []).append((entry["sum"], entry["count"]))
    total = sum(entry["sum"] for entry in one.meta["tensors"].values())
    count = sum(entry["count"] for entry in one.meta["tensors"].values())
    quantiles = np.quantile(one.full, QUANTILES)
    found: dict[str, Any] = {
        "source": one.meta.get("source"),
        "units": one.meta.get("units"),
        "mean": total / max(count, 1),
        "zeros": float(np.mean(one.full == 0.0)),
        "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, quantiles)},
        "layers": {
            key: {
                "share": sum(s for s, _ in parts) / total,
                "mean": sum(s for s, _ in parts) / sum(n for _, n in parts),
            }
            for key, parts in layers.items()
        },
    }
    if one.halves is not None and one.halves[1].any():
        r = rank_correlation(one.halves[0], one.halves[1])
        found["split_half_rank_correlation"] = r
        # Spearman-Brown: what the whole, twice as long as a half, would correlate with another whole
        found["reliability"] = None if r is None or r <= -1.0 else 2 * r / (1 + r)
    elif (one.folder / "course.safetensors").exists():
        found["note"] = "no halves to compare: too few sequences, or tensors that transformers rearranges when it loads"
    return found


def _deltas(base: Path, models: Sequence[Path], names: Mapping[str, int], stride: int) -> list[Vector]:
    for model in models:
        if not model.is_dir():
            raise FisherError(f"{model}: there is no such model folder. Say where the models are: --model, one each.")
    opened = [open_checkpoint(folder) for folder in (base, *models)]
    for one in opened[1:]:
        if one.pack is not None:
            check_base(one, opened[0])
    found: list[list[Vector]] = [[] for _ in models]
    for name, size in names.items():
        if any(name not in one.tensors for one in opened):
            raise FisherError(f"tensor {name!r} is not in all of {base} and the models: is it their base?")
        place = sample_positions(name, size, stride)
        old, *new = (_tensor(one, opened[0], name)[torch.from_numpy(place)] for one in opened)
        for row, value in zip(found, new):
            # against the base as the expert's dtype has it, or rounding would pass for training (design, section 1)
            reference = old.to(value.dtype) if value.dtype != torch.float32 else old
            row.append((value.double() - reference.double()).numpy())
    return [np.concatenate(row) for row in found]


def _tensor(checkpoint: Checkpoint, base: Checkpoint, name: str) -> torch.Tensor:
    if checkpoint.pack is not None:
        return read_tensors(Reader(checkpoint, base), names=[name])[name].view(-1)
    with safe_open(checkpoint.tensors[name].file, "pt") as file:
        return file.get_tensor(name).view(-1)


def _winners(judged: Sequence[Judged], delta: Vector) -> dict[str, Any]:
    """Conflicts in the sample: who wins by which sensitivity."""
    signs = np.sign(delta)
    several = (delta != 0.0).sum(axis=0) > 1
    conflict = several & (np.abs(signs.sum(axis=0)) != (delta != 0.0).sum(axis=0))
    delta = delta[:, conflict]
    # the unit of F̂ is the mean over all entries, which fisher.json has; of a part of the sequences, that much of it
    full = np.array([one.full[conflict] / one.mean for one in judged])
    by_fisher, by_size = winners(full * delta**2, delta), winners(delta**2, delta)
    found: dict[str, Any] = {
        "conflicts": int(conflict.sum()),
        "draws": float(np.mean(by_fisher < 0)),
        "draws_delta2": float(np.mean(by_size < 0)),
        "same_as_delta2": _agreement(by_fisher, by_size),
        "same_as_fisher_alone": _agreement(by_fisher, winners(full, delta)),
    }
    if all(one.halves is not None and one.halves[1].any() for one in judged):
        halves = [
            winners(
                np.array(
                    [one.halves[h][conflict] / one.scale(one.halves[h]) for one in judged if one.halves is not None]
                )
                * delta**2,
                delta,
            )
            for h in (0, 1)
        ]
        found["same_in_both_halves"] = _agreement(*halves)
    counts = set.intersection(*(set(one.along) for one in judged))
    found["after"] = {
        count: _agreement(
            winners(
                np.array([one.along[count][conflict] / one.scale(one.along[count]) for one in judged]) * delta**2, delta
            ),
            by_fisher,
        )
        for count in sorted(counts)
    }
    return found


def _agreement(one: NDArray[np.int64], other: NDArray[np.int64]) -> float | None:
    """The share with the same winner, of the conflicts that both decide."""
    both = (one >= 0) & (other >= 0)
    return float(np.mean(one[both] == other[both])) if both.any() else None


def _ranks(values: Vector) -> Vector:
    """Mid-ranks: equal values share one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(values)]
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + ends - 1) / 2.0, ends - starts)
    return ranks
