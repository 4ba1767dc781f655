"""Figures of each expert, coordinate by coordinate: how much changed, where, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.report.figure import Figure, bars, heat_map, lines, rows_of_table, share
from rlmerge.report.names import cells, place_of, spot

Document = Mapping[str, Any]
Names = Mapping[str, str]


EXPERT_MAPS = {"weights changed": "support", "‖δ‖/‖θ0‖": "relative_norm", "share of the expert's ‖δ‖²": "energy_share"}


def expert_figures(document: Document, names: Names) -> list[Figure]:
    """All of them."""
    found = [_support_bars(document, names), _expert_map(document, names), _sweep(document, names)]
    return [*found, _steps(document, names), _energy(document, names)]


def _support_bars(document: Document, names: Names) -> Figure:
    total = document["coordinates"]["total"]
    null = total.get("null", {}).get("experts", {})
    rows = []
    for key, one in total["experts"].items():
        for label, value in (("as stored", one["support"]), ("cast to bf16", one["support_bf16"])):
            if value is not None:
                known = null.get(key, {}).get("support") if label == "as stored" else None
                rows.append({"support": label, "expert": names[key], "value": value, "null": known})
    sparse = min(total["experts"], key=lambda key: total["experts"][key]["support"] or 0.0)
    one = total["experts"][sparse]
    first = "The sparsest is " if len(total["experts"]) > 1 else ""
    gaps = [abs((one["support"] or 0.0) - (one["support_bf16"] or 0.0)) for one in total["experts"].values()]
    return Figure(
        "support",
        "How many weights changed",
        f"{first}{names[sparse]}: {share(one['support'])} as stored, {share(one['support_bf16'])} after a cast to "
        f"bf16.",
        "The two differ, so a part of the sparsity is rounding: compare experts in one dtype only."
        if max(gaps) > 0.005
        else "Cast to bf16 as many weights differ as are stored: the dtype hides nothing here.",
        bars(rows, "Bars of the share of changed weights", category="support", series="expert", marks=True),
        rows_of_table(rows, ["support", "expert", "value", "null"]),
    )


def _map_rows(document: Document, names: Names, measures: Mapping[str, str]) -> list[dict[str, Any]]:
    return cells(
        {"measure": label, "expert": names[expert], "layer": layer, "module": module, "value": one[key]}
        for label, key in measures.items()
        for tensor in document["coordinates"]["tensors"]
        for layer, module in [place_of(tensor["name"])]
        for expert, one in tensor["experts"].items()
        if one[key] is not None
    )


def _expert_map(document: Document, names: Names) -> Figure:
    rows = _map_rows(document, names, EXPERT_MAPS)
    shares = [row for row in rows if row["measure"] == "weights changed"]
    most, least = (pick(shares, key=lambda row: row["value"]) for pick in (max, min))
    return Figure(
        "map",
        "Where training went",
        f"Most changed is {spot(most)} of {most['expert']} ({share(most['value'])}), least "
        f"{spot(least)} of {least['expert']} ({share(least['value'])}).",
        "Modules that hardly changed have little to merge: a filter can leave them as the base has them.",
        heat_map(
            rows,
            "Heat map of what changed by layer and module",
            choices={"measure": "Show", "expert": "Expert"},
            percent=False,
        ),
        rows_of_table(rows, ["measure", "expert", "layer", "module", "value"], percent=False),
    )


def _sweep(document: Document, names: Names) -> Figure:
    rows = []
    experts = document["coordinates"]["total"]["experts"]
    for label, kind in (("|δ| above", "absolute"), ("|δ|/|θ| above", "relative")):
        for key, one in experts.items():
            for point in one["sweep"][kind]:
                if point["share"] is not None and point["above"] > 0:
                    rows.append(
                        {"threshold": point["above"], "expert": names[key], "kind": label, "value": point["share"]}
                    )
    key, one = next(iter(experts.items()))
    at = next((p for p in one["sweep"]["absolute"] if p["above"] == 1e-5), None)
    said = (
        f" Of {names[key]}, {share(at['share'])} are changed by more than 1e-5, and {share(one['support'])} at all."
        if at
        else ""
    )
    return Figure(
        "sweep",
        "How sparsity depends on the tolerance",
        f"The share of weights that count as changed falls with the threshold.{said}",
        "A published sparsity means little without its threshold: quote the stored one.",
        lines(
            rows,
            "Lines of the share of changed weights over the threshold",
            x="threshold",
            series="expert",
            y_title="changed",
            choices={"kind": "Threshold on"},
            log_x=True,
            percent=True,
            zero=True,
        ),
        rows_of_table(rows, ["kind", "expert", "threshold", "value"], percent=False),
    )


def _steps(document: Document, names: Names) -> Figure:
    rows, ones = [], {}
    for key, one in document["coordinates"]["total"]["experts"].items():
        steps = one["steps"]
        for least, value in zip(steps["at_least"], steps["share"]):
            if value is not None:
                label = str(least) if least < 2 else f"{least} to {2 * least - 1}"
                rows.append({"expert": names[key], "steps": label, "value": value})
        ones[names[key]] = dict(zip(steps["at_least"], steps["share"])).get(1)
    known = {name: value for name, value in ones.items() if value is not None}
    most = max(known, key=lambda name: known[name]) if known else "no expert"
    found = {row["steps"] for row in rows if row["value"]}  # 0 is there where storing an adapter would lose changes
    rows = [row for row in rows if row["steps"] in found]
    return Figure(
        "steps",
        "Size of changes in units in the last place",
        f"Of what {most} changed, {share(known.get(most))} moved by a single unit in the last place of its dtype.",
        "Halving a single unit can round it away: averages of such experts lose updates in bf16."
        if (known.get(most) or 0.0) > 0.5
        else "Most changes are longer than one unit, and half of such a change can be stored.",
        bars(rows, "Bars of the sizes of changes", category="steps", series="expert", title="of changed weights"),
        rows_of_table(rows, ["expert", "steps", "value"]),
    )


def _energy(document: Document, names: Names) -> Figure:
    rows = [
        {"layer": scope["layer"], "expert": names[key], "value": one["energy_share"]}
        for scope in document["coordinates"]["layers"]
        if scope.get("layer") is not None
        for key, one in scope["experts"].items()
        if one["energy_share"] is not None
    ]
    if not rows:
        return Figure("energy", "Energy by layer", "The models have no numbered layers.", "", None)
    most = max(rows, key=lambda row: row["value"])
    return Figure(
        "energy",
        "Energy by layer",
        f"Layer {most['layer']} holds most of an expert's ‖δ‖²: {share(most['value'])} of {most['expert']}'s.",
        "Where the curve is even no layer can be spared; a peak is where a merge matters most.",
        lines(
            rows,
            "Lines of the share of squared norm over layers",
            x="layer",
            series="expert",
            y_title="share of ‖δ‖²",
            percent=True,
            zero=True,
        ),
        rows_of_table(rows, ["layer", "expert", "value"]),
    )
