"""The book: its links are followed, its reference says what the package offers, and what is shown is what was written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sllm_mini.lab.book.links import problems
from sllm_mini.lab.book.reference import PACKAGES, offered, pages, signature
from sllm_mini.lab.book.survey_page import survey_page
from sllm_mini.lab.survey import load_survey

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<p id="here"></p><a href="#here">a</a> <a href="other.html#there">b</a> <a href="https://example.org">c</a>', []),
        ('<a href="gone.html">a</a>', ["page.html: gone.html is not there"]),
        ('<a href="other.html#nowhere">a</a>', ["page.html: other.html#nowhere has no such place on its page"]),
        ('<a href="#nowhere">a</a>', ["page.html: #nowhere has no such place on its page"]),
        ('<img src="gone.png">', ["page.html: gone.png is not there"]),
        ('<script src="https://example.org/a.js"></script>', ["page.html: a reader without a network has no https://example.org/a.js, which a script fetches"]),
        ('<link rel="canonical" href="https://example.org/">', []),
        ('<code class="xref py py-obj">Engine</code>', ["page.html: a name of the package is referred to and not offered"]),
        ('<a href="other.html"><code class="xref py py-obj">Engine</code></a>', []),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, page: str, found: list[str]) -> None:
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "other.html").write_text('<h1 id="there">There</h1>')
    assert problems(tmp_path) == found


def test_the_reference_has_every_public_name_with_what_is_said_of_it() -> None:
    made = pages()
    assert made.keys() == {f"{name}.md" for name in PACKAGES} | {"index.md"}
    for package in PACKAGES:
        titles = set(re.findall(rf"^`````{{py:\w+}} {re.escape(package)}\.(\w+)", made[f"{package}.md"], re.MULTILINE))
        assert titles == set(offered(package)), package
    engine = made["sllm_mini.inference.md"]
    assert "py:method} sllm_mini.inference.Engine.generate(prompt: str | Sequence[int], *, max_new_tokens: int = 128" in engine
    assert ":classmethod:" in engine and "{py:obj}`Session <sllm_mini.inference.Session>`" in engine


def test_a_signature_can_be_read_whatever_its_defaults_are() -> None:
    marker = object()

    def f(a: int, b: object = marker, *c: str, d: str = "x", **e: int) -> None: ...

    assert signature(f) == "(a: int, b: object = ..., *c: str, d: str = 'x', **e: int) -> None"
    assert signature(f, bound=True).startswith("(b: object = ...")
    for package in PACKAGES:
        for value in offered(package).values():
            if callable(value):
                ast.parse(f"def f{signature(value) or '()'}: ...")


def test_every_row_of_the_survey_is_on_its_page() -> None:
    page, rows = survey_page(), load_survey()
    assert sum(line.startswith("| ") for line in page.splitlines()) == len(rows) + 3  # and three heads
    for row in rows:
        assert all(f"chapters/{number:02d}_" in page for number in row.chapters)
    for link in re.findall(r"\(chapters/([^)]+)\)", page):
        assert (ROOT / "chapters" / link).is_file()


def test_every_chapter_and_every_page_is_in_the_contents() -> None:
    contents = (BOOK / "index.md").read_text()
    for page in [*(ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"), *BOOK.glob("systems/*.md"), BOOK / "glossary.md", BOOK / "teaching.md"]:
        place = page.relative_to(BOOK if page.suffix == ".md" else ROOT).with_suffix("")
        assert f"\n{place}\n" in contents, page
