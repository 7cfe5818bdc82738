"""One small file with everything the report recorded, and the way of its results into `data/results/<gpu-model>/`.

The archive is a tar.gz below a limit: logs keep their ends, then chapters give up their pictures, then the largest
files stay out, and `OMITTED.txt` in it says what. Models and scratch files never go in. Reading one trusts nothing in it:
only plain JSON files of a sane size are read, and none is unpacked as it is.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sllm_mini.lab.report.folder import VERSION, Folder, ReportError, write_json
from sllm_mini.lab.report.unit import Entry
from sllm_mini.resources import resource

LIMIT_NBYTES = 12_000_000
_LOG_NBYTES = 256 << 10
_RESULT_NBYTES = 16 << 20
_TOP = ("state.json", "machine.json", "summary.md", "headlines.json")
_FOLDERS = ("results", "junit", "logs", "chapters")


def write_archive(folder: Folder, *, limit_nbytes: int = LIMIT_NBYTES) -> Path:
    """Writes `gpu-report.tar.gz` (a rehearsal's says so in its name) into the folder and returns its path.

    Raises ReportError where not even state and results fit.
    """
    path = folder.path / ("gpu-report-REHEARSAL.tar.gz" if folder.rehearsal else "gpu-report.tar.gz")
    files = {name: (folder.path / name).read_bytes() for name in _TOP if (folder.path / name).exists()}
    for name in _FOLDERS:
        for file in sorted((folder.path / name).rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                files[file.relative_to(folder.path).as_posix()] = file.read_bytes()
    omitted: list[str] = []
    _shrink(files, omitted, "logs/", "all but its end", lambda data: data[-_LOG_NBYTES:])
    packed = _pack(files, omitted)
    if len(packed) > limit_nbytes:
        _shrink(files, omitted, "chapters/", "its pictures", _without_pictures)
        packed = _pack(files, omitted)
    # What is largest goes first, and results and state never.
    for name in sorted((n for n in files if n.split("/")[0] in ("logs", "chapters", "junit")), key=lambda n: -len(files[n])):
        if len(packed) <= limit_nbytes:
            break
        del files[name]
        omitted.append(f"{name}: the whole file")
        packed = _pack(files, omitted)
    if len(packed) > limit_nbytes:
        raise ReportError(f"the results alone make an archive of {len(packed):,} bytes, more than the limit of {limit_nbytes:,}; raise --archive-limit")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(packed)
    temporary.replace(path)
    return path


def _shrink(files: dict[str, bytes], omitted: list[str], prefix: str, what: str, smaller: Callable[[bytes], bytes]) -> None:
    for name, data in files.items():
        if name.startswith(prefix) and len(found := smaller(data)) < len(data):
            files[name] = found
            omitted.append(f"{name}: {what}")


def _without_pictures(notebook: bytes) -> bytes:
    document = json.loads(notebook)
    for cell in document["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            pictures = [kind for kind in data if kind.startswith("image/") or (kind == "text/html" and "<img" in "".join(data[kind]))]
            for kind in pictures:
                del data[kind]
            if pictures:
                data.setdefault("text/plain", "(picture left out of the archive)")
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def _pack(files: Mapping[str, bytes], omitted: list[str]) -> bytes:
    note = {"OMITTED.txt": "".join(f"{line}\n" for line in omitted).encode()} if omitted else {}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in {**files, **note}.items():
            member = tarfile.TarInfo(f"gpu-report/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def record(archive: Path, results: Path | None = None) -> list[Path]:
    """Brings an archive's results into `results`/<gpu-model>/ (`data/results` by default), each with a stamp of machine,
    versions, date, command and code. Returns the files written. Raises ReportError for a rehearsal, an archive without a
    GPU or without results, and a file that is no archive of a report."""
    documents = _read(archive)
    state, machine = documents.get("state.json"), documents.get("machine.json")
    if state is None or machine is None or state.get("version") != VERSION:
        raise ReportError(f"{archive} is no archive of a report of version {VERSION}; make one with make gpu-report")
    rehearsed = state.get("rehearsal") is not False or any("rehearsal" in document for document in documents.values() if document is not state)
    if rehearsed:
        raise ReportError(f"{archive} is a rehearsal; only runs on a GPU are recorded")
    gpu = machine.get("gpu")
    if not isinstance(gpu, dict) or not gpu.get("model"):
        raise ReportError(f"{archive} was made without a GPU; only runs on a GPU are recorded")
    root = resource("data/results") if results is None else results
    target = root / (re.sub(r"[^a-z0-9.]+", "-", str(gpu["model"]).lower()).strip("-.") or "unnamed")
    written = []
    for entry in (Entry.from_json(entry) for entry in state["units"].values()):
        document = documents.get(f"results/{entry.result}")
        if entry.status != "done" or document is None:
            continue
        stamp = {
            "gpu": gpu["model"], "date": entry.started[:10], "command": _plain(entry.command), "code_hash": entry.code,
            "machine": {"system": machine.get("system"), "cpu_count": machine.get("cpu_count"), "gpu": gpu},
            "versions": {"python": str(machine.get("python")).split(" ")[0], **machine.get("modules", {})},
        }  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        path = target / PurePosixPath(str(entry.result)).name
        write_json(path, {**_without_folders(document), "recorded": stamp})
        written.append(path)
    if not written:
        raise ReportError(f"{archive} holds no result of a unit that was done; run make gpu-report again until there is one")
    return written


def _without_folders(document: dict[str, Any]) -> dict[str, Any]:
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
    """The archive's JSON documents by name, those that are none left out."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                name = member.name.removeprefix("gpu-report/")
                stream = opened.extractfile(member) if member.isreg() and name.endswith(".json") and member.size <= _RESULT_NBYTES else None
                if stream is not None:
                    document = json.loads(stream.read())
                    if isinstance(document, dict):
                        found[name] = document
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise ReportError(f"{archive} cannot be read as a report's archive ({error}); copy it again") from error
    return found


