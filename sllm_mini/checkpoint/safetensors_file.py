"""Reads and writes the header of a safetensors file, strictly, without reading tensor bytes.

The header is 8 little-endian bytes of length, then JSON `{name: {dtype, shape, data_offsets}}`; the tensors must cover
the rest of the file exactly, without holes or overlaps (the format's own rule). Taught in chapter 01.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, SAFETENSORS_CODES
from sllm_mini.checkpoint.index import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_NAME, MAX_TENSORS
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError

MAX_HEADER_NBYTES = 100_000_000
"""The limit of the safetensors library itself."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor of a file: contiguous bytes `[offset, offset + nbytes)`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def open_plain(path: str | os.PathLike[str]) -> int:
    """A read-only descriptor of a plain file (the caller closes it). Raises CheckpointError for anything else, at once:
    a pipe does not make it wait."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        plain = stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise CheckpointError(f"it cannot be opened: {error.strerror}", path=path) from error
    if not plain:
        os.close(fd)
        raise CheckpointError("it is not a plain file", path=path)
    return fd


def read_header(path: str | os.PathLike[str], fd: int | None = None) -> list[SafetensorsEntry]:
    """The tensors of a safetensors file in the order of their bytes; `fd` and errors as for `read_header_and_metadata`."""
    return read_header_and_metadata(path, fd)[0]


def read_header_and_metadata(path: str | os.PathLike[str], fd: int | None = None) -> tuple[list[SafetensorsEntry], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and the texts that the file carries beside them,
    from `fd` where the caller has it open already.

    Raises CheckpointError if it cannot be read and FormatError, naming the file and the tensor, if the header breaks
    a rule of the format."""
    opened = open_plain(path) if fd is None else fd
    try:
        size = os.fstat(opened).st_size
        prefix = os.pread(opened, 8, 0)
        if len(prefix) < 8:
            raise FormatError(f"it has {size} bytes and cannot be a safetensors file", path=path)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_NBYTES or 8 + length > size:
            raise FormatError(f"its header claims {length:,} bytes; the file has {size:,} and headers at most {MAX_HEADER_NBYTES:,}", path=path, offset=0)
        raw = os.pread(opened, length, 8)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", path=path) from error
    finally:
        if fd is None:
            os.close(opened)
    if len(raw) < length:
        raise FormatError("its header is truncated", path=path, offset=8 + len(raw))
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is not valid JSON ({' '.join(str(error).split())[:300]})", path=path, offset=8) from error
    if not isinstance(fields, dict):
        raise FormatError("its header is not a JSON object", path=path, offset=8)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its __metadata__ is not a JSON object of texts", path=path, offset=8)
    if len(fields) > MAX_TENSORS:
        raise FormatError(f"it holds {len(fields):,} tensors; a checkpoint holds at most {MAX_TENSORS:,}", path=path, offset=8)
    entries = [_entry(name, value, 8 + length, path) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = 8 + length
    for entry in entries:
        if entry.offset != position:
            raise FormatError(f"tensor {entry.name!r} leaves a hole or overlaps its neighbour", path=path, offset=entry.offset)
        position += entry.nbytes
    if position != size:
        raise FormatError(f"its tensors end at byte {position:,} but the file has {size:,}", path=path, offset=min(position, size))
    return entries, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _entry(name: str, value: object, data_start: int, path: str | os.PathLike[str]) -> SafetensorsEntry:
    if not 1 <= len(name) <= MAX_NAME or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FormatError(f"tensor {name[:200]!r} has a name that is empty, longer than {MAX_NAME:,} characters, or not text", path=path, offset=8)
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise FormatError(f"tensor {name[:200]!r} is not described correctly: {' '.join(str(error).split())[:300]}", path=path, offset=8) from error
    dtype = SAFETENSORS_CODES.get(entry.dtype)
    if dtype is None:
        raise FormatError(f"tensor {name[:200]!r} has dtype {entry.dtype[:40]!r}, which is not supported", path=path, offset=8)
    start, end = entry.data_offsets
    if len(entry.shape) > MAX_DIMENSIONS or prod(entry.shape) > MAX_ELEMENTS:
        raise FormatError(f"tensor {name[:200]!r} has more than {MAX_DIMENSIONS} dimensions or {MAX_ELEMENTS:,} elements", path=path, offset=8)
    nbytes = prod(entry.shape) * ITEM_NBYTES[dtype]
    if end - start != nbytes:
        raise FormatError(f"tensor {name[:200]!r} spans {end - start:,} bytes but its shape and dtype need {nbytes:,}", path=path, offset=data_start + start)
    return SafetensorsEntry(name, dtype, entry.shape, data_start + start, nbytes)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and header for tensors laid out one after another: name → (dtype code, shape, bytes).

    Padded with spaces to a multiple of 8, as the format's own writer does.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (code, shape, nbytes) in tensors.items():
        fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


class FileBytes:
    """Bytes `[offset, offset + nbytes)` of a file as a storage to be written (see `StorageReader`).

    Safe from several threads. The descriptor belongs to the caller.
    """

    def __init__(self, fd: int, path: Path, offset: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._fd, self._path, self._offset = fd, path, offset

    def read_into(self, offset: int, view: memoryview) -> None:
        at = self._offset + offset
        while len(view):
            try:
                count = os.preadv(self._fd, [view], at)
            except OSError as error:
                raise CheckpointError(f"it cannot be read: {error.strerror}", path=self._path, offset=at) from error
            if count == 0:
                raise IntegrityError("it ended while it was being read", path=self._path, offset=at)
            view, at = view[count:], at + count
