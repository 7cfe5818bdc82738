"""The index of a checkpoint, format v1: what `index.json` says, and the rules it must obey.

The file is one canonical JSON object `{"magic", "version", "digest", "body"}`; `digest` is XXH3-64 of the body's exact
bytes and the whole file must equal its own re-encoding, so no bit of it can flip unseen and no key can stand twice.
Every rule that needs only the index is checked here, before any size in it is trusted. Taught in chapter 01.
Format rules rebuilt from ServerlessLLM (OSDI'24), whose index has no magic, version or checksum.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import msgspec

from sllm_mini.checkpoint.dtypes import ITEM_NBYTES
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, LEAF_NBYTES, bytes_digest
from sllm_mini.device.kernels import BLOCK_NBYTES
from sllm_mini.errors import FormatError

MAGIC = "sllm-mini-checkpoint"
VERSION = 1
INDEX_FILE = "index.json"
TENSOR_ALIGNMENT = 256
"""Tensors that own their storage start on a multiple of this, as a GPU allocator would place them."""
MAX_INDEX_NBYTES = 256 << 20
MAX_TENSORS = 250_000
MAX_NAME = 1024
MAX_DIMENSIONS = 64
"""torch's own operators take no more."""
MAX_ELEMENTS = 2**53 - 1
"""Of one tensor, expanded ones (stride 0) included: below what torch can count."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
_Small = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
_Scalar = bool | int | float | str | None
_COMPANION_NAME = re.compile(r"(?!index\.json$|data-\d{5,}\.bin$)[A-Za-z0-9_][A-Za-z0-9_.+\- ]{0,254}")


class PartitionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One data file. `nbytes` is its decoded size, to which tensor offsets refer; `file_nbytes` its size on disk."""

    file: _Name
    nbytes: _Size
    file_nbytes: _Size
    codec: str
    device: _Small | None
    digests: str
    """16 hexadecimal characters per chunk of the file, in order."""


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One tensor: a strided view of bytes `[offset, offset + nbytes)` of a partition; strides count elements."""

    name: _Name
    dtype: _Name
    shape: tuple[_Size, ...]
    stride: tuple[_Size, ...]
    partition: _Small
    offset: _Size
    nbytes: _Size
    storage: _Small
    """Tensors with one storage id may overlap (ties, views); others may not."""
    layer: _Small


class CompositeEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A tensor made of plain parts under a class tag, such as quantised integers with their scales."""

    name: _Name
    kind: _Name
    parts: dict[str, _Name]
    meta: dict[str, _Scalar | list[_Scalar]]


class CompanionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One of the model's own small files: configuration, tokenizer, generation settings."""

    file: _Name
    nbytes: _Size
    digest: _Digest


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The body of `index.json`. Tensors stand in execution order, grouped by `layer` (an index into `layers`)."""

    total_nbytes: _Size
    block_nbytes: _Size
    chunk_nbytes: _Size
    leaf_nbytes: _Size
    partitions: list[PartitionEntry]
    layers: Annotated[list[_Name], msgspec.Meta(max_length=MAX_TENSORS)]
    tensors: Annotated[list[TensorEntry], msgspec.Meta(max_length=MAX_TENSORS)]
    composites: Annotated[list[CompositeEntry], msgspec.Meta(max_length=MAX_TENSORS)]
    companions: Annotated[list[CompanionEntry], msgspec.Meta(max_length=1024)]


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    magic: str
    version: int
    digest: str
    body: msgspec.Raw


def partition_file(number: int) -> str:
    """The name of the data file of partition `number`."""
    return f"data-{number:05d}.bin"


def extent_nbytes(shape: Sequence[int], stride: Sequence[int], item_nbytes: int) -> int:
    """Bytes from a strided tensor's first element to the end of its last; 0 if it has no elements."""
    if 0 in shape:
        return 0
    last = 0
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
    return (last + 1) * item_nbytes


def encode_index(index: Index) -> bytes:
    """The bytes of `index.json`."""
    body = msgspec.json.encode(index)
    return msgspec.json.encode(_Envelope(MAGIC, VERSION, bytes_digest(body), msgspec.Raw(body)))


_read_envelope = msgspec.json.Decoder(_Envelope).decode
_read_index = msgspec.json.Decoder(Index).decode
"""Made before there are threads: of two that make a first decoder of one type at once, msgspec gives one a part of it."""


def decode_index(raw: bytes, path: str | os.PathLike[str]) -> Index:
    """Parses and checks the bytes of an index. Raises FormatError, naming `path`, at the first rule it breaks."""
    if len(raw) > MAX_INDEX_NBYTES:
        raise FormatError(f"the index has {len(raw):,} bytes; at most {MAX_INDEX_NBYTES:,} are read", path=path)
    try:
        envelope = _read_envelope(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"this is not an index of a checkpoint ({_shortened(error)})", path=path) from error
    if envelope.magic != MAGIC:
        raise FormatError(f"the index says it is {envelope.magic[:40]!r}, not {MAGIC!r}", path=path)
    if envelope.version != VERSION:
        raise FormatError(f"the index has version {envelope.version}; this release reads version {VERSION}", path=path)
    body = bytes(envelope.body)
    if envelope.digest != bytes_digest(body) or msgspec.json.encode(envelope) != raw:
        raise FormatError("the index does not match its own digest; it was changed or damaged after it was written", path=path)
    try:
        index = _read_index(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the index is not valid: {_shortened(error)}", path=path) from error
    if msgspec.json.encode(index) != body:
        raise FormatError("the index is not in canonical form (a key may stand twice)", path=path)
    problem = _first_problem(index)
    if problem is not None:
        raise FormatError(f"the index is not valid: {problem}", path=path)
    return index


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300]  # it may quote a key of the file, however long


