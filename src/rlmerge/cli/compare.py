"""`rlmerge compare`: which model is better, by how much, and is that more than chance? Or: reports side by side."""

from __future__ import annotations

import csv
import json
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlmerge.errors import RlmergeError

from .options import Parser, declare_output, declare_report
from .show import warn

if TYPE_CHECKING:
    from rlmerge.evaluate.compare import Interval, Model, Retention, TaskComparison

USAGE = "[OPTIONS] FILE..."
DESCRIPTION = """\
Compare models on the same problems, from results files of 'rlmerge eval':
accuracy, differences, retention of the experts' gains, flips.

Or see reports of 'rlmerge inspect' side by side. --html makes a page of one
report or of several, or of a merge's rlmerge.json."""
WIDTH = 100
"""Columns of a terminal that tables fit; names give way."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    parser.add_argument("results", metavar="FILE", nargs="+", help="results of one or several tasks, or reports")
    which = "results file or name of the"
    parser.add_argument("--base", metavar="R", help=f"{which} base model; default: as its header says")
    parser.add_argument("--expert", metavar="R", action="append", help=f"{which} expert; once for each; default: same")
    parser.add_argument("--reference", metavar="R", help=f"{which} model to compare with; default: base, or the first")
    parser.add_argument("--force", action="store_true", help="compare although settings differ or runs are unfinished")
    parser.add_argument("--csv", action="store_true", help="print one line a model and task as CSV")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    declare_report(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Compares and prints."""
    from rlmerge.report.documents import read_documents

    if given.json + given.csv + given.markdown > 1:
        Parser("compare", USAGE, DESCRIPTION).error("--json, --csv and --markdown: give one of them")
    kind, documents = read_documents(given.results)
    if kind == "results":
        _results(given)
    else:
        from .reports import show_reports

        show_reports(given, kind, documents)


def _results(given: Namespace) -> None:
    from rlmerge.evaluate.compare import compare

    if given.html is not None or given.figures is not None:
        raise RlmergeError(
            "--html and --figures are for reports of 'rlmerge inspect' and for a merge's rlmerge.json; these files are "
            "results of evaluations. Print them with --markdown, --csv or --json."
        )
    found = compare(given.results, given.base, given.expert or (), given.reference, given.force)
    if given.json:
        json.dump(found.as_dict(), sys.stdout)
        print()
    elif given.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows_for_csv(found.tasks))
    elif not given.quiet:
        for number, task in enumerate(found.tasks):
            print("\n" * bool(number) + (in_markdown(task) if given.markdown else on_terminal(task)))
    if (given.json or given.csv) and not given.quiet:
        for task in found.tasks:
            for note in task.notes:
                warn(f"{task.task}: {note}")


def on_terminal(task: TaskComparison) -> str:
    """Title, tables, flipped problems, notes."""
    from rlmerge.figures import as_text

    parts = [_title(task), "", *(as_text(_fit(table)) + "\n" for table in _tables(task))]
    for model in task.models:
        if model.difference is not None:
            for word, ids in _flips(model):
                parts.append(_fold(f" {_clip(model.label)} {word}: ", ids))
    parts += [textwrap.fill(note, WIDTH, initial_indent=" note: ", subsequent_indent="   ") for note in task.notes]
    return "\n".join(parts).rstrip()


def in_markdown(task: TaskComparison) -> str:
    """The same in Markdown."""
    from rlmerge.figures import as_markdown

    parts = [f"### {_title(task)}", ""]
    for table in _tables(task):
        parts += [*as_markdown(table), ""]
    for model in task.models:
        parts += [f"- {model.label} {word}: {', '.join(ids)}" for word, ids in _flips(model) if ids]
    parts += [f"- note: {note}" for note in task.notes]
    return "\n".join(parts).rstrip()


def _title(task: TaskComparison) -> str:
    low, high = task.samples
    samples = f"{low} to {high} samples" if low != high else f"{low} sample{'s' * (low > 1)}"
    return f"{task.task}: {task.problems} problems, {samples} each; in %, with 95 % intervals"


