"""The ladder: six loaders, each the one before plus one idea, up to the pipeline.

The ablation of ServerlessLLM (OSDI'24) made runnable: what each idea is worth on this machine is the ratio of two
neighbours. No rung checks hashes. The top rung is the pipeline of `load_tensors`; the others are kept as plain as their idea allows and
are for measuring, not for use. Taught in chapter 02.

Costs on a CPU: the model's own memory. On a GPU also one chunk of host memory per thread, and by tensor the largest
tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.index import BLOCK_NBYTES
from sllm_mini.device.base import Buffer, Device, HostBuffer
from sllm_mini.device.cpu import HostMemory
from sllm_mini.loading.flow import LoadOptions
from sllm_mini.loading.load import start_load
from sllm_mini.loading.plan import Chunk, plan_load
from sllm_mini.loading.reader import PartitionReader
from sllm_mini.loading.restore import restore_tensors

if TYPE_CHECKING:
    import torch

READ_NBYTES = LoadOptions().chunk_nbytes
THREADS = LoadOptions().threads


@dataclass(frozen=True, slots=True)
class Rung:
    """One loader of the ladder. `idea` is what it adds to the rung below, in words; the flags say the same to the code.
    Safe from several threads."""

    name: str
    idea: str
    bulk: bool = False
    direct: bool = False
    threads: int = 1
    pinned: bool = False
    pipelined: bool = False

    def load(self, checkpoint: Checkpoint, device: Device) -> dict[str, torch.Tensor]:
        """The plain tensors of a checkpoint on `device`. Raises LoadError for what cannot be read, OutOfMemoryError for
        what does not fit."""
        if self.pipelined:
            with start_load(checkpoint, device, verify=False, options=LoadOptions(READ_NBYTES, self.threads)) as handle:
                handle.wait()
                return dict(handle.tensors)
        if self.bulk:
            return _load_chunks(self, checkpoint, device)
        return _load_each(checkpoint, device)


_BY_TENSOR = Rung("by tensor", "one read and one allocation for each tensor, through the page cache")
_BULK = replace(_BY_TENSOR, name="bulk", idea="one allocation for all, filled in chunks of 16 MiB; tensors are views of it", bulk=True)
_DIRECT = replace(_BULK, name="direct", idea="reads go around the page cache, so the processor copies nothing", direct=True)
_THREADS = replace(_DIRECT, name="threads", idea=f"{THREADS} threads keep {THREADS} reads in flight", threads=THREADS)
_PINNED = replace(_THREADS, name="pinned", idea="memory is ready before it is read into: huge pages on a CPU, pinned on the way to a GPU", pinned=True)
_PIPELINE = replace(_PINNED, name="pipeline", idea="making memory ready, reading and copying on overlap", pipelined=True)

LADDER: tuple[Rung, ...] = (_BY_TENSOR, _BULK, _DIRECT, _THREADS, _PINNED, _PIPELINE)
"""From the lowest rung to the top."""


def _load_each(checkpoint: Checkpoint, device: Device) -> dict[str, torch.Tensor]:
    """As a loader that knows of tensors only: storages that several tensors share are read for each of them."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        readers = _open_readers(checkpoint, stack, direct=False)
        for entry in checkpoint.index.tensors:
            memory = torch.empty(max(entry.nbytes, 16), dtype=torch.uint8)
            if entry.nbytes:
                view = memoryview((ctypes.c_ubyte * entry.nbytes).from_address(memory.data_ptr())).cast("B")
                readers[entry.partition].read(view, entry.offset, cached=False)
            tensors |= restore_tensors(memory if device.is_host else memory.to(device.name), [(entry, 0)])
    return tensors


def _load_chunks(rung: Rung, checkpoint: Checkpoint, device: Device) -> dict[str, torch.Tensor]:
    plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=READ_NBYTES, granule=BLOCK_NBYTES)
    target = HostMemory(plan.nbytes, huge_pages=rung.pinned, populate=rung.pinned) if device.is_host else device.allocate(plan.nbytes)
    pending = iter(plan.chunks)  # the threads take from it in turn
    with ExitStack() as stack, ThreadPoolExecutor(rung.threads) as threads:
        readers = _open_readers(checkpoint, stack, direct=rung.direct)
        if isinstance(target, HostMemory):
            work = [threads.submit(_read_in_place, target, pending, readers) for _ in range(rung.threads)]
        else:
            work = [threads.submit(_read_and_copy, device, target, pending, readers, rung.pinned) for _ in range(rung.threads)]
        for done in work:
            done.result()
    return restore_tensors(target.tensor(), plan.places(0))


def _read_in_place(target: HostMemory, pending: Iterator[Chunk], readers: list[PartitionReader]) -> None:
    for chunk in pending:
        view = target.view[chunk.device_offset : chunk.device_offset + chunk.nbytes]
        readers[chunk.partition].read(view, chunk.file_offset, cached=False)


def _read_and_copy(device: Device, target: Buffer, pending: Iterator[Chunk], readers: list[PartitionReader], pinned: bool) -> None:
    staging: HostBuffer = device.allocate_host(READ_NBYTES) if pinned else HostMemory(READ_NBYTES, huge_pages=False)
    stream = device.stream()
    try:
        for chunk in pending:
            readers[chunk.partition].read(staging.view[: chunk.nbytes], chunk.file_offset, cached=False)
            stream.copy_from_host(target, chunk.device_offset, staging, 0, chunk.nbytes)
            stream.synchronize()
    finally:
        stream.close()
        staging.close()


def _open_readers(checkpoint: Checkpoint, stack: ExitStack, *, direct: bool) -> list[PartitionReader]:
    readers = []
    for number in range(len(checkpoint.index.partitions)):
        readers.append(PartitionReader(checkpoint, number, direct=direct))
        stack.callback(readers[-1].close)
    return readers
