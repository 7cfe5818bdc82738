"""Traces on disk: one format in two spellings, CSV and JSONL, plain or gzip; read strictly and written all or nothing.

Taught in chapter 08. The name says the spelling: `.csv`, `.jsonl`, and either with `.gz`. Times are seconds.

    # sllm-mini trace 1 {"name":"burst","source":"burst_trace","kind":"synthetic","seed":0}
    arrival_seconds,model,input_tokens,output_tokens,prefix,duration_seconds
    0.118301,model-03,1155,211,,

    {"format":"sllm-mini trace","version":1,"label":{"name":"burst","source":"burst_trace","kind":"synthetic","seed":0}}
    {"arrival_seconds":0.118301,"model":"model-03","input_tokens":1155,"output_tokens":211}

The last two columns may be empty, and are left out in JSONL. Rows are sorted by arrival and every line has an end, so
that a file that was cut off inside a line is not taken for a whole one. Reading and writing hold one line in memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

import msgspec

from sllm_mini.cluster.trace.lines import Lines, header_of, open_lines
from sllm_mini.cluster.trace.request import Again, Trace, TraceError, TraceLabel, TraceRequest, checked
from sllm_mini.errors import CheckpointExistsError, FormatError, WriteError

VERSION = 1
COLUMNS = ("arrival_seconds", "model", "input_tokens", "output_tokens", "prefix", "duration_seconds")
_CSV_MARK = "# sllm-mini trace "


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of JSONL."""

    format: Literal["sllm-mini trace"]
    version: int
    label: TraceLabel


_ENCODER = msgspec.json.Encoder()
_REQUEST = msgspec.json.Decoder(TraceRequest)


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace in a file, to be streamed from it: each iteration reads the file again and holds one line of it.

    Raises FormatError now for a header that is not that of a trace, and while iterating for a line that is wrong.
    """
    spelling = _spelling(Path(path), FormatError)
    with open_lines(path) as lines:
        label = _read_label(lines, spelling)
    return Trace(label, Again(partial(_requests, Path(path), spelling)))


def iter_trace(path: str | os.PathLike[str]) -> Iterator[TraceRequest]:
    """The requests of a file in order of arrival, one line in memory. Raises FormatError as `open_trace` does."""
    return iter(open_trace(path))


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The whole trace of a file in memory, some 150 bytes a request. Raises FormatError for anything wrong in it."""
    trace = open_trace(path)
    return Trace(trace.label, tuple(trace))


def write_trace(path: str | os.PathLike[str], trace: Trace, *, overwrite: bool = False) -> int:
    """Writes a trace and returns its number of requests. Under `path` there is the whole trace or what was there before.

    It goes into a hidden file beside `path`, fsynced and then renamed; the same trace gives the same bytes, in gzip by
    one version of zlib. Raises CheckpointExistsError for a file that exists unless `overwrite`, TraceError for a request
    that no trace may hold, WriteError for a name with another ending and for what the file system refuses. Two that
    overwrite one path at once: the last wins.
    """
    target = Path(path)
    spelling = _spelling(target, WriteError)
    if not overwrite and os.path.lexists(target):
        raise CheckpointExistsError("it exists already; choose another path or ask to overwrite it", path=target)
    write = _write_csv if spelling == ".csv" else _write_jsonl
    with published_file(target) as binary, _text(binary, target) as file:
        return write(file, trace.label, checked(trace))


def _spelling(path: Path, error: type[FormatError] | type[WriteError]) -> str:
    name = path.name.removesuffix(".gz")
    for ending in (".csv", ".jsonl"):
        if name.endswith(ending):
            return ending
    raise error("its name does not say how it is spelled; end it in .csv, .jsonl, .csv.gz or .jsonl.gz", path=path)


