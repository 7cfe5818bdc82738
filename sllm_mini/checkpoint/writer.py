"""Writes a checkpoint: plans the layout, streams the storages into partitions, records what was written.

Every byte is copied once, hashed, written once and never read again. Memory grows by threads × 8 MiB, whatever the
model's size. Taught in chapter 01.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from sllm_mini.checkpoint.dtypes import ITEM_NBYTES
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, LEAF_NBYTES, bytes_digest
from sllm_mini.checkpoint.index import (
    BLOCK_NBYTES,
    INDEX_FILE,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_TENSORS,
    CompanionEntry,
    Index,
    PartitionEntry,
    TensorEntry,
    companion_name_problem,
    decode_index,
    encode_index,
    extent_nbytes,
    partition_file,
)
from sllm_mini.checkpoint.layout import Layout, StorageSpec, execution_order, plan_layout
from sllm_mini.checkpoint.publish import publish
from sllm_mini.checkpoint.source import Source, StorageReader
from sllm_mini.checkpoint.streams import FilePlan, write_files
from sllm_mini.errors import CheckpointError, FormatError, UnsupportedError
from sllm_mini.types import ProgressCallback


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How a checkpoint is written.

    `partition_nbytes`: no partition holds more, unless one tensor does. `device_map`: prefix of tensor names → index
    of the device whose partition they go to (the longest matching prefix counts); empty for no preference.
    `threads`: writers at work, None for two per processor.
    """

    overwrite: bool = False
    partition_nbytes: int = 8 << 30
    device_map: Mapping[str, int] = field(default_factory=dict)
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.partition_nbytes <= 0:
            raise ValueError(f"partition_nbytes is {self.partition_nbytes}; it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        if any(device < 0 for device in self.device_map.values()):
            raise ValueError("device_map has a negative device; devices count from 0")


def write_checkpoint(source: Source, path: str | os.PathLike[str], options: WriteOptions, progress: ProgressCallback | None) -> None:
    """Writes `source` to `path`, all or nothing (see `publish`). Raises WriteError, CheckpointExistsError, or the
    error of the source."""
    order, layout, tensors, layers = _plan(source, options)
    with publish(path, overwrite=options.overwrite) as work:
        companions = [_write_companion(work, name, content) for name, content in sorted(source.companions.items())]
        plans = _file_plans(source, order, layout)
        digests = write_files(work, plans, threads=options.threads, progress=progress, digest=True)
        partitions = [
            PartitionEntry(plan.name, plan.nbytes, plan.nbytes, "none", device, "".join(found))
            for plan, device, found in zip(plans, layout.partition_devices, digests, strict=True)
        ]
        index = Index(
            total_nbytes=sum(layout.partition_nbytes),
            block_nbytes=BLOCK_NBYTES,
            chunk_nbytes=CHUNK_NBYTES,
            leaf_nbytes=LEAF_NBYTES,
            partitions=partitions,
            layers=layers,
            tensors=tensors,
            composites=list(source.composites),
            companions=companions,
        )
        if source.confirm is not None:
            source.confirm()
        raw = encode_index(index)
        decode_index(raw, work / INDEX_FILE)  # what we write is held to the rules that a reader applies
        (work / INDEX_FILE).write_bytes(raw)


def _plan(source: Source, options: WriteOptions) -> tuple[list[int], Layout, list[TensorEntry], list[str]]:
    """The storages in execution order, where they go, and the index's tensors and layers."""
    if len(source.tensors) > MAX_TENSORS:
        raise UnsupportedError(f"there are {len(source.tensors):,} tensors; a checkpoint holds at most {MAX_TENSORS:,}")
    by_name = {tensor.name: tensor for tensor in source.tensors}
    groups = execution_order(by_name)
    order: list[int] = []
    device_of: dict[int, int | None] = {}
    for _, names in groups:
        for name in names:
            storage = by_name[name].storage
            if storage not in device_of:
                order.append(storage)
                device_of[storage] = _device_for(name, options.device_map)
    specs = [StorageSpec(source.storages[storage].nbytes, device_of[storage]) for storage in order]
    layout = plan_layout(specs, partition_nbytes=options.partition_nbytes)
    placed = dict(zip(order, layout.placements, strict=True))
    tensors = []
    for layer, (_, names) in enumerate(groups):
        for name in names:
            tensor = by_name[name]
            item = ITEM_NBYTES.get(tensor.dtype)
            if item is None:
                raise UnsupportedError(f"tensor {name!r} has dtype {tensor.dtype}, which the format does not know")
            if len(tensor.shape) > MAX_DIMENSIONS or prod(tensor.shape) > MAX_ELEMENTS:
                raise UnsupportedError(f"tensor {name!r} has more than {MAX_DIMENSIONS} dimensions or {MAX_ELEMENTS:,} elements")
            place = placed[tensor.storage]
            nbytes = extent_nbytes(tensor.shape, tensor.stride, item)
            offset = place.offset + tensor.offset
            tensors.append(TensorEntry(name, tensor.dtype, tensor.shape, tensor.stride, place.partition, offset, nbytes, tensor.storage, layer))
    return order, layout, tensors, [layer for layer, _ in groups]


def _device_for(name: str, device_map: Mapping[str, int]) -> int | None:
    prefixes = [prefix for prefix in device_map if name == prefix or name.startswith(f"{prefix}.") or prefix == ""]
    return device_map[max(prefixes, key=len)] if prefixes else None


def _write_companion(work: Path, name: str, content: bytes | Path) -> CompanionEntry:
    problem = companion_name_problem(name)
    if problem:
        raise FormatError(problem)
    if isinstance(content, Path):
        origin = content
        try:
            content = origin.read_bytes()
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error.strerror}", path=origin) from error
    (work / name).write_bytes(content)
    return CompanionEntry(name, len(content), bytes_digest(content))


def _file_plans(source: Source, order: list[int], layout: Layout) -> list[FilePlan]:
    """What each partition file holds, in the order of its bytes."""
    starts: list[list[int]] = [[] for _ in layout.partition_nbytes]
    storages: list[list[StorageReader]] = [[] for _ in layout.partition_nbytes]
    for storage, place in zip(order, layout.placements, strict=True):
        starts[place.partition].append(place.offset)
        storages[place.partition].append(source.storages[storage])
    return [
        FilePlan(partition_file(number), nbytes, starts[number], storages[number])
        for number, nbytes in enumerate(layout.partition_nbytes)
    ]
