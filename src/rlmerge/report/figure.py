"""A figure of a report: a Vega-Lite chart, what it says in one sentence, what to do about it, and its numbers.

Charts are made by altair, so that nothing here draws. Needs the extra `report` where a chart is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rlmerge.errors import MissingExtraError

Row = Mapping[str, Any]

SEQUENTIAL, DIVERGING = "viridis", "blueorange"
"""Colour schemes that differ in lightness, so that they work in print and for the colour-blind."""
SERIES = (
    *("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d", "#bab0ac"),
    *("#9ecae9", "#ffbf79", "#88d27a", "#d6a5c9", "#b79a20", "#439894", "#d8b5a5", "#79706e"),
)
"""Colours of series: without a red, which is the null model's."""
NULL = "#d62728"


@dataclass(frozen=True)
class Figure:
    """One chart and the words around it.

    id      for links to it and names of its files
    says    what it shows here, true of these numbers; plain text
    advice  what to do about it; '' if nothing
    chart   Vega-Lite, as altair writes it; None for a table alone
    table   header and rows of the same numbers, for who cannot see the chart
    code    text to copy, shown as it is
    """

    id: str
    title: str
    says: str
    advice: str
    chart: Mapping[str, Any] | None
    table: Sequence[Sequence[str]] = ()
    code: str = ""


@dataclass(frozen=True)
class Section:
    """A heading of a report with its figures."""

    title: str
    figures: Sequence[Figure]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """All of a report.

    summary  what a reader must know, a sentence each, most important first
    facts    name and value, shown as a list beside the summary
    numbers  the document that all was made from
    """

    title: str
    summary: Sequence[str]
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    numbers: Mapping[str, Any]
    warnings: Sequence[str] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        """All figures in the order of the page."""
        return [figure for section in self.sections for figure in section.figures]


def altair() -> ModuleType:
    """The plotting library. Raises MissingExtraError without it."""
    try:
        import altair
    except ImportError:
        raise MissingExtraError("an HTML report", "altair", "report") from None
    altair.data_transformers.disable_max_rows()
    return altair


