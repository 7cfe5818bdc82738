"""The report's folder: what was done, what came of it, and where everything lies.

`state.json` has one entry per unit and is replaced as a whole after each, so a call that is killed loses the unit it was
in and nothing else. One runner at a time works in a folder. A folder holds a rehearsal or a run, never both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sllm_mini.errors import SllmError
from sllm_mini.lab.report.unit import Entry, Unit

VERSION = 1
REHEARSAL = "This is a REHEARSAL of the report: tiny sizes, and no GPU but a recording fake of one. No figure in it is a result."


class ReportError(SllmError):
    """The report cannot be made or recorded as asked."""


class Folder:
    """See the module. `rehearsal` is fixed when the folder is made; without `create` nothing is made, to look only. Raises
    ReportError for a folder that is another's."""

    def __init__(self, path: Path, *, rehearsal: bool, create: bool = True) -> None:
        self.path = path
        self.rehearsal = rehearsal
        self.results, self.logs, self.chapters, self.work = (path / name for name in ("results", "logs", "chapters", "work"))
        self.models, self.scratch = self.work / "models", self.work / "scratch"
        for folder in (self.results, self.logs, self.chapters, path / "junit", self.models, self.scratch) if create else ():
            folder.mkdir(parents=True, exist_ok=True)
        self._state = path / "state.json"
        self.entries: dict[str, Entry] = {}
        if self._state.exists():
            self._read()

    def _read(self) -> None:
        try:
            document = json.loads(self._state.read_text(encoding="utf-8"))
            if document["version"] != VERSION:
                raise ReportError(f"{self._state} is of version {document['version']}, not {VERSION}; name another folder with OUT=")
            rehearsal = document["rehearsal"]
            self.entries = {key: Entry.from_json(entry) for key, entry in document["units"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{self._state} cannot be read ({error}); name another folder with OUT=") from error
        if rehearsal != self.rehearsal:
            was, now = ("a rehearsal", "a run") if rehearsal else ("a run", "a rehearsal")
            raise ReportError(f"{self.path} holds {was} and this is {now}; name another folder with OUT=")

    def note(self, unit: Unit, entry: Entry) -> None:
        """Keeps what became of a unit, at once and on the disk."""
        self.entries[unit.key] = entry
        self.save()

    def save(self) -> None:
        document = {"version": VERSION, "rehearsal": self.rehearsal, "units": {key: entry.as_json() for key, entry in self.entries.items()}}
        write_json(self._state, document)

    def log_of(self, key: str) -> Path:
        return self.logs / f"{key.replace('/', '.')}.log"

    def result_documents(self) -> Iterator[tuple[str, Entry, dict[str, Any]]]:
        """Key, entry and JSON of each unit that left a result that can be read, failed ones included."""
        for key, entry in self.entries.items():
            if entry.result is not None:
                try:
                    document = json.loads((self.results / entry.result).read_text(encoding="utf-8"))
                except (OSError, ValueError):
                    continue
                if isinstance(document, dict):
                    yield key, entry, document

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises ReportError where another runner works in this folder."""
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ReportError(f"another report is being made in {self.path}; wait for it or name another folder with OUT=") from error
            yield

    def delete(self, path: Path) -> None:
        """Removes something large that was made in the work folder, and nothing outside it."""
        if self.work.resolve() not in path.resolve().parents:
            raise ReportError(f"{path} is not inside {self.work}, so it is not deleted")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def clear_scratch(self) -> None:
        """Empties the folder in which a unit may leave what it likes, also when it was killed."""
        self.delete(self.scratch)
        self.scratch.mkdir(exist_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
