"""Writes docs/performance.md, its picture and the README's numbers from benchmarks/results.json.

    python benchmarks/write_page.py

Nothing on the page is written by hand but what never depends on a measurement; a test compares it with this program.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import ratio
from targets import ANONYMOUS, PER_THREAD, Report, arrays, lines, middle, section, targets

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "performance.md"
PICTURE = PAGE.with_suffix(".svg")
README = HERE.parent / "README.md"
README_MARKS = "<!-- numbers of benchmarks/write_page.py -->", "<!-- end of the numbers -->"

MARK = "<!-- Written by benchmarks/write_page.py from benchmarks/results.json; edit that program, not this page. -->"
INTRO = """\
# Performance

Merging moves bytes: read K + 1 models, write one. This page says how much longer than that rlmerge takes, and how
that compares with mergekit. All of it comes from `make bench`, which prints the tables and goes on where it was
killed; `python benchmarks/write_page.py` makes this page of its results.
"""
CUTS = """\
bf16, three experts (or as many as the method takes), 13 % of the weights changed. Of all coordinates `ties` keeps 5 %,
breadcrumbs 10 %, dare and della 50 %, `dots` 30 %; `sce` selects 10 % of those where experts differ.

![Seconds a method takes in rlmerge, in mergekit, and for plain copying](performance.svg)
"""
COLUMNS = """\
*of the processor*: seconds of all threads, and their ratio, which other programs on the machine change less. *first
run*: with no compiled kernels in the cache. *stages*: something is measured before the merge. *floor*: a program
that reads the same files (Fishers included) and writes as much with two threads, from and to the page cache; *with
hashes*: it also hashes all of it with xxh3-128, as rlmerge does for `rlmerge.json`; *one thread*: the floor with one.
*MB*: anonymous memory at its peak; *peak*: all resident memory, mapped files included.
"""
ARRAYS = """\
Methods that decompose whole matrices, on a layer with four of 1536 × 1536, and on one with three of 4864 × 896, one
thread. An array is the largest matrix in fp64, beyond what `task_arithmetic` takes:
"""
AGREEMENT = """\
## Do both compute the same?

Both tools with `dtype: float32` on bf16 models of 32 M parameters; values that differ by more than 1e-6 are counted.
*ties*: the update ties with others at a threshold, and the tools keep different ones of them. *changed, l1, l2*: of
methods that draw their masks, rlmerge's update over mergekit's. *words in bf16*: with `dtype: bfloat16`, where mergekit
computes in bf16 (but for `linear` and `slerp`) and rlmerge rounds once; ties are included. Where signs cancel, both
were told to add the positive updates (`cancelled: positive`), as mergekit does. On updates that are large enough for
mergekit's constants, both agree in all methods that draw nothing (`tests/golden`).
"""
CLOSING = """\
## How it is measured

- The models are made up, at the true shapes of Qwen2-0.5B and 1.5B and of SmolLM2-135M. What decides a merge's speed is
  as in real RLVR experts: 13 % of the words changed, by one to three bf16 steps, 45 % of the overlap in conflict.
- In a row every program runs once a turn, one after the other, at least three turns (two for memory, one for matrices);
  the tables show medians. A row is measured anew as a whole when rlmerge's source or the recipe changes, and half a
  turn is continued for an hour at most.
- Inputs are read once before each run, and the disk is synced, so every run finds its inputs in the page cache.
- Memory is that of the process and its children, seen every 50 ms. Times are those of the whole command, from before
  its start to its end.
- mergekit runs with the flags that are fastest on a processor here: `--no-copy-tokenizer --no-write-model-card
  --quiet`.
- More about how rlmerge came to be this fast, and what did not help: [the log](log.md).
"""
TURNING = ("small", "nothing", "experts", "memory", "spectral", "methods", "large")
"""Sections whose rows have turns."""
VERDICTS = {
    "agree": "agree",
    "but for ties": "agree but for ties",
    "as likely": "as likely",
    "known": "differ, as known",
    "differ": "**differ**",
}
KINDS = {
    "start": "start-up: imports, recipe, plan, until the first byte is read",
    "kernel_loading": "loading compiled kernels",
    "reading": "reading (`preadv` from the page cache)",
    "decoding": "decoding, comparing, picking out what changed",
    "arithmetic": "arithmetic: scores, histograms, cuts, signs, sums",
    "encoding": "rounding, and what it left of the updates",
    "writing": "writing (`pwrite` into the page cache)",
    "hashing": "hashing inputs and output",
    "interpreter": "the interpreter and NumPy, between all these",
}


def number(value: float | None, places: int = 1) -> str:
    """A number for a table; nothing for None."""
    return "" if value is None else f"{value:.{places}f}"


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; columns are set to the right where their head begins with '>'."""
    rule = ["---:" if head.startswith(">") else "---" for head in heads]
    names = [head.removeprefix(">") for head in heads]
    return [f"| {' | '.join(cells)} |" for cells in (names, rule, *rows)] + [""]


