"""What the study's numbers say about each hypothesis of docs/study/protocol.md: differences with intervals, and words.

Scores are tables [sets, problems]: a set is a pair of training runs of its own, problems are shared by all, those of
both domains side by side. With one set (a rehearsal) intervals are over problems alone, and words mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlmerge.evaluate.statistics import pass_at_k
from rlmerge.lab.cells import Cell, is_done, read_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.measure import drawn_of
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.study import MATCHED, Set, StudyPreset, base_name, expert, sets
from rlmerge.lab.study_merges import ABLATIONS, AGREEMENTS, UNTUNED, merges_of
from rlmerge.lab.verdicts import OPEN, Row, Table, all_of, as_row, difference, over_runs, retained, retained_difference

METRICS = ("greedy", "sampled", "pass", "mass")
"""Greedy accuracy, the share of right samples, the chance that one of all samples is right, and the probability of the
texts that are known to be right."""
JUDGED = ("greedy", "sampled")
"""What claims are judged by, each by itself."""
SHOWN = (*JUDGED, "mass")
INTEREST = 0.02
"""The smallest effect of interest, of all four."""
SHARE_OF_INTEREST = 0.1
"""Of the gain: the smallest difference of two retentions that is of interest; and of cosines."""


NORM_CALIPER = 0.1
"""Share of its norm by which an update that is matched by norm may miss."""
Seeds = Sequence[tuple[int, ...]] | None


@dataclass
class Numbers:
    """What the cells of a root hold, as tables."""

    root: Path
    preset: StudyPreset

    @cached_property
    def sets(self) -> list[Set]:
        """Those of which everything is measured."""
        return [one for one in sets(self.preset) if is_done(self.root, Cell(f"geometry-{one.name}", ""))]

    def of(self, what: str, arm: str) -> dict[tuple[int, ...], list[Set]]:
        """Sets by seeds, which are rows of a table: a fusion, or the single-task merges of both domains of one pair."""
        found: dict[tuple[int, ...], list[Set]] = {}
        for one in self.sets:
            if (one.what, one.arm) == (what, arm) and not self.missed(one):
                found.setdefault(one.seeds, []).append(one)
        return found

    def missed(self, one: Set) -> bool:
        """Whether an expert that should be as good as RLVR's, or as far from the base, is not."""
        if one.arm not in MATCHED:
            return False
        what = MATCHED[one.arm]
        key = {"accuracy": "greedy", "norm": "norm"}[what]
        for match in (read_cell(self.root, f"match-{domain}-{seed}") for domain in one.domains for seed in one.seeds):
            aim = match["aim"][key]
            allowed = self.preset.caliper if what == "accuracy" else NORM_CALIPER * aim
            if abs(match["seen"][str(match[what])][key] - aim) > allowed + 1e-9:
                return True
        return False

    def score(self, cell: str, domain: str, metric: str) -> Table:
        """Of one model on one domain, [problems]; the same problems for all, or LabError."""
        whole, base = read_cell(self.root, cell), read_cell(self.root, "measure-base")
        if any(whole.get(key) != base.get(key) for key in ("base", "arithmetic")):
            raise LabError(
                f"{cell}: was made from another base, or by a processor with other products, than the rest. Make all "
                "of it on one machine."
            )
        found, asked = whole["tasks"][self.preset.tasks[domain]], base["tasks"][self.preset.tasks[domain]]["problems"]
        if found["problems"] != asked:
            raise LabError(
                f"{cell}: was measured on other problems of {domain} than the base. Remove one of the cells."
            )
        if metric == "greedy":
            return np.array([float(letter) for letter in found["greedy"]])
        if metric in ("mass", "trace"):
            return np.array(found[metric])
        right, drawn = np.array(found["right"], np.int64), drawn_of(found)
        often = drawn == found["samples"]  # pass@k takes problems that were asked k times
        return right / drawn if metric == "sampled" else pass_at_k(drawn[often], right[often], found["samples"])

    def merged(self, what: str, arm: str, label: str, dtype: str, metric: str, seeds: Seeds = None) -> Table:
        """Of a merge, [sets, problems of both domains]; of all sets of an arm, or those of some seeds."""
        return self._rows(
            what, arm, lambda one, domain: self.score(f"merge-{one.name}-{dtype}-{label}", domain, metric), seeds
        )

    def singles(self, what: str, arm: str, metric: str, seeds: Seeds = None) -> Table:
        """Of the single experts on their own domains, the mean of those that are merged."""

        def mean(one: Set, domain: str) -> Table:
            own = [expert(arm, domain, seed) for seed in one.seeds]
            return np.mean([self.score(f"measure-{name}", domain, metric) for name in own], axis=0)

        return self._rows(what, arm, mean, seeds)

    def unmerged(self, what: str, metric: str) -> dict[str, Table]:
        """What RLVR's experts can do where nothing is merged: in fusion, each of the two on both domains, as one may
        have learned what helps in the other's; in single-task merging, the mean of the two.
        """
        if what != "fusion":
            return {"no merge": self.singles(what, "rlvr", metric)}
        return {
            f"{own} expert alone": self._rows(
                what, "rlvr", lambda one, domain, own=own: self.score(
                    f"measure-{expert('rlvr', own, one.seeds[0])}", domain, metric), None
            )
            for own in DOMAINS
        }  # fmt: skip

    def base(self, what: str, arm: str, metric: str, seeds: Seeds = None) -> Table:
        """Of what the experts began with, repeated for every set."""
        return self._rows(
            what, arm, lambda one, domain: self.score(f"measure-{base_name(one.arm)}", domain, metric), seeds
        )

    def _rows(self, what: str, arm: str, get: Any, seeds: Seeds) -> Table:
        rows = []
        for key, group in self.of(what, arm).items():
            if seeds is None or key in seeds:
                parts = [get(one, domain) for domain in DOMAINS for one in group if domain in one.domains]
                rows.append(np.concatenate(parts))
        return np.array(rows)


