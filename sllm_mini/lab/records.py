"""Chapters run on one machine, kept, and set beside a run on another: what `sllm-mini record` and `compare` do.

A record is a folder with executed notebooks and nothing else: each says when, on which machine and by which code it ran, and its tables hold the
figures. So the chapters as they are committed are a record too, which is what a reader's own is set beside. Shown in chapter 00.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sllm_mini.errors import SllmError
from sllm_mini.lab.execute import ChapterError, Execution, execute_chapter
from sllm_mini.lab.table import Table

_UNITS = {
    "ns": (1e-9, "s"), "µs": (1e-6, "s"), "us": (1e-6, "s"), "ms": (1e-3, "s"), "s": (1.0, "s"), "min": (60.0, "s"), "h": (3600.0, "s"),
    "B": (1.0, "B"), "kB": (1e3, "B"), "MB": (1e6, "B"), "GB": (1e9, "B"), "TB": (1e12, "B"), "%": (0.01, "%"), "": (1.0, ""),
}  # fmt: skip
_QUANTITY = re.compile(r"(?P<sign>[-−]?)(?P<times>[x×]?)(?P<number>\d[\d,\u202f]*(?:\.\d+)?) ?(?P<unit>ns|µs|us|ms|min|s|h|kB|MB|GB|TB|B|%)?(?P<rate>/s)?(?=$|[ (;,–])")


class RecordError(SllmError):
    """A folder that holds no chapters, a name that is taken, or chapters that there are not."""


@dataclass(frozen=True, slots=True)
class Run:
    """A chapter that was executed. `tables` are by the id of their cell and their place in its output."""

    title: str
    machine: str
    date: str
    code: str
    seconds: float
    tables: Mapping[tuple[str, int], Table]

    @property
    def where(self) -> str:
        return f"{self.machine or 'a machine that is not named'}, {self.date or 'date unknown'}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that two runs of a chapter both have. `ratio` is theirs over mine; None where one of them is 0."""

    caption: str
    row: str
    column: str
    mine: str
    theirs: str
    ratio: float | None


def chapter_files(folder: Path, chosen: Sequence[str] = ()) -> list[Path]:
    """The notebooks of a folder, or those whose names begin as one of `chosen`. Raises RecordError for none, and for one that there is not."""
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise RecordError(f"{folder} has no chapters; give a folder with notebooks such as 02_the_pipelined_loader.ipynb")
    for name in chosen:
        if not any(path.name.startswith(name) for path in every):
            raise RecordError(f"there is no chapter {name} in {folder}; there are {', '.join(path.name[:2] for path in every)}")
    return [path for path in every if not chosen or path.name.startswith(tuple(chosen))]


def record(chapters: Iterable[Path], folder: Path, *, timeout_seconds: float = 600.0) -> Iterator[Execution | ChapterError]:
    """Executes chapters and writes each into `folder`, which must not be there; the notebooks themselves stay as they are. Gives what became of
    each. Raises RecordError."""
    if folder.exists():
        raise RecordError(f"{folder} is there already; give another name, or remove it")
    folder.mkdir(parents=True)
    for path in chapters:
        try:
            yield execute_chapter(path, to=folder / path.name, timeout_seconds=timeout_seconds)
        except ChapterError as error:
            yield error


def read_run(path: Path) -> Run:
    """Raises RecordError for a file that is no notebook, or was never executed."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells, told = notebook["cells"], notebook["metadata"].get("sllm_mini", {})
        title = next((line.lstrip("# ") for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines() if line.startswith("# ")), path.stem)
        tables = {(str(cell.get("id", number)), place): table for number, cell in enumerate(cells) for place, table in enumerate(_tables(cell))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is no notebook that can be read ({error})") from error
    if "executed" not in told:
        raise RecordError(f"{path} was never executed; run: sllm-mini record {path.name[:2]}")
    return Run(title, str(told.get("machine", "")), str(told["executed"]), str(told.get("code", "")), float(told.get("seconds", 0.0)), tables)


def figures(mine: Run, theirs: Run) -> list[Figure]:
    """Every quantity that is in the same place of both: same cell, same headers, a row of the same name, and of the same kind. Pure."""
    found: list[Figure] = []
    for place, table in mine.tables.items():
        other = theirs.tables.get(place)
        if other is None or other.headers != table.headers:
            continue
        rows = {_named(other.rows, number): row for number, row in enumerate(other.rows)}
        for number, row in enumerate(table.rows):
            beside = rows.get(_named(table.rows, number))
            for header, cell, theirs_cell in zip(table.headers[1:], row[1:], (beside or ())[1:], strict=False):
                one, two = quantity(cell), quantity(theirs_cell)
                if one is not None and two is not None and one[1] == two[1]:
                    found.append(Figure(table.caption, row[0], header, cell, theirs_cell, two[0] / one[0] if one[0] and two[0] else None))
    return found


def quantity(text: str) -> tuple[float, str] | None:
    """What a cell begins with, in its base unit, and the unit: seconds, bytes, bytes a second, a share, a factor, a number. None where it is none."""
    match = _QUANTITY.match(text.strip())
    if match is None:
        return None
    scale, unit = _UNITS[match["unit"] or ""]
    sign = -1.0 if match["sign"] else 1.0
    return sign * scale * float(match["number"].replace(",", "").replace("\u202f", "")), ("x" if match["times"] else "") + unit + (match["rate"] or "")


def figures_table(mine: Run, theirs: Run) -> Table:
    """The figures of two runs of one chapter, side by side."""
    rows = []
    for each in figures(mine, theirs):
        rows.append((each.caption, each.row, each.column, each.mine, each.theirs, "" if each.ratio is None else f"{each.ratio:.2f}"))
    stale = "" if mine.code == theirs.code else " They ran other code of the package, or one does not say which."
    note = f"This: {mine.where}. Other: {theirs.where}.{stale}"
    return Table(("table", "row", "figure", "this", "other", "other over this"), tuple(rows), mine.title, note, numeric=frozenset({3, 4, 5}))


def _named(rows: Sequence[Sequence[str]], number: int) -> tuple[str, int]:
    """A row by its first cell, and by how many before it have the same."""
    name = rows[number][0]
    return name, sum(row[0] == name for row in rows[:number])


def _tables(cell: Mapping[str, Any]) -> Iterator[Table]:
    for output in cell.get("outputs", ()):
        text = "".join(output.get("data", {}).get("text/html", ""))
        if text.startswith("<table>"):
            reader = _Reader()
            reader.feed(text)
            if reader.headers and all(len(row) == len(reader.headers) for row in reader.rows):
                yield Table(tuple(reader.headers), tuple(map(tuple, reader.rows)), reader.caption)


class _Reader(HTMLParser):
    """A `Table` as it was written into a notebook."""

    def __init__(self) -> None:
        super().__init__()
        self.caption, self.headers, self.rows = "", list[str](), list[list[str]]()
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tbody":
            self._in = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag == "th":
            self._in = tag
            self.headers.append("")
        elif tag == "td":
            self._in = tag
            self.rows[-1].append("")
        elif tag == "caption":
            self._in = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""
        if tag == "thead":
            self.rows.clear()

    def handle_data(self, data: str) -> None:
        if self._in == "caption":
            self.caption += data
        elif self._in == "th":
            self.headers[-1] += data
        elif self._in == "td":
            self.rows[-1][-1] += data
