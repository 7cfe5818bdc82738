"""Chapters run on one machine, kept, and set beside a run on another: what `sllm-mini record` and `compare` do.

A record is a folder with executed notebooks and nothing else: each says when, on which machine and by which code it ran, and its outputs hold the
figures. So the chapters as they are committed are a record too, which is what a reader's own is set beside. One run stands beside one run: how far
runs of one machine lie apart, the rounds within a chapter say. Shown in chapter 00.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sllm_mini.errors import SllmError
from sllm_mini.lab.children import last_line
from sllm_mini.lab.environment import CAPTION
from sllm_mini.lab.execute import ChapterError, Execution, execute_chapter
from sllm_mini.lab.quantity import quantities, skeleton, without_asides
from sllm_mini.lab.shown import Shown, shown_by
from sllm_mini.lab.table import Table


class RecordError(SllmError):
    """A folder that holds no chapters, a name that is taken, or chapters that there are not."""


@dataclass(frozen=True, slots=True)
class Run:
    """A chapter that was executed, and what each cell showed, by its id."""

    title: str
    machine: str
    date: str
    code: str
    seconds: float
    cells: Mapping[str, Shown]

    @property
    def where(self) -> str:
        return f"{self.machine or 'a machine that is not named'}, {self.date or 'date unknown'}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that two runs of a chapter both have. `caption` is that of its table; None where it was printed or drawn: then `row` is the line,
    with "…" for figures that differ, and `column` the words before the figure. `ratio` is theirs over mine; None where one of them is 0 or they are of two kinds."""

    cell: str
    caption: str | None
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


