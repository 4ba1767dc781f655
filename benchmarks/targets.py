"""What the benchmark is held against: each target, what was measured, whether it holds, and if not, why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cells import ratio

Report = dict[str, Any]
FASTER = {
    "ties": 25, "della": 40, "sce": 20, "breadcrumbs": 20, "ramplus_tl": 15, "dare_ties": 10, "linear": 4,
    "task_arithmetic": 4,
}  # fmt: skip
"""Times as fast as mergekit, at least."""
WHEN_SET = {"ties": 97, "della": 174, "sce": 107, "breadcrumbs": 85, "ramplus_tl": 52, "dare_ties": 37, "linear": 17,
            "task_arithmetic": 10}  # fmt: skip
"""Seconds that mergekit took on the machine and at the hour for which the targets were set."""
ANONYMOUS, PER_THREAD = 400, 64
"""MB."""
LINEAR = 0.1
"""Largest distance of a measured time from the straight line through all, as a share of the time."""


@dataclass(frozen=True)
class Target:
    """One line of the table. `holds` is None while nothing is measured."""

    what: str
    measured: str
    holds: bool | None
    why: str = ""


def section(report: Report, name: str) -> dict[str, Any]:
    """Rows of a section by name; none if nothing is measured."""
    return report["sections"].get(name, {})


def middle(row: dict[str, Any], contender: str, field: str = "wall") -> float | None:
    """A contender's median, None without one. 'cpu' is user and system time."""
    found = row["contenders"].get(contender, {}).get("median")
    if found is None:
        return None
    return found["user"] + found["system"] if field == "cpu" else found[field]


def spread(values: list[tuple[str, float]], unit: str = " ×") -> str:
    """The smallest and the largest, with their rows."""
    low, high = min(values, key=lambda v: v[1]), max(values, key=lambda v: v[1])
    if low == high:
        return f"{low[1]:.1f}{unit}"
    return f"{low[1]:.1f} (`{low[0]}`) to {high[1]:.1f}{unit} (`{high[0]}`)"


def against_floor(report: Report, staged: bool, most: float) -> Target:
    """Time over that of the floor, of methods that measure nothing first, or of those that do."""
    rows = {n: r for n, r in section(report, "methods").items() if bool(r["stages"]) == staged}
    what = f"{'with' if staged else 'without'} a measuring stage ≤ {most:g} × floor"
    times = [(name, value) for name, row in rows.items() if (value := ratio(row, "rlmerge", "floor")) is not None]
    if not times:
        return Target(what, "not measured", None)
    good = sum(value <= most for _, value in times)
    hashed = [(name, value) for name, row in rows.items() if (value := ratio(row, "rlmerge", "hashed")) is not None]
    reasons = [f"over the floor with hashes, which `rlmerge.json` needs: {spread(hashed)}"] if hashed else []
    reasons += profiled(report, "sar" if staged else "ties")
    measured = f"{good} of {len(times)} methods; {spread(times)}"
    return Target(what, measured, good == len(times), "; ".join(reasons))


def profiled(report: Report, name: str) -> list[str]:
    """Where the time goes that the floor has not, from the profile of one thread: at most one sentence."""
    one = section(report, "profile").get(name)
    if one is None:
        return []
    seconds = one["seconds"]
    return [
        f"of {one['total']:.1f} s of `{name}` on one thread, start-up and loading kernels take "
        f"{seconds['start'] + seconds['kernel_loading']:.1f} and the interpreter {seconds['interpreter']:.1f}, which "
        f"threads do not share, hashing {seconds['hashing']:.1f}, kernels "
        f"{seconds['decoding'] + seconds['arithmetic'] + seconds['encoding']:.1f}, reading and writing "
        f"{seconds['reading'] + seconds['writing']:.1f}"
    ]