def opening(report: Report) -> list[str]:
    """When, where and of what."""
    machine, versions = report["machine"], report["versions"]
    measured = [row for name in TURNING for row in section(report, name).values()]
    loads = [load for row in measured if row["load"] for load in row["load"]]
    theirs = versions.get("mergekit") or {}
    against = f"; mergekit {theirs['mergekit']}, torch {theirs['torch']}" if theirs else ""
    text = [
        *(MARK, "", INTRO),
        f"Measured {report['date']} on {machine['cpus']} processors ({machine['processor']}), "
        f"{machine['memory_gb']:.0f} GB, {machine['file_system']}, Linux {machine['kernel']}; rlmerge "
        f"{versions['commit']}, NumPy {versions['numpy']}, numba {versions['numba']}{against}.",
    ]
    if loads:
        text.append(
            f"The machine's load average before a run was {min(loads):.1f} to {max(loads):.1f}, what the benchmark "
            "itself had just done included."
        )
        if max(loads) > machine["cpus"] + 1:
            text.append(
                "**Other programs ran at the same time**: times are too long, ratios compare what suffered alike."
            )
    if report["missing"]:
        count = Counter(name.partition("/")[0] for name in report["missing"])
        listed = ", ".join(f"{name} ({many})" for name, many in count.items())
        text += ["", f"**Not measured yet**, rows by section: {listed}."]
    return [*text, ""]


def target_table(report: Report) -> list[str]:
    """What was promised, and what came."""
    verdict = {True: "yes", False: "**no**", None: "?"}
    rows = [
        (one.what, one.measured, verdict[one.holds], one.why if one.holds is False else "") for one in targets(report)
    ]
    return ["## Targets", "", *grid(("target", "measured", "holds", "where not: why"), rows)]


def against_table(report: Report, name: str) -> list[str]:
    """Every method against mergekit and the floor."""
    both = [(tool, field) for tool in ("rlmerge", "mergekit") for field in ("anonymous", "rss")]
    table = []
    for label, row in section(report, name).items():
        cells = (
            number(middle(row, "rlmerge")),
            number(middle(row, "rlmerge", "cpu")),
            number(middle(row, "first")),
            number(middle(row, "mergekit")),
            *(number(ratio(row, "mergekit", "rlmerge", field)) for field in ("wall", "cpu")),
            "yes" if row["stages"] else "",
            number(middle(row, "floor"), 2),
            *(number(ratio(row, "rlmerge", other)) for other in ("floor", "hashed", "plain")),
            *(number(middle(row, tool, field), 0) for tool, field in both),
        )
        table.append((f"`{label}`", *cells))
    heads = (
        "method", ">rlmerge s", ">of the processor", ">first run", ">mergekit s", ">mergekit / rlmerge",
        ">of the processor", "stages", ">floor s", ">× floor", ">× with hashes", ">× one thread", ">MB", ">peak",
        ">MB mergekit", ">peak",
    )  # fmt: skip
    return grid(heads, table)


def synced_table(report: Report) -> list[str]:
    """With fsync on both sides."""
    table = []
    for name, row in section(report, "methods").items():
        if middle(row, "rlmerge_fsync") is not None:
            values = [middle(row, tool) for tool in ("rlmerge_fsync", "floor_fsync")]
            table.append((f"`{name}`", *map(number, (*values, ratio(row, "rlmerge_fsync", "floor_fsync")))))
    return grid(("method", ">`--fsync` s", ">floor with fsync s", ">×"), table) if table else []


def methods_part(report: Report) -> list[str]:
    """The main tables."""
    millions = f"{report['parameters']['0.5B'] / 1e6:.0f} M parameters,"
    text = ["## Every method, 0.5B", "", millions, CUTS, *against_table(report, "methods"), COLUMNS]
    if synced := synced_table(report):
        text += ["By default nobody waits for the disk. With `--fsync`:", "", *synced]
    return text


