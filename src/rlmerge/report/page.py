"""Writes a report as one HTML file that opens from disk and asks nothing of a network; also its figures as SVG and PNG.

The plotting library, the charts and the numbers are inside, compressed (the library takes 0.4 MB). Every figure has its
numbers as a table, so the page can be read without seeing the charts and without JavaScript. Light and dark follow the
system, until a reader chooses.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rlmerge.errors import MissingExtraError
from rlmerge.report.figure import Figure, Page, Section
from rlmerge.version import VERSION

MAX_ROWS = 400
"""Rows of a table that the page shows; the numbers of all are in the document that the page carries."""


def write_page(page: Page, path: Path, library: str | None = None) -> None:
    """Writes the page. Raises MissingExtraError without the extra `report`, OSError if the file cannot be written."""
    part = path.with_name(path.name + ".part")
    part.write_text(render(page, library), encoding="utf-8")
    part.replace(path)


def render(page: Page, library: str | None = None) -> str:
    """The page as HTML; with `library`, the name of a file beside it that holds what `library_file` returns."""
    asset = resources.files("rlmerge.report") / "assets"
    style, script = ((asset / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [_summary(page), *(_section(number, section) for number, section in enumerate(page.sections, 1))]
    links = [("summary", "Summary"), *((f"s{n}", section.title) for n, section in enumerate(page.sections, 1))]
    navigation = "".join(f'<li><a href="#{anchor}">{_text(title)}</a></li>' for anchor, title in links)
    code = _packed("library", library_code()) if library is None else f'<script src="{_text(library)}"></script>'
    holds = "This file holds all it shows; it loads nothing." if library is None else f"It loads {_text(library)}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="rlmerge {VERSION}">
<title>{_text(page.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{_text(page.title)}</h1>
<p class="tools"><button type="button" id="theme">Dark</button>
<button type="button" id="save">Save the numbers (JSON)</button></p>
<nav aria-label="Sections"><ul>{navigation}</ul></nav>
</header>
<main id="main">
<noscript><p class="warning">Charts need JavaScript; the numbers are in the tables below.</p></noscript>
<p class="warning" id="failed" hidden>This browser cannot draw the charts; the numbers are in the tables below.</p>
{"".join(sections)}
</main>
<footer><p>Made by rlmerge {VERSION}. {holds}</p></footer>
{_packed("figures", _json(_charts(page)))}
{_packed("numbers", _json(page.numbers))}
{code}
<script>{script}</script>
</body>
</html>
"""


def embedded(page: str, name: str) -> Any:
    """What a page carries under a name: 'numbers', the document it was made from, or 'figures', its charts."""
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    assert found is not None, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def library_code() -> str:
    """The code that draws, without anything that it would load. Raises MissingExtraError without the extra."""
    return _converter().javascript_bundle("window.vegaEmbed = vegaEmbed;")


def library_file() -> str:
    """The same as a script for pages that share it: compressed, put where a page of one file has it."""
    element = "Object.assign(document.createElement('script'), {type: 'text/plain', id: 'library', textContent: data})"
    return f'{{const data = "{_compressed(library_code())}"; document.head.append({element});}}\n'


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes every chart as SVG and PNG, the first of its menus' choices chosen. Returns the files."""
    converter = _converter()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        if figure.chart is None:
            continue
        spec = dict(figure.chart)
        if spec.get("width") == "container":
            spec["width"] = 640
        spec["config"] = {**spec.get("config", {}), "background": "white"}
        for suffix, data in (
            ("svg", converter.vegalite_to_svg(spec).encode()),
            ("png", converter.vegalite_to_png(spec, scale=2)),
        ):
            written.append(folder / f"{figure.id}.{suffix}")
            written[-1].write_bytes(data)
    return written


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise MissingExtraError("a report", "vl-convert-python", "report") from None
    return vl_convert


def _charts(page: Page) -> dict[str, Mapping[str, Any]]:
    """By figure, without the address of the schema, which nobody is to load."""
    charts = {figure.id: figure.chart for figure in page.figures if figure.chart is not None}
    return {name: {key: part for key, part in chart.items() if key != "$schema"} for name, chart in charts.items()}


def _text(text: str) -> str:
    return html.escape(text)


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _packed(name: str, text: str) -> str:
    """Text in a script element: compressed, as letters and digits, among which no tag can hide."""
    return f'<script type="text/plain" id="{name}">{_compressed(text)}</script>'


def _compressed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _summary(page: Page) -> str:
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in page.facts)
    warnings = "".join(f'<p class="warning">{_text(text)}</p>' for text in page.warnings)
    said = "".join(f"<li>{_text(sentence)}</li>" for sentence in page.summary)
    return (
        f'<section id="summary" aria-labelledby="h-summary"><h2 id="h-summary">Summary</h2>{warnings}'
        f'<ul class="summary">{said}</ul><dl>{facts}</dl></section>'
    )


def _section(number: int, section: Section) -> str:
    text = f"<p>{_text(section.text)}</p>" if section.text else ""
    figures = "".join(map(_figure, section.figures))
    head = f'<h2 id="h-s{number}">{_text(section.title)}</h2>'
    return f'<section id="s{number}" aria-labelledby="h-s{number}">{head}{text}{figures}</section>'


def _figure(figure: Figure) -> str:
    chart = f'<div class="chart" id="chart-{figure.id}"></div>' if figure.chart is not None else ""
    advice = f' <span class="advice">{_text(figure.advice)}</span>' if figure.advice else ""
    table = _table(figure) if figure.table else ""
    folded = f"<details><summary>Numbers of “{_text(figure.title)}”</summary>{table}</details>" if chart else table
    folded += f'<pre tabindex="0"><code>{_text(figure.code)}</code></pre>' if figure.code else ""
    return (
        f'<figure id="{figure.id}" aria-labelledby="t-{figure.id}"><h3 id="t-{figure.id}">{_text(figure.title)}</h3>'
        f"{chart}<figcaption>{_text(figure.says)}{advice}</figcaption>{folded}</figure>"
    )


def _table(figure: Figure) -> str:
    header, *rows = figure.table
    head = "".join(f'<th scope="col">{_text(cell or "measure")}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MAX_ROWS])
    left = len(rows) - MAX_ROWS
    more = f"<p>{left} more rows are in the numbers of this page.</p>" if left > 0 else ""
    region = f'<div class="table" role="region" tabindex="0" aria-label="Numbers of {_text(figure.title)}">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"


def _cell(text: str) -> str:
    """A cell; sentences may be folded, numbers not."""
    return f'<td class="long">{_text(text)}</td>' if len(text) > 40 else f"<td>{_text(text)}</td>"
