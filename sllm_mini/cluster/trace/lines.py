"""Text files read line by line and strictly, plain or gzip: what every reader of traces is made of.

Taught in chapter 08. Memory is one line, whatever the file's length. Every failure is a FormatError of one sentence that
names the file, the line and what to do.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TextIO

from sllm_mini.cluster.trace.request import MAX_TOKENS
from sllm_mini.errors import FormatError

MAX_LINE = 1 << 20
"""Characters; the longest published line has some 10 000. Without a bound a binary file would be read whole."""
_NUMBER = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII).fullmatch


class Lines:
    """The lines of one open file, without their ends (LF or CRLF), and the number of the last one read."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.number = 0
        self.ended = True
        """Whether the last line read had an end; False at the end of a file that may have been cut off."""
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number += 1
        try:
            line = self._file.readline(MAX_LINE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.wrong(f"the compressed file is damaged or cut off ({error}); copy it again") from error
        except UnicodeDecodeError as error:
            raise self.wrong("it is not UTF-8 text; name a trace, or save it as UTF-8") from error
        except OSError as error:
            raise self.wrong(f"it cannot be read: {error.strerror or error}") from error
        if not line:
            self.number -= 1
            raise StopIteration
        if len(line) == MAX_LINE:
            raise self.wrong(f"the line is longer than {MAX_LINE:,} characters; name a trace")
        self.ended = line.endswith("\n")
        return line.removesuffix("\n").removesuffix("\r")

    def wrong(self, message: str) -> FormatError:
        """The error for the line read last."""
        return FormatError(f"line {self.number}: {message}", path=self.path)

    def rows(self, columns: int) -> Iterator[list[str]]:
        """The cells of each line that is left, as comma-separated values. Raises FormatError unless each has so many."""
        reader = csv.reader(self, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise self.wrong(f"it is no row of comma-separated values ({error}); mend or remove it") from error
            if len(row) != columns:
                raise self.wrong(f"it has {len(row)} columns where the header has {columns}; mend or remove it")
            yield row

    def count(self, text: str, column: str) -> int:
        """A number of things, 0 to MAX_TOKENS. Raises FormatError for anything else."""
        if not (text.isdecimal() and text.isascii() and len(text) <= 10) or (value := int(text)) > MAX_TOKENS:
            raise self.wrong(f"{column} is {text[:40]!r}; give a whole number from 0 to {MAX_TOKENS:,}")
        return value

    def number_of(self, text: str, column: str) -> float:
        """A finite number, 0 or more. Raises FormatError for anything else."""
        value = float(text) if _NUMBER(text) else -1.0
        if not 0 <= value < inf:
            raise self.wrong(f"{column} is {text[:40]!r}; give a number of 0 or more")
        return value


@contextmanager
def open_lines(path: str | os.PathLike[str]) -> Iterator[Lines]:
    """Opens a text file, which is gzip where its name ends in .gz. Raises FormatError where it cannot be opened."""
    target = Path(path)
    try:
        file = gzip.open(target, "rt", encoding="utf-8", newline="\n") if target.suffix == ".gz" else target.open(encoding="utf-8", newline="\n")  # noqa: SIM115
    except OSError as error:
        raise FormatError(f"it cannot be read: {error.strerror or error}; name a trace file", path=target) from error
    with file:
        yield Lines(target, file)


def header_of(lines: Lines) -> str:
    """The first line, without a byte order mark. Raises FormatError for an empty file."""
    line = next(lines, None)
    if line is None:
        raise FormatError("it is empty; name a trace file", path=lines.path)
    return line.removeprefix("\ufeff")
