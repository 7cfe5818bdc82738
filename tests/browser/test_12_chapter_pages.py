"""Every chapter as a reader meets it: `make lab`, a real browser, the menu, and each slider, list and tick box moved.

The server runs on a copy of `chapters/` (everything else is linked to), so the chapters in the checkout stay as they
are. One chapter at a time: its page and its kernel are closed before the next (`-k 09` takes chapter 09 alone, and
TEST_FLAGS passes that through `make browser`). Every chapter is opened; those whose recorded run took a minute at most are run, and with
--slow all of them are. SLLM_SCREENSHOTS names a folder for pictures of what the browser showed.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.name for path in (REPOSITORY / "chapters").glob("[0-9][0-9]_*.ipynb"))
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
START_SECONDS = 180
RUN_SECONDS = 1200
QUICK_SECONDS = 60
DRAW_SECONDS = 180
HARMLESS = re.compile(r"favicon|ERR_ABORTED")
"""Console errors that no chapter causes."""

CONTROLS = ".widget-slider, .widget-dropdown, .widget-checkbox"
KEYS = ("PageUp", "PageDown", "End", "Home")
"""What a slider's knob is moved with: five steps either way, and to its ends."""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: the page that a browser would be sent to, the folder it serves, and its kernels."""

    start_page: Path
    tree: Path
    url: str
    token: str

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"{self.url}/api/{path}", headers={"Authorization": f"token {self.token}"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def kernels(self) -> list[dict[str, Any]]:
        return list(self.ask("kernels"))


@dataclass(frozen=True)
class Chapter:
    """One chapter in its own tab: the file that the tab saves to, and what the browser's console complained of."""

    lab: Lab
    name: str
    page: Any
    complaints: list[str] = field(default_factory=list)

    def cells(self) -> list[dict[str, Any]]:
        def whole() -> Any:
            try:
                return json.loads((self.lab.tree / "chapters" / self.name).read_text(encoding="utf-8"))
            except ValueError:  # it is just being saved
                return None

        return list(wait_until("a whole file", START_SECONDS, whole)["cells"])

    def photograph(self, what: str, shown: Any = None) -> None:
        if folder := os.environ.get("SLLM_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (shown or self.page).screenshot(path=Path(folder) / f"chapter_{self.name[:2]}_{what}.png")


def wait_until(what: str, seconds: float, ready: Callable[[], Any], every: float = 0.2) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = ready()
        if answer:
            return answer
        time.sleep(every)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
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
        yield Lab(page, tree, f"http://127.0.0.1:{port}", token)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # make, the server and its kernels: the session is theirs alone
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("chromium is not installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=CHAPTERS, ids=[name.removesuffix(".ipynb") for name in CHAPTERS])
def chapter(request: pytest.FixtureRequest, lab: Lab, browser: Any) -> Iterator[Chapter]:
    name = request.param
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    page = context.new_page()
    page.set_default_timeout(120_000)
    opened = Chapter(lab, name, page)
    page.on("console", lambda message: opened.complaints.append(f"{message.text} ({message.location.get('url')})") if message.type == "error" else None)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    # `make lab` itself opens the first; `reset` opens no chapter that was open before.
    page.goto(lab.start_page.as_uri() if name == CHAPTERS[0] else f"{lab.url}/lab/tree/chapters/{name}?token={lab.token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-MarkdownOutput h1")
    yield opened
    context.close()
    for session in lab.ask("sessions"):
        lab.ask(f"sessions/{session['id']}", "DELETE")
    wait_until("the kernel's end", START_SECONDS, lambda: not lab.kernels())


@pytest.fixture(scope="module")
def run_chapter(chapter: Chapter, request: pytest.FixtureRequest) -> Chapter:
    """One that this run of the tests has the time to run."""
    if recorded_seconds(chapter.name) > QUICK_SECONDS and not request.config.getoption("--slow"):
        pytest.skip("long form; run it with --slow")
    return chapter


def recorded_seconds(name: str) -> float:
    return float(json.loads((REPOSITORY / "chapters" / name).read_text(encoding="utf-8"))["metadata"]["sllm_mini"]["seconds"])


def choose(page: Any, menu: str, command: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-item:visible", has_text=re.compile(f"^{command}")).first.click()


def code_cells(page: Any) -> Iterator[Any]:
    """Each code cell in turn, drawn: JupyterLab draws a cell as it comes into view."""
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    for i in range(cells.count()):
        cells.nth(i).scroll_into_view_if_needed()
        yield cells.nth(i)


def pictures(page: Any) -> list[dict[str, Any]]:
    """Every picture in an output: its size, its alt text, and what it is."""
    found: list[dict[str, Any]] = []
    for cell in code_cells(page):
        found += cell.locator(".jp-OutputArea-output img").evaluate_all(
            "images => Promise.all(images.map(async i => { await i.decode().catch(() => {});"
            " return {width: i.naturalWidth, shown: i.getBoundingClientRect().width, alt: i.alt, source: i.currentSrc}; }))"
        )
    return found


def outputs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def check_pictures(chapter: Chapter) -> None:
    """Every picture that the file holds is drawn, and says in words what it shows."""
    expected = sum("".join(output["data"].get("text/html", "")).count("<img") for output in outputs(chapter.cells()) if "data" in output)
    assert expected > 0, "the chapter holds no figures; run `make chapters`"

    def all_drawn() -> list[dict[str, Any]]:
        found = pictures(chapter.page)
        return found if len(found) == expected and all(p["width"] and p["shown"] for p in found) else []

    found = wait_until(f"all of {expected} figures being drawn", DRAW_SECONDS, all_drawn)
    # JupyterLab itself calls a picture without alt text "Image".
    assert [p["source"][:60] for p in found if p["alt"].strip() in ("", "Image")] == []


def check_console(chapter: Chapter) -> None:
    assert [text for text in chapter.complaints if not HARMLESS.search(text)] == []


def test_the_page_says_everything_before_any_cell_has_run(chapter: Chapter) -> None:
    first = "".join(next(cell for cell in chapter.cells() if cell["cell_type"] == "markdown")["source"])
    title = first.splitlines()[0]
    assert title.startswith("# ")
    shown = chapter.page.locator(".jp-Notebook .jp-MarkdownOutput h1").first.inner_text()
    assert shown.strip().removesuffix("¶") == title.removeprefix("# ").strip()
    check_pictures(chapter)
    chapter.page.locator(".jp-Notebook .jp-Cell").first.scroll_into_view_if_needed()
    chapter.photograph("opened")
    check_console(chapter)


def test_restart_and_run_all_shows_no_error(run_chapter: Chapter, capsys: pytest.CaptureFixture[str]) -> None:
    chapter = run_chapter
    page, lab = chapter.page, chapter.lab
    ncode = sum(cell["cell_type"] == "code" and bool("".join(cell["source"]).strip()) for cell in chapter.cells())
    wait_until("a kernel", START_SECONDS, lambda: [kernel["execution_state"] for kernel in lab.kernels()] == ["idle"])
    choose(page, "Edit", "Clear Outputs of All Cells")  # what is seen later is of this run

    def cleared() -> bool:
        page.keyboard.press("Control+s")
        return outputs(chapter.cells()) == [] and not any(cell.get("execution_count") for cell in chapter.cells())

    wait_until("the file without outputs", START_SECONDS, cleared, every=0.5)
    started = time.monotonic()
    choose(page, "Kernel", "Restart Kernel and Run All Cells")
    page.locator(".jp-Dialog button.jp-mod-accept").click()

    def finished() -> bool:
        if any(kernel["execution_state"] != "idle" for kernel in lab.kernels()):
            return False
        page.keyboard.press("Control+s")
        cells = chapter.cells()
        raised = [(output["ename"], output["evalue"]) for output in outputs(cells) if output["output_type"] == "error"]
        assert raised == []
        return sum(cell.get("execution_count") is not None for cell in cells) == ncode

    wait_until("the last cell", RUN_SECONDS, finished, every=1.0)
    with capsys.disabled():
        print(f"\n{chapter.name}: restarted and run in the browser in {time.monotonic() - started:.0f} s")
    assert [o["text"] for o in outputs(chapter.cells()) if o["output_type"] == "stream" and o["name"] == "stderr"] == []
    check_pictures(chapter)
    assert page.locator(".jp-RenderedError, .jp-OutputArea-output [data-mime-type*=error]").count() == 0
    if os.environ.get("SLLM_SCREENSHOTS"):
        for number, cell in enumerate(code_cells(page)):
            if cell.locator(".jp-OutputArea-output img").count():
                chapter.photograph(f"run_{number:02}", cell.locator(".jp-Cell-outputWrapper"))
    check_console(chapter)


@dataclass(frozen=True)
class Control:
    """A slider, a list or a tick box of one cell, and what its cell's output looks like."""

    cell: Any
    at: Any

    @property
    def label(self) -> str:
        kind = ".widget-label" if self.at.locator("input[type=checkbox]").count() == 0 else "label"
        labels = [text.strip() for text in self.at.locator(kind).all_text_contents()]
        return next((text for text in labels if text), "")

    def moves(self) -> list[Callable[[], Any]]:
        """The ways in which it can be moved, each a new value (but for a slider that stands at that end)."""
        if self.at.locator("input[type=checkbox]").count():
            return [self.at.locator("input").click] * 2
        if self.at.locator("select").count():
            names = self.at.locator("option").all_inner_texts()
            now = self.at.locator("select").evaluate("list => list.selectedIndex")
            return [lambda i=i: self.at.locator("select").select_option(index=i) for i in [*range(now + 1, len(names)), *range(now + 1)]]
        return [lambda key=key: self.at.locator(".noUi-handle").press(key) for key in KEYS]

    def setting(self) -> str:
        """What it stands at, as it shows it."""
        if self.at.locator("input[type=checkbox]").count():
            return str(self.at.locator("input").is_checked())
        if self.at.locator("select").count():
            return str(self.at.locator("select").evaluate("list => list.selectedIndex"))
        return str(self.at.locator(".widget-readout").inner_text())

    def figure(self) -> tuple[str, str]:
        """What is drawn, and apart from it the list of settings that it says it was drawn with."""
        drawn, settings = self.cell.locator(".jp-OutputArea-output").evaluate_all(
            "areas => { const said = areas.flatMap(a => [...a.querySelectorAll('details')]).map(d => d.textContent).join('');"
            " const shown = areas.filter(a => !a.querySelector('.jupyter-widgets')).map(a => { const copy = a.cloneNode(true);"
            " copy.querySelectorAll('details').forEach(d => d.remove()); return copy.innerHTML; }).join(''); return [shown, said]; }"
        )
        return drawn, settings

    def redraws(self) -> bool:
        """True as soon as one of its moves has changed the figure; each redrawing is waited for."""
        before, said = self.figure()
        for move in self.moves():
            stood = self.setting()
            move()
            if self.setting() == stood:
                continue
            wait_until(f"a redrawing for {self.label!r} at {self.setting()}", DRAW_SECONDS, lambda said=said: self.figure()[1] != said)
            after, said = self.figure()
            if after != before:
                return True
        return False


def controls_of(page: Any) -> list[Control]:
    return [Control(cell, cell.locator(CONTROLS).nth(i)) for cell in code_cells(page) for i in range(cell.locator(CONTROLS).count())]


def moves_alone_or_beside(control: Control, lists: list[Control]) -> bool:
    """Some settings count only beside others (sources, in a plan of several): those lists are tried at each of their options."""
    if control.redraws():
        return True
    for other in lists:
        for choice in other.moves():
            choice()
            if control.redraws():
                return True
    return False


def test_every_control_is_named_and_its_figure_follows(run_chapter: Chapter) -> None:
    chapter = run_chapter
    promised = sum("explore(" in "".join(cell["source"]) for cell in chapter.cells() if cell["cell_type"] == "code")
    controls = controls_of(chapter.page)
    assert len({id(control.cell) for control in controls}) == promised, "each `explore` of the chapter shows its controls"
    if not promised:
        pytest.skip("the chapter has no controls")
    assert [control.at.inner_html() for control in controls if not control.label] == []
    idle = []
    for control in controls:
        control.cell.scroll_into_view_if_needed()
        lists = [other for other in controls if other.cell is control.cell and other is not control and other.at.locator("select").count()]
        if not moves_alone_or_beside(control, lists):
            idle.append(control.label)
    for number, cell in enumerate({id(control.cell): control.cell for control in controls}.values()):
        cell.scroll_into_view_if_needed()
        chapter.photograph(f"moved_{number}", cell.locator(".jp-Cell-outputWrapper"))
        assert cell.locator("img").first.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0
    assert idle == [], "these were moved over their whole range and the figure stayed as it was"
    assert chapter.page.locator(".jp-RenderedError").count() == 0
    check_console(chapter)