def small_part(report: Report) -> list[str]:
    """What little work costs."""
    text = []
    if section(report, "small"):
        text += ["## A small model: 135M", "", *against_table(report, "small")]
    if not (rows := section(report, "nothing")):
        return text
    table = [
        (
            row["label"]["what"],
            number(middle(row, "rlmerge"), 2),
            number(middle(row, "rlmerge", "cpu"), 2),
            *(number(middle(row, other), 2) for other in ("floor", "hashed")),
            *(number(ratio(row, "rlmerge", other)) for other in ("floor", "hashed")),
        )
        for row in rows.values()
    ]
    heads = ("inputs", ">s", ">of the processor", ">floor s", ">with hashes s", ">× floor", ">× with hashes")
    intro = "Three experts that are copies of the base, and one model copied, 0.5B:"
    return [*text, "## Inputs of which nothing comes", "", intro, "", *grid(heads, table)]


def experts_part(report: Report) -> list[str]:
    """One to eight experts."""
    if not (rows := section(report, "experts")):
        return []
    counts = sorted({row["label"]["experts"] for row in rows.values()})
    table = []
    for name, start, slope, off in lines(report):
        mine = {row["label"]["experts"]: row for row in rows.values() if row["label"]["method"] == name}
        cells = [number(middle(mine[k], "rlmerge", "cpu"), 2) if k in mine else "" for k in counts]
        table.append((f"`{name}`", *cells, f"{start:.2f} + {slope:.2f}·K", f"{off:.0%}"))
    heads = ("method", *(f">K = {k}" for k in counts), "line", ">largest distance")
    intro = "Seconds of the processor, start-up included, 135M parameters:"
    return ["## One to eight experts", "", intro, "", *grid(heads, table)]


def memory_part(report: Report) -> list[str]:
    """Size and threads, and matrices."""
    text = []
    if rows := section(report, "memory"):
        threads = sorted({row["label"]["threads"] for row in rows.values()})
        found: dict[tuple[str, str], dict[int, float | None]] = {}
        for row in rows.values():
            label, most = row["label"], middle(row, "rlmerge", "anonymous")
            found.setdefault((label["method"], label["size"]), {})[label["threads"]] = most
        table = [(f"`{m}`", size, *(number(by.get(t), 0) for t in threads)) for (m, size), by in found.items()]
        table.append(("*bound*", "any", *(str(ANONYMOUS + PER_THREAD * t) for t in threads)))
        heads = ("method", "parameters", *(f">{t} thread{'s' * (t > 1)}" for t in threads))
        text += ["## Memory", "", "Anonymous memory at its peak, MB:", "", *grid(heads, table)]
    rows, table = section(report, "spectral"), []
    for name, value in arrays(report):
        most, took = middle(rows[name], "rlmerge", "anonymous"), middle(rows[name], "rlmerge")
        label = rows[name]["label"]
        table.append((f"`{label['method']}`", label["shape"], number(most, 0), number(value), number(took)))
    return [*text, ARRAYS, *grid(("method", "matrix", ">MB", ">arrays", ">s"), table)] if table else text


def profile_part(report: Report) -> list[str]:
    """Where the time goes."""
    found = section(report, "profile")
    if not found:
        return []
    table = [
        (text, *(f"{one['seconds'][kind]:.2f} ({one['seconds'][kind] / one['total']:.0%})" for one in found.values()))
        for kind, text in KINDS.items()
    ]
    table.append(("all", *(f"{one['total']:.2f}" for one in found.values())))
    intro = "Seconds of one thread, 0.5B parameters, kernels compiled before (`benchmarks/profile_merge.py`):"
    return ["## Where the time goes", "", intro, "", *grid(("", *(f">`{name}`" for name in found)), table)]


def agreement_part(report: Report) -> list[str]:
    """Whether both tools compute the same."""
    found = section(report, "agree")
    if not found:
        return []
    table = []
    for name, one in found.items():
        if "changed" in one:
            fp32 = ", ".join(f"{key} {one[key]:.3f}" for key in ("changed", "l1", "l2"))
        else:
            fp32 = f"{one['max_difference']:.1e}"
        count = one.get("coordinates", 1)
        shares = [f"{one[key] / count:.3%}" if one.get(key) else "" for key in ("tie_at_threshold", "unexplained")]
        table.append((f"`{name}`", VERDICTS[one["verdict"]], fp32, *shares, in_bf16(one), one["reason"]))
    heads = ("method", "in fp32", "largest difference", ">ties", ">other differences", "words in bf16", "why")
    return [AGREEMENT, *grid(heads, table)]


