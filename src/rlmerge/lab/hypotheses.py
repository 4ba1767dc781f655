"""What the study's numbers say about each hypothesis of docs/study/protocol.md: differences with intervals, verdicts.

Scores are tables [sets, problems]: a set is a pair of training runs of its own, problems are shared by all, those of
both domains side by side. With one set (a rehearsal) intervals are over problems alone, and verdicts mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.evaluate.statistics import (
    Estimate,
    crossed_difference,
    p_value,
    paired_difference,
    pass_at_k,
    ratio,
    student_quantile,
)
from rlmerge.lab.cells import Cell, is_done, read_cell
from rlmerge.lab.presets import DOMAINS
from rlmerge.lab.study import MATCHED, Set, StudyPreset, domain_of, expert, sets
from rlmerge.lab.study_merges import ABLATIONS, AGREEMENTS, FEW, IN_BF16, merges_of

Table = NDArray[np.float64]
METRICS = ("greedy", "sampled", "pass", "trace")
"""Greedy accuracy, the share of right samples, the chance that one of all samples is right, and the mean
log-probability of a token of a right solution, in nats."""
INTEREST = {"greedy": 0.02, "sampled": 0.02, "pass": 0.02, "trace": 0.01}
"""The smallest effect of interest."""
SHARE_OF_INTEREST = 0.1
"""Of the gain: the smallest difference of two retentions that is of interest."""
Row = dict[str, Any]


@dataclass
class Numbers:
    """What the cells of a root hold, as tables."""

    root: Path
    preset: StudyPreset

    @cached_property
    def sets(self) -> list[Set]:
        """Those of which everything is measured."""
        return [one for one in sets(self.preset) if is_done(self.root, Cell(f"geometry-{one.name}", ""))]

    def of(self, what: str, arm: str) -> list[list[Set]]:
        """Sets, by rows of a table: a fusion, or the single-task merges of both domains of one pair of seeds."""
        found = [one for one in self.sets if (one.what, one.arm) == (what, arm)]
        if what == "fusion":
            return [[one] for one in found]
        by_seeds: dict[str, list[Set]] = {}
        for one in found:
            by_seeds.setdefault(one.name.split(".", 3)[3], []).append(one)
        return list(by_seeds.values())

    def score(self, cell: str, domain: str, metric: str) -> Table:
        """Of one model on one domain, [problems]."""
        found = read_cell(self.root, cell)["tasks"][self.preset.tasks[domain]]
        if metric == "greedy":
            return np.array([float(letter) for letter in found["greedy"]])
        if metric == "trace":
            return np.array(found["trace"])
        right, samples = np.array(found["right"], np.float64), found["samples"]
        return right / samples if metric == "sampled" else pass_at_k(samples, right.astype(np.int64), samples)

    def merged(self, what: str, arm: str, label: str, dtype: str, metric: str) -> Table:
        """Of a merge, [sets, problems of both domains]."""
        return self._rows(
            what, arm, lambda one, domain: self.score(f"merge-{one.name}-{dtype}-{label}", domain, metric)
        )

    def singles(self, what: str, arm: str, metric: str) -> Table:
        """Of the single experts on their own domains, the mean of those that are merged."""

        def mean(one: Set, domain: str) -> Table:
            own = [name for name in one.members if domain_of(name) == domain]
            return np.mean([self.score(f"measure-{name}", domain, metric) for name in own], axis=0)

        return self._rows(what, arm, mean)

    def base(self, what: str, arm: str, metric: str) -> Table:
        """Of the base, repeated for every set."""
        return self._rows(what, arm, lambda one, domain: self.score("measure-base", domain, metric))

    def _rows(self, what: str, arm: str, get: Any) -> Table:
        rows = []
        for group in self.of(what, arm):
            parts = []
            for domain in DOMAINS:
                for one in group:
                    if any(domain_of(name) == domain for name in one.members):
                        parts.append(get(one, domain))
            rows.append(np.concatenate(parts))
        return np.array(rows)


# -- estimates ---------------------------------------------------------------------------------------------------------


def difference(table: Table) -> Estimate:
    """Mean of a table of differences [sets, problems], for other sets and other problems."""
    return crossed_difference(table) if len(table) > 1 else paired_difference(table[0])


def as_row(estimate: Estimate, interest: float) -> Row:
    """As JSON, with a verdict: 'holds' above 0, 'refuted' where an effect of interest is ruled out, else 'open'."""
    value, (low, high) = float(estimate.value), uncut(estimate)
    half = p_value(estimate) / 2  # one-sided, that it is not above 0
    p = half if estimate.centre > 0 else 1.0 - half
    return {"value": value, "low": low, "high": high, "p": p, "verdict": verdict(low, high, interest)}


def verdict(low: float, high: float, interest: float) -> str:
    """Of a difference that a hypothesis says is above 0."""
    return "holds" if low > 0.0 else "refuted" if high < interest else "open"


def retained(above: Table, below: Table) -> Row:
    """Share of a gain that is kept: merge less base over single experts less base."""
    crossed = len(above) > 1
    found = ratio(above if crossed else above[0], below if crossed else below[0], crossed)
    ends = [float(number) if np.isfinite(number) else None for number in (found.value, found.low, found.high)]
    return dict(zip(("value", "low", "high"), ends))


def retained_difference(one: tuple[Table, Table], other: tuple[Table, Table]) -> Row | None:
    """Difference of two retentions; None where a gain is not clear of 0.

    By the influence of each set and problem, (above − r·below) / mean(below), whose differences are a table like any
    other: sets are paired by their place (matched runs share a seed; of runs that do not, no harm), problems are
    shared. Source: the delta method, for ratios of means.
    """
    parts, values = [], []
    for above, below in (one, other):
        gain = difference(below)
        if uncut(gain)[0] <= 0.0:
            return None
        values.append(above.mean() / below.mean())
        parts.append((above - values[-1] * below) / below.mean())
    more = values[0] - values[1]
    low, high = uncut(difference(parts[0] - parts[1]))
    found = {"value": float(more), "low": float(more + low), "high": float(more + high)}
    return found | {"verdict": verdict(found["low"], found["high"], SHARE_OF_INTEREST)}


def uncut(estimate: Estimate) -> tuple[float, float]:
    """The interval without the bounds of accuracies: nats and retentions have none."""
    half = float(estimate.factor * estimate.error)
    return float(estimate.centre) - half, float(estimate.centre) + half


def over_experts(values: Sequence[float]) -> Row | None:
    """Mean of single numbers with Student's interval; None of fewer than two."""
    if len(values) < 2:
        return None
    found = np.array(values)
    half = student_quantile(len(found) - 1) * float(found.std(ddof=1)) / np.sqrt(len(found))
    mean = float(found.mean())
    return {"value": mean, "low": mean - half, "high": mean + half}


