"""The page of `rlmerge inspect`: what training did to each expert, and what experts have in common.

Every sentence is made from the numbers beside it, so that what a figure says is true of these models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmerge.figures import short_names
from rlmerge.report.figure import Figure, Page, Section, bars, heat_map, lines, rows_of_table, share
from rlmerge.report.function_figures import function_section
from rlmerge.report.names import place_of
from rlmerge.report.spectra_figures import spectra_section

Document = Mapping[str, Any]


def geometry_page(document: Document, title: str) -> Page:
    """The page of a document of `rlmerge inspect`. Needs the extra `report`."""
    keys = [expert["key"] for expert in document["experts"]]
    names = dict(zip(keys, short_names(keys)))
    sections = []
    if "coordinates" in document:
        sections.append(Section("Each expert", _of_experts(document, names)))
        if len(keys) > 1:
            sections.append(Section("Between experts", _of_pairs(document, names), NULL_TEXT))
    if "spectra" in document:
        sections.append(spectra_section(document["spectra"], names))
    if "storage" in document:
        sections.append(Section("What a stored merge keeps", [_storage(document["storage"])]))
    if "function" in document:
        sections.append(function_section(document["function"], names))
    if "verdict" in document:
        sections.append(Section("Verdict", _verdict(document["verdict"], names)))
    return Page(
        title,
        summary(document, names),
        _facts(document, names),
        sections,
        document,
        tuple(document.get("verdict", {}).get("warnings", ())),
    )


NULL_TEXT = (
    "The red tick is the null model: the same updates, shuffled among weights of the same size, added to the base and "
    "rounded as the expert is. What the tick explains, training did not do."
)


def summary(document: Document, names: Mapping[str, str]) -> list[str]:
    """What kind of experts these are, what they share, what happens when they are merged; a sentence each."""
    said = []
    if (verdict := document.get("verdict")) is not None:
        each = ", ".join(f"{names[key]} {one['looks']}" for key, one in verdict["experts"].items())
        said.append(f"These experts look {verdict['looks'].removesuffix('-like')}-trained: {each}.".replace("mixed-", "both ways "))
        said += [f"Recommended: {reason}" for reason in verdict["recommended"]["reasons"][:2]]
    if (coordinates := document.get("coordinates")) is not None:
        total = coordinates["total"]
        for key, one in total["experts"].items():
            said.append(
                f"{names[key]} changed {share(one['support'])} of the weights, by {_number(one['relative_norm'])} of their norm."
            )
        for pair in total["pairs"]:
            said.append(
                f"{names[pair['a']]} and {names[pair['b']]}: cosine {_number(pair['cosine'])}; they meet in "
                f"{share(pair['jaccard'])} of what either changed, and disagree in sign in {share(pair['conflict_overlap'])} of that."
            )
    return said


def _facts(document: Document, names: Mapping[str, str]) -> list[tuple[str, str]]:
    base = document["base"]
    facts = [("base", f"{base['reference']} ({base['dtype']})")]
    facts += [(names[e["key"]], f"{e['reference']} ({e['dtype']})") for e in document["experts"]]
    return [*facts, ("weights", f"{base.get('coordinates', 0):,}"), ("rlmerge", document["rlmerge"])]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


# ---- Each expert ----------------------------------------------------------------------------------------------------

EXPERT_MAPS = {"weights changed": "support", "‖δ‖/‖θ0‖": "relative_norm", "share of the expert's ‖δ‖²": "energy_share"}


def _of_experts(document: Document, names: Mapping[str, str]) -> list[Figure]:
    found = [_support_bars(document, names), _expert_map(document, names), _sweep(document, names)]
    return [*found, _steps(document, names), _energy(document, names)]


def _support_bars(document: Document, names: Mapping[str, str]) -> Figure:
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
    return Figure(
        "support", "How many weights changed",
        f"{names[sparse]} is the sparsest: {share(one['support'])} as stored, {share(one['support_bf16'])} after a cast to "
        "bf16, where steps smaller than half a unit in the last place vanish.",
        "If the two differ, sparsity comes from rounding: compare experts in one dtype only.",
        bars(rows, "Bars of the share of changed weights", category="support", series="expert", marks=True),
        rows_of_table(rows, ["support", "expert", "value", "null"]),
    )  # fmt: skip


def _map_rows(document: Document, names: Mapping[str, str], measures: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"measure": label, "expert": names[expert], "layer": layer, "module": module, "value": one[key]}
        for label, key in measures.items()
        for tensor in document["coordinates"]["tensors"]
        for layer, module in [place_of(tensor["name"])]
        for expert, one in tensor["experts"].items()
        if one[key] is not None
    ]


def _expert_map(document: Document, names: Mapping[str, str]) -> Figure:
    rows = _map_rows(document, names, EXPERT_MAPS)
    shares = [row for row in rows if row["measure"] == "weights changed"]
    most, least = (pick(shares, key=lambda row: row["value"]) for pick in (max, min))
    return Figure(
        "map", "Where training went",
        f"Every cell is a tensor. Most changed is {spot(most)} of {most['expert']} ({share(most['value'])}), least "
        f"{spot(least)} of {least['expert']} ({share(least['value'])}).",
        "Modules that hardly changed can be left out of a merge by a filter without loss.",
        heat_map(rows, "Heat map of what changed by layer and module", choices={"measure": "Show", "expert": "Expert"},
                 percent=False),
        rows_of_table(rows, ["measure", "expert", "layer", "module", "value"], percent=False),
    )  # fmt: skip


def _sweep(document: Document, names: Mapping[str, str]) -> Figure:
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
    said = f" Of {names[key]}, {share(at['share'])} are changed by more than 1e-5, and {share(one['support'])} at all." if at else ""
    return Figure(
        "sweep", "How sparsity depends on the tolerance",
        f"The share of weights that count as changed falls with the threshold.{said}",
        "A published sparsity means little without its threshold: quote the stored one.",
        lines(rows, "Lines of the share of changed weights over the threshold", x="threshold", series="expert",
              y_title="changed", choices={"kind": "Threshold on"}, log_x=True, percent=True, zero=True),
        rows_of_table(rows, ["kind", "expert", "threshold", "value"], percent=False),
    )  # fmt: skip


def _steps(document: Document, names: Mapping[str, str]) -> Figure:
    rows, ones = [], {}
    for key, one in document["coordinates"]["total"]["experts"].items():
        steps = one["steps"]
        for least, value in zip(steps["at_least"], steps["share"]):
            if value is not None:
                label = str(least) if least == 1 else f"{least} to {2 * least - 1}"
                rows.append({"expert": names[key], "steps": label, "value": value})
        ones[names[key]] = dict(zip(steps["at_least"], steps["share"])).get(1)
    known = {name: value for name, value in ones.items() if value is not None}
    most = max(known, key=lambda name: known[name]) if known else "no expert"
    return Figure(
        "steps", "Size of changes in units in the last place",
        f"Of what {most} changed, {share(known.get(most))} moved by a single unit in the last place of its dtype.",
        "Where single units dominate, halving an update rounds it away: do not average such experts into bf16.",
        bars(rows, "Bars of the sizes of changes", category="expert", series="steps", title="of changed weights"),
        rows_of_table(rows, ["expert", "steps", "value"]),
    )  # fmt: skip


def _energy(document: Document, names: Mapping[str, str]) -> Figure:
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
        "energy", "Energy by layer",
        f"Layer {most['layer']} holds most of an expert's ‖δ‖²: {share(most['value'])} of {most['expert']}'s.",
        "An even curve means that no layer can be spared.",
        lines(rows, "Lines of the share of squared norm over layers", x="layer", series="expert",
              y_title="share of ‖δ‖²", percent=True, zero=True),
        rows_of_table(rows, ["layer", "expert", "value"]),
    )  # fmt: skip


# ---- Between experts ------------------------------------------------------------------------------------------------

PAIR_BARS = {
    "cosine": "cosine", "cosine inside the overlap": "overlap_cosine", "Jaccard": "jaccard",
    "conflict (of overlap)": "conflict_overlap", "conflict (of union)": "conflict_union",
    "conflict (by energy)": "conflict_energy",
}  # fmt: skip
PAIR_MAPS = {"conflict (of overlap)": "conflict_overlap", "Jaccard": "jaccard", "cosine": "cosine", "lift": "lift"}


def _of_pairs(document: Document, names: Mapping[str, str]) -> list[Figure]:
    return [
        _pair_bars(document, names), _matrix(document, names), _pair_map(document, names),
        _decomposition(document, names), _regions(document, names),
    ]  # fmt: skip


def pair_name(pair: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """'math × code'."""
    return f"{names[pair['a']]} × {names[pair['b']]}"


def _pair_bars(document: Document, names: Mapping[str, str]) -> Figure:
    total = document["coordinates"]["total"]
    nulls = {(pair["a"], pair["b"]): pair for pair in total.get("null", {}).get("pairs", ())}
    rows = [
        {"measure": label, "pair": pair_name(pair, names), "value": pair[key],
         "null": nulls.get((pair["a"], pair["b"]), {}).get(key)}
        for label, key in PAIR_BARS.items()
        for pair in total["pairs"]
        if pair[key] is not None
    ]  # fmt: skip
    worst = max(total["pairs"], key=lambda pair: pair["conflict_overlap"] or 0.0)
    null = nulls.get((worst["a"], worst["b"]), {}).get("conflict_overlap")
    beside = f", where the null model has {share(null)}" if null is not None else ""
    said = _relation(worst["cosine"])
    return Figure(
        "pairs", "How much experts agree",
        f"{pair_name(worst, names)} conflict most: {share(worst['conflict_overlap'])} of their overlap has opposite signs{beside}; "
        f"their cosine of {_number(worst['cosine'])} {said}.",
        "Conflicts near 50 % mean unrelated updates: settle each (sar, ties) instead of averaging. Far below, the experts "
        "learned the same, and a mean keeps it.",
        bars(rows, "Bars of agreement of each pair", category="measure", series="pair", percent=False, marks=True),
        rows_of_table(rows, ["measure", "pair", "value", "null"], percent=False),
    )  # fmt: skip


def _relation(cosine: float | None) -> str:
    if cosine is None:
        return "is undefined"
    words = "is close to orthogonal" if abs(cosine) < 0.1 else "is one direction in part" if cosine > 0 else "is opposed in part"
    return "is nearly one direction" if cosine > 0.7 else words


def _matrix(document: Document, names: Mapping[str, str]) -> Figure:
    rows = []
    for label, key in (("cosine", "cosine"), ("conflict (of overlap)", "conflict_overlap"), ("Jaccard", "jaccard")):
        for pair in document["coordinates"]["total"]["pairs"]:
            for a, b in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
                if pair[key] is not None:
                    rows.append({"measure": label, "expert": names[a], "other": names[b], "value": pair[key]})
    cosines = [row for row in rows if row["measure"] == "cosine"]
    near = max(cosines, key=lambda row: row["value"]) if cosines else None
    said = f"{near['expert']} and {near['other']} are the closest pair: cosine {_number(near['value'])}." if near else "No pair has a cosine."
    return Figure(
        "matrix", "Every expert against every other", said,
        "Blocks of close experts are runs of one task: merge within a block first.",
        heat_map(rows, "Matrix of experts", x="other", y="expert", choices={"measure": "Show"}, percent=False),
        rows_of_table(rows, ["measure", "expert", "other", "value"], percent=False),
    )  # fmt: skip


def _pair_map(document: Document, names: Mapping[str, str]) -> Figure:
    rows = [
        {"measure": label, "pair": pair_name(pair, names), "layer": layer, "module": module, "value": pair[key]}
        for label, key in PAIR_MAPS.items()
        for tensor in document["coordinates"]["tensors"]
        for layer, module in [place_of(tensor["name"])]
        for pair in tensor["pairs"]
        if pair[key] is not None
    ]
    conflicts = [row for row in rows if row["measure"] == "conflict (of overlap)"]
    if not conflicts:
        return Figure("pair-map", "Where experts conflict", "No pair changed a weight in common.", "", None)
    most = max(conflicts, key=lambda row: row["value"])
    low = min(conflicts, key=lambda row: row["value"])
    return Figure(
        "pair-map", "Where experts conflict",
        f"Conflict is highest in {spot(most)} ({share(most['value'])} of the overlap) and lowest in {spot(low)} ({share(low['value'])}).",
        "Where conflict is far from the rest, give that module a method or weights of its own by a filter.",
        heat_map(rows, "Heat map of conflict by layer and module", choices={"measure": "Show", "pair": "Pair"},
                 percent=False),
        rows_of_table(rows, ["measure", "pair", "layer", "module", "value"], percent=False),
    )  # fmt: skip


def _decomposition(document: Document, names: Mapping[str, str]) -> Figure:
    pairs = document["coordinates"]["total"]["pairs"]
    table = [["pair", "cosine", "overlap cosine", "energy of the first in the overlap", "of the second", "lift"]]
    for pair in pairs:
        values = [pair[key] for key in ("cosine", "overlap_cosine", "energy_a", "energy_b", "lift")]
        table.append([pair_name(pair, names), *map(_number, values)])
    pair = pairs[0]
    return Figure(
        "cosines", "What a cosine is made of",
        f"cosine = cosine inside the overlap × √(energy shares): of {pair_name(pair, names)}, {_number(pair['cosine'])} = "
        f"{_number(pair['overlap_cosine'])} × √({_number(pair['energy_a'])} · {_number(pair['energy_b'])}).",
        "A small cosine with high energies in the overlap is disagreement; with low energies, it is distance.",
        None, table,
    )  # fmt: skip


def _regions(document: Document, names: Mapping[str, str]) -> Figure:
    total = document["coordinates"]["total"]
    nulls = total.get("null", {}).get("regions")

    def of(regions: Mapping[str, Any]) -> dict[str, float | None]:
        parts = {f"only {names[key]}": value for key, value in regions["unique"].items()}
        return {**parts, "several, agreeing": regions["agreement"], "several, in conflict": regions["conflict"], "none": regions["inactive"]}

    null = of(nulls) if nulls else {}
    found = of(total["regions"])
    rows = [
        {"of": "all weights", "region": region, "value": value, "null": null.get(region)}
        for region, value in found.items()
        if value is not None
    ]
    return Figure(
        "regions", "Who changed what",
        f"{share(total['regions']['inactive'])} of the weights are as the base has them in every expert; "
        f"{share(total['regions']['conflict'])} are pulled in opposite directions.",
        "What only one expert changed merges without a question; only the last two parts need a method.",
        bars(rows, "Bars of regions", category="of", series="region", marks=nulls is not None),
        rows_of_table(rows, ["region", "value", "null"]),
    )  # fmt: skip


# ---- Storage, verdict -----------------------------------------------------------------------------------------------


def _storage(storage: Mapping[str, Any]) -> Figure:
    rows = []
    for merge in storage["merges"]:
        settings = ", ".join(f"{key} {value}" for key, value in merge["settings"].items())
        name = f"{merge['method']} ({settings})" if settings else merge["method"]
        for label, key in (("survival", "survival"), ("cosine", "cosine"), ("norm ratio", "norm_ratio")):
            if merge[key] is not None:
                rows.append({"measure": label, "merge": name, "value": merge[key]})
    survivals = [row for row in rows if row["measure"] == "survival"]
    worst, best = (pick(survivals, key=lambda row: row["value"]) for pick in (min, max))
    return Figure(
        "storage", f"Predicted survival in {storage['dtype']}",
        f"Stored in {storage['dtype']}, {worst['merge']} keeps {share(worst['value'])} of its updates, {best['merge']} "
        f"{share(best['value'])}; nothing was written to find out.",
        "Choose a method near 100 %, or write out_dtype: float32.",
        bars(rows, "Bars of survival of merges", category="measure", series="merge", percent=False),
        rows_of_table(rows, ["measure", "merge", "value"], percent=False),
    )  # fmt: skip


def _verdict(verdict: Mapping[str, Any], names: Mapping[str, str]) -> list[Figure]:
    table = [["expert", "criterion", "value", "RLVR if", "SFT if", "published", "source", "vote"]]
    for key, judged in verdict["experts"].items():
        for one in judged["evidence"]:
            cells = [one["criterion"], _number(one["value"]), one["rlvr"], one["sft"], one["published"], one["source"]]
            table.append([names[key], *cells, one["vote"]])
    votes = [row[-1] for row in table[1:]]
    recommended = verdict["recommended"]
    return [
        Figure(
            "evidence", "What the verdict rests on",
            f"{votes.count('rlvr')} criteria vote RLVR, {votes.count('sft')} SFT, {votes.count('none')} neither.",
            "A verdict on sparsity alone may be one on learning rate or rounding: see the warnings at the top.",
            None, table,
        ),
        Figure(
            "recipe", "A recipe to begin with", " ".join(recommended["reasons"]),
            "Save it as recipe.yml: rlmerge merge recipe.yml OUT.", None, (), recommended["recipe"],
        ),
    ]  # fmt: skip


def spot(row: Mapping[str, Any]) -> str:
    """'mlp.up_proj of layer 3'."""
    return row["module"] if row["layer"] == "–" else f"{row['module']} of layer {row['layer']}"


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs, in order."""
    return [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
