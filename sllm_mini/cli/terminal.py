"""What every command shares: how numbers, tables, progress, JSON and errors reach a terminal or a pipe.

People read stdout, scripts read one JSON document there (`--json`); progress and errors go to stderr, progress only
when stderr is a terminal. Costs the import of rich. Call from the main thread; a progress callback may be called
from any.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from sllm_mini.types import Progress as ByteProgress
from sllm_mini.types import ProgressCallback

PIPE_WIDTH = 1000
"""Columns of a pipe: nothing is wrapped there, so that `grep` and `cut` see whole lines."""

TEXT_WIDTH = 100
"""Prose is not set wider than this, however wide the terminal."""

_WANTS_JSON = "sllm_mini.wants_json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.find_root().meta[_WANTS_JSON] = value
    return value


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.", callback=_remember_json)
]
DeviceOption = Annotated[
    str, typer.Option("--device", help='Where to load it: "cpu", "cuda", "cuda:1".', metavar="DEVICE")
]


def wants_json(context: typer.Context) -> bool:
    """True once the command of this context was given --json."""
    return bool(context.find_root().meta.get(_WANTS_JSON))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # To the one place that ends a command whose reader has left.
        raise BrokenPipeError


def stdout_console(*, quiet: bool = False) -> Console:
    """A console that prints what it is given: no markup, no emoji codes, no colours of its own for numbers."""
    return _console(sys.stdout, quiet)


def stderr_console() -> Console:
    """The same for stderr."""
    return _console(sys.stderr, quiet=False)


def _console(stream: TextIO, quiet: bool) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(file=stream, markup=False, emoji=False, highlight=False, width=width, quiet=quiet)


def emit_json(document: Mapping[str, Any]) -> None:
    """Prints the one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def table(*columns: str, numbers: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An unframed table; the columns named in `numbers` are flush right and never broken."""
    made = Table(
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for column in columns:
        if column in numbers:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made


def facts(rows: Mapping[str, str | Text]) -> Table:
    """Two columns without a header: a dim name, then what is so."""
    made = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def binary_text(nbytes: int) -> str:
    """Exact powers of two by their name ("4 KiB", "16 MiB"), anything else in bytes."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift:,} {unit}"
    return f"{nbytes:,} bytes"


def count(number: int, noun: str) -> str:
    """ "1 tensor", "2,048 tensors"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def byte_progress(description: str) -> Iterator[ProgressCallback]:
    """A progress bar on stderr while the body runs, gone afterwards; silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(description, total=None)

        def on_progress(progress: ByteProgress) -> None:
            bar.update(task, completed=progress.done_nbytes, total=progress.total_nbytes)

        yield on_progress


@contextmanager
def stage_progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr and a function that says what is being done now; silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda words: bar.update(task, description=words)


def wrapping_writer(width: int) -> Callable[[str], None]:
    """A function that writes text to stdout as it comes and breaks lines between words, never past `width`."""
    column = 0
    word = ""

    def write(text: str) -> None:
        nonlocal column, word
        for character in text:
            if not character.isspace():
                word += character
                continue
            if column and column + len(word) > width:
                sys.stdout.write("\n")
                column = 0
            sys.stdout.write(word)
            column = 0 if character == "\n" else column + len(word) + 1
            if column <= width:
                sys.stdout.write(character)
            word = ""
        sys.stdout.flush()

    return write


def error_document(error: BaseException) -> dict[str, Any]:
    """What `--json` says of an error: its type, its sentence, and the file and byte offset where it has them."""
    path = getattr(error, "path", None) or (error.filename if isinstance(error, OSError) else None)
    return {
        "error": {
            "type": type(error).__name__,
            "message": error_sentence(error),
            "path": os.fsdecode(path) if isinstance(path, str | bytes) else None,
            "offset": getattr(error, "offset", None),
        }
    }


def error_sentence(error: BaseException) -> str:
    """One sentence without a traceback: what is wrong and, where the error knows, what to do."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{os.fsdecode(error.filename)}: {error.strerror}"
            if isinstance(error.filename, str | bytes)
            else error.strerror
        )
    return " ".join(str(error).split()) or type(error).__name__


def print_error(error: BaseException, *, as_json: bool) -> None:
    """On stderr: one line, for people or as JSON."""
    sys.stdout.flush()
    if as_json:
        sys.stderr.write(json.dumps(error_document(error), ensure_ascii=False) + "\n")
    else:
        stderr_console().print(Text.assemble(("Error: ", "bold red"), error_sentence(error)), soft_wrap=True)