def _read_label(lines: Lines, spelling: str) -> TraceLabel:
    """Reads the header. Raises FormatError."""
    line = header_of(lines)
    try:
        if spelling == ".jsonl":
            header = msgspec.json.decode(line, type=_Header)
            version, label = str(header.version), header.label
        elif line.startswith(_CSV_MARK):
            version, _, text = line.removeprefix(_CSV_MARK).partition(" ")
            label = msgspec.json.decode(text, type=TraceLabel) if version == str(VERSION) else None  # type: ignore[assignment]
        else:
            raise lines.wrong("it does not begin as a trace of sllm-mini; import a published one first (`sllm-mini trace import`, or import_trace)")
    except msgspec.DecodeError as error:
        raise lines.wrong(f"the header of the trace is wrong ({error}); write the trace again or mend the line") from error
    if version != str(VERSION):
        raise lines.wrong(f"it is a trace of version {version[:20]!r} and this sllm_mini reads version {VERSION}; write it again or install a newer sllm_mini")
    if spelling == ".csv" and next(lines, None) != ",".join(COLUMNS):
        raise lines.wrong(f"the columns are not {','.join(COLUMNS)}; name them so, in this order")
    return label


def _requests(path: Path, spelling: str) -> Iterator[TraceRequest]:
    with open_lines(path) as lines:
        _read_label(lines, spelling)
        try:
            yield from checked(_csv_requests(lines) if spelling == ".csv" else _jsonl_requests(lines))
        except TraceError as error:
            raise lines.wrong(str(error)) from error
        if not lines.ended:
            raise lines.wrong("the last line has no end, so the file may have been cut off; copy it again, or end the line")


def _csv_requests(lines: Lines) -> Iterator[TraceRequest]:
    models: dict[str, str] = {}  # so that a held trace has each name once
    for arrival, model, inputs, outputs, prefix, duration in lines.rows(len(COLUMNS)):
        yield TraceRequest(
            lines.number_of(arrival, "arrival_seconds"),
            models.setdefault(model, model),
            lines.count(inputs, "input_tokens"),
            lines.count(outputs, "output_tokens"),
            prefix or None,
            lines.number_of(duration, "duration_seconds") if duration else None,
        )


def _jsonl_requests(lines: Lines) -> Iterator[TraceRequest]:
    for line in lines:
        try:
            yield _REQUEST.decode(line)
        except msgspec.DecodeError as error:
            raise lines.wrong(f"it is no request of a trace ({error}); mend or remove it") from error


def _write_csv(file: TextIO, label: TraceLabel, requests: Iterable[TraceRequest]) -> int:
    file.write(f"{_CSV_MARK}{VERSION} {_ENCODER.encode(label).decode()}\n{','.join(COLUMNS)}\n")
    writer = csv.writer(file, lineterminator="\n")
    written = 0
    for r in requests:
        duration = "" if r.duration_seconds is None else _number(r.duration_seconds)
        writer.writerow((_number(r.arrival_seconds), r.model, r.input_tokens, r.output_tokens, r.prefix or "", duration))
        written += 1
    return written


def _write_jsonl(file: TextIO, label: TraceLabel, requests: Iterable[TraceRequest]) -> int:
    file.write(_ENCODER.encode(_Header("sllm-mini trace", VERSION, label)).decode() + "\n")
    written = 0
    for request in requests:
        file.write(_ENCODER.encode(request).decode() + "\n")
        written += 1
    return written


def _number(value: float) -> str:
    """The shortest text that reads as the same number; 0.0 for -0.0, which is one that nobody means."""
    return repr(float(value) + 0.0)


@contextmanager
def _text(binary: BinaryIO, target: Path) -> Iterator[TextIO]:
    """UTF-8 text into an open file, through gzip (with no name and no time in it) where the name says so."""
    packed = gzip.GzipFile("", "wb", compresslevel=9, fileobj=binary, mtime=0) if target.suffix == ".gz" else None
    file = io.TextIOWrapper(cast(Any, packed or binary), encoding="utf-8", newline="\n")
    try:
        yield file
    finally:
        try:
            file.detach()  # what it still holds is written; `binary` stays open for its owner
        finally:
            if packed is not None:
                packed.close()


@contextmanager
def published_file(target: Path) -> Iterator[BinaryIO]:
    """A hidden file beside `target`, open for writing bytes, that takes its name when the body ends well and is removed otherwise:
    under `target` there is the whole file or what was there before. Raises WriteError for what the file system refuses."""
    hidden = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(hidden, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, target)
    except OSError as error:
        raise WriteError(f"it cannot be written: {error.strerror or error}", path=target) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(hidden)
