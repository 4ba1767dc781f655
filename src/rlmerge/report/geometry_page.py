"""The page of `rlmerge inspect`: what training did to each expert, and what experts have in common.

Every sentence is made from the numbers beside it, so that what a figure says is true of these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmerge.figures import gathered
from rlmerge.report.beside import merge_name, names_of
from rlmerge.report.expert_figures import expert_figures
from rlmerge.report.figure import Figure, Page, Section, bars, number, rows_of_table, share
from rlmerge.report.function_figures import function_section
from rlmerge.report.pair_figures import pair_figures
from rlmerge.report.spectra_figures import spectra_section

Document = Mapping[str, Any]
Names = Mapping[str, str]


def geometry_page(document: Document, title: str = "") -> Page:
    """The page of a document of `rlmerge inspect`. Needs the extra `report`."""
    names = names_of(document)
    sections = []
    if "coordinates" in document:
        sections.append(Section("Each expert", expert_figures(document, names)))
        if len(names) > 1:
            sections.append(Section("Between experts", pair_figures(document, names), NULL_TEXT))
    if "spectra" in document:
        sections.append(spectra_section(document["spectra"], names))
    if "storage" in document:
        sections.append(Section("What a stored merge keeps", [_storage(document["storage"])]))
    if "function" in document:
        sections.append(function_section(document["function"], names))
    if "verdict" in document:
        sections.append(Section("Verdict", _verdict(document["verdict"], names)))
    return Page(
        title or f"What training did to {_listed(list(names.values()))}",
        summary(document, names),
        _facts(document, names),
        sections,
        document,
        tuple(gathered(document.get("verdict", {}).get("warnings", ()), names)),
    )


def _listed(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


NULL_TEXT = (
    "The red tick is the null model: the same updates, shuffled among weights of the same size, added to the base and "
    "rounded as the expert is. What the tick explains, training did not do."
)


STORE_ADVICE = "Choose a method near 100 %, or write out_dtype: float32."


def summary(document: Document, names: Names) -> list[str]:
    """What kind of experts these are, what they share, what happens when they are merged; a sentence each."""
    said = []
    if (verdict := document.get("verdict")) is not None:
        each = ", ".join(f"{names[key]} {one['looks']}" for key, one in verdict["experts"].items())
        said.append(f"Verdict: {verdict['looks']} ({each})." if len(names) > 1 else f"Verdict: {each}.")
        said += [f"Recommended: {reason}" for reason in verdict["recommended"]["reasons"][:2]]
    if (coordinates := document.get("coordinates")) is not None:
        total = coordinates["total"]
        for key, one in total["experts"].items():
            said.append(
                f"{names[key]} changed {share(one['support'])} of the weights, by {number(one['relative_norm'])} of "
                f"their norm."
            )
        for pair in total["pairs"]:
            said.append(
                f"{names[pair['a']]} and {names[pair['b']]}: cosine {number(pair['cosine'])}; they meet in "
                f"{share(pair['jaccard'])} of what either changed, and disagree in sign in "
                f"{share(pair['conflict_overlap'])} of that."
            )
    return said


def _facts(document: Document, names: Names) -> list[tuple[str, str]]:
    base = document["base"]
    facts = [("base", f"{base['reference']} ({base['dtype']})")]
    facts += [(names[e["key"]], f"{e['reference']} ({e['dtype']})") for e in document["experts"]]
    return [*facts, ("weights", f"{base.get('coordinates', 0):,}"), ("rlmerge", document["rlmerge"])]


# ---- Storage, verdict -----------------------------------------------------------------------------------------------


def _storage(storage: Mapping[str, Any]) -> Figure:
    rows = []
    for merge in storage["merges"]:
        name = merge_name(merge)
        for label, key in (("survival", "survival"), ("cosine", "cosine"), ("norm ratio", "norm_ratio")):
            if merge[key] is not None:
                rows.append({"measure": label, "merge": name, "value": merge[key]})
    survivals = [row for row in rows if row["measure"] == "survival"]
    worst, best = (pick(survivals, key=lambda row: row["value"], default=None) for pick in (min, max))
    if worst is None or best is None:
        return Figure("storage", f"Predicted survival in {storage['dtype']}", "No expert changed anything.", "", None)
    said = f"{worst['merge']} keeps {share(worst['value'])} of its updates, {best['merge']} {share(best['value'])}"
    if share(worst["value"]) == share(best["value"]):
        said = f"every merge keeps {share(worst['value'])} of its updates"
    return Figure(
        "storage",
        f"Predicted survival in {storage['dtype']}",
        f"Stored in {storage['dtype']}, {said}; nothing was written to find out.",
        STORE_ADVICE if worst["value"] < 0.99 else "Any of these merges can be stored.",
        bars(rows, "Bars of survival of merges", category="measure", series="merge", percent=False),
        rows_of_table(rows, ["measure", "merge", "value"], percent=False),
    )


def _verdict(verdict: Mapping[str, Any], names: Names) -> list[Figure]:
    table = [["expert", "criterion", "value", "RLVR if", "SFT if", "published", "source", "vote"]]
    for key, judged in verdict["experts"].items():
        for one in judged["evidence"]:
            cells = [one["criterion"], number(one["value"]), one["rlvr"], one["sft"], one["published"], one["source"]]
            table.append([names[key], *cells, one["vote"]])
    votes = [row[-1] for row in table[1:]]
    recommended = verdict["recommended"]
    return [
        Figure(
            "evidence",
            "What the verdict rests on",
            f"{votes.count('rlvr')} criteria vote RLVR, {votes.count('sft')} SFT, {votes.count('none')} neither.",
            "A verdict on sparsity alone may be one on learning rate or rounding: see the warnings at the top.",
            None,
            table,
        ),
        Figure(
            "recipe",
            "A recipe to begin with",
            " ".join(recommended["reasons"]),
            "Save it as recipe.yml: rlmerge merge recipe.yml OUT.",
            None,
            (),
            recommended["recipe"],
        ),
    ]
