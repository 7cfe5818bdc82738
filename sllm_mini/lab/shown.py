"""What an executed notebook shows, cell by cell: its tables, and its lines that hold a figure.

Read from the outputs that the notebook stores, whoever ran it and however. A picture counts by its alt text, a line for
each clause. Costs the reading of one file; nothing in it is executed. Pure, safe from any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

from sllm_mini.lab.quantity import quantities
from sllm_mini.lab.table import Table

_PICTURE = re.compile(r"^\[figure: (.*)\]$")
_CLAUSES = re.compile(r"[,;.]\s+(?![^()]*\))(?!\d+(?:[,;.]|$))")
"""Where an alt text is cut: not within brackets, and not within a list of bare numbers."""
_BLOCKS = {"p", "div", "li", "figcaption", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "figure", "table"}
_UNSEEN = {"style", "script", "svg", "title"}


@dataclass(frozen=True, slots=True)
class Shown:
    """What one cell showed: its tables and its lines with a figure, in order."""

    tables: tuple[Table, ...]
    lines: tuple[str, ...]


def shown_by(cell: Mapping[str, Any]) -> Shown:
    """The outputs of a cell as JSON holds it. Raises LookupError, TypeError or AttributeError for what is no cell."""
    tables: list[Table] = []
    lines: list[str] = []
    printed = ""  # one print may lie in several outputs
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if output["output_type"] == "stream":
            printed += "".join(output["text"])
        elif "text/html" in data:
            page = _Page()
            page.feed("".join(data["text/html"]))
            page.close()
            tables += page.tables
            lines += page.lines
        else:
            lines += _plain("".join(data.get("text/plain", ())))
    lines += printed.splitlines()
    return Shown(tuple(tables), tuple(line for line in lines if quantities(line)))


def _plain(text: str) -> Iterator[str]:
    for line in text.splitlines():
        picture = _PICTURE.match(line)
        yield from _clauses(picture[1]) if picture else (line,)


def _clauses(alt_text: str) -> Iterator[str]:
    """The parts of an alt text, so that "4.6 s in all: import 2.8 s, load 1.2 s" stands beside one that names the load first."""
    for part in _CLAUSES.split(alt_text):
        before, colon, after = part.strip(" .").partition(": ")
        yield from (before, after) if quantities(before) else (before + colon + after,)


class _Page(HTMLParser):
    """Tables, alt texts and lines of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.lines: list[str] = []
        self._words = ""
        self._unseen = 0
        self._caption, self._headers, self._rows = "", list[str](), list[list[str]]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unseen += tag in _UNSEEN
        if tag in _BLOCKS:
            self._end_line()
        if tag == "table":
            self._caption, self._headers, self._rows = "", [], []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("caption", "th", "td"):
            self._words = ""
        elif tag == "img":
            self.lines += _clauses(dict(attrs).get("alt") or "")

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN
        if tag == "caption":
            self._caption = self._taken()
        elif tag == "th" and len(self._rows) == 1:
            self._headers.append(self._taken())
        elif tag in ("th", "td") and self._rows:
            self._rows[-1].append(self._taken())
        elif tag == "figcaption":
            self.lines += _clauses(self._taken().strip())  # it often says again what the alt text says
        elif tag == "table":
            # Of other programs' tables, those that are no grid say nothing that could be set beside another.
            rows = [tuple(row) for row in self._rows if row]
            if self._headers and all(len(row) == len(self._headers) for row in rows):
                self.tables.append(Table(tuple(self._headers), tuple(rows), self._caption))
        if tag in _BLOCKS:
            self._end_line()

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._words += data

    def close(self) -> None:
        super().close()
        self._end_line()

    def _taken(self) -> str:
        words, self._words = self._words, ""
        return words

    def _end_line(self) -> None:
        if line := self._taken().strip():
            self.lines.append(line)