def in_bf16(one: dict[str, Any]) -> str:
    """What a method's outputs have not in common in bf16."""
    if (bf16 := one.get("bf16")) is None:
        return ""
    wrote = bf16["mergekit_dtypes"]
    note = "" if wrote == ["BF16"] else f" (mergekit wrote {' and '.join(wrote)})"
    return f"{bf16['differ_share']:.3%} differ{note}"


def page(report: Report) -> str:
    """The whole page."""
    text = [*opening(report), *target_table(report)]
    if section(report, "methods"):
        text += methods_part(report)
    if section(report, "large"):
        text += ["## Three methods, 1.5B in four shards", "", *against_table(report, "large")]
    text += [*small_part(report), *experts_part(report), *memory_part(report), *profile_part(report)]
    return "\n".join([*text, *agreement_part(report), CLOSING])


def numbers(report: Report) -> str:
    """What the README says of speed and memory: methods that both tools have, and the memory of all."""
    rows = section(report, "methods")
    both = {name: row for name, row in rows.items() if ratio(row, "mergekit", "rlmerge") is not None}
    if not both:
        return "Speed and memory: [docs/performance.md](docs/performance.md)."
    named = [name for name in ("linear", "ties", "della", "karcher") if name in both] or list(both)[:3]
    times = ", ".join(
        f"`{name}` in {middle(both[name], 'rlmerge'):.1f} s (mergekit {middle(both[name], 'mergekit'):.0f} s)"
        for name in named
    )
    ours, theirs = (
        [most for row in both.values() if (most := middle(row, tool, "anonymous")) is not None]
        for tool in ("rlmerge", "mergekit")
    )
    return (
        f"Three experts of {report['parameters']['0.5B'] / 1e6:.0f} M bf16 parameters on {report['machine']['cpus']} "
        f"processors:\n{times},\nwith {min(ours):.0f} to {max(ours):.0f} MB of memory of its own "
        f"(mergekit {min(theirs) / 1e3:.1f} to {max(theirs) / 1e3:.1f} GB).\n"
        "All methods, the floor that copying sets, and what is missed: [docs/performance.md](docs/performance.md)."
    )


def in_readme(text: str, report: Report) -> str:
    """The README with these numbers."""
    before, _, rest = text.partition(README_MARKS[0])
    after = rest.partition(README_MARKS[1])[2]
    return f"{before}{README_MARKS[0]}\n{numbers(report)}\n{README_MARKS[1]}{after}"


def draw(report: Report, path: Path) -> None:
    """Bars: seconds of every method in rlmerge and mergekit, and the floors as marks."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rlmerge"
    import matplotlib.pyplot as plt

    rows = section(report, "methods")
    names = sorted(rows, key=lambda name: -(middle(rows[name], "mergekit") or 0.0))
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(names) + 1))

    def points(tool: str, offset: float) -> tuple[list[float], list[float]]:
        known = [(i + offset, took) for i, name in enumerate(names) if (took := middle(rows[name], tool)) is not None]
        return [place for place, _ in known], [took for _, took in known]

    for offset, tool, color in ((-0.2, "mergekit", "#c9c9c9"), (0.2, "rlmerge", "#2b6cb0")):
        axes.barh(*points(tool, offset), 0.38, color=color, label=tool)
    for tool, color, label in (
        ("floor", "black", "floor: the bytes alone"),
        ("hashed", "#c05621", "floor with hashes"),
    ):
        places, seconds = points(tool, 0.2)
        axes.plot(seconds, places, "|", color=color, ms=9, mew=2, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds (logarithmic), 494M bf16 parameters, three experts, two threads")
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Description": report["versions"]["commit"]})
    plt.close(figure)


def main() -> None:
    """Writes page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    args.page.write_text(page(report))
    if args.page == PAGE:
        README.write_text(in_readme(README.read_text(), report))
    if section(report, "methods"):
        draw(report, args.page.with_suffix(".svg"))
    else:
        args.page.with_suffix(".svg").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
