"""RLVR-like, SFT-like or mixed: by stated thresholds, each with its evidence; and a recipe, with its reasons.

No threshold is a law. The published ranges are of other models at other learning rates, so every vote shows its value
beside them, and a warning says when nothing but learning rate or rounding has spoken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .document import Coordinates, Evidence, Judged, Number, Recommended, Scope, Storage, Stored, Verdict

Looks = Literal["RLVR-like", "SFT-like", "mixed"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A quantity, the values from which it votes, and where these come from.

    rlvr, sft   the bound of each vote, or None where the quantity never speaks for it
    rising      whether large values are RLVR's
    indirect    whether it follows learning rate, steps and rounding, not what was learned
    """

    name: str
    rlvr: float | None
    sft: float | None
    rising: bool
    indirect: bool
    published: str
    source: str

    def vote(self, value: Number) -> Literal["rlvr", "sft", "none"]:
        """What a value speaks for."""
        if value is None:
            return "none"
        sign = 1.0 if self.rising else -1.0
        if self.rlvr is not None and sign * value >= sign * self.rlvr:
            return "rlvr"
        return "sft" if self.sft is not None and sign * value <= sign * self.sft else "none"

    def words(self, bound: float | None, rlvr: bool) -> str:
        """The bound of a vote, as '≥ 0.36'."""
        return "never" if bound is None else f"{'≥' if self.rising == rlvr else '≤'} {bound:g}"


UNCHANGED = Criterion(
    "unchanged in bf16", 0.36, 0.19, True, True,
    "RLVR 0.36-0.92, OPD 0.49-0.57, SFT 0.006-0.19", "arXiv 2511.08567, 2606.07082",
)  # fmt: skip
RELATIVE_NORM = Criterion(
    "relative norm of the update", 1e-3, 3e-3, False, True,
    "norms of 0.64-0.78 (RL), 1.7-2.4 (RFT), 4.8-7.8 (SFT) on Llama-3.1-8B; the thresholds are our reading",
    "arXiv 2607.22039",
)  # fmt: skip
SPECTRAL_SHIFT = Criterion(
    "normalised spectral shift (NSS)", 5e-5, 5e-4, False, True,  # at most the relative norm (Mirsky)
    "RLVR about 1e-5, OPD about 1e-4, SFT about 1e-3", "arXiv 2511.08567, 2606.07082",
)  # fmt: skip
COSINE = Criterion(
    "largest cosine with another expert, beyond the null", None, 0.9, False, False,
    "SFT, RFT and RIFT of one task 0.97 and more; RLVR of different tasks 0.05", "arXiv 2606.23740; our lab",
)  # fmt: skip
INDIRECT = {one.name for one in (UNCHANGED, RELATIVE_NORM, SPECTRAL_SHIFT, COSINE) if one.indirect}

DIVERGED = 0.5
"""Of the relative norm: from here on a model does not look trained from its base."""
ROUNDED = 0.1
"""Of the coordinates: what support as stored and as bf16 may differ by."""
SINGLE_STEPS = 0.5
"""Of the changes: from here on rounding decides what the support is."""
LIKE_NULL = 0.1
"""Relative difference of two Jaccard indexes that a warning calls the same."""
FRAGILE = 0.9
"""Survival below which storing in bf16 is advised against."""


def judge(
    coordinates: Coordinates, storage: Storage | None, spectra: Mapping[str, Any] | None, recipe: Callable[[str], str]
) -> Verdict:
    """The verdict on measured experts.

    recipe   the YAML of a recipe over these models: 'sar', 'ties' or 'task_arithmetic'
    """
    total = coordinates["total"]
    experts = {key: _judge(key, total, spectra) for key in total["experts"]}
    kinds: list[Looks] = [one["looks"] for one in experts.values()]
    looks: Looks = kinds[0] if len(set(kinds)) == 1 else "mixed"
    return {
        "looks": looks,
        "experts": experts,
        "warnings": [*_warn_each(total, experts), *_warn_pairs(total), *((spectra or {}).get("warnings") or [])],
        "recommended": _recommend(looks, _is_certain(experts), total, storage, recipe),
    }


def _judge(key: str, total: Scope, spectra: Mapping[str, Any] | None) -> Judged:
    expert = total["experts"][key]
    support = expert["support_bf16"]
    evidence = [
        _evidence(UNCHANGED, None if support is None else 1.0 - support),
        _evidence(RELATIVE_NORM, expert["relative_norm"]),
    ]
    if spectra is not None:
        shift = spectra["total"]["experts"].get(key, {}).get("shift", {}).get("nss")
        evidence.append(_evidence(SPECTRAL_SHIFT, shift))
    if len(total["experts"]) > 1:
        evidence.append(_evidence(COSINE, _largest_cosine(key, total)))
    if not expert["support"]:
        return {"looks": "mixed", "evidence": [{**one, "vote": "none"} for one in evidence]}
    return {"looks": _decide(evidence), "evidence": evidence}


def _decide(evidence: Sequence[Evidence]) -> Looks:
    """The votes that do not follow the learning rate decide, if they agree; else all, if they agree; else mixed."""
    votes = [(one["vote"], one["criterion"] in INDIRECT) for one in evidence if one["vote"] != "none"]
    for some in ([vote for vote, weak in votes if not weak], [vote for vote, _ in votes]):
        if some and len(set(some)) == 1:
            return "RLVR-like" if some[0] == "rlvr" else "SFT-like"
        if some:
            return "mixed"
    return "mixed"


