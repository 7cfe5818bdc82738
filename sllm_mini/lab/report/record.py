"""The way of a report's archive into the repository: results into `data/results/<gpu-model>/`, chapters into `chapters/`.

Nothing in an archive is trusted: only plain JSON files of a sane size are read, none is unpacked as it is, and of a name
in it only the last part is used. Not safe from several threads.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from sllm_mini.lab.recorded import code_hash
from sllm_mini.lab.report.archive import OMITTED
from sllm_mini.lab.report.folder import VERSION, ReportError, write_json
from sllm_mini.lab.report.unit import Entry
from sllm_mini.resources import resource

_MEMBER_NBYTES = 16 << 20


def record(archive: Path, results: Path | None = None) -> list[Path]:
    """Brings an archive's results into `results`/<gpu-model>/ (`data/results` by default), each with a stamp of machine,
    versions, date, command and code. Returns the files written. Raises ReportError for a rehearsal, an archive without a
    GPU or without results, and a file that is no archive of a report."""
    documents = _read(archive)
    machine = documents["machine.json"]
    gpu = machine["gpu"]
    root = resource("data/results") if results is None else results
    target = root / (re.sub(r"[^a-z0-9.]+", "-", str(gpu["model"]).lower()).strip("-.") or "unnamed")
    written = []
    for _, entry in _done(documents):
        document = documents.get(f"results/{entry.result}")
        if document is None:
            continue
        stamp = {
            "gpu": gpu["model"], "date": entry.started[:10], "command": _plain(entry.command), "code_hash": entry.code,
            "machine": {"system": machine.get("system"), "cpu_count": machine.get("cpu_count"), "gpu": gpu},
            "versions": {"python": str(machine.get("python")).split(" ")[0], **machine.get("modules", {})},
        }  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        path = target / PurePosixPath(str(entry.result)).name
        write_json(path, {**without_folders(document), "recorded": stamp})
        written.append(path)
    if not written:
        raise ReportError(f"{archive} holds no result of a unit that was done; run make gpu-report again until there is one")
    return written


def record_chapters(archive: Path, chapters: Path) -> tuple[list[Path], list[str]]:
    """Replaces the notebooks of the folder `chapters` by those that an archive's run has executed. Returns the files written,
    and a sentence for each that was not: that gave something up for the archive's limit, whose cells (but for outputs) are no
    longer those that ran, or that ran other code of this package. Raises ReportError as `record` does."""
    documents = _read(archive)
    brought, refused = [], []
    for key, entry in _done(documents):
        stage, _, stem = key.partition("/")
        if stage != "chapters":
            continue
        document, target = documents.get(f"chapters/{stem}.ipynb"), chapters / f"{PurePosixPath(stem).name}.ipynb"
        if document is None or OMITTED in document.get("metadata", ()):
            refused.append(f"{target.name} is not brought: it or its pictures were too large for the archive; make it with a higher --archive-limit")
        elif not target.is_file() or _sources(document) != _sources(json.loads(target.read_text(encoding="utf-8"))):
            refused.append(f"{target.name} is not brought: its cells are not those of {target}; run the report on this checkout")
        elif entry.code != code_hash():
            refused.append(f"{target.name} is not brought: it ran the package's code {entry.code}, and here is {code_hash()}; run the report on this checkout")
        else:
            write_json(target, document)
            brought.append(target)
    return brought, refused


def _sources(notebook: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Everything of a notebook's cells that running it does not change; None for what is no notebook."""
    cells = notebook.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells) or not isinstance(notebook.get("metadata"), dict):
        return None
    return [{key: value for key, value in cell.items() if key not in ("outputs", "execution_count")} for cell in cells]


def _done(documents: dict[str, dict[str, Any]]) -> list[tuple[str, Entry]]:
    """Key and entry of each unit that was done."""
    found = [(key, Entry.from_json(entry)) for key, entry in documents["state.json"]["units"].items()]
    return [(key, entry) for key, entry in found if entry.status == "done"]


def without_folders(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what it says of the folders of the machine that it was made on: the stamp has the rest."""
    kept = {key: value for key, value in document.items() if key != "command"}
    if isinstance(kept.get("machine"), dict):
        kept["machine"] = {key: value for key, value in kept["machine"].items() if key != "directory"}
    return kept


def _plain(command: tuple[str, ...]) -> str:
    """The command without the folders of the machine it ran on."""
    words = [word if not word.startswith("/") else "python" if number == 0 else PurePosixPath(word).name for number, word in enumerate(command)]
    return " ".join(word if "\n" not in word else "…" for word in words)


def _read(archive: Path) -> dict[str, dict[str, Any]]:
    """The JSON documents and notebooks of the archive of a run on a GPU, by name. Raises ReportError for any other file."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                name = member.name.removeprefix("gpu-report/")
                stream = opened.extractfile(member) if member.isreg() and name.endswith((".json", ".ipynb")) and member.size <= _MEMBER_NBYTES else None
                if stream is not None:
                    document = json.loads(stream.read())
                    if isinstance(document, dict):
                        found[name] = document
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise ReportError(f"{archive} cannot be read as a report's archive ({error}); copy it again") from error
    state, machine = found.get("state.json"), found.get("machine.json")
    if state is None or machine is None or state.get("version") != VERSION:
        raise ReportError(f"{archive} is no archive of a report of version {VERSION}; make one with make gpu-report")
    if state.get("rehearsal") is not False or any("rehearsal" in document for document in found.values() if document is not state):
        raise ReportError(f"{archive} is a rehearsal; only runs on a GPU are recorded")
    if not isinstance(machine.get("gpu"), dict) or not machine["gpu"].get("model"):
        raise ReportError(f"{archive} was made without a GPU; only runs on a GPU are recorded")
    return found
