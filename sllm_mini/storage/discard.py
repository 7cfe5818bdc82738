"""A load into nowhere: what is read only passes by, on its way from a remote to the disk cache (chapter 03)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sllm_mini.device.cpu import HostMemory
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.plan import Chunk
from sllm_mini.loading.reader import Reader


class Discard:
    """A `loading.pipeline.Target` whose readers keep what they read by themselves. Memory grows by one chunk a thread."""

    def __init__(self, flow: Flow, readers: list[Reader]) -> None:
        self._flow, self._open_readers = flow, readers
        self._own = threading.local()
        self.readers = self.free_slots = flow.options.threads

    def threads(self) -> list[tuple[str, Callable[[], None]]]:
        return []

    def deliver(self, chunk: Chunk) -> None:
        """Reads a chunk. Raises what its reader raises."""
        memory = getattr(self._own, "memory", None)
        if memory is None:
            memory = self._own.memory = HostMemory(self._flow.options.chunk_nbytes)
        with self._flow.span("read", chunk):
            direct = self._open_readers[chunk.partition].read(memory.view[: chunk.nbytes], chunk.file_offset, cached=False)
        self._flow.count(chunk, direct=direct)
        with self._flow.changed:
            self.free_slots += 1
            self._flow.changed.notify_all()
        self._flow.arrived(chunk)

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Its memory goes with its threads."""
