"""The book as a reader without Python meets it: every page in a real browser, without an error, and read with an accessibility checker.

SLLM_SCREENSHOTS names a folder for pictures of some of the pages.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN = ("index.html", "chapters/02_the_pipelined_loader.html", "reference/sllm_mini.inference.html", "systems/serverlessllm.html", "survey.html")
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
    .filter(each => ["serious", "critical"].includes(each.impact)).map(each => `${each.id}: ${each.nodes[0].html.slice(0, 200)}`)"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Path:
    built = subprocess.run(["make", "book"], cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return REPOSITORY / "out" / "book" / "html"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_every_page_opens_without_an_error_and_can_be_read_by_everybody(site: Path, address: str, browser: Any) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    tab = browser.new_page(viewport={"width": 1280, "height": 1600})
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("requestfailed", lambda request: errors.append(f"{request.url} was not had"))
    tab.on("request", lambda request: None if request.url.startswith((address, "data:")) else errors.append(f"{request.url} is asked for"))
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert len(pages) > 40
    found: dict[str, list[str]] = {}
    for page in pages:
        errors.clear()
        tab.goto(f"{address}/{page}")
        tab.evaluate(AXE_SCRIPT)
        if wrong := [*errors, *tab.evaluate(AXE)]:
            found[page] = wrong
        folder = os.environ.get("SLLM_SCREENSHOTS")
        if folder and page in SHOWN:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tab.screenshot(path=Path(folder) / f"book_{Path(page).stem}.png")
    tab.close()
    assert not found


@pytest.mark.parametrize("width", [360, 1280])
def test_a_chapter_is_no_wider_than_its_window_and_its_figures_say_what_they_show(address: str, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(f"{address}/chapters/02_the_pipelined_loader.html")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    figures = tab.locator(".cell_output svg, .cell_output img")
    assert figures.count() >= 3
    for number in range(figures.count()):
        figure = figures.nth(number)
        named = figure.evaluate("e => Boolean(e.getAttribute('aria-label') || e.getAttribute('alt') || e.querySelector(':scope > title') || e.closest('[aria-label]') || e.closest('figure'))")
        assert named, figure.evaluate("e => e.outerHTML.slice(0, 300)")
    tab.close()


def test_the_search_finds_what_the_glossary_explains(address: str, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(f"{address}/search.html?q=zygote")
    tab.wait_for_selector("ul.search li a", timeout=20_000)
    assert any("glossary" in link.get_attribute("href") or "05_resident" in link.get_attribute("href") for link in tab.locator("ul.search li a").all())
    tab.close()