# -- the hypotheses ----------------------------------------------------------------------------------------------------


def hypotheses(numbers: Numbers) -> dict[str, Any]:
    """All of them, by name, and one word for each claim; what is not measured is left out."""
    found = {
        "H1": sparsity(numbers),
        "H2": directions(numbers),
        "H3": losses(numbers),
        "H4": against_baselines(numbers),
        "H5": sensitivities(numbers),
        "H6": mechanisms(numbers),
    }
    found = {name: rows for name, rows in found.items() if rows}
    return found | {"words": words(found, numbers.preset)}


def words(found: dict[str, Any], preset: StudyPreset) -> dict[str, str]:
    """One word for each claim of the protocol. What the preset has and no set is left of is open, never left out."""
    said: dict[str, str] = {}
    asked = [arm for arm in EQUAL if arm in preset.arms]
    only = "" if len(asked) == len(EQUAL) else f" ({', '.join(asked)} alone)"
    for dtype, arms in found.get("H1", {}).items():
        said[f"H1 in {dtype}{only}"] = all_of([arms[arm]["more"] if arm in arms else None for arm in asked])
    for row in found.get("H2", {}).get("claims", ()):
        said[f"H2 {row['what']}: {row['claim']}"] = row["verdict"]
    for metric in JUDGED:
        for what in dict.fromkeys(one["what"] for one in found.get("H3", ())):
            said[f"H3 {what}, {metric}"] = all_of(losing(found["H3"], what, metric, preset))
        for one in found.get("H4", ()):
            if one["metric"] == metric:
                said[f"H4 {one['what']}, {metric}"] = one["verdict"]
        deciding = [one[metric] for one in found.get("H5", ()) if one["other"][0] in DECIDING]
        if deciding:
            said[f"H5, {metric}"] = all_of(deciding)
        for one in found.get("H6", ()):
            said[f"H6 {one['cause']}, {metric}"] = one[metric]["verdict"]
    return said


LEAST_SETS = 5
"""Of an arm: fewer say too little about other sets, whatever their interval (docs/compare.md)."""


def losing(found: Sequence[Row], what: str, metric: str, preset: StudyPreset) -> list[Row | None]:
    """H3's rows: what the mean and the sum keep of SFT's gains more than of RLVR's. In fusion of SFT as good and of SFT
    as far from the base as RLVR, where there are such arms; else of SFT after as many steps. None: too few sets.
    """
    arms = [arm for arm in MATCHED if arm in preset.arms] if what == "fusion" else []
    rows = [one for one in found if (one["what"], one["metric"]) == (what, metric) and one["merge"] in UNTUNED]
    return [
        one["more"].get(arm) if one["kept"].get(arm, {"sets": 0})["sets"] >= LEAST_SETS else None
        for one in rows
        for arm in arms or ["sft"]
    ]


