"""Writes a report as one HTML file that opens from disk and asks nothing of a network; also its figures as SVG and PNG.

The plotting library is inlined once (about 0.9 MB). Every figure has its numbers as a table, so the page can be read
without seeing the charts and without JavaScript. Light and dark follow the system, until a reader chooses.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rlmerge.errors import MissingExtraError
from rlmerge.report.figure import Figure, Page, Section
from rlmerge.version import VERSION

MAX_ROWS = 400
"""Rows of a table that the page shows; the numbers of all are in the document that the page carries."""


def write_page(page: Page, path: Path) -> None:
    """Writes the page. Raises MissingExtraError without the extra `report`, OSError if the file cannot be written."""
    part = path.with_name(path.name + ".part")
    part.write_text(render(page), encoding="utf-8")
    part.replace(path)


def render(page: Page) -> str:
    """The page as HTML."""
    asset = resources.files("rlmerge.report") / "assets"
    style, script = ((asset / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    figures = {figure.id: figure.chart for figure in page.figures if figure.chart is not None}
    sections = [_summary(page), *(_section(number, section) for number, section in enumerate(page.sections, 1))]
    links = [("summary", "Summary"), *((f"s{n}", section.title) for n, section in enumerate(page.sections, 1))]
    navigation = "".join(f'<li><a href="#{anchor}">{_text(title)}</a></li>' for anchor, title in links)
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
<noscript><p class="warning">Charts need JavaScript; every number is in the tables below.</p></noscript>
{"".join(sections)}
</main>
<footer><p>Made by rlmerge {VERSION}. This file holds all it shows; it loads nothing.</p></footer>
<script type="application/json" id="figures">{_json(figures)}</script>
<script type="application/json" id="numbers">{_json(page.numbers)}</script>
<script type="module">{_library()}
{script}</script>
</body>
</html>
"""


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
        for suffix, data in (
            ("svg", converter.vegalite_to_svg(spec).encode()),
            ("png", converter.vegalite_to_png(spec, scale=2)),
        ):
            written.append(folder / f"{figure.id}.{suffix}")
            written[-1].write_bytes(data)
    return written


def _converter():  # noqa: ANN202
    try:
        import vl_convert
    except ImportError:
        raise MissingExtraError("an HTML report", "vl-convert-python", "report") from None
    return vl_convert


def _library() -> str:
    """The code that draws, without anything that it would load."""
    return _converter().javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _text(text: str) -> str:
    return html.escape(text)


def _json(data: object) -> str:
    """JSON that can stand in a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


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
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows[:MAX_ROWS])
    left = len(rows) - MAX_ROWS
    more = f"<p>{left} more rows are in the numbers of this page.</p>" if left > 0 else ""
    region = f'<div class="table" role="region" tabindex="0" aria-label="Numbers of {_text(figure.title)}">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
