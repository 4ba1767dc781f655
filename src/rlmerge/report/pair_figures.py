"""Figures of pairs of experts: direction, overlap and conflict beside the null model, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.report.figure import Figure, bars, heat_map, number, rows_of_table, share
from rlmerge.report.names import cells, place_of, spot

Document = Mapping[str, Any]
Names = Mapping[str, str]

PAIR_BARS = {
    "cosine": "cosine",
    "cosine inside the overlap": "overlap_cosine",
    "Jaccard": "jaccard",
    "conflict (of overlap)": "conflict_overlap",
    "conflict (of union)": "conflict_union",
    "conflict (by energy)": "conflict_energy",
}
PAIR_MAPS = {"conflict (of overlap)": "conflict_overlap", "Jaccard": "jaccard", "cosine": "cosine", "lift": "lift"}


def pair_figures(document: Document, names: Names) -> list[Figure]:
    """All of them."""
    found = [_pair_bars(document, names), _pair_map(document, names)]
    if len(names) > 2:
        found.insert(1, _matrix(document, names))
    return [*found, _decomposition(document, names), _regions(document, names)]


def pair_name(pair: Mapping[str, Any], names: Names) -> str:
    """'math × code'."""
    return f"{names[pair['a']]} × {names[pair['b']]}"


def _pair_bars(document: Document, names: Names) -> Figure:
    total = document["coordinates"]["total"]
    nulls = {(pair["a"], pair["b"]): pair for pair in total.get("null", {}).get("pairs", ())}
    rows = [
        {
            "measure": label,
            "pair": pair_name(pair, names),
            "value": pair[key],
            "null": nulls.get((pair["a"], pair["b"]), {}).get(key),
        }
        for label, key in PAIR_BARS.items()
        for pair in total["pairs"]
        if pair[key] is not None
    ]
    worst = max(total["pairs"], key=lambda pair: pair["conflict_overlap"] or 0.0)
    null = nulls.get((worst["a"], worst["b"]), {}).get("conflict_overlap")
    beside = f", where the null model has {share(null)}" if null is not None else ""
    said = _relation(worst["cosine"])
    return Figure(
        "pairs",
        "How much experts agree",
        f"{pair_name(worst, names)} conflict most: {share(worst['conflict_overlap'])} of their overlap has opposite "
        f"signs{beside}; "
        f"{said}.",
        "Near 50 %, signs are those of unrelated updates: settle each conflict (sar, ties) instead of averaging. Far "
        "below, "
        "experts learned alike, and a mean keeps what they share.",
        bars(rows, "Bars of agreement of each pair", category="measure", series="pair", percent=False, marks=True),
        rows_of_table(rows, ["measure", "pair", "value", "null"], percent=False),
    )


def _relation(cosine: float | None) -> str:
    if cosine is None:
        return "an update is zero and has no direction"
    words = "close to orthogonal" if abs(cosine) < 0.1 else "partly aligned" if cosine > 0 else "partly opposed"
    return f"their updates are {'nearly aligned' if cosine > 0.7 else words} (cosine {number(cosine)})"


def _matrix(document: Document, names: Names) -> Figure:
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in document["coordinates"]["total"]["pairs"]}
    rows = [
        {"measure": label, "expert": names[a], "other": names[b], "value": pair[key]}
        for label, key in (("cosine", "cosine"), ("conflict (of overlap)", "conflict_overlap"), ("Jaccard", "jaccard"))
        for a in names
        for b in names
        if (pair := pairs.get(frozenset((a, b)))) is not None and pair[key] is not None
    ]
    cosines = [row for row in rows if row["measure"] == "cosine"]
    near = max(cosines, key=lambda row: row["value"]) if cosines else None
    said = (
        f"{near['expert']} and {near['other']} are the closest pair: cosine {number(near['value'])}."
        if near
        else "No pair has a cosine."
    )
    return Figure(
        "matrix",
        "Every expert against every other",
        said,
        "Experts far closer to each other than to the rest repeat each other: merged first, they do not outvote the "
        "others.",
        heat_map(
            rows,
            "Matrix of experts",
            x="other",
            y="expert",
            choices={"measure": "Show"},
            order=list(names.values()),
            percent=False,
        ),
        rows_of_table(rows, ["measure", "expert", "other", "value"], percent=False),
    )


def _pair_map(document: Document, names: Names) -> Figure:
    rows = cells(
        {"measure": label, "pair": pair_name(pair, names), "layer": layer, "module": module, "value": pair[key]}
        for label, key in PAIR_MAPS.items()
        for tensor in document["coordinates"]["tensors"]
        for layer, module in [place_of(tensor["name"])]
        for pair in tensor["pairs"]
        if pair[key] is not None
    )
    conflicts = [row for row in rows if row["measure"] == "conflict (of overlap)"]
    if not conflicts:
        return Figure("pair-map", "Where experts conflict", "No pair changed a weight in common.", "", None)
    most = max(conflicts, key=lambda row: row["value"])
    low = min(conflicts, key=lambda row: row["value"])
    return Figure(
        "pair-map",
        "Where experts conflict",
        f"Conflict is highest in {spot(most)} ({share(most['value'])} of the overlap) and lowest in {spot(low)} "
        f"({share(low['value'])}).",
        "Where conflict is far from the rest, give that module a method or weights of its own by a filter.",
        heat_map(
            rows, "Heat map of conflict by layer and module", choices={"measure": "Show", "pair": "Pair"}, percent=False
        ),
        rows_of_table(rows, ["measure", "pair", "layer", "module", "value"], percent=False),
    )


def _decomposition(document: Document, names: Names) -> Figure:
    pairs = document["coordinates"]["total"]["pairs"]
    table = [["pair", "cosine", "overlap cosine", "energy of the first in the overlap", "of the second", "lift"]]
    for pair in pairs:
        values = [pair[key] for key in ("cosine", "overlap_cosine", "energy_a", "energy_b", "lift")]
        table.append([pair_name(pair, names), *map(number, values)])
    pair = pairs[0]
    return Figure(
        "cosines",
        "What a cosine is made of",
        f"cosine = cosine inside the overlap × √(energy shares): of {pair_name(pair, names)}, "
        f"{number(pair['cosine'])} = "
        f"{number(pair['overlap_cosine'])} × √({number(pair['energy_a'])} · {number(pair['energy_b'])}).",
        "A small cosine with high energies in the overlap is disagreement; with low energies, it is distance.",
        None,
        table,
    )


def _regions(document: Document, names: Names) -> Figure:
    total = document["coordinates"]["total"]
    nulls = total.get("null", {}).get("regions")

    def of(regions: Mapping[str, Any]) -> dict[str, float | None]:
        parts = {f"only {names[key]}": value for key, value in regions["unique"].items()}
        return {
            **parts,
            "several, agreeing": regions["agreement"],
            "several, in conflict": regions["conflict"],
            "none": regions["inactive"],
        }

    null = of(nulls) if nulls else {}
    found = of(total["regions"])
    rows = [
        {"of": "all weights", "region": region, "value": value, "null": null.get(region)}
        for region, value in found.items()
        if value is not None
    ]
    return Figure(
        "regions",
        "Who changed what",
        f"{share(total['regions']['inactive'])} of the weights are as the base has them in every expert; "
        f"{share(total['regions']['conflict'])} are pulled in opposite directions.",
        "What only one expert changed merges without a question; a method decides what several changed.",
        bars(rows, "Bars of regions", category="of", series="region", marks=nulls is not None),
        rows_of_table(rows, ["region", "value", "null"]),
    )