def in_both_parts(first: Row, second: Row, presets: tuple[StudyPreset, StudyPreset]) -> dict[str, str]:
    """The primary claims: the word of part 1, unless a row of part 2 (the numbers of its page) has an interval below 0,
    which contradicts it.
    """
    said = {}
    for metric in JUDGED:
        own = next(one for one in second["H4"] if (one["what"], one["metric"]) == ("fusion", metric))
        rows = {"H3": losing(second["H3"], "fusion", metric, presets[1]), "H4": list(own["less"].values())}
        for name, parts in rows.items():
            claim = f"{name} fusion, {metric}"
            against = any(row is not None and row["high"] < 0.0 for row in parts)
            said[claim] = "contradicted" if against else words(first, presets[0])[claim]
    return said


EQUAL = ("rft", "sft", "sft-norm")
"""Arms at equal rate and steps, and at equal norm: what H1 is about. One of fewer steps has had less time to change."""


def sparsity(numbers: Numbers) -> Row:
    """H1: share of the weights that changed, in bf16 and in fp32, and how many more did in the other arms."""
    found: Row = {}
    for dtype in ("bf16", "fp32"):
        shares: dict[str, dict[str, float]] = {}
        for arm in numbers.preset.arms:
            for cell in _geometry(numbers, "fusion", arm).values():
                for name, one in cell.get(dtype, {"experts": {}})["experts"].items():
                    shares.setdefault(arm, {})[name.removeprefix(f"{arm}-")] = one["support"]
        own = shares.get("rlvr", {})
        rows = {}
        for arm, values in shares.items():
            mean = float(np.mean(list(values.values())))
            rows[arm] = {"mean": mean, "more": None}
            if arm != "rlvr":
                least = SHARE_OF_INTEREST * float(np.mean(list(own.values())))
                rows[arm]["more"] = over_runs([values[key] - own[key] for key in values if key in own], least)
        found[dtype] = rows
    return found if any(found.values()) else {}


def _geometry(numbers: Numbers, what: str, arm: str) -> dict[str, dict[str, Any]]:
    """By name of the set."""
    found = [one for group in numbers.of(what, arm).values() for one in group]
    return {one.name: read_cell(numbers.root, f"geometry-{one.name}") for one in found}


def directions(numbers: Numbers) -> Row:
    """H2: cosine, Jaccard and sign conflict of pairs, beside those of the null model; and what is claimed of them."""
    keys = ("cosine", "jaccard", "conflict_overlap")
    pairs: list[Row] = []
    claims: list[Row] = []
    for what in ("fusion", "single"):
        if not numbers.of(what, "rlvr"):
            continue
        cosines: dict[str, list[float]] = {}
        more = []
        for arm in numbers.preset.arms:
            for name, cell in _geometry(numbers, what, arm).items():
                for dtype in [dtype for dtype in ("bf16", "fp32") if dtype in cell]:
                    pair, null = cell[dtype]["pairs"][0], cell[dtype]["null"]["pairs"][0]
                    pairs.append({"set": name, "dtype": dtype} | {key: [pair[key], null[key]] for key in keys})
                    if dtype == "bf16":
                        cosines.setdefault(arm, []).append(abs(pair["cosine"]))
                        if arm == "rlvr" and None not in (pair[keys[2]], null[keys[2]]):
                            more.append(pair[keys[2]] - null[keys[2]])
        own, sft = cosines.get("rlvr", []), cosines.get("sft", [])
        rows = {
            "|cosine| is below 0.1": over_runs([SHARE_OF_INTEREST - one for one in own], 0.0),
            "|cosine| is less than SFT's": over_runs([b - a for a, b in zip(own, sft)], SHARE_OF_INTEREST),
            "signs conflict more than by chance": over_runs(more, INTEREST),
        }
        claims += [
            {"what": what, "claim": claim, "row": row, "verdict": row["verdict"] if row else OPEN}
            for claim, row in rows.items()
        ]
    return {"pairs": pairs, "claims": claims} if pairs else {}


