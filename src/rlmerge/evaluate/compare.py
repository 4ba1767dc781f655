"""Models on the same problems: accuracies, paired differences, retention of the experts' gains, flipped problems.

`compare` reads results files, groups them by task, and asks `statistics` for every number. Models with one label and
several training seeds are one row, whose chance is that of seeds and of problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import statistics
from .results import Results, ResultsError, Scores, differences, scores
from .statistics import Array, Estimate

GATE = 4.0
"""A gain of the expert that does not exceed so many standard errors is no measure for what is retained of it."""
NEAR = 5.0
"""A gain between GATE and this was perhaps shown because it came out too large: the retention then reads too low."""
FEW = 10
"""Below so many problems that differ, an interval of a difference is rough."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and standard error; bounds are None where the interval would be unbounded."""

    value: float
    low: float | None
    high: float | None
    error: float | None


@dataclass(frozen=True)
class Difference:
    """A model less the reference, on the same problems.

    interval           by a formula (`statistics.paired_difference`, `crossed_difference`)
    bootstrap          95 %, over problems, or crossed over seeds × problems
    p, test            two-sided: 'McNemar mid-p' for one sample a problem and no seeds, else 'paired t' or 'crossed t'
    p_exact            McNemar's exact one; None where the test is another
    p_holm             p adjusted over the models of the task that were compared with the reference
    right_to_wrong     problems of which the reference has more than half of the samples right, the model less
    wrong_to_right     the other way round
    """

    reference: str
    interval: Interval
    bootstrap: tuple[float, float]
    test: str
    p: float
    p_exact: float | None
    p_holm: float
    right_to_wrong: tuple[str, ...]
    wrong_to_right: tuple[str, ...]


@dataclass(frozen=True)
class Retention:
    """How much of an expert is left in a model.

    expert_gain     expert - base
    gain_retention  (model - base) / (expert - base); None unless the gain exceeds 4 standard errors
    plain           model / expert; None where the expert is never right
    """

    expert: str
    expert_gain: Interval
    gain_retention: Interval | None
    plain: Interval | None


@dataclass(frozen=True)
class Model:
    """One row: a model, or several that differ in their training seed only.

    pass_at     pass@k for k = 1 (the accuracy), 2, 4, … and all samples of a problem
    difference  None for the reference
    retention   one for each expert; none for base and experts themselves
    """

    label: str
    role: str
    seeds: tuple[int, ...]
    paths: tuple[str, ...]
    accuracy: Interval
    pass_at: dict[int, Interval]
    difference: Difference | None = None
    retention: tuple[Retention, ...] = ()