# -- the hypotheses ----------------------------------------------------------------------------------------------------


def hypotheses(numbers: Numbers) -> dict[str, Any]:
    """All of them, by name; what is not measured is left out."""
    found = {
        "H1": sparsity(numbers),
        "H2": directions(numbers),
        "H3": losses(numbers),
        "H4": against_baselines(numbers),
        "H5": sensitivities(numbers),
        "H6": mechanisms(numbers),
    }
    return {name: rows for name, rows in found.items() if rows}


def _geometry(numbers: Numbers, what: str, arm: str) -> list[tuple[Set, dict[str, Any]]]:
    rows = [one for group in numbers.of(what, arm) for one in group]
    return [(one, read_cell(numbers.root, f"geometry-{one.name}")) for one in rows]


def sparsity(numbers: Numbers) -> Row:
    """H1: share of the weights that changed, in bf16 and in fp32, and how many more did in the other arms."""
    found: Row = {}
    for dtype in ("bf16", "fp32"):
        shares: dict[str, dict[str, float]] = {}
        for arm in numbers.preset.arms:
            for _, cell in _geometry(numbers, "fusion", arm):
                for name, one in cell[dtype]["experts"].items():
                    shares.setdefault(arm, {})[name.removeprefix(f"{arm}-")] = one["support"]
        own = shares.get("rlvr", {})
        rows = {}
        for arm, values in shares.items():
            more = over_experts([values[key] - own[key] for key in values if key in own]) if arm != "rlvr" else None
            rows[arm] = {"mean": float(np.mean(list(values.values()))), "more_than_rlvr": more}
            if more is not None:
                rows[arm]["verdict"] = verdict(more["low"], more["high"], SHARE_OF_INTEREST * rows["rlvr"]["mean"])
        found[dtype] = rows
    return found if any(found.values()) else {}


def directions(numbers: Numbers) -> list[Row]:
    """H2: cosine, Jaccard and sign conflict of pairs, beside those of the null model."""
    found = []
    for what in ("fusion", "single"):
        for arm in numbers.preset.arms:
            for one, cell in _geometry(numbers, what, arm):
                for dtype in ("bf16", "fp32"):
                    pair, null = cell[dtype]["pairs"][0], cell[dtype]["null"]["pairs"][0]
                    keys = ("cosine", "jaccard", "conflict_overlap")
                    found.append({"set": one.name, "dtype": dtype} | {key: [pair[key], null[key]] for key in keys})
    return found


def retention(numbers: Numbers, what: str, arm: str, label: str, dtype: str, metric: str) -> tuple[Table, Table]:
    """(merge − base, single experts − base), tables."""
    base = numbers.base(what, arm, metric)
    return numbers.merged(what, arm, label, dtype, metric) - base, numbers.singles(what, arm, metric) - base


def standard(preset: StudyPreset) -> tuple[str, ...]:
    """Merges that are no SAR."""
    return ("sum", "mean", *(method for method in preset.methods if method != "sar"))