def standard(preset: StudyPreset) -> tuple[str, ...]:
    """Merges that are no SAR."""
    return ("sum", "mean", *(method for method in preset.methods if method != "sar"))


def losses(numbers: Numbers) -> list[Row]:
    """H3: what every merge keeps of the gains, and how much more an SFT arm keeps than RLVR of the same seeds."""
    found = []
    for what in ("fusion", "single"):
        if not numbers.of(what, "rlvr"):
            continue
        for label in (*standard(numbers.preset), "sar"):
            for metric in SHOWN:
                row: Row = {"what": what, "merge": label, "metric": metric, "kept": {}, "more": {}}
                for arm in numbers.preset.arms:
                    made = {one.label for one in merges_of(what, arm, numbers.preset.methods)}
                    seeds = tuple(numbers.of(what, arm))
                    if label not in made or not seeds:
                        continue
                    own = retention(numbers, what, arm, label, metric, seeds)
                    row["kept"][arm] = retained(*own) | {"sets": len(seeds)}
                    if arm != "rlvr":
                        rlvr = retention(numbers, what, "rlvr", label, metric, seeds)
                        row["more"][arm] = retained_difference(own, rlvr, SHARE_OF_INTEREST)
                found.append(row)
    return found


def by_domain(numbers: Numbers) -> list[Row]:
    """What a fusion has more than the expert of a domain there: over both, what is above one expert hides what is lost
    of the other.
    """
    found = []
    for arm in numbers.preset.arms:
        seeds = tuple(numbers.of("fusion", arm))
        made = {one.label for one in merges_of("fusion", arm, numbers.preset.methods)}
        for label in (*standard(numbers.preset), "sar") if seeds else ():
            for metric in JUDGED if label in made else ():
                less = numbers.merged("fusion", arm, label, "fp32", metric) - numbers.singles("fusion", arm, metric)
                first = len(numbers.score("measure-base", DOMAINS[0], metric))
                parts = zip(DOMAINS, (less[:, :first], less[:, first:]))
                found.append({"arm": arm, "merge": label, "metric": metric}
                             | {domain: as_row(difference(part), INTEREST) for domain, part in parts})  # fmt: skip
    return found


def retention(
    numbers: Numbers, what: str, arm: str, label: str, metric: str, seeds: Seeds = None
) -> tuple[Table, Table]:
    """(merge − base, single experts − base), tables."""
    base = numbers.base(what, arm, metric, seeds)
    merged = numbers.merged(what, arm, label, "fp32", metric, seeds)
    return merged - base, numbers.singles(what, arm, metric, seeds) - base


def against_baselines(numbers: Numbers) -> list[Row]:
    """H4: SAR less each baseline, not to merge among them, and less all of them, which is the largest p."""
    found = []
    for what in ("fusion", "single"):
        if not numbers.of(what, "rlvr"):
            continue
        for metric in METRICS:
            labels = standard(numbers.preset)
            own = numbers.merged(what, "rlvr", "sar", "fp32", metric)
            others = {label: numbers.merged(what, "rlvr", label, "fp32", metric) for label in labels}
            others |= numbers.unmerged(what, metric)
            rows = {label: as_row(difference(own - other), INTEREST) for label, other in others.items()}
            found.append({"what": what, "metric": metric, "less": rows, "p": max(row["p"] for row in rows.values()),
                          "verdict": all_of(list(rows.values()))})  # fmt: skip
    return found


def _less(numbers: Numbers, one: tuple[str, str], other: tuple[str, str]) -> Row:
    """Two merges (label, dtype) of the RLVR fusions, greedily, by samples, and by the probability of right texts."""
    found: Row = {"one": one, "other": other}
    for metric in SHOWN:
        table = numbers.merged("fusion", "rlvr", *one, metric) - numbers.merged("fusion", "rlvr", *other, metric)
        found[metric] = as_row(difference(table), INTEREST)
    return found


DECIDING = ("delta2-ties-drawn", "F-permuted", "random-winner")
"""What the Fisher must be above, if it is to matter: the size of the update alone, one that knows no place, chance."""


