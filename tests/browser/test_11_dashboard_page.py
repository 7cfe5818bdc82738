"""The dashboard as an operator meets it: `sllm-mini serve` on the tiny model, a real browser, requests that come meanwhile.

SLLM_SCREENSHOTS names a folder for pictures of what the browser showed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

KEY = "a-key-of-the-reader"
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
    .filter(each => ["serious", "critical"].includes(each.impact)).map(each => `${each.id}: ${each.nodes[0].html.slice(0, 200)}`)"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from sllm_mini.lab.models import tiny_checkpoint

    tiny = tiny_checkpoint().path
    command = [sys.executable, "-m", "sllm_mini.cli.main", "serve", f"one={tiny}", f"two={tiny}", "--cluster", "local:2", "--devices", "1", "--port", "0", "--keep-alive", "6s", "--json"]
    with subprocess.Popen(command, env={**os.environ, "SLLM_MINI_API_KEY": KEY}, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = []
            while not lines or lines[-1] not in ("}\n", ""):
                lines.append(server.stdout.readline())
            yield str(json.loads("".join(lines))["url"])
        finally:
            server.terminate()
            server.wait(60)


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


def ask(address: str, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 40}
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers), timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def photograph(tab: Any, name: str) -> None:
    if folder := os.environ.get("SLLM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(folder) / f"dashboard_{name}.png", full_page=True)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_a_start_is_seen_as_it_happens(address: str, browser: Any, scheme: str, width: int) -> None:
    from axe_playwright_python.base import AXE_SCRIPT
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.set_default_timeout(60_000)
    errors: list[str] = []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" and "401" not in message.text else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith((address, "data:")) else errors.append(f"{request.url} is asked for"))
    tab.goto(f"{address}/dashboard")

    tab.wait_for_selector("#ask:not([hidden])")
    assert not tab.locator("#shown").is_visible()
    tab.fill("#key", "wrong")
    tab.press("#key", "Enter")
    expect(tab.locator("#link")).to_contain_text("not one of")
    tab.fill("#key", KEY)
    tab.press("#key", "Enter")
    tab.wait_for_selector("#shown:not([hidden])")
    expect(tab.locator("#models tr")).to_have_count(2)
    expect(tab.locator("#nodes article")).to_have_count(2)

    answered = tab.locator("#requests div").nth(2).locator("dd")
    before = int(answered.inner_text())
    assert ask(address, "one") and ask(address, "two")
    expect(answered).to_have_text(str(before + 2))
    expect(tab.locator("#models")).to_contain_text("ready")
    tab.wait_for_selector("#timeline rect.bar.ready")
    assert "one" in tab.locator("#timeline").get_attribute("aria-label") or "two" in tab.locator("#timeline").get_attribute("aria-label")
    assert tab.locator("#nodes .measure svg").count() >= 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    photograph(tab, f"{scheme}_{width}")
    tab.evaluate(AXE_SCRIPT)
    assert not tab.evaluate(AXE)
    assert not errors
    tab.close()


def test_a_name_that_looks_like_html_is_a_name_and_a_server_that_is_gone_is_told(address: str, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(f"{address}/dashboard")
    status = json.loads(urllib.request.urlopen(urllib.request.Request(f"{address}/admin/ps", headers={"authorization": f"Bearer {KEY}"})).read())
    status["models"][0]["name"] = "<img src=x onerror=alert(1)>"
    tab.route("**/admin/ps", lambda route: route.fulfill(json=status))
    tab.wait_for_selector("#ask:not([hidden])")
    tab.fill("#key", KEY)
    tab.press("#key", "Enter")
    tab.wait_for_selector("#models tr")
    assert tab.locator("#models th").first.inner_text() == "<img src=x onerror=alert(1)>" and tab.locator("#models img").count() == 0
    tab.unroute("**/admin/ps")
    tab.route("**/admin/ps", lambda route: route.abort())
    tab.wait_for_selector("#link.lost")
    assert "cannot be asked" in tab.locator("#link").inner_text()
    tab.close()