def losses(numbers: Numbers) -> list[Row]:
    """H3: what every merge keeps of the gains, and how much more of them an SFT arm keeps than RLVR."""
    found = []
    for what in ("fusion", "single"):
        if not numbers.of(what, "rlvr"):
            continue
        for label in (*standard(numbers.preset), "sar"):
            for metric in ("greedy", "trace"):
                own = retention(numbers, what, "rlvr", label, "fp32", metric)
                row: Row = {
                    "what": what,
                    "merge": label,
                    "metric": metric,
                    "kept": {"rlvr": retained(*own)},
                    "more": {},
                }
                for arm in numbers.preset.arms:
                    made = {one.label for one in merges_of(what, arm, numbers.preset.methods)}
                    if arm == "rlvr" or label not in made or not numbers.of(what, arm):
                        continue
                    other = retention(numbers, what, arm, label, "fp32", metric)
                    row["kept"][arm] = retained(*other)
                    row["more"][arm] = retained_difference(other, own)
                found.append(row)
    return found


def against_baselines(numbers: Numbers) -> list[Row]:
    """H4: SAR less each baseline, and, by intersection and union (Berger 1982), less all of them: the largest p."""
    found = []
    for what in ("fusion", "single"):
        if not numbers.of(what, "rlvr"):
            continue
        for metric in METRICS:
            labels = standard(numbers.preset)
            if metric not in ("greedy", "trace"):  # of these alone there are samples
                labels = tuple(label for label in labels if label in FEW)
            rows = {}
            own = numbers.merged(what, "rlvr", "sar", "fp32", metric)
            for label in labels:
                less = own - numbers.merged(what, "rlvr", label, "fp32", metric)
                rows[label] = as_row(difference(less), INTEREST[metric])
            every = all(row["verdict"] == "holds" for row in rows.values())
            some_refuted = any(row["verdict"] == "refuted" for row in rows.values())
            found.append(
                {
                    "what": what,
                    "metric": metric,
                    "less": rows,
                    "p": max(row["p"] for row in rows.values()),
                    "verdict": "holds" if every else "refuted" if some_refuted else "open",
                }
            )
    return found


def _less(numbers: Numbers, one: tuple[str, str], other: tuple[str, str]) -> Row:
    """Two merges (label, dtype) of the RLVR fusions, by greedy accuracy and likelihood."""
    found: Row = {"one": one, "other": other}
    for metric in ("greedy", "trace"):
        table = numbers.merged("fusion", "rlvr", *one, metric) - numbers.merged("fusion", "rlvr", *other, metric)
        found[metric] = as_row(difference(table), INTEREST[metric])
    return found


def sensitivities(numbers: Numbers) -> list[Row]:
    """H5: the paper's sensitivity less every other way to settle a conflict, on identical supports."""
    if not numbers.of("fusion", "rlvr"):
        return []
    own = ABLATIONS[0].label
    rows = [_less(numbers, (own, "fp32"), (one.label, "fp32")) for one in (*ABLATIONS[1:], *AGREEMENTS)]
    return rows + [_less(numbers, (own, "bf16"), (label, "bf16")) for label in IN_BF16 if label != own]


def mechanisms(numbers: Numbers) -> list[Row]:
    """H6: what is regained when rounding, then dilution, then conflict is switched off, one at a time."""
    if not numbers.of("fusion", "rlvr"):
        return []
    rows = [_less(numbers, ("mean", "fp32"), ("mean", "bf16"))]
    for dtype in ("fp32", "bf16"):
        rows.append(_less(numbers, ("plain-mean", dtype), ("mean", dtype)))
        rows.append(_less(numbers, ("random-winner", dtype), ("plain-mean", dtype)))
    return rows


def controls(numbers: Numbers) -> list[Row]:
    """What equal compute gives without merging: accuracy of the controls beside the experts and SAR."""
    found = []
    for seed in numbers.preset.seeds:
        row: Row = {"seed": seed}
        for domain in DOMAINS:
            names = {"rlvr": expert("rlvr", domain, seed)}
            for control in numbers.preset.controls:
                names[control] = f"joint-{seed}" if control == "joint" else expert(control, domain, seed)
            row[domain] = {
                name: {metric: float(numbers.score(f"measure-{cell}", domain, metric).mean()) for metric in METRICS}
                for name, cell in names.items()
                if is_done(numbers.root, Cell(f"measure-{cell}", ""))
            }
        found.append(row)
    return found


def matches(numbers: Numbers) -> dict[str, Row]:
    """Which SFT checkpoints were matched, and how well."""
    if not set(numbers.preset.arms) & set(MATCHED):
        return {}
    names = [f"match-{domain}-{seed}" for seed in numbers.preset.seeds for domain in DOMAINS]
    return {name: read_cell(numbers.root, name) for name in names if is_done(numbers.root, Cell(name, ""))}