@dataclass(frozen=True)
class TaskComparison:
    """All models on one task. `notes` say what to mind when reading the numbers."""

    task: str
    problems: int
    samples: tuple[int, int]
    base: str | None
    reference: str
    experts: tuple[str, ...]
    models: tuple[Model, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, a part for every task."""

    tasks: tuple[TaskComparison, ...] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain types only."""
        return asdict(self)


@dataclass(frozen=True)
class _Row:
    """The scores of a label: right samples and samples [seeds, problems]; one seed for a model without."""

    label: str
    role: str
    seeds: tuple[int, ...]
    paths: tuple[str, ...]
    c: Array
    n: Array

    @property
    def share(self) -> Array:
        return self.c / self.n

    @property
    def samples(self) -> float:
        """Of a problem: the harmonic mean, if they differ in number."""
        return float(1 / np.mean(1 / self.n))


def compare(
    results: Sequence[Path | str],
    base: str | None = None,
    experts: Sequence[str] = (),
    reference: str | None = None,
    force: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compares results files, grouped by task.

    base, experts, reference   a results file (added to `results` if it is not there), or a model's name.
                               Without them, base and experts are those whose header says so; the reference is the base,
                               else the first model of the task.
    force                      compares also what was made with other settings or is unfinished, with a note
    seed                       of the bootstrap

    Raises ResultsError where there is nothing to compare: other problems, other settings, other seeds.
    """
    named = [name for name in (base, reference, *experts) if name is not None]
    files = {Path(path).resolve(): Path(path) for path in [*results, *(name for name in named if Path(name).is_file())]}
    loaded = [Results.load(path) for path in files.values()]
    if not loaded:
        raise ResultsError("nothing to compare: give results files.")
    labels = {one.header.label for one in loaded}
    base, reference = _label(base, labels), _label(reference, labels)
    wanted = {label for label in (_label(name, labels) for name in experts) if label}
    tasks: dict[str, list[Results]] = {}
    for one in loaded:
        tasks.setdefault(one.header.task, []).append(one)
    return Comparison(tuple(_task(task, tasks[task], base, wanted, reference, force, seed) for task in sorted(tasks)))


def _label(name: str | None, labels: set[str]) -> str | None:
    if name is None or name in labels:
        return name
    if Path(name).is_file():
        return Results.load(name).header.label
    known = ", ".join(sorted(labels))
    raise ResultsError(f"{name}: is neither a results file nor one of the models: {known}.")


def _task(
    task: str, given: list[Results], base: str | None, wanted: set[str], reference: str | None, force: bool, seed: int
) -> TaskComparison:
    read = [(one, scores(one)) for one in given]
    notes = _alike(task, read, force)
    rows = _rows(read)
    named_base = base
    base = base if base in rows else _by_role(task, rows, "base") if base is None else None
    experts = tuple(label for label in rows if label in wanted or (not wanted and rows[label].role == "expert"))
    notes += [f"no results of {name} here" for name in (named_base, reference) if name and name not in rows]
    first = reference if reference in rows else base if base is not None else next(iter(rows))
    ids = read[0][1].ids
    found = [_difference(rows[first], row, ids, seed, notes) for row in rows.values() if row.label != first]
    adjusted = statistics.holm([p for _, p, _ in found])
    by_label = {label: make(p) for (label, _, make), p in zip(found, adjusted)}
    models = []
    for row in rows.values():
        kept = () if base is None or row.label in (base, *experts) else tuple(
            _retention(rows[base], rows[expert], row) for expert in experts
        )  # fmt: skip
        accuracy, pass_at = _accuracy(row)
        difference = by_label.get(row.label)
        models.append(Model(row.label, row.role, row.seeds, row.paths, accuracy, pass_at, difference, kept))
    notes += _about_seeds(rows)
    notes += [
        f"gain of {kept.expert}: only just above 4 standard errors, so what is retained of it reads too low"
        for model in models
        for kept in model.retention
        if kept.gain_retention and kept.expert_gain.value < NEAR * (kept.expert_gain.error or 0)
    ]
    counts = [int(v) for row in rows.values() for v in (row.n.min(), row.n.max())]
    size = (min(counts), max(counts))
    return TaskComparison(task, len(ids), size, base, first, experts, tuple(models), tuple(dict.fromkeys(notes)))


def _by_role(task: str, rows: dict[str, _Row], role: str) -> str | None:
    found = [label for label, row in rows.items() if row.role == role]
    if len(found) > 1:
        raise ResultsError(f"{task}: {' and '.join(found)} both say that they are the {role}. Choose with --{role}.")
    return found[0] if found else None


# --- what must be alike -----------------------------------------------------------------------------------------------


def _alike(task: str, read: list[tuple[Results, Scores]], force: bool) -> list[str]:
    """Refuses other problems, and, unless forced, other settings, numbers of samples, and unfinished files."""
    first, known = read[0]
    doubts = []
    for one, found in read:
        missing, extra = sorted(set(known.ids) - set(found.ids)), sorted(set(found.ids) - set(known.ids))
        if missing or extra:
            parts = [f"{len(ids)} only in {path}: {_some(ids)}" for ids, path in (
                (missing, first.path), (extra, one.path)) if ids]  # fmt: skip
            raise ResultsError(f"{task}: models must be compared on the same problems, but {'; '.join(parts)}.")
        doubts += [
            f"settings.{text}" for text in differences(_settings(first), _settings(one), str(first.path), str(one.path))
        ]
        if one.header.problems is not None and one.header.problems != len(found.ids):
            doubts.append(f"{one.path}: unfinished, {len(found.ids)} of {one.header.problems} problems")
        if len(set(found.n)) > 1:
            doubts.append(f"{one.path}: {min(found.n)} to {max(found.n)} samples a problem")
        elif found.n[0] != known.n[0]:
            doubts.append(f"samples a problem: {known.n[0]} ({first.path}), {found.n[0]} ({one.path})")
    if doubts and not force:
        listed = "\n".join(f"  {text}" for text in doubts)
        raise ResultsError(f"{task}: these results were not made alike:\n{listed}\nEvaluate again, or add --force.")
    return [f"compared by force: {text}" for text in doubts]


def _settings(one: Results) -> dict[str, Any]:
    return {key: value for key, value in one.header.settings.items() if key != "seed"}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")


def _rows(read: list[tuple[Results, Scores]]) -> dict[str, _Row]:
    """Results by label, in the order given; seeds in theirs."""
    groups: dict[str, dict[int | None, tuple[Results, Scores]]] = {}
    for one, found in read:
        seeds = groups.setdefault(one.header.label, {})
        if one.header.seed in seeds:
            twin = seeds[one.header.seed][0].path
            text = f"both are {one.header.label!r} on {one.header.task!r} with seed {one.header.seed}"
            raise ResultsError(f"{twin} and {one.path}: {text}. Give one, or another `name` or `seed` in the header.")
        seeds[one.header.seed] = (one, found)
    rows = {}
    for label, seeds in groups.items():
        if None in seeds and len(seeds) > 1:
            raise ResultsError(f"{seeds[None][0].path}: says no seed, but other results of {label!r} do.")
        order = sorted(seeds, key=lambda seed: -1 if seed is None else seed)
        c, n = (np.array([getattr(seeds[seed][1], key) for seed in order]) for key in ("c", "n"))
        paths = tuple(str(seeds[seed][0].path) for seed in order)
        role = next((seeds[s][0].header.role for s in order if seeds[s][0].header.role), "")
        rows[label] = _Row(label, role, tuple(s for s in order if s is not None), paths, c, n)
    return rows


def _about_seeds(rows: dict[str, _Row]) -> list[str]:
    few = [row.label for row in rows.values() if 2 <= len(row.c) < 5]
    if not few:
        return []
    least = min(len(rows[label].c) for label in few)
    cover = "as low as 85 %" if least == 2 else "91 to 98 %"
    return [f"{', '.join(few)}: {least} seeds say little about seeds: true coverage of a 95 % interval is {cover}"]


# --- the numbers ------------------------------------------------------------------------------------------------------


def _interval(estimate: Estimate) -> Interval:
    value, *rest = (float(v) for v in estimate[:4])
    low, high, error = (v if math.isfinite(v) else None for v in rest)
    return Interval(value, low, high, error)


def _accuracy(row: _Row) -> tuple[Interval, dict[int, Interval]]:
    """pass@1, and pass@k for k = 2, 4, … and the smallest number of samples."""
    least = int(row.n.min())
    orders = sorted({1, least, *(2**i for i in range(1, least.bit_length()) if 2**i <= least)})
    found = {}
    for k in orders:
        values = row.share if k == 1 else statistics.pass_at_k(row.n, row.c, k)
        samples = row.samples / k  # what independent samples would be; at k = all of them, a value is 0 or 1
        crossed = len(values) > 1
        found[k] = _interval(
            statistics.crossed_score(values, samples) if crossed else statistics.mean_score(values[0], samples)
        )
    return found[1], found


def _matched(*rows: _Row) -> list[Array]:
    """Shares [seeds, problems] with the same seeds on every row; a model with a single result stands for every seed."""
    several = [row for row in rows if len(row.c) > 1]
    for row in several[1:]:
        if row.seeds != several[0].seeds:
            one, two = several[0], row
            text = f"{one.label} has seeds {list(one.seeds)}, {two.label} {list(two.seeds)}"
            raise ResultsError(f"{text}: seeds are compared in pairs. Give the missing results, or leave some out.")
    count = max(len(row.c) for row in rows)
    return [np.broadcast_to(row.share, (count, row.c.shape[1])) for row in rows]


def _estimate(table: Array) -> Estimate:
    return statistics.crossed_difference(table) if len(table) > 1 else statistics.paired_difference(table[0])


def _ratio(above: Array, below: Array) -> Estimate:
    crossed = len(above) > 1
    return statistics.ratio(above, below, True) if crossed else statistics.ratio(above[0], below[0])


def _difference(first: _Row, row: _Row, ids: tuple[str, ...], seed: int, notes: list[str]) -> tuple[str, float, Any]:
    """The label, the p-value, and what makes a Difference of the adjusted one."""
    one, two = _matched(first, row)
    table = two - one
    estimate = _estimate(table)
    before, after = (r.c.sum(0) / r.n.sum(0) for r in (first, row))
    lost = tuple(ids[i] for i in np.flatnonzero((before > 0.5) & (after < 0.5)))
    won = tuple(ids[i] for i in np.flatnonzero((before < 0.5) & (after > 0.5)))
    exact = None
    if len(table) == 1 and first.n.max() == row.n.max() == 1:
        exact, p = statistics.mcnemar(len(lost), len(won))
        test = "McNemar mid-p"
    else:
        p, test = statistics.p_value(estimate), "crossed t" if len(table) > 1 else "paired t"
    differing = int(np.count_nonzero(table.any(axis=0)))
    if differing < FEW:
        notes.append(f"{row.label}: only {differing} problems differ from {first.label}: the interval is rough")
    bootstrap = statistics.paired_bootstrap(table if len(table) > 1 else table[0], seed)

    def make(p_holm: float) -> Difference:
        return Difference(first.label, _interval(estimate), bootstrap, test, p, exact, p_holm, lost, won)

    return row.label, p, make


def _retention(base: _Row, expert: _Row, row: _Row) -> Retention:
    low, high, value = _matched(base, expert, row)
    gain = _estimate(high - low)
    shown = float(gain.value) > GATE * float(gain.error)
    kept = _ratio(value - low, high - low) if shown else None
    plain = _ratio(value, high) if high.any() else None
    return Retention(expert.label, _interval(gain), kept and _interval(kept), plain and _interval(plain))
