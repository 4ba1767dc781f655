"""Where a report goes: what can go wrong there is said before anything is measured, and then it is written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmerge.disk_errors import disk_errors
from rlmerge.errors import MissingExtraError, OutputError, RecipeError

if TYPE_CHECKING:
    from rlmerge.report.figure import Page

PACKAGES = {"altair": "altair", "vl_convert": "vl-convert-python"}
"""Modules that draw, and the packages that bring them."""


MARK = b'<meta name="generator" content="rlmerge'
"""By which a page of ours is known."""


def check_apart(option: str, path: Path | None, inputs: Sequence[Path | str], output: Path | str | None = None) -> None:
    """Raises OutputError for what would be written into a folder of a model that is read, or into a merge's output."""
    if path is None:
        return
    target = path.resolve()
    for folder in map(Path, inputs):
        if folder.is_dir() and folder.resolve() in (target, *target.parents):
            raise OutputError(
                f"{option} {path}: lies in the model folder {folder}, which is only read. Write it elsewhere."
            )
    if output is not None and Path(output).resolve() in (target, *target.parents):
        raise OutputError(
            f"{option} {path}: lies in {output}, which holds what is merged and nothing else. Write it beside that, "
            f"such as {output}.html."
        )


def check_places(html: Path | None, figures: Path | None) -> None:
    """Raises MissingExtraError or OutputError where a page or figures cannot be made or written."""
    if html is None and figures is None:
        return
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("--html" if html is not None else "--figures", package, "report")
    if html is not None:
        _check_page(html)
    if figures is not None and (figures.exists() and not figures.is_dir()):
        raise OutputError(f"--figures {figures}: is a file. Write the name of a folder, new or old.")
    for option, path in (("--html", html), ("--figures", figures)):
        if path is None:
            continue
        folder = path if option == "--figures" and path.is_dir() else path.absolute().parent
        if not folder.is_dir():
            raise OutputError(f"{option} {path}: there is no folder {path.parent}. Make it, or write another name.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {path}: {folder} cannot be written to. Write a name in a folder of yours.")


def _check_page(html: Path) -> None:
    if html.suffix.lower() not in (".html", ".htm"):
        raise OutputError(
            f"--html {html}: a page is an HTML file. Write a name that ends in .html, such as report.html."
        )
    if html.is_dir():
        raise OutputError(f"--html {html}: is a folder. Write the name of a file, such as {html}/report.html.")
    if html.exists():
        with html.open("rb") as file:
            if MARK not in file.read(2**12):
                raise OutputError(f"--html {html}: is there, and no page of rlmerge. Write another name, or remove it.")


@disk_errors()
def write_outputs(page: Page, html: Path | None, figures: Path | None) -> None:
    """The page as HTML, and its figures as SVG and PNG; an earlier page of that name is replaced."""
    from rlmerge.report.page import save_figures, write_page

    if html is not None:
        write_page(page, html)
    if figures is not None:
        save_figures(page.figures, figures)


def write_report(
    document: Mapping[str, Any] | list[Mapping[str, Any]],
    html: Path | str | None = None,
    figures: Path | str | None = None,
    *,
    title: str = "",
) -> None:
    """Writes a report: one HTML file that needs no network, and its figures as SVG and PNG. Needs the extra `report`.

    document  what `inspect` returns; several of these, to be seen side by side; or the contents of a merge's
              rlmerge.json
    html      the page, a name that ends in .html
    figures   a folder for the figures
    Raises MissingExtraError, OutputError, ReportError.
    """
    from rlmerge.report.documents import page_of

    if html is None and figures is None:
        raise RecipeError("write_report: give html, the name of a page, or figures, a folder for them, or both.")
    places = [None if given is None else Path(given) for given in (html, figures)]
    check_places(*places)
    documents = [document] if isinstance(document, Mapping) else list(document)
    write_outputs(page_of([(f"report {n}", one) for n, one in enumerate(documents, 1)], title), *places)
