"""One look for all figures and widgets, in the code that draws them and in what the chapters hold. Chapter 12."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from matplotlib import colors

from sllm_mini.lab import style

REPOSITORY = Path(__file__).resolve().parents[1]
LAB = REPOSITORY / "sllm_mini" / "lab"
DRAWING = sorted(path for path in LAB.rglob("*.py") if path != LAB / "style.py" and "pyplot" in path.read_text(encoding="utf-8"))
CHAPTERS = sorted((REPOSITORY / "chapters").glob("[0-9][0-9]_*.ipynb"))
COLOUR_WORDS = frozenset({"c", "color", "colors", "facecolor", "facecolors", "edgecolor", "edgecolors", "ecolor", "markerfacecolor", "markeredgecolor"})
NEUTRAL = frozenset({"white", "none", "face"})
WIDEST_PX = 970
"""Of the widest page; a narrower one shows it smaller."""
LEAST_ALT = 60


def named_colours(source: str) -> Iterator[str]:
    """Every colour that a module writes out instead of asking `style` for it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"#[0-9a-fA-F]{3,8}", node.value):
            yield node.value
        if isinstance(node, ast.keyword) and node.arg in COLOUR_WORDS:
            for each in ast.walk(node.value):
                if isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value not in NEUTRAL and colors.is_color_like(each.value):
                    yield each.value


def test_a_colour_that_is_written_out_is_found() -> None:
    source = "ax.plot(x, color='tab:red' if bad else INK, label='red'); ax.bar(x, facecolor='white'); SHADE = '#fffefd'"
    assert set(named_colours(source)) == {"tab:red", "#fffefd"}


@pytest.mark.parametrize("path", DRAWING, ids=lambda path: str(path.relative_to(LAB)))
def test_whatever_draws_has_its_colours_and_its_type_from_the_style(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert list(named_colours(source)) == []
    assert "use_style" in source or "subplots(" not in source


def test_there_is_something_to_look_at() -> None:
    assert len(DRAWING) > 20 and len(CHAPTERS) == 12 and set(style.PALETTE) >= {"cold", "ready", "remote", "disk"}


def pages(path: Path) -> Iterator[tuple[str, str]]:
    """Of each code cell its source and what its outputs are as HTML."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            yield cell.source, "".join("".join(output.get("data", {}).get("text/html", "")) for output in cell.outputs)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_picture_says_what_it_shows_and_fits_the_page(path: Path) -> None:
    found = [picture for _, page in pages(path) for picture in re.findall(r"<img [^>]*>", page)]
    assert len(found) >= 3
    for picture in found:
        alt, width = re.search(r'alt="([^"]*)"', picture), re.search(r'width="(\d+)"', picture)
        assert alt is not None and len(alt[1]) >= LEAST_ALT and re.search(r"\d|;", alt[1]), picture[-300:]
        assert width is not None and int(width[1]) <= WIDEST_PX and "max-width:100%" in picture


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_can_be_moved_is_there_without_a_kernel(path: Path) -> None:
    for source, page in pages(path):
        if "explore(" in source:
            assert "<img" in page and "Drawn with" in page, source
            settings = re.findall(r"<li>(.*?)</li>", page) or re.findall(r"<tr>(.*?)</tr>", page)
            assert settings and all(": " in re.sub(r"<[^>]*>", "", each) or "<td" in each for each in settings), settings
