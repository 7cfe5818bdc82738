"""Back to safetensors: every tensor under its name, in files that any Hugging Face tool reads.

Streams with bounded memory, also tensors that are not contiguous. Tensors that are exactly the same view (ties) are
written once and named in the file's metadata, as safetensors' own `save_model` does. Taught in chapter 01.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from math import prod
from pathlib import Path

import numpy as np

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, SAFETENSORS_CODES
from sllm_mini.checkpoint.index import Index, TensorEntry, extent_nbytes
from sllm_mini.checkpoint.publish import keep_source, publish
from sllm_mini.checkpoint.quantised import flattened_metadata
from sllm_mini.checkpoint.safetensors_file import FileBytes, encode_header
from sllm_mini.checkpoint.source import HeldBytes, StorageReader
from sllm_mini.checkpoint.streams import FilePlan, write_files
from sllm_mini.checkpoint.verify import verify_checkpoint
from sllm_mini.errors import UnsupportedError
from sllm_mini.types import ProgressCallback

_CODES = {name: code for code, name in SAFETENSORS_CODES.items()}
_GATHER = 1 << 18  # elements gathered at a time from a tensor that is not contiguous


def export_safetensors(
    path: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_nbytes: int = 5_000_000_000,
    overwrite: bool = False,
    verify: bool = True,
    progress: ProgressCallback | None = None,
) -> list[Path]:
    """Writes a Hugging Face directory from a checkpoint and returns its weight files.

    With `verify`, every hash is checked first. Composites are written as their plain parts, torchao's so that
    transformers finds them. Raises what `verify_checkpoint` raises, UnsupportedError for a dtype that safetensors has
    no code for, CheckpointExistsError and WriteError. Safe from several threads on different targets.
    """
    if max_shard_nbytes <= 0:
        raise ValueError(f"shards of {max_shard_nbytes} bytes cannot hold anything; ask for a positive size")
    checkpoint = open_checkpoint(path)
    keep_source(checkpoint.path, dst)
    kept, aliases = _split_aliases(checkpoint.index)
    for tensor in kept:
        if tensor.dtype not in _CODES:
            raise UnsupportedError(f"tensor {tensor.name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    if verify:
        verify_checkpoint(checkpoint)
    shards = _shards(kept, max_shard_nbytes)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with ExitStack() as stack, publish(dst, overwrite=overwrite) as work:
        fds = []
        for number in range(len(checkpoint.index.partitions)):
            fds.append(checkpoint.open_partition(number))
            stack.callback(os.close, fds[-1])
        flattened = flattened_metadata(checkpoint.index.composites, [tensor.name for tensor in kept])
        plans = [_shard_plan(name, shard, aliases, flattened, checkpoint, fds) for name, shard in zip(names, shards, strict=True)]
        write_files(work, plans, progress=progress)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            total = sum(_nbytes(tensor) for tensor in kept)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for companion in checkpoint.index.companions:
            (work / companion.file).write_bytes(checkpoint.read_companion(companion.file))
    return [Path(dst) / name for name in names]


def _split_aliases(index: Index) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors to write, and for each exact alias of one of them the name it is written under."""
    first: dict[object, str] = {}
    kept: list[TensorEntry] = []
    aliases: dict[str, str] = {}
    for tensor in index.tensors:
        view = (tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride)
        if tensor.nbytes and view in first:
            aliases[tensor.name] = first[view]
        else:
            first[view] = tensor.name
            kept.append(tensor)
    return kept, aliases


def _nbytes(tensor: TensorEntry) -> int:
    return prod(tensor.shape) * ITEM_NBYTES[tensor.dtype]


def _shards(tensors: list[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + _nbytes(tensor) > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += _nbytes(tensor)
    return shards


def _shard_plan(
    name: str, shard: list[TensorEntry], aliases: dict[str, str], flattened: dict[str, str], checkpoint: Checkpoint, fds: list[int]
) -> FilePlan:  # fmt: skip
    held = {tensor.name for tensor in shard}
    metadata = {"format": "pt", **{alias: kept for alias, kept in aliases.items() if kept in held}, **flattened}
    header = encode_header({tensor.name: (_CODES[tensor.dtype], tensor.shape, _nbytes(tensor)) for tensor in shard}, metadata)
    starts: list[int] = [0]
    storages: list[StorageReader] = [HeldBytes(header)]
    position = len(header)
    for tensor in shard:
        starts.append(position)
        storages.append(_contiguous_bytes(tensor, checkpoint, fds[tensor.partition]))
        position += _nbytes(tensor)
    return FilePlan(name, position, starts, storages)


def _contiguous_bytes(tensor: TensorEntry, checkpoint: Checkpoint, fd: int) -> StorageReader:
    file = checkpoint.path / checkpoint.index.partitions[tensor.partition].file
    step, contiguous = 1, True
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        contiguous &= size <= 1 or stride == step
        step *= size
    if contiguous or tensor.nbytes == 0:
        return FileBytes(fd, file, tensor.offset, _nbytes(tensor))
    return _GatheredBytes(fd, tensor)


class _GatheredBytes:
    """The elements of a strided tensor in row-major order, computed for any byte range of it."""

    def __init__(self, fd: int, tensor: TensorEntry) -> None:
        self.nbytes = _nbytes(tensor)
        self._item = ITEM_NBYTES[tensor.dtype]
        self._shape, self._stride = tensor.shape, tensor.stride
        extent = extent_nbytes(tensor.shape, tensor.stride, self._item)
        with open(fd, "rb", closefd=False) as file:
            self._data = np.memmap(file, np.dtype((np.void, self._item)), "r", tensor.offset, (extent // self._item,))

    def read_into(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        for at in range(offset // self._item, -(-end // self._item), _GATHER):
            elements = np.arange(at, min(at + _GATHER, -(-end // self._item)))
            source = np.zeros_like(elements)
            rest = elements
            for size, stride in zip(reversed(self._shape), reversed(self._stride), strict=True):
                rest, coordinate = np.divmod(rest, size)
                source += coordinate * stride
            content = self._data[source].tobytes()
            low, high = max(offset, at * self._item), min(end, (at + len(elements)) * self._item)
            view[low - offset : high - offset] = content[low - at * self._item : high - at * self._item]
