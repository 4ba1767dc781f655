"""What the statistics of a merge say, as rows with names: one list for the terminal, the model card and the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One quantity: of the whole model ('' if it has none), and of each expert (empty if it has none)."""

    name: str
    whole: str
    each: tuple[str, ...] = ()


SHARES: tuple[tuple[str, str, str], ...] = (
    ("support (of coordinates)", "changed", "support"),
    ("unique (of changed)", "unique", ""),
    ("overlap (of changed)", "overlap", ""),
    ("conflict (of overlap)", "conflict", ""),
    ("draws (of conflicts)", "draws", ""),
    ("wins (of conflicts)", "", "wins"),
    ("winner as under δ² (both decide)", "winner_agrees_with_delta2", ""),
    ("kept (of non-zero)", "", "kept"),
    ("cancelled (of updates)", "cancelled", ""),
    ("ignored changes (of support)", "", "ignored"),
    ("survival after the cast", "survival", ""),
)
"""Name, key of the whole model's share and of the experts' shares among the statistics."""
MERGED = "merged (the rest did not fit)"
COSINE = "cosine intended / stored"
RESCALE = "rescale factor, mean"
ORDER = (MERGED, *(name for name, _, _ in SHARES), COSINE, RESCALE)


def statistics_rows(total: dict[str, Any]) -> list[Row]:
    """The rows that a merge has, in the order of ORDER; experts in the order of `total['support']`."""
    experts = list(total.get("support", {}))
    rows = []
    if "merged" in total:
        merged = total["merged"]
        rows.append(Row(MERGED, f"{merged['count']:,} of {merged['of']:,} weights ({percent(merged)})"))
    for name, whole, each in SHARES:
        if whole in total or each in total:
            shares = tuple(percent(total[each].get(key)) for key in experts) if each in total else ()
            rows.append(Row(name, percent(total[whole]) if whole in total else "", shares))
    if "realised_cosine" in total:
        rows.append(Row(COSINE, f"{total['realised_cosine']:.4f}"))
    if "rescale" in total:
        rows.append(Row(RESCALE, f"{total['rescale']['mean']:.4f}"))
    return rows


def statistics_table(total: dict[str, Any]) -> list[list[str]]:
    """The rows as cells under a header: the whole model, then a column an expert."""
    experts = short_names(list(total.get("support", {})))
    blank = ("",) * len(experts)
    rows = ([row.name, row.whole, *(row.each or blank)] for row in statistics_rows(total))
    return [["", "all", *experts], *rows]


def size(count: float) -> str:
    """'1.23 GB' of a number of bytes (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def percent(share: dict[str, Any] | None) -> str:
    """'12.3 %' of a counted share, '-' where there was nothing to count."""
    return f"{100 * share['share']:.1f} %" if share and "share" in share else "-"


def short_names(keys: Sequence[str]) -> list[str]:
    """The last component of each path; where that does not tell them apart, what is left without the components that
    all share at both ends: 'runs/math/bf16' and 'runs/code/bf16' are 'math' and 'code'.
    """
    last = [key.rstrip("/").rsplit("/", 1)[-1] for key in keys]
    if len(set(last)) == len(keys) and all(last):
        return last
    parts = [key.strip("/").split("/") for key in keys]
    while len(keys) > 1 and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    while len(keys) > 1 and all(len(part) > 1 and part[-1] == parts[0][-1] for part in parts):
        parts = [part[:-1] for part in parts]
    short = ["/".join(part) for part in parts]
    return short if len(set(short)) == len(keys) and all(short) else list(keys)


def gathered(lines: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Lines 'KEY: the same' as one, 'NAME, NAME: the same', in the place of the first; keys by what they are called."""
    of_text: dict[str, list[str]] = {}
    for line in lines:
        for key in sorted(names, key=len, reverse=True):
            line = line.replace(key, names[key])
        name, colon, text = line.partition(": ")
        of_text.setdefault(text if colon else line, []).extend([name] * bool(colon))
    return [f"{', '.join(named)}: {text}" if named else text for text, named in of_text.items()]


def as_text(table: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first row is its header, the first column stands to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(" " + "   ".join(cells).rstrip())
    rule = " " + "─" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def as_markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same table in Markdown."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table[0], rule, *table[1:])]