def sensitivities(numbers: Numbers) -> list[Row]:
    """H5: the paper's sensitivity less every other way to settle a conflict, on identical supports."""
    if not numbers.preset.ablations or not numbers.of("fusion", "rlvr"):
        return []
    own = (ABLATIONS[0].label, "fp32")
    rows = [_less(numbers, own, (one.label, "fp32")) for one in ABLATIONS[1:]]
    return rows + [_less(numbers, (one.label, "fp32"), own) for one in AGREEMENTS]


CAUSES = {
    "rounding": (("mean", "fp32"), ("mean", "bf16")),
    "dilution": (("plain-mean", "fp32"), ("mean", "fp32")),
    "conflict": ((ABLATIONS[0].label, "fp32"), ("plain-mean", "fp32")),
}
"""H6: a merge in which one thing is switched off, and the one in which it is on."""


def mechanisms(numbers: Numbers) -> list[Row]:
    """H6: what is regained when rounding, dilution or conflict is switched off, one at a time."""
    if not numbers.preset.ablations or not numbers.of("fusion", "rlvr"):
        return []
    return [{"cause": cause, **_less(numbers, one, other)} for cause, (one, other) in CAUSES.items()]


def controls(numbers: Numbers) -> list[Row]:
    """What equal compute gives without merging: accuracy of the controls beside the experts, on their own domains."""
    found = []
    for seed in numbers.preset.controlled if numbers.preset.controls else ():
        row: Row = {"seed": seed}
        for domain in DOMAINS:
            names = {"rlvr": expert("rlvr", domain, seed)}
            for control in numbers.preset.controls:
                names[control] = f"joint-{seed}" if control == "joint" else expert(control, domain, seed)
            row[domain] = {
                name: {metric: float(numbers.score(f"measure-{cell}", domain, metric).mean()) for metric in SHOWN}
                for name, cell in names.items()
                if is_done(numbers.root, Cell(f"measure-{cell}", ""))
            }
        found.append(row)
    return found


def transfer(numbers: Numbers) -> dict[str, Row]:
    """Points that experts gain on the other domain, by arm: what makes a merge of two look good that has lost one."""
    found: dict[str, Row] = {}
    for arm in numbers.preset.arms:
        more: list[float] = []
        for seed in numbers.preset.seeds:
            for domain, other in zip(DOMAINS, reversed(DOMAINS)):
                cell = f"measure-{expert(arm, domain, seed)}"
                if is_done(numbers.root, Cell(cell, "")):
                    if numbers.preset.tasks[other] not in read_cell(numbers.root, cell)["tasks"]:
                        continue
                    before = numbers.score(f"measure-{base_name(arm)}", other, "greedy")
                    gain = numbers.score(cell, other, "greedy") - before
                    more.append(float(gain.mean()))
        if more:
            found[arm] = {"mean": float(np.mean(more)), "runs": len(more), "more": over_runs(more, INTEREST)}
    return found


def masters(numbers: Numbers) -> dict[str, Row]:
    """How much less right the fp32 masters are than the bf16 models whose gradients they followed, by arm."""
    found: dict[str, Row] = {}
    for arm in ("rlvr", "rft", "sft"):
        less: list[float] = []
        for seed in numbers.preset.seeds:
            for domain in DOMAINS:
                cell = f"measure-{expert(arm, domain, seed)}"
                if is_done(numbers.root, Cell(cell, "")):
                    letters = read_cell(numbers.root, cell)["master"][numbers.preset.tasks[domain]]["greedy"]
                    own = letters.count("1") / len(letters)
                    less.append(float(numbers.score(cell, domain, "greedy").mean()) - own)
        if less:
            found[arm] = {"mean": float(np.mean(less)), "runs": len(less), "less": over_runs(less, INTEREST)}
    return found


def matches(numbers: Numbers) -> dict[str, Row]:
    """Which SFT checkpoints were matched, and how well."""
    if not set(numbers.preset.arms) & set(MATCHED):
        return {}
    names = [f"match-{domain}-{seed}" for seed in numbers.preset.seeds for domain in DOMAINS]
    return {name: read_cell(numbers.root, name) for name in names if is_done(numbers.root, Cell(name, ""))}