def heat_map(
    rows: Sequence[Row],
    description: str,
    *,
    x: str = "layer",
    y: str = "module",
    choices: Mapping[str, str],
    order: Sequence[str] = (),
    diverging: bool = False,
    percent: bool = True,
) -> dict[str, Any]:
    """A heat map of `value` over two columns; for each of `choices` (column: label) a menu picks one of its values.

    order   of both axes; without it numbers by size, then words as they come
    """
    alt = altair()
    columns, kinds = (list(map(str, order or _ordered(row[axis] for row in rows))) for axis in (x, y))
    rows = [{**row, x: str(row[x]), y: str(row[y])} for row in _short(rows)]  # a sort order has values of one type
    text = ".1%" if percent else ".3~g"
    scale = alt.Scale(scheme=DIVERGING, domainMid=0) if diverging else alt.Scale(scheme=SEQUENTIAL)
    chart = alt.Chart(alt.Data(values=rows), width="container", height=18 * len(kinds), description=description)
    chart = chart.mark_rect().encode(
        x=alt.X(f"{x}:O", title=x, sort=columns, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y(f"{y}:N", title=None, sort=kinds, axis=alt.Axis(labelLimit=220)),
        color=alt.Color("value:Q", title=None, scale=scale, legend=alt.Legend(format=text)),
        tooltip=[*_words(x, y, *choices), alt.Tooltip("value:Q", format=text)],
    )
    return _with_menus(chart, rows, choices).to_dict()


def bars(
    rows: Sequence[Row],
    description: str,
    *,
    category: str,
    series: str,
    percent: bool = True,
    title: str = "",
    marks: bool = False,
    choices: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Horizontal bars of `value`, grouped by category; with `marks` a tick at `null`, what chance would give.

    A category that is one of `choices` (column: label) is picked from a menu, which gives each a scale of its own.
    """
    alt = altair()
    text, rows, choices = ".1%" if percent else ".3~g", _short(rows), choices or {}
    names = list(dict.fromkeys(row[series] for row in rows))
    groups = [] if category in choices else list(dict.fromkeys(row[category] for row in rows))
    shown = _words(category, series)
    nulls = marks and any(row.get("null") is not None for row in rows)
    tooltip = [*shown, alt.Tooltip("value:Q", format=text)]
    tooltip += [alt.Tooltip("null:Q", format=text, title="null model")] if nulls else []
    chart = alt.Chart(alt.Data(values=rows)).encode(tooltip=tooltip)
    axis = alt.Axis(labelLimit=170)
    if len(groups) > 1:
        offset = alt.YOffset(f"{series}:N", sort=names)
        chart = chart.encode(y=alt.Y(f"{category}:N", title=None, sort=groups, axis=axis), yOffset=offset)
    else:
        chart = chart.encode(y=alt.Y(f"{series}:N", title=None, sort=names, axis=axis))
    step = max(8, 22 - 2 * len(names)) if len(groups) > 1 else 20
    height = step * len(names) * (1.25 * len(groups) if len(groups) > 1 else 1)
    colours = _colours(series, names, legend=len(groups) > 1)
    x = alt.X("value:Q", title=title or None, axis=alt.Axis(format=text, labelOverlap=True))
    layers = [chart.mark_bar().encode(x=x, color=colours)]
    if nulls:
        tick = chart.mark_tick(thickness=3, size=step, color=NULL, aria=False)  # the table says it
        layers.append(tick.encode(x="null:Q").transform_filter("isValid(datum.null)"))
    whole = alt.layer(*layers).properties(width="container", height=height, description=description)
    return _with_menus(whole, rows, choices).to_dict()


def _colours(series: str, names: Sequence[str], legend: bool) -> Any:
    """A colour a series; the legend stands below, in columns that fit on a phone."""
    alt = altair()
    columns = 2 if max(map(len, names), default=0) < 18 else 1
    below = (
        alt.Legend(orient="bottom", columns=columns, labelLimit=260, symbolLimit=0, symbolOpacity=1) if legend else None
    )
    return alt.Color(f"{series}:N", title=None, sort=names, scale=alt.Scale(range=SERIES), legend=below)


def lines(
    rows: Sequence[Row],
    description: str,
    *,
    x: str,
    series: str,
    y_title: str,
    choices: Mapping[str, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    zero: bool = False,
) -> dict[str, Any]:
    """Lines of `value` over the numbers x, one a series, with `low` and `high` as a band where rows have them."""
    alt = altair()
    text, rows = ".1%" if percent else ".4~g", _short(rows)
    names = list(dict.fromkeys(row[series] for row in rows))
    whole_numbers = all(isinstance(row[x], int) for row in rows)
    axis = alt.Axis(labelOverlap=True, **({"tickMinStep": 1, "format": "d"} if whole_numbers else {"format": "~g"}))
    if log_x:
        axis = alt.Axis(labelOverlap=True, format="~g", values=sorted({row[x] for row in rows}))
    along = alt.X(f"{x}:Q", title=x, axis=axis, scale=alt.Scale(type="log") if log_x else alt.Scale(zero=False))
    up = alt.Scale(type="log") if log_y else alt.Scale(zero=zero)
    chart = alt.Chart(alt.Data(values=list(rows)), width="container", height=260, description=description)
    colour = _colours(series, names, legend=True)
    line = chart.mark_line(point=True).encode(
        x=along,
        y=alt.Y("value:Q", title=y_title, scale=up, axis=alt.Axis(format=text)),
        color=colour,
        strokeDash=alt.StrokeDash(f"{series}:N", legend=None, sort=names),
        tooltip=[*_words(series), alt.Tooltip(f"{x}:Q"), alt.Tooltip("value:Q", format=text)],
    )
    if not any("low" in row for row in rows):
        return _with_menus(line, rows, choices or {}).to_dict()
    band = chart.mark_area(opacity=0.2).encode(x=along, y="low:Q", y2="high:Q", color=colour)
    whole = alt.layer(band, line).properties(width="container", height=260, description=description)
    return _with_menus(whole, rows, choices or {}).to_dict()


def _short(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Six digits are more than a chart can show; all of them are in the document."""
    return [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


def _with_menus(chart: Any, rows: Sequence[Row], choices: Mapping[str, str]) -> Any:
    """The chart with a menu for each column of which only the rows of one value are shown; one value needs no menu."""
    alt = altair()
    for column, label in choices.items():
        options = list(dict.fromkeys(row[column] for row in rows))
        if len(options) < 2:
            continue
        menu = alt.param(
            f"chosen_{column}", value=options[0], bind=alt.binding_select(options=options, name=f"{label} ")
        )
        chart = chart.add_params(menu).transform_filter(alt.datum[column] == menu)
    return chart


def _words(*columns: str) -> list[Any]:
    """What a hover says of columns that are names."""
    return [altair().Tooltip(f"{column}:N") for column in columns]


def _ordered(values: Iterable[Any]) -> list[Any]:
    """Numbers by size, then words as they come."""
    found = list(dict.fromkeys(values))
    numbers = sorted(value for value in found if not isinstance(value, str))
    return [*numbers, *(value for value in found if isinstance(value, str))]


def share(value: float | None) -> str:
    """'12.3 %', '–' for what is undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """'0.0123', three digits; '–' for what is undefined."""
    return "–" if value is None else f"{value:.3g}"


def rows_of_table(rows: Sequence[Row], columns: Sequence[str], percent: bool = True) -> list[list[str]]:
    """The rows of a chart as cells under a header, numbers as a reader wants them."""
    return [list(columns), *([_cell(row.get(column), percent) for column in columns] for row in rows)]


def _cell(value: Any, percent: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"
    return str(value)
