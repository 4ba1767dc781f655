"""A headless browser, and pages of every kind: of the demo's experts, side by side, of a merge, large, and hostile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from tests.report.report_documents import large, small
from tests.report.test_geometry_page import renamed

import rlmerge
from rlmerge.demo.assets import DATA
from rlmerge.report.page import embedded

HOSTILE = '<img src=x onerror="alert(1)">'
NAMES = ("experts", "beside", "merge", "large", "hostile")
EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "reports"
SHOTS = Path(__file__).resolve().parent.parent / "build" / "screenshots"


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """HTML files by name."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in NAMES}
    reports = [
        embedded((EXAMPLES / f"tiny-{kind}.html").read_text(encoding="utf-8"), "numbers")
        for kind in ("rlvr", "sft", "rft")
    ]
    rlmerge.write_report(reports[0], html=made["experts"])
    rlmerge.write_report(reports, html=made["beside"])
    rlmerge.write_report(large(), html=made["large"])
    rlmerge.write_report(renamed(small(("victim", "b")), {"victim": HOSTILE}), html=made["hostile"])
    rlmerge.write_report(_merge(folder / "merged"), html=made["merge"])
    made["shared"] = EXAMPLES / "small-beside.html"
    return made


def _merge(out: Path) -> Any:
    """What a merge of two of the demo's experts says of itself."""
    models = DATA / "models"
    experts = [str(models / f"rlvr-{name}" / "bf16") for name in ("math-1", "code-1")]
    recipe = rlmerge.recipe_from_parts(str(models / "base" / "bf16"), experts, "sar", {"sensitivity": "delta2"})
    rlmerge.merge_to_folder(recipe, out)
    return json.loads((out / "rlmerge.json").read_text())


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium: the one that CHROMIUM names, or that of the system."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "no chromium was found: make test-browser CHROMIUM=/path/to/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in the browser, and all that it said and asked for."""

    page: Page
    context: BrowserContext
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Opener]:
    """Opens a page by name, without a network, and waits until it is drawn."""
    opener = Opener(browser, pages)
    yield opener
    for context in opener.contexts:
        context.close()


class Opener:
    """Opens pages, each in a context of its own."""

    def __init__(self, browser: Browser, pages: dict[str, Path]) -> None:
        self.browser, self.pages = browser, pages
        self.contexts: list[BrowserContext] = []

    def __call__(self, name: str, theme: str = "light", width: int = 1280, wait: bool = True, **options) -> Opened:
        context = self.browser.new_context(
            color_scheme=theme, offline=True, viewport={"width": width, "height": 900}, **options
        )
        self.contexts.append(context)
        page = context.new_page()
        found = Opened(page, context)
        page.on("console", lambda message: found.said.append(message.text))
        page.on("pageerror", lambda error: found.said.append(str(error)))
        page.on("dialog", lambda dialog: (found.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: found.asked.append(request.url))
        page.goto(self.pages[name].as_uri())
        if wait:
            page.wait_for_function("document.documentElement.dataset.drawn", timeout=30_000)
        return found
