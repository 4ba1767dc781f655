"""Statistics of a finished merge, added up in plan order: per tensor and in total, as JSON-able numbers with names.

The design's words: support, unique, overlap, conflict, agreement, draws, wins, kept, rescale factors, survival,
realised direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlmerge.methods.base import Result

from .journal import Journal
from .work import Worker


def collect(worker: Worker, journal: Journal) -> list[dict[str, Any]]:
    """One report a variant: `total` and `tensors` (by name), and what the stages found for the whole model."""
    reports = []
    for variant, group in enumerate(worker.group_of):
        tensors: dict[str, Any] = {}
        total: dict[str, Any] = {}
        size = mismatched = 0
        for t, tensor in enumerate(worker.plan.tensors):
            if tensor.carry is not None:
                tensors[tensor.name] = {"size": tensor.size, "carried": tensor.carry}
                mismatched += tensor.size if tensor.carry == "mismatch" else 0
                continue
            sums: dict[str, Any] = {}
            for u in range(len(tensor.units)):
                record = journal.units[t, u]
                add(sums, record.stats[variant])
                if record.census:
                    add(sums, record.census[group])
            experts, places = worker.plan.experts_of(tensor), worker.plan.places_of(tensor)
            add(total, _spread(sums, places, len(worker.plan.experts)))
            size += tensor.size
            entry = {"size": tensor.size} | name_statistics(sums, experts, tensor.size)
            stages = journal.results.of(group, tensor.name)
            factors = _factors(worker, variant, t, stages)
            tensors[tensor.name] = entry | ({"rescale": factors} if factors else {})
        summary = {"size": size} | name_statistics(total, worker.plan.experts, size)
        if mismatched:  # the shares below are of what was merged, which here is not all that could have been
            whole = sum(tensor.size for tensor in worker.plan.tensors)
            summary["merged"] = {"count": size, "of": whole, "share": size / whole}
        factors = [value for entry in tensors.values() for value in entry.get("rescale", {}).values()]
        if factors:
            summary["rescale"] = {"min": min(factors), "mean": math.fsum(factors) / len(factors), "max": max(factors)}
        model = journal.results.of(group, "")
        if "fisher_mean" in model:
            summary["fisher_mean"] = dict(zip(worker.plan.experts, model["fisher_mean"]["mean"]))
        reports.append({"total": summary, "tensors": tensors})
    return reports


PER_EXPERT = ("support", "wins", "kept", "eligible", "ignored", "pair_overlap", "pair_conflict")
"""Statistics with one entry an expert, or one a pair."""


def _spread(sums: Mapping[str, Any], places: list[int], count: int) -> dict[str, Any]:
    """The statistics of a tensor with entries for all experts of the recipe, not only those of its part."""
    out = dict(sums)
    for key in PER_EXPERT:
        if key in out and places != list(range(count)):
            of_part = np.asarray(out[key])
            out[key] = np.zeros((count,) * of_part.ndim, of_part.dtype)
            out[key][np.ix_(*[places] * of_part.ndim)] = of_part
    return out


def add(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Adds arrays of statistics by name."""
    for key, value in part.items():
        array = np.asarray(value)
        total[key] = total[key] + array if key in total else array


def name_statistics(sums: Mapping[str, Any], experts: tuple[str, ...], size: int) -> dict[str, Any]:
    """Counts and shares with names. Shares of 0 things are left out rather than invented."""
    out: dict[str, Any] = {}
    if "support" in sums:
        out["support"] = {key: _share(int(n), size) for key, n in zip(experts, sums["support"])}
        unique, overlap, conflict, agreement = (int(n) for n in sums["regions"])
        changed = unique + overlap
        out["changed"] = _share(changed, size)
        for name, count in (("unique", unique), ("overlap", overlap)):
            out[name] = _share(count, changed)
        for name, count in (("conflict", conflict), ("agreement", agreement)):
            out[name] = _share(count, overlap)
        out["pairs"] = _pairs(sums, experts)
    if "draws" in sums:
        conflicts = int(sums["regions"][2]) if "regions" in sums else 0
        out["draws"] = _share(int(sums["draws"][0]), conflicts)
        out["wins"] = {key: _share(int(n), conflicts) for key, n in zip(experts, sums["wins"])}
        both = int(sums["both_decide"][0])
        if both:
            out["winner_agrees_with_delta2"] = _share(int(sums["same_winner"][0]), both)
            out["delta2_draws"] = _share(int(sums["delta2_draws"][0]), conflicts)
    if "eligible" in sums:
        out["kept"] = {key: _share(int(k), int(n)) for key, k, n in zip(experts, sums["kept"], sums["eligible"])}
    elif "kept" in sums and "support" in sums:
        out["kept"] = {key: _share(int(k), int(n)) for key, k, n in zip(experts, sums["kept"], sums["support"])}
    if "cancelled" in sums:
        updates = int(sums["elected"][0]) + int(sums["cancelled"][0])
        out["cancelled"] = _share(int(sums["cancelled"][0]), updates)
    if "ignored" in sums:
        out["ignored"] = {key: _share(int(i), int(n)) for key, i, n in zip(experts, sums["ignored"], sums["support"])}
    if "survival" in sums:
        intended, survived = (int(n) for n in sums["survival"])
        wanted, real, product = (float(value) for value in sums["direction"])
        out["survival"] = _share(survived, intended)
        out["intended_norm"] = math.sqrt(wanted)
        out["realised_norm"] = math.sqrt(real)
        if wanted > 0 and real > 0:
            out["realised_cosine"] = product / math.sqrt(wanted) / math.sqrt(real)
    return out


def _pairs(sums: Mapping[str, Any], experts: tuple[str, ...]) -> list[dict[str, Any]]:
    overlap, conflict = sums["pair_overlap"], sums["pair_conflict"]
    return [
        {
            "experts": [experts[i], experts[j]],
            "overlap": int(overlap[i][j]),
            "conflict": _share(int(conflict[i][j]), int(overlap[i][j])),
        }
        for i in range(len(experts))
        for j in range(i + 1, len(experts))
    ]


def _share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "share": count / of} if of else {"count": count}


def _factors(worker: Worker, variant: int, tensor: int, results: Mapping[str, Result]) -> dict[str, float]:
    factors = worker.plan.variants[variant].method.factors(worker.task(variant, tensor), results)
    return dict(zip(worker.plan.experts_of(worker.plan.tensors[tensor]), factors))
