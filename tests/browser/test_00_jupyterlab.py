"""Chapter 00 as a reader meets it: `make lab`, a real browser, the menu, a slider.

The server runs on a copy of `chapters/` (everything else is linked to), so the chapter in the checkout stays as it
is. SLLM_SCREENSHOTS names a folder for pictures of what the browser showed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1500)]

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
START_SECONDS = 120
RUN_SECONDS = 1200


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: the page that a browser would be sent to, the chapter it serves, and its kernels."""

    start_page: Path
    chapter: Path
    url: str
    token: str

    def kernels(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{self.url}/api/kernels", headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def cells(self) -> list[dict[str, Any]]:
        return json.loads(self.chapter.read_text(encoding="utf-8"))["cells"]


def wait_until(what: str, seconds: float, ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = ready()
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    chapters = sorted((REPOSITORY / "chapters").glob("00_*.ipynb"))
    if not chapters:
        pytest.fail("there is no chapters/00_*.ipynb for a reader to open")
    place = tmp_path_factory.mktemp("lab")
    tree, home, runtime = place / "tree", place / "home", place / "runtime"
    tree.mkdir()
    for entry in REPOSITORY.iterdir():
        if entry.name not in ("chapters", ".git"):
            (tree / entry.name).symlink_to(entry)
    shutil.copytree(REPOSITORY / "chapters", tree / "chapters")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    token = "a-reader"
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data")}
    environment |= {"JUPYTER_RUNTIME_DIR": str(runtime), "IPYTHONDIR": str(home / "ipython")}
    environment.pop("MPLBACKEND", None)  # the kernel chooses its own, as it does for a reader
    flags = f"LAB_FLAGS=--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token={token}"
    log = place / "lab.log"
    with log.open("wb") as out:
        server = subprocess.Popen(["make", "lab", flags], cwd=tree, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:

        def start_page() -> Path | None:
            if server.poll() is not None:
                pytest.fail(f"`make lab` ended: {log.read_text(errors='replace')[-2000:]}")
            pages = [page for page in runtime.glob("*-open*.html") if "/tree/chapters/" in page.read_text()]
            return pages[0] if pages else None

        page = wait_until("`make lab` serving", START_SECONDS, start_page)
        yield Lab(page, tree / "chapters" / chapters[0].name, f"http://127.0.0.1:{port}", token)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # make, the server and its kernels: the session is theirs alone
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 1600})
        tab.set_default_timeout(60_000)
        tab.goto(lab.start_page.as_uri())
        tab.wait_for_selector(".jp-Notebook .jp-MarkdownOutput h1")
        yield tab
        browser.close()


@pytest.fixture(autouse=True)
def photograph(request: pytest.FixtureRequest, page: Any) -> Iterator[None]:
    yield
    if folder := os.environ.get("SLLM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name}.png")


def choose(page: Any, menu: str, command: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-item:visible", has_text=re.compile(f"^{command}")).first.click()


def pictures(page: Any) -> list[dict[str, Any]]:
    """Every picture in an output: its size, its alt text, and what it is. Cells are drawn as they come into view."""
    cells = page.locator(".jp-Notebook .jp-Cell")
    found: list[dict[str, Any]] = []
    for i in range(cells.count()):
        cells.nth(i).scroll_into_view_if_needed()
        found += cells.nth(i).locator(".jp-OutputArea-output img").evaluate_all(
            "images => Promise.all(images.map(async i => { await i.decode().catch(() => {});"
            " return {width: i.naturalWidth, shown: i.getBoundingClientRect().width, alt: i.alt, source: i.currentSrc}; }))"
        )
    return found


def outputs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def check_pictures(lab: Lab, page: Any) -> None:
    """Every picture that the file holds is drawn, and says in words what it shows."""
    expected = sum("".join(output["data"].get("text/html", "")).count("<img") for output in outputs(lab.cells()) if "data" in output)
    assert expected > 0, "the chapter holds no figures; run `make chapters`"

    def all_drawn() -> list[dict[str, Any]]:
        found = pictures(page)
        return found if len(found) == expected and all(p["width"] and p["shown"] for p in found) else []

    found = wait_until(f"all of {expected} figures being drawn", 60, all_drawn)
    # JupyterLab itself calls a picture without alt text "Image".
    assert [p["source"][:60] for p in found if p["alt"].strip() in ("", "Image")] == []


def test_the_chapter_opens_with_its_title(lab: Lab, page: Any) -> None:
    first = "".join(next(cell for cell in lab.cells() if cell["cell_type"] == "markdown")["source"])
    title = first.splitlines()[0]
    assert title.startswith("# ")
    shown = page.locator(".jp-Notebook .jp-MarkdownOutput h1").first.inner_text()
    assert shown.strip().removesuffix("¶") == title.removeprefix("# ").strip()


def test_the_page_says_everything_before_any_kernel_has_run(lab: Lab, page: Any) -> None:
    check_pictures(lab, page)


def test_every_cell_runs_from_the_menu(lab: Lab, page: Any) -> None:
    ncode = sum(cell["cell_type"] == "code" and bool("".join(cell["source"]).strip()) for cell in lab.cells())
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Run All Cells")

    def finished() -> bool:
        if any(kernel["execution_state"] != "idle" for kernel in lab.kernels()):
            return False
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        cells = lab.cells()
        failed = [output for output in outputs(cells) if output["output_type"] == "error"]
        assert failed == []
        return sum(cell.get("execution_count") is not None for cell in cells) == ncode

    wait_until("the last cell", RUN_SECONDS, finished)
    assert [o["text"] for o in outputs(lab.cells()) if o["output_type"] == "stream" and o["name"] == "stderr"] == []
    check_pictures(lab, page)
    assert page.locator(".jp-RenderedError, .jp-OutputArea-output [data-mime-type*=error]").count() == 0


def test_a_slider_moves_and_its_figure_follows(lab: Lab, page: Any) -> None:
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    for i in range(cells.count()):
        cells.nth(i).scroll_into_view_if_needed()
        if cells.nth(i).locator(".widget-slider").count():
            break
    else:
        pytest.fail("the chapter has no slider to move")
    cell = cells.nth(i)
    handle, readout = cell.locator(".widget-slider .noUi-handle").first, cell.locator(".widget-readout").first
    before, source = readout.inner_text(), cell.locator("img").first.get_attribute("src")
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    if readout.inner_text() == before:  # it stood at its end
        for _ in range(5):
            handle.press("ArrowLeft")
    assert readout.inner_text() != before
    wait_until("the figure following the slider", 60, lambda: cell.locator("img").first.get_attribute("src") != source)
    assert cell.locator("img").first.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0
    assert page.locator(".jp-RenderedError").count() == 0
