"""Pages in a real browser: they draw, answer to mouse and keyboard, can be read by everyone, and print."""

from __future__ import annotations

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from tests_browser.conftest import HOSTILE, NAMES, SHOTS

from rlmerge.report.page import embedded

THEMES = ("light", "dark")
PHONE, DESKTOP = 390, 1280


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_drawn(opened, pages, name, width):
    """Without a word on the console, without a request, within the width of the screen."""
    found = opened(name, "dark" if width == PHONE else "light", width)
    charts = embedded(pages[name].read_text(), "figures")
    for figure in charts:
        svg = found.page.locator(f"#chart-{figure} svg.marks")
        assert svg.count() == 1, figure
        box = svg.bounding_box()
        assert box["width"] > 200, (figure, box)
        assert box["height"] > 30, (figure, box)
        assert box["x"] + box["width"] <= width, (figure, box)
        marks = found.page.locator(f"#chart-{figure} svg g[class*='mark-'] path[d]")
        assert marks.count() > 1, figure
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.said == []
    assert found.asked == [pages[name].as_uri()]
    SHOTS.mkdir(parents=True, exist_ok=True)
    found.page.screenshot(path=SHOTS / f"{name}-{width}.png", full_page=True)


@pytest.mark.parametrize(
    ("name", "theme"), [(name, theme) for name in NAMES for theme in THEMES if (name, theme) != ("large", "dark")]
)
def test_everyone_can_read_it(opened, name, theme):
    """axe-core finds nothing, with some tables open."""
    page = opened(name, theme).page
    page.evaluate("document.querySelectorAll('details').forEach((one, n) => { one.open = n < 4; })")
    found = Axe().run(page)
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found.response["violations"]] == []


@pytest.mark.parametrize("name", ["experts", "beside", "merge"])
def test_hovering_shows_the_value(opened, pages, name):
    """Over the middle of a cell or a bar stands the number that the chart was made of."""
    page = opened(name).page
    figure = {"experts": "map", "beside": "changed", "merge": "where"}[name]
    mark = page.locator(f"#chart-{figure} g.mark-rect.role-mark path").first
    mark.scroll_into_view_if_needed()
    mark.hover()
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for(timeout=5000)
    shown = dict(zip(tip.locator("td.key").all_inner_texts(), tip.locator("td.value").all_inner_texts()))
    chart = embedded(pages[name].read_text(), "figures")[figure]
    rows = chart.get("data", {}).get("values") or next(iter(chart["datasets"].values()))
    labels = {key.rstrip(":"): value for key, value in shown.items()}
    names = [key for key in labels if key not in ("value", "null model")]
    row = next(row for row in rows if all(str(row[key]) == labels[key] for key in names))
    value = labels["value"]
    number = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
    assert number == pytest.approx(row["value"], rel=0.02, abs=0.001)


def test_names_on_hover_are_text(opened):
    found = opened("hostile")
    found.page.locator("#map .chart select").nth(1).select_option(HOSTILE)
    found.page.locator("#chart-map g.mark-rect.role-mark path").first.hover()
    tip = found.page.locator("#vg-tooltip-element.visible")
    tip.wait_for(timeout=5000)
    assert HOSTILE in tip.inner_text()
    assert found.page.locator("img").count() == 0
    assert found.said == []


@pytest.mark.parametrize("theme", THEMES)
def test_the_theme_can_be_chosen(opened, theme):
    page = opened("merge", theme).page
    back = "getComputedStyle(document.body).backgroundColor"
    label = "getComputedStyle(document.querySelector('#chart-where svg text')).fill"
    before = page.evaluate(f"[{back}, {label}]")
    other = {"light": "dark", "dark": "light"}[theme]
    button = page.locator("#theme")
    assert button.inner_text().lower() == other
    button.click()
    page.wait_for_function(f"document.documentElement.dataset.theme === '{other}'")
    page.wait_for_function(f"{label} !== '{before[1]}'")
    after = page.evaluate(f"[{back}, {label}]")
    assert after[0] != before[0]
    page.emulate_media(color_scheme=other)  # what was chosen stays chosen
    button.click()
    page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")


def test_menus_choose_what_is_shown(opened):
    page = opened("experts").page
    chart = page.locator("#map .chart")
    before = chart.locator("g.mark-rect.role-mark").inner_html()
    menu = chart.locator("select").first
    assert menu.locator("xpath=ancestor::label").inner_text().startswith("Show")
    menu.focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function(
        "before => document.querySelector('#chart-map g.mark-rect.role-mark').innerHTML !== before", arg=before
    )


def test_the_keyboard_reaches_everything(opened):
    """Tab goes over skip link, buttons, sections, menus and tables; what it is on can be seen; Enter opens a table."""
    page = opened("merge").page
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        what = page.evaluate(
            "() => { const one = document.activeElement; const style = getComputedStyle(one);"
            " return [one.tagName, one.textContent.slice(0, 30), style.outlineStyle, one.className]; }"
        )
        if what[0] == "BODY":
            break
        assert what[2] != "none", what
        seen.append(what[0])
        if what[0] == "SUMMARY":
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open")
    assert seen[:3] == ["A", "BUTTON", "BUTTON"]
    assert {"A", "BUTTON", "SELECT", "SUMMARY", "DIV"} <= set(seen)
    details = page.locator("details")
    assert details.count() == seen.count("SUMMARY")
    assert details.first.locator("td").first.is_visible()
    page.reload()
    page.wait_for_function("document.documentElement.dataset.drawn")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")


def test_the_numbers_can_be_saved(opened, pages):
    page = opened("beside").page
    with page.expect_download() as download:
        page.locator("#save").click()
    assert json.loads(download.value.path().read_text()) == embedded(pages["beside"].read_text(), "numbers")


@pytest.mark.parametrize("theme", THEMES)
def test_it_prints(opened, theme):
    """Dark on white whatever the theme, without what only a screen can use, figures within the paper."""
    page = opened("experts", theme).page
    page.emulate_media(media="print", color_scheme=theme)
    page.set_viewport_size({"width": 700, "height": 900})
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert page.evaluate("getComputedStyle(document.querySelector('#chart-map svg text')).fill") == "rgb(27, 31, 36)"
    assert not page.locator("nav").is_visible()
    assert not page.locator("#theme").is_visible()
    wide = page.evaluate(
        "[...document.querySelectorAll('.chart svg')].filter((one) => one.getBoundingClientRect().right > 701).length"
    )
    assert wide == 0
    data = page.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", data)) > 3
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / f"experts-{theme}.pdf").write_bytes(data)


def test_an_example_page_takes_the_library_beside_it(opened, pages):
    found = opened("shared")
    assert found.page.locator(".chart svg.marks").count() == len(embedded(pages["shared"].read_text(), "figures"))
    assert found.said == []
    assert found.asked == [pages["shared"].as_uri(), pages["shared"].with_name("vega.js").as_uri()]


def test_without_javascript_there_are_the_tables(opened):
    page = opened("merge", wait=False, java_script_enabled=False).page
    assert page.locator("noscript p").is_visible()
    page.locator("summary").first.click()
    assert page.locator("details td").first.is_visible()


def test_a_browser_that_is_too_old_says_so(opened):
    found = opened("merge", wait=False)
    assert not found.page.locator("#failed").is_visible()
    found.page.add_init_script("delete window.DecompressionStream")
    found.page.reload()
    found.page.locator("#failed").wait_for(state="visible", timeout=5000)
