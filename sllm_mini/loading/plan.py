"""What to read and where to put it: a load cut into chunks, before a byte moves. Pure.

A whole model becomes one run per partition; a subset becomes the runs of blocks its tensors touch. Runs lie one after
another in one allocation per device, so a tensor's address is known before its bytes arrive. Taught in chapter 02.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from sllm_mini.checkpoint.index import Index, TensorEntry
from sllm_mini.checkpoint.layout import align_up


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of one partition and where they start in a device's allocation."""

    partition: int
    file_offset: int
    nbytes: int
    device: int
    device_offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of reading: part of a run. `layer` is the first layer that needs it."""

    number: int
    partition: int
    file_offset: int
    nbytes: int
    device: int
    device_offset: int
    layer: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Chunks in execution order, the size of each device's allocation, and the tensors that go to each device."""

    device_nbytes: tuple[int, ...]
    runs: tuple[Run, ...]
    chunks: tuple[Chunk, ...]
    tensors: tuple[tuple[TensorEntry, int], ...]
    """(tensor, device) in execution order."""
    _by_offset: tuple[tuple[Chunk, ...], ...] = field(repr=False)
    """The chunks of each device in the order of their places there."""

    @property
    def nbytes(self) -> int:
        return sum(self.device_nbytes)

    def after(self, done_nbytes: int) -> LoadPlan:
        """What is left to do where the first `done_nbytes` of the one device's allocation are in place already; a chunk that
        is there in part is moved again."""
        return replace(self, chunks=tuple(chunk for chunk in self.chunks if chunk.device_offset + chunk.nbytes > done_nbytes))

    def place(self, tensor: TensorEntry, device: int) -> int:
        """The offset of a tensor's first byte in its device's allocation (0 for a tensor without bytes)."""
        if tensor.nbytes == 0:
            return 0
        run = self.runs[self._run(tensor, device)]
        return run.device_offset + tensor.offset - run.file_offset

    def places(self, device: int) -> Iterator[tuple[TensorEntry, int]]:
        """Each tensor of a device, in execution order, and `place` of it."""
        runs = [run for run in self.runs if run.device == device]
        if len({run.partition for run in runs}) < len(runs):  # a subset: several runs of one partition
            yield from ((tensor, self.place(tensor, device)) for tensor, at in self.tensors if at == device)
            return
        shifts = {run.partition: run.device_offset - run.file_offset for run in runs}
        for tensor, at in self.tensors:
            if at == device:
                yield tensor, tensor.offset + shifts[tensor.partition] if tensor.nbytes else 0

    def chunks_of(self, tensor: TensorEntry, device: int) -> list[int]:
        """The numbers of the chunks that hold a tensor's bytes, in the order of those bytes."""
        if tensor.nbytes == 0:
            return []
        start = self.place(tensor, device)
        own = self._by_offset[device]
        low = bisect_right(own, start, key=lambda chunk: chunk.device_offset) - 1
        high = bisect_left(own, start + tensor.nbytes, key=lambda chunk: chunk.device_offset)
        return [chunk.number for chunk in own[low:high]]

    def _run(self, tensor: TensorEntry, device: int) -> int:
        return bisect_right(self.runs, (device, tensor.partition, tensor.offset), key=lambda run: (run.device, run.partition, run.file_offset)) - 1


def plan_load(
    index: Index, device_of: Callable[[str], int], *, devices: int, names: Collection[str] | None, chunk_nbytes: int, granule: int
) -> LoadPlan:
    """Plans the load of `names` (None: all) of a checkpoint to the devices 0 to `devices` - 1.

    `device_of` says where the tensor of a name goes. A subset is read in whole granules of `granule` bytes of each file (the hash chunk when hashes are to be checked,
    else a block). A storage that tensors on two devices share is read to both.
    """
    wanted = None if names is None else set(names)
    tensors = tuple((tensor, device_of(tensor.name)) for tensor in index.tensors if wanted is None or tensor.name in wanted)
    runs: list[Run] = []
    sizes: list[int] = []
    for device in range(devices):
        own = [tensor for tensor, target in tensors if target == device]
        offset = 0
        for partition, entry in enumerate(index.partitions):
            inside = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in own if tensor.partition == partition)
            whole = wanted is None and len(inside) == sum(tensor.partition == partition for tensor, _ in tensors)
            pieces = [(0, entry.nbytes)] if whole and entry.nbytes else _granules(inside, entry.nbytes, granule)
            for start, end in pieces:
                runs.append(Run(partition, start, end - start, device, offset))
                offset += end - start
        sizes.append(offset)
    chunks = _chunks(runs, tensors, chunk_nbytes)
    by_offset = (sorted((chunk for chunk in chunks if chunk.device == device), key=lambda chunk: chunk.device_offset) for device in range(devices))
    return LoadPlan(tuple(sizes), tuple(runs), chunks, tensors, tuple(tuple(own) for own in by_offset))


def _granules(inside: list[tuple[int, int]], limit: int, granule: int) -> list[tuple[int, int]]:
    """The union of byte ranges, each widened to whole granules of a file of `limit` bytes."""
    pieces: list[tuple[int, int]] = []
    for start, end in inside:
        if start == end:
            continue
        low, high = start // granule * granule, min(align_up(end, granule), limit)
        if pieces and low <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(pieces[-1][1], high))
        else:
            pieces.append((low, high))
    return pieces


def _chunks(runs: list[Run], tensors: tuple[tuple[TensorEntry, int], ...], chunk_nbytes: int) -> tuple[Chunk, ...]:
    """Cuts runs at multiples of `chunk_nbytes` of the file and puts the pieces in execution order."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (device, partition) → (end, layer) by end
    for tensor, device in tensors:
        if tensor.nbytes:
            spans.setdefault((device, tensor.partition), []).append((tensor.offset + tensor.nbytes, tensor.layer))
    for ends in spans.values():
        ends.sort()
    pieces: list[tuple[int, Run, int, int]] = []
    for run in runs:
        ends = spans.get((run.device, run.partition), [])
        at = run.file_offset
        while at < run.file_offset + run.nbytes:
            end = min(align_up(at + 1, chunk_nbytes), run.file_offset + run.nbytes)
            first = bisect_right(ends, at, key=lambda item: item[0])
            pieces.append((ends[min(first, len(ends) - 1)][1] if ends else 0, run, at, end))
            at = end
    pieces.sort(key=lambda piece: (piece[0], piece[1].partition, piece[2], piece[1].device))
    return tuple(
        Chunk(number, run.partition, at, end - at, run.device, run.device_offset + at - run.file_offset, layer)
        for number, (layer, run, at, end) in enumerate(pieces)
    )