def _tables(task: TaskComparison) -> list[list[list[str]]]:
    order = max((k for model in task.models for k in model.pass_at), default=1)
    many = [f"pass@{order}"] if order > 1 else []
    versus = f"less {_clip(task.reference, 14)}"
    first = [["", "accuracy", *many, versus, "p", "p Holm", "lost/won"]]
    for model in task.models:
        cells = [model.label + _seeds(model), _range(model.accuracy)]
        cells += [_points(model.pass_at[order].value) if order in model.pass_at else "-"] * len(many)
        gap = model.difference
        if gap is None:
            cells += [""] * 4
        else:
            flips = f"{len(gap.right_to_wrong)}/{len(gap.wrong_to_right)}"
            cells += [_range(gap.interval, "+"), _chance(gap.p), _chance(gap.p_holm), flips]
        first.append(cells)
    second = [["retention", "of expert", "its gain ± SE", "of the gain", "plain"]]
    for model in task.models:
        for kept in model.retention:
            gain = kept.expert_gain
            shown = _range(kept.gain_retention) if kept.gain_retention else "gain < 4 SE"
            row = [
                model.label + _seeds(model),
                _clip(kept.expert, 20),
                f"{_points(gain.value, '+')} ± {_points(gain.error)}",
            ]
            second.append([*row, shown, _range(kept.plain)])
    return [first, second] if len(second) > 1 else [first]


def _fit(table: list[list[str]]) -> list[list[str]]:
    """The table with the names in its first column cut so that it is no wider than WIDTH."""
    rest = sum(3 + max(map(len, column)) for column in list(zip(*table))[1:])
    return [[_clip(row[0], max(WIDTH - 1 - rest, 12)), *row[1:]] for row in table]


def _seeds(model: Model) -> str:
    return f" ×{len(model.seeds)}" if len(model.seeds) > 1 else ""


def _clip(text: str, longest: int = 26) -> str:
    """The end of a long name tells more than its beginning."""
    return text if len(text) <= longest else "…" + text[-longest + 1 :]


def _points(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _range(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return "-"
    return f"{_points(found.value, sign)} [{_points(found.low)}, {_points(found.high)}]"


def _chance(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _flips(model: Model) -> list[tuple[str, Sequence[str]]]:
    gap = model.difference
    return [] if gap is None else [("lost", gap.right_to_wrong), ("won", gap.wrong_to_right)]


def _fold(lead: str, ids: Sequence[str]) -> str:
    """As many ids as one line holds; --json, --csv and --markdown have them all."""
    text = lead
    for number, one in enumerate(ids):
        more = f", … ({len(ids)} in all)"
        if len(text) + len(one) + 2 + len(more) > WIDTH:
            return text + f"{', ' * bool(number)}… ({len(ids)} in all)"
        text += ("" if not number else ", ") + one
    return text + ("none" if not ids else "")


COLUMNS = (
    *("task", "model", "role", "seeds", "problems", "samples", "accuracy", "accuracy_low", "accuracy_high"),
    *("reference", "difference", "difference_low", "difference_high", "bootstrap_low", "bootstrap_high"),
    *("test", "p", "p_holm", "right_to_wrong", "wrong_to_right"),
    *("expert", "expert_gain", "expert_gain_error", "gain_retention", "gain_retention_low", "gain_retention_high"),
    *("plain_retention", "plain_retention_low", "plain_retention_high"),
)


def rows_for_csv(tasks: Sequence[TaskComparison]) -> list[list[object]]:
    """A header, then a row for every model and task; one for each expert if several. Shares, not percent."""
    rows: list[list[object]] = [[*COLUMNS, "notes"]]
    for task in tasks:
        for model in task.models:
            samples = "-".join(map(str, sorted(set(task.samples))))
            row: list[object] = [task.task, model.label, model.role, " ".join(map(str, model.seeds)), task.problems]
            row += [samples, *_three(model.accuracy)]
            gap = model.difference
            if gap is None:
                row += [""] * 11
            else:
                row += [gap.reference, *_three(gap.interval), *gap.bootstrap, gap.test, gap.p, gap.p_holm]
                row += [" ".join(gap.right_to_wrong), " ".join(gap.wrong_to_right)]
            experts = [_kept(kept) for kept in model.retention]
            rows += [[*row, *cells, "; ".join(task.notes)] for cells in experts or [[""] * 9]]
    return rows


def _kept(kept: Retention) -> list[object]:
    gain = kept.expert_gain
    return [kept.expert, gain.value, gain.error, *_three(kept.gain_retention), *_three(kept.plain)]


def _three(found: Interval | None) -> list[object]:
    cells = [found.value, found.low, found.high] if found else [None] * 3
    return ["" if cell is None else cell for cell in cells]