def against_mergekit(report: Report, name: str, least: float) -> Target:
    """How many times as fast as mergekit one method is."""
    row = section(report, "methods").get(name)
    value = ratio(row, "mergekit", "rlmerge") if row else None
    what = f"`{name}` ≥ {least:g} × as fast as mergekit"
    if row is None or value is None:
        return Target(what, "not measured", None)
    cpu = ratio(row, "mergekit", "rlmerge", "cpu")
    own, theirs = middle(row, "rlmerge") or 0.0, middle(row, "mergekit") or 0.0
    measured = f"{value:.1f} × ({own:.1f} s against {theirs:.1f} s; processor time {cpu:.1f} ×)"
    why = f"mergekit took {WHEN_SET[name]} s where the target was set: {WHEN_SET[name] / own:.0f} × of ours here"
    return Target(what, measured, value >= least, why if value < least < WHEN_SET[name] / own else "")


def nothing_slower(report: Report) -> Target:
    """Whether mergekit is faster anywhere."""
    values = [
        (name, value)
        for name, row in section(report, "methods").items()
        if (value := ratio(row, "mergekit", "rlmerge")) is not None
    ]
    if not values:
        return Target("nothing slower than in mergekit", "not measured", None)
    return Target("nothing slower than in mergekit", spread(values), min(v for _, v in values) >= 1)


def anonymous_memory(report: Report) -> Target:
    """The largest share of the bound that any size and number of threads takes."""
    what = f"anonymous memory ≤ {ANONYMOUS} MB + {PER_THREAD} MB a thread, at any size"
    rows = section(report, "memory")
    if not rows:
        return Target(what, "not measured", None)
    found = [
        (found / (ANONYMOUS + PER_THREAD * row["label"]["threads"]), found, row["label"])
        for row in rows.values()
        if (found := middle(row, "rlmerge", "anonymous")) is not None
    ]
    share, most, label = max(found, key=lambda one: one[0])
    text = f"at most {most:.0f} MB (`{label['method']}`, {label['size']}, {label['threads']} threads)"
    return Target(what, text, share <= 1)


def arrays(report: Report) -> list[tuple[str, float]]:
    """Per row of a spectral method, the fp64 arrays of its largest matrix's size beyond a method that has none."""
    rows = section(report, "spectral")
    plain = {row["size"]: row for row in rows.values() if row["label"].get("method") == "task_arithmetic"}
    found = []
    for name, row in rows.items():
        most = middle(row, "rlmerge", "anonymous")
        rest = middle(plain[row["size"]], "rlmerge", "anonymous") if row["size"] in plain else None
        if rest is not None and most is not None and row["label"]["method"] != "task_arithmetic":
            found.append((name, max(0.0, most - rest) * 1e6 / row["label"]["matrix_bytes"]))
    return found


def spectral_memory(report: Report) -> Target:
    """Memory of methods that decompose."""
    what = "spectral methods ≤ 6 × their largest matrix (fp64)"
    found = arrays(report)
    if not found:
        return Target(what, "not measured", None)
    good = sum(value <= 6 for _, value in found)
    why = "`iso_merger` holds the turns of all experts, a square matrix each, until it knows their factors"
    return Target(what, f"{good} of {len(found)}; {spread(found, ' arrays')}", good == len(found), why)


def lines(report: Report) -> list[tuple[str, float, float, float]]:
    """Per method: seconds of the processor at no expert, seconds an expert, largest relative distance from the line."""
    by_method: dict[str, list[tuple[int, float]]] = {}
    for row in section(report, "experts").values():
        cpu = middle(row, "rlmerge", "cpu")
        if cpu is not None:
            by_method.setdefault(row["label"]["method"], []).append((row["label"]["experts"], cpu))
    found = []
    for name, points in by_method.items():
        if len(points) > 2:
            x, y = np.array(points, float).T
            slope, start = np.polyfit(x, y, 1)
            found.append((name, float(start), float(slope), float(np.max(np.abs(slope * x + start - y) / y))))
    return found


