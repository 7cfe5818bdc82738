"""Chunks of a CPU target, straight into place: each byte is moved once.

What the page cache holds is mapped; the rest is read into pages that one thread backs with memory ahead of the reads, so
that a read in flight never waits for a page fault and the system's memory is asked for early. Where whole files are
cached there is no disk to keep busy, so that thread and most readers are not started. Costs no memory beside the
model's own. Taught in chapter 02.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

from sllm_mini.device.cpu import HostMemory, cpu_count
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.plan import Chunk
from sllm_mini.loading.reader import Reader

_CLAIMED, _BACKED, _CACHED, _MAPPED = 1, 2, 3, 4


class InPlace:
    """Puts chunks into one contiguous host allocation that nothing has been put into yet. Safe from several threads."""

    def __init__(self, flow: Flow, memory: HostMemory, chunks: Iterable[Chunk], readers: list[Reader]) -> None:
        self._flow, self._memory, self._readers = flow, memory, readers
        self._chunks = list(chunks)
        self._states: dict[int, int] = {}
        self.free_slots = len(self._chunks)
        self.readers = flow.options.threads
        if flow.options.use_cached and flow.options.map_cached:
            self._map_cached_files()
            if len(self._states) == len(self._chunks):
                self.readers = min(self.readers, cpu_count())

    def threads(self) -> list[tuple[str, Callable[[], None]]]:
        """What it wants done beside the reads: (name, work)."""
        return [("pages", self._back_ahead)] if len(self._states) < len(self._chunks) else []

    def deliver(self, chunk: Chunk) -> None:
        """Reads or maps one chunk into place. Raises LoadError, IntegrityError, OutOfMemoryError or DeviceError."""
        flow, reader = self._flow, self._readers[chunk.partition]
        view = self._memory.view[chunk.device_offset : chunk.device_offset + chunk.nbytes]
        state = self._prepare(chunk)
        if state == _CLAIMED:
            return  # the load has failed elsewhere, and nobody makes pages for this chunk any more
        cached = state == _CACHED
        mapped = state == _MAPPED or (cached and flow.options.map_cached and _mappable(chunk.device_offset, chunk.file_offset, chunk.nbytes))
        if mapped:
            with flow.span("map", chunk):
                if state == _MAPPED:
                    self._memory.populate_mapped(chunk.device_offset, chunk.nbytes)
                else:
                    self._memory.map_file(chunk.device_offset, reader.fd, chunk.file_offset, chunk.nbytes)
            direct = False
        else:
            with flow.span("read", chunk):
                direct = reader.read(view, chunk.file_offset, cached=cached)
        flow.check(chunk, view, reader.path)
        flow.count(chunk, direct=direct, mapped=mapped)
        flow.arrived(chunk)

    def finish(self) -> None:
        """All chunks have been delivered."""

    def close(self) -> None:
        """It owns nothing."""

    def _map_cached_files(self) -> None:
        """Maps each file that the page cache holds whole, in one call; its pages follow chunk by chunk, side by side."""
        for partition in {chunk.partition for chunk in self._chunks}:
            own = [chunk for chunk in self._chunks if chunk.partition == partition]
            first, nbytes = min(own, key=lambda chunk: chunk.file_offset), sum(chunk.nbytes for chunk in own)
            in_one = max(chunk.file_offset + chunk.nbytes for chunk in own) - first.file_offset == nbytes  # a subset may have holes
            reader = self._readers[partition]
            if in_one and _mappable(first.device_offset, first.file_offset, nbytes) and reader.is_cached(first.file_offset, nbytes):
                self._memory.map_file(first.device_offset, reader.fd, first.file_offset, nbytes, populate=False)
                self._states |= dict.fromkeys((chunk.number for chunk in own), _MAPPED)

    def _back_ahead(self) -> None:
        for chunk in self._chunks:
            with self._flow.changed:
                if self._flow.error is not None:
                    return
                if chunk.number in self._states:
                    continue  # a reader was faster
                self._states[chunk.number] = _CLAIMED
            self._back(chunk)

    def _prepare(self, chunk: Chunk) -> int:
        """Sees to it that a chunk that will be read has pages; says whether the page cache holds it."""
        with self._flow.changed:
            if chunk.number in self._states:
                self._flow.changed.wait_for(lambda: self._states[chunk.number] != _CLAIMED or self._flow.error is not None)
                return self._states[chunk.number]
            self._states[chunk.number] = _CLAIMED
        return self._back(chunk)

    def _back(self, chunk: Chunk) -> int:
        reader = self._readers[chunk.partition]
        cached = self._flow.options.use_cached and reader.is_cached(chunk.file_offset, chunk.nbytes)
        if not (cached and self._flow.options.map_cached):
            with self._flow.span("pages", chunk):
                self._memory.populate(chunk.device_offset, chunk.nbytes)
        state = _CACHED if cached else _BACKED
        with self._flow.changed:
            self._states[chunk.number] = state
            self._flow.changed.notify_all()
        return state


def _mappable(device_offset: int, file_offset: int, nbytes: int) -> bool:
    """Whether a file's bytes can be mapped there: a kernel may have pages larger than the format's blocks."""
    return not (device_offset | file_offset | nbytes) % mmap.PAGESIZE