def companion_name_problem(name: str) -> str | None:
    """Why a file name may not be a companion's, or None if it may."""
    if _COMPANION_NAME.fullmatch(name) is None:
        return f"{name!r} is not a plain file name that a checkpoint may carry"
    return None


def _first_problem(index: Index) -> str | None:
    return _sizes_problem(index) or _partitions_problem(index) or _tensors_problem(index) or _extras_problem(index)


def _sizes_problem(index: Index) -> str | None:
    if (index.block_nbytes, index.leaf_nbytes, index.chunk_nbytes) != (BLOCK_NBYTES, LEAF_NBYTES, CHUNK_NBYTES):
        return f"version {VERSION} has blocks of {BLOCK_NBYTES}, leaves of {LEAF_NBYTES} and chunks of {CHUNK_NBYTES} bytes"
    total = sum(partition.nbytes for partition in index.partitions)
    if index.total_nbytes != total:
        return f"total_nbytes is {index.total_nbytes:,} but the partitions add up to {total:,}"
    return None


def _partitions_problem(index: Index) -> str | None:
    for number, partition in enumerate(index.partitions):
        if partition.file != partition_file(number):
            return f"partition {number} is named {partition.file[:60]!r}, not {partition_file(number)!r}"
        if partition.codec != "none":
            return f"{partition.file} has codec {partition.codec[:40]!r}; this release knows only 'none'"
        if partition.nbytes % BLOCK_NBYTES or partition.file_nbytes != partition.nbytes:
            return f"{partition.file} has {partition.nbytes:,} bytes ({partition.file_nbytes:,} on disk), not whole blocks of {BLOCK_NBYTES:,}"
        chunks = -(-partition.file_nbytes // CHUNK_NBYTES)
        if len(partition.digests) != chunks * DIGEST_HEX or not set(partition.digests) <= set("0123456789abcdef"):
            return f"{partition.file} needs {chunks:,} digests of {DIGEST_HEX} hexadecimal characters each"
    return None


def _tensors_problem(index: Index) -> str | None:
    if len(set(index.layers)) < len(index.layers):
        return "two layers have the same name"
    names: set[str] = set()
    hulls: dict[int, tuple[int, int, int]] = {}  # storage → (partition, start, end)
    layer, layers = 0, len(index.layers)
    limits = [partition.nbytes for partition in index.partitions]
    for tensor in index.tensors:  # a hundred thousand of them may be read before the first byte of a model is
        name, shape, place, start, nbytes = tensor.name, tensor.shape, tensor.partition, tensor.offset, tensor.nbytes
        if name in names:
            return f"two tensors are named {name!r}"
        names.add(name)
        item = ITEM_NBYTES.get(tensor.dtype)
        if item is None:
            return f"tensor {name!r} has the unknown dtype {tensor.dtype[:40]!r}"
        if len(shape) != len(tensor.stride):
            return f"tensor {name!r} has {len(shape)} sizes but {len(tensor.stride)} strides"
        if len(shape) > MAX_DIMENSIONS or prod(shape) > MAX_ELEMENTS:
            return f"tensor {name!r} has more than {MAX_DIMENSIONS} dimensions or {MAX_ELEMENTS:,} elements"
        if nbytes != extent_nbytes(shape, tensor.stride, item):
            return f"tensor {name!r} says {nbytes:,} bytes, which its shape, stride and dtype do not span"
        if place >= len(limits):
            return f"tensor {name!r} lies in partition {place}, which does not exist"
        end = start + nbytes
        if start % item or end > limits[place]:
            return f"tensor {name!r} at byte {start:,} is misaligned or ends outside its partition"
        if not layer <= tensor.layer < layers:
            return f"tensor {name!r} breaks the execution order with layer {tensor.layer}"
        layer = tensor.layer
        hull = hulls.get(tensor.storage)
        if hull is None:
            hulls[tensor.storage] = (place, start, end)
        elif hull[0] != place:
            return f"tensor {name!r} shares a storage with a tensor of another partition"
        else:
            hulls[tensor.storage] = (place, min(hull[1], start), max(hull[2], end))
    last_place, last_end = -1, 0
    for place, low, high in sorted(hull for hull in hulls.values() if hull[1] < hull[2]):
        if place == last_place and low < last_end:
            return f"two storages of {partition_file(place)} overlap at byte {low:,}"
        last_place, last_end = place, high
    return None


def _extras_problem(index: Index) -> str | None:
    names = {tensor.name for tensor in index.tensors}
    taken = set(names)
    used: set[str] = set()
    for composite in index.composites:
        if composite.name in taken:
            return f"two tensors are named {composite.name!r}"
        taken.add(composite.name)
        missing = [part for part in composite.parts.values() if part not in names]
        if missing:
            return f"composite {composite.name!r} needs the tensor {missing[0]!r}, which does not exist"
        own = set(composite.parts.values())
        if not own or len(own) < len(composite.parts) or own & used:
            return f"composite {composite.name!r} has no parts, or one that is used twice"
        used |= own
    files: set[str] = set()
    for companion in index.companions:
        problem = companion_name_problem(companion.file)
        if problem or companion.file in files:
            return problem or f"two companion files are named {companion.file!r}"
        files.add(companion.file)
    return None


def is_json_meta(value: Any) -> bool:
    """True for what a composite may carry besides its parts: a scalar or a list of scalars."""
    scalars = (bool, int, float, str, type(None))
    return isinstance(value, scalars) or (isinstance(value, list) and all(isinstance(item, scalars) for item in value))