def linear_cost(report: Report) -> Target:
    """Whether a straight line describes the cost from 1 to 8 experts."""
    what = "cost linear in coordinates × experts, to K = 8"
    found = lines(report)
    if not found:
        return Target(what, "not measured", None)
    text = "; ".join(f"`{name}` {slope:.2f} s an expert, off by ≤ {off:.0%}" for name, _, slope, off in found)
    why = (
        "where several experts have changed a coordinate all K are looked at, and such coordinates are 3 % of all at "
        "K = 2 and 26 % at K = 8 (docs/log.md); seconds divided by experts do not exceed those of one"
    )
    return Target(what, f"processor time: {text}", all(off <= LINEAR for *_, off in found), why)


def of_nothing(report: Report, name: str, what: str, floor: str) -> Target:
    """A merge of which nothing comes against a program that only reads (hashes) and writes."""
    row = section(report, "nothing").get(name)
    value = ratio(row, "rlmerge", floor) if row else None
    if row is None or value is None:
        return Target(what, "not measured", None)
    times = f"{middle(row, 'rlmerge'):.2f} s; reading, hashing and writing alone {middle(row, 'hashed'):.2f} s"
    start = section(report, "help")
    begun = section(report, "profile").get("ties", {}).get("seconds", {}).get("start")
    why = f"start-up takes {begun:.2f} s of it" if start and begun is not None else ""
    return Target(what, f"{value:.1f} × ({times})", value <= 1.5, why)


def small_model(report: Report) -> Target:
    """A model that is merged in less time than a program takes to start."""
    what = "135M parameters, `ties`, warm, start-up included: ≤ 5 × floor without fsync"
    row = section(report, "small").get("ties")
    value = ratio(row, "rlmerge", "floor") if row else None
    if row is None or value is None:
        return Target(what, "not measured", None)
    floor = middle(row, "floor") or 0.0
    measured = f"{value:.1f} × ({middle(row, 'rlmerge'):.2f} s against {floor:.2f} s)"
    return Target(what, measured, value <= 5, small_reason(report, floor) if floor else "")


def small_reason(report: Report, floor: float) -> str:
    """What a small merge cannot do without, in floors: start-up, and kernels, from the profile of a larger model."""
    one, row = section(report, "profile").get("ties"), section(report, "methods").get("ties")
    if one is None or row is None:
        return ""
    seconds, share = one["seconds"], section(report, "small")["ties"]["input_mb"] / row["input_mb"]
    start = (seconds["start"] + seconds["kernel_loading"]) / floor
    kernels = share * (seconds["decoding"] + seconds["arithmetic"] + seconds["encoding"]) / 2 / floor
    disk = share * (seconds["reading"] + seconds["writing"]) / 2 / floor
    return (
        f"from the profile of one thread: starting takes {start:.1f} floors; shared by two threads, compiled "
        f"kernels alone take {kernels:.1f}, reading twice and writing {disk:.1f}"
    )


def start_up(report: Report) -> Target:
    """The help of both tools."""
    row = section(report, "help").get("help")
    if row is None:
        return Target("`--help` in under 0.3 s", "not measured", None)
    took, theirs = middle(row, "rlmerge"), middle(row, "mergekit")
    other = "" if theirs is None else f" (mergekit {theirs:.1f} s)"
    return Target("`--help` in under 0.3 s", f"{took:.2f} s{other}", (took or 0) < 0.3)


def targets(report: Report) -> list[Target]:
    """All of them, in the order of the table."""
    made: list[Callable[[], Target]] = [
        lambda: against_floor(report, False, 1.5),
        lambda: against_floor(report, True, 3.0),
        *(lambda n=name, x=least: against_mergekit(report, n, x) for name, least in FASTER.items()),
        lambda: nothing_slower(report),
        lambda: anonymous_memory(report),
        lambda: spectral_memory(report),
        lambda: linear_cost(report),
        lambda: of_nothing(
            report, "ties-equal", "inputs that are all equal cost a comparison (≤ 1.5 × floor)", "hashed"
        ),
        lambda: of_nothing(report, "copy", "what no recipe changes costs a copy (≤ 1.5 × floor)", "hashed"),
        lambda: small_model(report),
        lambda: start_up(report),
    ]
    return [make() for make in made]
