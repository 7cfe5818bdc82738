"""One small file with everything the report recorded.

It is a tar.gz below a limit: logs keep their ends, then chapters give up their pictures, then the largest files stay
out, and `OMITTED.txt` in it says what. Models and scratch files never go in. `record` reads it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from sllm_mini.lab.report.folder import Folder, ReportError

LIMIT_NBYTES = 12_000_000
_LOG_NBYTES = 256 << 10
OMITTED = "omitted"
"""Key in the metadata of a notebook that gave something up for the limit."""
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
                document.setdefault("metadata", {})[OMITTED] = "pictures"
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