def record(chapters: Iterable[Path], folder: Path, *, timeout_seconds: float = 600.0) -> Generator[Execution | ChapterError]:
    """Executes chapters and writes each into `folder`, which must not be there; the notebooks themselves stay as they are. Gives what became of
    each; a folder into which nothing came is removed. Raises RecordError."""
    if folder.exists():
        raise RecordError(f"{folder} is there already; give another name, or remove it")
    folder.mkdir(parents=True)
    try:
        for path in chapters:
            try:
                yield execute_chapter(path, to=folder / path.name, timeout_seconds=timeout_seconds)
            except ChapterError as error:
                yield error
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def read_run(path: Path, *, committed: bool = False) -> Run:
    """The run whose outputs a notebook holds, or those that it has at git's HEAD. Machine and day are those that its own first cell found, so they
    are true of a notebook run in JupyterLab as well. Raises RecordError for a file that is no notebook, or was never executed."""
    try:
        notebook = json.loads(_committed(path) if committed else path.read_text(encoding="utf-8"))
        cells, told = notebook["cells"], notebook["metadata"].get("sllm_mini", {})
        title = next((line.lstrip("# ") for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines() if line.startswith("# ")), path.stem)
        shown = {str(cell.get("id", number)): shown_by(cell) for number, cell in enumerate(cells)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is no notebook that can be read ({error})") from error
    machine, date = _found(shown)
    if "executed" not in told and not date:
        raise RecordError(f"{path} was never executed; run: sllm-mini record {path.name[:2]}")
    if date and (machine, date) != (told.get("machine"), told.get("executed")):
        return Run(title, machine, date, "", 0.0, shown)  # run again since by something that leaves no metadata
    return Run(title, str(told.get("machine", "")), str(told["executed"]), str(told.get("code", "")), float(told.get("seconds", 0.0)), shown)


def _committed(path: Path) -> str:
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise RecordError(f"{path} as it was committed cannot be had: git is not installed; name the record to set it beside") from error
    if done.returncode:
        raise RecordError(f"{path} as it was committed cannot be had ({last_line(done.stderr.decode(errors='replace')) or 'git gave no reason'}); name the record to set it beside")
    return done.stdout.decode("utf-8")


def _found(shown: Mapping[str, Shown]) -> tuple[str, str]:
    """Machine, as `machine_label` has it, and day, as a chapter's first cell found them; empty where it found none."""
    own = (table for each in shown.values() for table in each.tables if table.caption == CAPTION and len(table.headers) > 1)
    facts = {row[0]: row[1] for table in own for row in table.rows}
    gpu, processor = facts.get("GPU", "none").partition(", ")[0], facts.get("processor", "").partition(", torch")[0]
    return (processor if gpu == "none" else f"{gpu}, {processor}"), facts.get("date", "")


def figures(mine: Run, theirs: Run) -> list[Figure]:
    """Every figure that is in the same place of both: in the same cell, a row and a column of the same name, or a line that says the same but for its
    figures. Pure."""
    found: list[Figure] = []
    for cell, shown in mine.cells.items():
        if any(table.caption == CAPTION for table in shown.tables):
            continue  # the machine itself, which both name
        other = theirs.cells.get(cell, Shown((), ()))
        for table, beside in zip(shown.tables, other.tables, strict=False):
            if table.headers == beside.headers:
                found += _table_figures(cell, table, beside)
        for line, same in _pairs(shown.lines, other.lines):
            found += _line_figures(cell, line, same)
    return found


def _table_figures(cell: str, mine: Table, theirs: Table) -> Iterator[Figure]:
    rows = {_named(theirs.rows, number): row for number, row in enumerate(theirs.rows)}
    for number, row in enumerate(mine.rows):
        beside = rows.get(_named(mine.rows, number), ())
        label = _label(mine.rows, row, beside)
        for header, text, other in zip(mine.headers[1:], row[1:], beside[1:], strict=False):
            one, two = quantities(text), quantities(other)
            if one and two and one[0].unit == two[0].unit:
                yield Figure(cell, mine.caption, label, header, text, other, two[0].over(one[0]))


def _label(rows: Sequence[Sequence[str]], row: Sequence[str], beside: Sequence[str]) -> str:
    """A row's first cell, and the next ones that both runs share as long as others of its table begin as it does."""
    upto = 1
    while upto < len(beside) and row[upto] == beside[upto] and sum(each[:upto] == row[:upto] for each in rows) > 1:
        upto += 1
    return ", ".join(row[:upto])


def _line_figures(cell: str, mine: str, theirs: str) -> Iterator[Figure]:
    pairs = list(zip(quantities(mine), quantities(theirs), strict=True))
    label, end = mine, 0
    for one, two in reversed(pairs):
        if one.text != two.text:
            label = f"{label[: one.start]}…{label[one.end :]}"
    label = " ".join(without_asides(label).split())
    for one, two in pairs:
        words, end = mine[end : one.start], one.end
        yield Figure(cell, None, label, " ".join(without_asides(words).split()).strip(" ,;:"), one.text, two.text, two.over(one))


def _pairs(mine: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Lines that say the same but for figures, in order. Where one run has more of a kind than the other, which belongs to which is not guessed."""
    of_a_kind = {kind: iter([line for line in theirs if skeleton(line) == kind]) for kind in set(map(skeleton, theirs))}
    counts = Counter(map(skeleton, mine)), Counter(map(skeleton, theirs))
    pairs = [(line, next(of_a_kind[kind])) for line in mine if counts[0][kind := skeleton(line)] == counts[1][kind]]
    return list(dict.fromkeys(pairs))


def figures_table(mine: Run, theirs: Run) -> Table:
    """The figures of two runs of one chapter that differ, side by side; those of one line in one row."""
    every = figures(mine, theirs)
    different = [each for each in every if each.mine != each.theirs]
    rows = []
    for _, group in groupby(enumerate(different), lambda each: (each[1].cell, each[1].row, None if each[1].caption is None else each[0])):
        same = [each for _, each in group]
        column = "" if same[0].caption is None else same[0].column
        ratios = ", ".join("?" if each.ratio is None else f"{each.ratio:.2f}" for each in same)
        rows.append((same[0].caption or same[0].cell, same[0].row, column, *(", ".join(words) for words in zip(*((each.mine, each.theirs) for each in same), strict=True)), ratios))
    stale = "" if mine.code == theirs.code else " They ran other code of the package, or one does not say which."
    caption = f"{mine.title}. This: {mine.where}. Other: {theirs.where}."
    note = f"Of {len(every)} figures that both have, {len(every) - len(different)} are the same and left out.{stale}"
    return Table(("table or cell", "row or line", "figure", "this", "other", "other over this"), tuple(rows), caption, note, numeric=frozenset({3, 4, 5}))


def _named(rows: Sequence[Sequence[str]], number: int) -> tuple[str, int]:
    """A row by its first cell, and by how many before it have the same."""
    name = rows[number][0]
    return name, sum(row[0] == name for row in rows[:number])
