"""Host memory on the way to a GPU: chunks that are read into, copied from, and used again, by load after load.

Pinning memory costs about as much as copying it, so whoever loads often makes one pool and passes it to each load; a
load without one makes its own chunks and gives them back. Keeps at most `chunks` times `chunk_nbytes` of host memory
while no load runs; each load uses at most its `ring_chunks`. Rebuilt from ServerlessLLM's pinned pool (OSDI'24), which
had to hold the whole model. Taught in chapter 02.
"""

from __future__ import annotations

import threading
from types import TracebackType

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.device import get_device
from sllm_mini.device.base import Device, HostBuffer


class ChunkPool:
    """Chunks of the host memory that `device` copies from fastest. Safe from several threads and several loads; as a
    context manager it closes itself; a load that starts after that is refused. Raises ValueError for sizes that no load could use, DeviceError for a device that is
    not there.

        with ChunkPool("cuda") as pool:
            load_tensors(first, "cuda", pool=pool)
            load_tensors(second, "cuda", pool=pool)  # pins nothing
    """

    def __init__(self, device: str | Device, *, chunk_nbytes: int = 16 << 20, chunks: int = 8) -> None:
        if chunk_nbytes <= 0 or chunk_nbytes % CHUNK_NBYTES or chunks < 1:
            raise ValueError(f"a pool keeps 1 chunk or more of a positive multiple of {CHUNK_NBYTES:,} bytes; {chunks} of {chunk_nbytes:,} were asked for")
        self.device, self.chunk_nbytes, self.chunks = get_device(device), chunk_nbytes, chunks
        self._lock = threading.Lock()
        self._kept: list[HostBuffer] = []
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Host memory that the pool keeps now, beside what loads have taken."""
        with self._lock:
            return len(self._kept) * self.chunk_nbytes

    def require_open(self) -> None:
        """Raises ValueError if it was closed. Loads that had it before go on: what they take is freed as it comes back."""
        with self._lock:
            if self._closed:
                raise ValueError("the pool was closed; make a new one, or close it after the last load that uses it")

    def fill(self) -> None:
        """Takes all its memory now, so that no load has to. Raises OutOfMemoryError, and ValueError once it was closed."""
        self.require_open()
        taken = [self.take() for _ in range(self.chunks)]
        for buffer in taken:
            self.give(buffer)

    def take(self) -> HostBuffer:
        """A chunk nobody else has: a kept one if there is one, else a new one. Raises OutOfMemoryError."""
        with self._lock:
            if self._kept:
                return self._kept.pop()
        return self.device.allocate_host(self.chunk_nbytes)

    def give(self, buffer: HostBuffer) -> None:
        """Hands a chunk back, to be kept if there is room and the pool is open, else freed."""
        with self._lock:
            if not self._closed and len(self._kept) < self.chunks:
                self._kept.append(buffer)
                return
        buffer.close()

    def close(self) -> None:
        """Gives the memory back: what is kept now, and what loads have when they hand it back."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, []
        for buffer in kept:
            buffer.close()

    def __enter__(self) -> ChunkPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