def _evidence(criterion: Criterion, value: Number) -> Evidence:
    return {
        "criterion": criterion.name,
        "value": value,
        "rlvr": criterion.words(criterion.rlvr, True),
        "sft": criterion.words(criterion.sft, False),
        "published": criterion.published,
        "source": criterion.source,
        "vote": criterion.vote(value),
    }


def _largest_cosine(key: str, total: Scope) -> Number:
    """Of the pairs with an expert, less what the null model has there."""
    nulls = total.get("null", {"pairs": []})["pairs"] or [{"cosine": 0.0}] * len(total["pairs"])
    found = [
        pair["cosine"] - (null["cosine"] or 0.0)
        for pair, null in zip(total["pairs"], nulls)
        if key in (pair["a"], pair["b"]) and pair["cosine"] is not None
    ]
    return max(found, default=None)


# -- warnings ----------------------------------------------------------------------------------------------------------


def _warn_each(total: Scope, experts: Mapping[str, Judged]) -> list[str]:
    found = []
    for key, expert in total["experts"].items():
        support, as_bf16 = expert["support"] or 0.0, expert["support_bf16"] or 0.0
        if not support:
            found.append(f"{key}: equals the base in every coordinate. Is it the right folder?")
            continue
        if (expert["relative_norm"] or 0.0) > DIVERGED:
            found.append(
                f"{key}: its update has {expert['relative_norm']:.2f} of the base's norm: it does not look trained "
                "from this base."
            )
        if support - as_bf16 > ROUNDED:
            found.append(
                f"{key}: {support:.1%} of the weights changed as stored, {as_bf16:.1%} as bf16: most of its sparsity "
                "in bf16 is rounding, not training."
            )
        steps = dict(zip(expert["steps"]["at_least"], expert["steps"]["share"]))
        if expert["steps"]["dtype"] != "F32" and (single := steps.get(1) or 0.0) > SINGLE_STEPS:
            found.append(
                f"{key}: {single:.0%} of its changes are one step of {expert['steps']['dtype']}, the least that can be "
                "stored: rounding decided which updates are seen, and its support says little of training."
            )
        spoken = {one["criterion"] for one in experts[key]["evidence"] if one["vote"] != "none"}
        if spoken and spoken <= INDIRECT:
            found.append(
                f"{key}: only {', '.join(sorted(spoken))} spoke, and that follows learning rate and steps: "
                "SFT at an RL learning rate looks much like RLVR, and RLVR at a large one like SFT."
            )
    return found


def _warn_pairs(total: Scope) -> list[str]:
    found = []
    for pair, null in zip(total["pairs"], total.get("null", {"pairs": []})["pairs"]):
        ours, chance = pair["jaccard"], null["jaccard"]
        if ours and chance and abs(ours / chance - 1.0) < LIKE_NULL:
            found.append(
                f"{pair['a']} and {pair['b']}: overlap as in the null model (Jaccard {ours:.3f} and {chance:.3f}): "
                "small weights change more easily, and that is all that where they meet says."
            )
    return found


# -- what to do --------------------------------------------------------------------------------------------------------


def _is_certain(experts: Mapping[str, Judged]) -> bool:
    """Whether something else than learning rate and rounding has spoken of every expert."""
    return all(
        any(one["vote"] != "none" and one["criterion"] not in INDIRECT for one in judged["evidence"])
        for judged in experts.values()
    )


def _recommend(
    looks: Looks, certain: bool, total: Scope, storage: Storage | None, recipe: Callable[[str], str]
) -> Recommended:
    method, reasons = "sar", []
    if len(total["experts"]) == 1:
        method = "task_arithmetic"
        reasons.append("There is one expert: λ scales its update, and 1 gives it back bit for bit.")
    elif looks == "SFT-like" and certain:
        method = "ties"
        reasons.append(
            "Updates of SFT are dense and redundant: TIES trims each to its largest, elects a sign and averages those "
            "that agree."
        )
    else:
        reasons.append(
            "SAR keeps what one expert alone changed and lets the larger update win a conflict; with Fishers "
            "(`fisher:`), the one that matters more."
        )
        if looks == "RLVR-like":
            reasons.append("Updates of RLVR are sparse and lie apart, so that most of each is kept whole.")
        else:
            reasons.append(
                "It settles each coordinate by itself and needs experts of no one kind, "
                + ("and these do not look alike." if looks == "mixed" else "and these look of SFT by their size only.")
            )
    conflicts = [pair["conflict_overlap"] for pair in total["pairs"] if pair["conflict_overlap"] is not None]
    if conflicts:
        reasons.append(
            f"In up to {max(conflicts):.0%} of the coordinates that two experts changed they disagree in sign: a sum "
            "would cancel there."
        )
    reasons += _of_storage(method, storage)
    return {"recipe": recipe(method), "reasons": reasons}


def _of_storage(method: str, storage: Storage | None) -> list[str]:
    if storage is None:
        return []
    found = []
    average = _find(storage, "average")
    if average is not None and (average["survival"] or 1.0) < FRAGILE:
        found.append(
            f"Of an average only {average['survival']:.0%} of the updates would survive in bf16 (cosine with the "
            f"intended one {average['cosine'] or 0.0:.2f}): do not average, or store fp32."
        )
    own = _find(storage, "sum" if method == "task_arithmetic" else method)
    if own is not None and own["survival"] is not None:
        text = f"Of this recipe's updates {own['survival']:.1%} survive in bf16"
        found.append(f"{text}: add `out_dtype: float32`." if own["survival"] < FRAGILE else f"{text}.")
    return found


def _find(storage: Storage, method: str) -> Stored | None:
    return next((one for one in storage["merges"] if one["method"] == method), None)
