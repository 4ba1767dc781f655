"""Figures of the section `spectra` of a geometry document: ranks, shifts, angles, masks, common subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.report.figure import Figure, Section, bars, heat_map, lines, number, rows_of_table, share
from rlmerge.report.names import cells, place_of, spot

Spectra = Mapping[str, Any]
MAPS = {
    "spectral shift (NSS)": ("shift", "nss"),
    "largest left angle (degrees)": ("angles", "left_max"),
    "stable rank of δ": ("delta", "stable_rank"),
    "effective rank of δ": ("delta", "effective_rank"),
}


def spectra_section(spectra: Spectra, names: Mapping[str, str]) -> Section:
    """The section of a page."""
    figures = [_shift(spectra, names), _energy(spectra, names), _masks(spectra, names), _map(spectra, names)]
    if spectra["total"]["pairs"]:
        figures.append(_common(spectra, names))
    return Section("Spectra", [figure for figure in figures if figure is not None], " ".join(spectra["warnings"]))


def _at(tree: Any, *path: str) -> Any:
    """A value deep in dicts, None where a part is not there."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _shift(spectra: Spectra, names: Mapping[str, str]) -> Figure:
    total = spectra["total"]
    rows = []
    for label, path in (
        ("spectral shift (NSS)", ("shift", "nss")),
        ("‖δ‖/‖W₀‖, the most it can be", ("shift", "relative_norm")),
        ("part of δ in the spectrum", ("shift", "residual")),
    ):
        for key, one in total["experts"].items():
            value, null = _at(one, *path), _at(total["null"]["experts"], key, *path)
            if value is not None:
                rows.append({"measure": label, "expert": names[key], "value": value, "null": null})
    shifts = {names[key]: _at(one, "shift", "nss") for key, one in total["experts"].items()}
    known = {name: value for name, value in shifts.items() if value is not None}
    said = "; ".join(f"{name} {number(value)}" for name, value in known.items())
    return Figure(
        "nss",
        "How far singular values moved",
        f"Mean over matrices of ‖σ(W₊) − σ(W₀)‖/‖σ(W₀)‖: {said}. Published: about 1e-3 after SFT, 1e-5 after RLVR."
        if known
        else "No matrix has a known shift.",
        "A shift far below ‖δ‖/‖W₀‖ means that training turned the weights rather than stretched them, as noise "
        "does, too.",
        bars(rows, "Bars of spectral shift", category="measure", series="expert", percent=False, marks=True),
        rows_of_table(rows, ["measure", "expert", "value", "null"], percent=False),
    )


def _energy(spectra: Spectra, names: Mapping[str, str]) -> Figure | None:
    rows = [
        {"k": int(k), "expert": names[key], "value": value}
        for key, one in spectra["total"]["experts"].items()
        for k, value in _at(one, "delta", "energy").items()
        if value is not None
    ]
    if not rows:
        return None
    ranks = {names[key]: _at(one, "delta", "stable_rank") for key, one in spectra["total"]["experts"].items()}
    said = ", ".join(f"{name} {number(value)}" for name, value in ranks.items())
    return Figure(
        "energy-of-k",
        "Energy of an update in its largest directions",
        f"Share of ‖δ‖² in the k largest singular directions, mean over matrices; stable rank: {said}.",
        "Where few directions hold little of it, low-rank compression of the update would lose the rest.",
        lines(
            rows,
            "Lines of energy over the number of directions",
            x="k",
            series="expert",
            y_title="share of ‖δ‖²",
            log_x=True,
            percent=True,
            zero=True,
        ),
        rows_of_table(rows, ["k", "expert", "value"]),
    )


def _masks(spectra: Spectra, names: Mapping[str, str]) -> Figure | None:
    total = spectra["total"]
    rows = []
    for kind, label in (("principal", "principal"), ("low", "small")):
        for key, one in total["experts"].items():
            for alpha, value in (_at(one, "masks", kind) or {}).items():
                if value is not None:
                    null = _at(total["null"]["experts"], key, "masks", kind, alpha)
                    rows.append({"mask": f"{label}, α = {alpha}", "expert": names[key], "value": value, "null": null})
    if not rows:
        return None
    gaps = [(abs(row["value"] - row["null"]), row) for row in rows if row["null"] is not None]
    gap, row = max(gaps, key=lambda pair: pair[0]) if gaps else (None, rows[0])
    beside = f"the null model has {share(row['null'])}" if gap is not None else "no null model was measured"
    first = (
        "No mask is far from the null model; farthest" if gap is not None and gap < 0.005 else "Farthest from chance"
    )
    return Figure(
        "masks",
        "Which weights training touched",
        f"{first}: {share(row['value'])} of what {row['expert']} changed lies in '{row['mask']}', {beside}. "
        f"'principal' are the "
        "largest α of the base's leading directions, 'small' its smallest α; chance alone is α.",
        "Near the tick, the preference for small weights is bf16 rounding and says nothing of training.",
        bars(rows, "Bars of overlap with masks", category="mask", series="expert", marks=True),
        rows_of_table(rows, ["mask", "expert", "value", "null"]),
    )


def _map(spectra: Spectra, names: Mapping[str, str]) -> Figure | None:
    rows = cells(
        {"measure": label, "expert": names[key], "layer": layer, "module": module, "value": value}
        for label, path in MAPS.items()
        for tensor in spectra["tensors"]
        for layer, module in [place_of(tensor["name"])]
        for key, one in tensor["experts"].items()
        if (value := _at(one, *path)) is not None
    )
    if not rows:
        return None
    first = [row for row in rows if row["measure"] == rows[0]["measure"]]
    most = max(first, key=lambda row: row["value"])
    return Figure(
        "spectra-map",
        "Spectra, layer by module",
        f"The largest {most['measure']} is {number(most['value'])}, in {spot(most)} of {most['expert']}.",
        "Single matrices that stick out deserve a look: a filter can give them weights or a method of their own.",
        heat_map(
            rows,
            "Heat map of spectral measures by layer and module",
            choices={"measure": "Show", "expert": "Expert"},
            percent=False,
        ),
        rows_of_table(rows, ["measure", "expert", "layer", "module", "value"], percent=False),
    )


def _common(spectra: Spectra, names: Mapping[str, str]) -> Figure | None:
    rows = []
    for pair in spectra["total"]["pairs"]:
        for k, one in pair["similarity"].items():
            for side in ("left", "right"):
                if one[side] is not None:
                    rows.append(
                        {
                            "subspace": f"{side}, k = {k}",
                            "pair": f"{names[pair['a']]} × {names[pair['b']]}",
                            "value": one[side],
                            "null": one[f"{side}_chance"],
                        }
                    )
    if not rows:
        return None
    most = max(rows, key=lambda row: row["value"] - row["null"])
    return Figure(
        "subspaces",
        "Directions that experts share",
        f"Most in common beyond chance: {most['pair']}, {most['subspace']}: {share(most['value'])} where random "
        f"subspaces "
        f"have {share(most['null'])} (the tick).",
        "Shared directions add up in a sum: prefer a mean, or tsv_m, which sets them apart.",
        bars(rows, "Bars of common subspaces", category="subspace", series="pair", marks=True),
        rows_of_table(rows, ["subspace", "pair", "value", "null"]),
    )
