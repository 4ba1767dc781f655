"""What `rlmerge compare` does with reports: tables side by side, one page, figures."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from rlmerge.errors import RlmergeError

if TYPE_CHECKING:
    from rlmerge.report.documents import Kind

FOR_RESULTS = ("base", "expert", "reference", "force", "csv")
"""Options that mean nothing to reports."""


def show_reports(given: Namespace, kind: Kind, documents: list[tuple[str, dict[str, Any]]]) -> None:
    """Prints reports of `inspect` side by side, or what a merge did, and writes the page and the figures."""
    from rlmerge.report.documents import page_of
    from rlmerge.report.outputs import check_places, write_outputs

    for option in FOR_RESULTS:
        if getattr(given, option):
            raise RlmergeError(
                f"--{option} is for results of evaluations; these files are reports. Leave it out: they are shown "
                f"side by side."
            )
    if kind == "merge" and len(documents) > 1:
        raise RlmergeError("rlmerge compare shows one merge at a time: give one rlmerge.json.")
    check_places(given.html, given.figures)
    if given.html is not None or given.figures is not None:
        write_outputs(page_of(documents), given.html, given.figures)
    if kind == "merge":
        _print_merge(given, documents[0][1])
    else:
        _print_reports(given, documents)
    if not given.quiet and not given.json:
        for path, what in ((given.html, "the page"), (given.figures, "its figures")):
            if path is not None:
                print(f"\n{path}: {what}")


def _print_reports(given: Namespace, documents: list[tuple[str, dict[str, Any]]]) -> None:
    from rlmerge.figures import as_markdown
    from rlmerge.report.beside import compare_reports, on_terminal, tables

    found = compare_reports(documents)
    if given.json:
        json.dump(found, sys.stdout, allow_nan=False)
        print()
    elif given.quiet:
        return
    elif given.markdown:
        print("\n\n".join("\n".join(as_markdown(table)) for table in tables(found)))
        print("".join(f"\n- note: {note}" for note in found["notes"]), end="\n" if found["notes"] else "")
    else:
        print(on_terminal(found))


def _print_merge(given: Namespace, provenance: dict[str, Any]) -> None:
    from rlmerge.figures import as_markdown, statistics_table

    from .show import show_statistics

    total, method = provenance["statistics"]["total"], provenance["recipe"]["merge_method"]
    if given.json:
        json.dump({"method": method, "statistics": total}, sys.stdout, allow_nan=False)
        print()
    elif given.quiet:
        return
    elif given.markdown:
        print("\n".join(as_markdown(statistics_table(total))))
    else:
        show_statistics(method, total)
