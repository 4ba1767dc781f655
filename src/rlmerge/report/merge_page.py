"""The page of a merge: what it did to every update, from the statistics that its `rlmerge.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmerge.figures import statistics_table
from rlmerge.report.figure import Figure, Page, Section, bars, heat_map, rows_of_table, share
from rlmerge.report.names import called, cells, place_of, spot

MEASURES = {
    "changed by any expert": "changed",
    "changed by several (of changed)": "overlap",
    "in conflict (of overlap)": "conflict",
    "draws (of conflicts)": "draws",
    "survival after the cast": "survival",
}
"""Label and key of the shares that are one number a tensor."""
EACH = {"support": "support", "wins (of conflicts)": "wins", "kept (of non-zero)": "kept"}
"""The same for shares of each expert."""


def merge_page(provenance: Mapping[str, Any], title: str, alarms: Sequence[str] = ()) -> Page:
    """The page of a merge, from its `rlmerge.json` and the warnings that it gave. Needs the extra `report`."""
    statistics = provenance["statistics"]
    total, tensors = statistics["total"], statistics["tensors"]
    names = called(list(total.get("support", {})))
    recipe = provenance["recipe"]
    sections = [Section("The whole model", [_table(total, names)])]
    if "support" in total:
        sections.append(Section("Where", [_whole_maps(tensors, total), *_expert_maps(tensors, total, names)]))
    if "wins" in total:
        sections.append(Section("Who won", [_wins(tensors, names, total)]))
    return Page(
        title,
        _summary(total, recipe, names),
        [
            ("method", recipe["merge_method"]),
            ("experts", ", ".join(names.values()) or "–"),
            ("weights merged", f"{total.get('size', 0):,}"),
            ("rlmerge", provenance["rlmerge"]),
        ],
        sections,
        provenance,
        (*alarms, *provenance.get("notes", ())),
    )


def _share(total: Mapping[str, Any], key: str, expert: str | None = None) -> float | None:
    found = total.get(key)
    if found is not None and expert is not None:
        found = found.get(expert)
    return None if found is None else found.get("share")


def _summary(total: Mapping[str, Any], recipe: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Sentences that are true of these statistics, the most important first."""
    said = []
    survival, cosine = _share(total, "survival"), total.get("realised_cosine")
    if survival is not None:
        direction = f"; the stored update points where it should with cosine {cosine:.4f}" if cosine is not None else ""
        lost = "nearly all" if survival > 0.99 else "most" if survival > 0.9 else "only a part"
        said.append(
            f"After the cast to the output's dtype, {share(survival)} of the intended updates are still "
            f"there ({lost}){direction}."
        )
    if (conflict := _share(total, "conflict")) is not None:
        overlap = _share(total, "overlap")
        alone = (
            "50 % is what independent experts would do"
            if len(names) == 2
            else ("independent ones would do so in 50 % where two meet, in 75 % where three do")
        )
        said.append(
            f"The experts meet in {share(overlap)} of the changed weights, and pull in opposite directions in "
            f"{share(conflict)} of these; {alone}."
        )
    draws = _share(total, "draws")
    if draws:
        said.append(f"{share(draws)} of the conflicts were draws, which return to the base.")
    for key, name in names.items():
        support = _share(total, "support", key)
        if support is not None:
            said.append(f"{name} changes {share(support)} of the weights that were merged.")
    return said or [f"Merged by {recipe['merge_method']}, a method that keeps no statistics of updates."]


def _table(total: Mapping[str, Any], names: Mapping[str, str]) -> Figure:
    _, *rows = statistics_table(dict(total))
    return Figure(
        "statistics",
        "What became of the updates",
        "Shares of the whole model, then of each expert; 'of' names what a share is of.",
        "Low survival: store in float32, or use a method that does not average. Many draws: give the experts Fishers.",
        None,
        [["", "all", *names.values()], *rows],
    )


def _rows(tensors: Mapping[str, Any], measures: Mapping[str, str]) -> list[dict[str, Any]]:
    return cells(
        {"measure": label, "layer": layer, "module": module, "value": value}
        for label, key in measures.items()
        for name, found in tensors.items()
        for layer, module in [place_of(name)]
        if (value := _share(found, key)) is not None
    )


def _whole_maps(tensors: Mapping[str, Any], total: Mapping[str, Any]) -> Figure:
    rows = _rows(tensors, {label: key for label, key in MEASURES.items() if key in total})
    shares = [row for row in rows if row["measure"] == "changed by any expert"]
    most, least = (pick(shares, key=lambda row: row["value"]) for pick in (max, min))
    return Figure(
        "where",
        "Layer by module",
        f"Most is changed in {spot(most)} ({share(most['value'])}), least in {spot(least)} ({share(least['value'])}).",
        "Use filters in the recipe where single modules behave unlike the rest.",
        heat_map(rows, "Heat map of shares by layer and module", choices={"measure": "Show"}),
        rows_of_table(rows, ["measure", "layer", "module", "value"]),
    )


def _expert_maps(tensors: Mapping[str, Any], total: Mapping[str, Any], names: Mapping[str, str]) -> list[Figure]:
    rows = cells(
        {"measure": label, "expert": short, "layer": layer, "module": module, "value": value}
        for label, key in EACH.items()
        for expert, short in names.items()
        for name, found in tensors.items()
        for layer, module in [place_of(name)]
        if key in total and (value := _share(found, key, expert)) is not None
    )
    if not rows:
        return []
    supports = {short: _share(total, "support", expert) or 0.0 for expert, short in names.items()}
    most = max(supports, key=lambda name: supports[name])
    return [
        Figure(
            "experts",
            "Each expert, layer by module",
            f"{most} changes most of the experts: {share(supports[most])} of the weights.",
            "An expert that changes far more than the others outvotes them: lower its weight, or give it less density.",
            heat_map(
                rows,
                "Heat map of one expert's shares by layer and module",
                choices={"measure": "Show", "expert": "Expert"},
            ),
            rows_of_table(rows, ["measure", "expert", "layer", "module", "value"]),
        )
    ]


def _wins(tensors: Mapping[str, Any], names: Mapping[str, str], total: Mapping[str, Any]) -> Figure:
    """Wins of conflicts by kind of module, from the counts of the tensors."""
    counts: dict[str, dict[str, int]] = {}
    conflicts: dict[str, int] = {}
    for name, found in tensors.items():
        module = place_of(name)[1]
        conflicts[module] = conflicts.get(module, 0) + found["conflict"]["count"]
        for expert, won in found["wins"].items():
            counts.setdefault(module, {}).setdefault(expert, 0)
            counts[module][expert] += won["count"]
    rows = [
        {"module": module, "expert": names[expert], "value": won / conflicts[module]}
        for module, each in counts.items()
        for expert, won in each.items()
        if conflicts[module]
    ]
    shares = {names[expert]: won["share"] for expert, won in total["wins"].items()}
    most = max(shares, key=lambda name: shares[name] or 0.0)
    draws = _share(total, "draws")
    rest = (
        "What is left of 100 % was drawn."
        if len(names) == 2
        else (f"{share(draws)} were drawn; where several win together, each is counted." if draws is not None else "")
    )
    return Figure(
        "wins",
        "Who wins the conflicts, by module",
        f"{most} wins most conflicts: {share(shares[most])} of all. {rest}",
        "If one expert wins nearly everywhere although both matter, compare their Fishers: rlmerge fisher-stats.",
        bars(rows, "Bars of wins by module and expert", category="module", series="expert", title="of conflicts"),
        rows_of_table(rows, ["module", "expert", "value"]),
    )
