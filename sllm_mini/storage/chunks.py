"""Images in the store's chunks: a load straight into them, and copies from them to a device.

An image is all partitions of a checkpoint one after another, cut into chunks of shared memory; a load chunk may lie in two
of them. Costs no memory beside the chunks', but for two slots of staging where the chunks are not pinned. Taught in
chapter 03.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, chunk_digest
from sllm_mini.device.base import Buffer, Device, Event, HostBuffer
from sllm_mini.device.cpu import CpuStream
from sllm_mini.errors import DeviceError
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.plan import Chunk
from sllm_mini.loading.pool import ChunkPool
from sllm_mini.loading.reader import Reader
from sllm_mini.storage.shared_chunk import SharedChunk


def pieces_of(offset: int, nbytes: int, chunk_nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Where `[offset, offset + nbytes)` of an image lies: (number of the chunk, offset in it, bytes), in order."""
    end = offset + nbytes
    while offset < end:
        number, inside = divmod(offset, chunk_nbytes)
        count = min(chunk_nbytes - inside, end - offset)
        yield number, inside, count
        offset += count


class IntoChunks:
    """A `loading.pipeline.Target`: reads a load's chunks to their places in an image that lies in `shared` chunks.

    `chunks` are those of a plan of the whole model on one device (there `device_offset` is the offset in the image), or
    some of them: a resident prefix need not be read again. `shared` may have no memory yet: one thread backs it ahead of
    the reads. Bytes of the last chunk behind the image become zero. Safe from several threads.
    """

    def __init__(self, flow: Flow, shared: Sequence[SharedChunk], chunks: Iterable[Chunk], readers: Sequence[Reader]) -> None:
        self._flow, self._shared, self._readers = flow, shared, readers
        self._chunks = list(chunks)
        self.free_slots = len(self._chunks)
        self.readers = flow.options.threads
        self._end = max((chunk.device_offset + chunk.nbytes for chunk in self._chunks), default=0)
        if self._end > sum(chunk.nbytes for chunk in shared):
            raise ValueError(f"{len(shared)} chunks of shared memory are too few for an image of {self._end:,} bytes")
        if self._end:
            number, inside = divmod(self._end, shared[0].nbytes)
            if inside:
                shared[number].clear(inside)  # before anybody can look

    def threads(self) -> list[tuple[str, Callable[[], None]]]:
        """What it wants done beside the reads: (name, work)."""
        return [("pages", self._back_ahead)]

    def deliver(self, chunk: Chunk) -> None:
        """Reads one chunk into place. Raises LoadError, IntegrityError or OutOfMemoryError."""
        flow, reader = self._flow, self._readers[chunk.partition]
        self._back(chunk)
        cached = flow.options.use_cached and reader.is_cached(chunk.file_offset, chunk.nbytes)
        at, direct, views = chunk.file_offset, True, self._views(chunk.device_offset, chunk.nbytes)
        with flow.span("read", chunk):
            if len(views) > 1 and not flow.verify:
                # Such a reader checks hashes itself, so a cut hash chunk would cost it the whole of it twice: a copy is cheaper.
                whole = memoryview(bytearray(chunk.nbytes))
                direct = reader.read(whole, at, cached=cached)
                for view in views:
                    view[:] = whole[: len(view)]
                    whole = whole[len(view) :]
            else:
                for view in views:
                    direct = reader.read(view, at, cached=cached) and direct
                    at += len(view)
        if flow.verify:
            with flow.span("hash", chunk):
                flow.compare(chunk, reader.path, self._digests(chunk))
        flow.count(chunk, direct=direct)
        flow.arrived(chunk)

    def finish(self) -> None:
        """All chunks have been delivered."""

    def close(self) -> None:
        """It owns nothing."""

    def _views(self, offset: int, nbytes: int) -> list[memoryview]:
        pieces = pieces_of(offset, nbytes, self._shared[0].nbytes)
        return [self._shared[number].view[inside : inside + count] for number, inside, count in pieces]

    def _digests(self, chunk: Chunk) -> Iterator[str]:
        for at in range(0, chunk.nbytes, CHUNK_NBYTES):
            views = self._views(chunk.device_offset + at, min(CHUNK_NBYTES, chunk.nbytes - at))
            # One hash chunk in two chunks of memory is rare and 2 MiB: it is put together to be hashed.
            yield chunk_digest(views[0] if len(views) == 1 else memoryview(b"".join(views)))

    def _back_ahead(self) -> None:
        for chunk in self._chunks:
            with self._flow.changed:
                if self._flow.error is not None:
                    return
            self._back(chunk)

    def _back(self, chunk: Chunk) -> None:
        missing = [
            shared for number, _, _ in pieces_of(chunk.device_offset, chunk.nbytes, self._shared[0].nbytes) if not (shared := self._shared[number]).backed
        ]
        if missing:
            with self._flow.span("pages", chunk):
                for shared in missing:
                    shared.back()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy under way, the end of its bytes in the image, and the slot it reads from if it is staged."""

    done: Event
    end: int
    slot: HostBuffer | None


class FromChunks:
    """Copies images from shared chunks to memory on `device`, on a stream of its own; one copy at a time, others wait.

    Pinned chunks are copied from directly. Others go through two slots of `pool` (by default of its own, pinned at the
    first need), so that the processor fills one while the GPU copies the other. Safe from several threads; `close`
    waits for the copy under way.
    """

    def __init__(self, device: Device, pool: ChunkPool | None = None) -> None:
        self._pool = ChunkPool(device, chunks=2) if pool is None else pool
        self._own_pool = pool is None
        self._direct = device.is_host
        self._lock = threading.Lock()
        self._stream = device.stream()
        self._memmove = CpuStream()

    def copy(
        self, shared: Sequence[SharedChunk], nbytes: int, target: Buffer, *, start: int = 0, on_prefix: Callable[[int], None] | None = None
    ) -> int:
        """Copies bytes `[start, nbytes)` of an image to the same place in `target`, waits, and returns how many.

        `on_prefix` is told in between, on this thread, how many bytes of the image are in place. Raises ValueError
        for an image that the chunks cannot hold, DeviceError for a copy that fails; then those under way have ended, so
        that the chunks may be given back.
        """
        if nbytes > sum(chunk.nbytes for chunk in shared):
            raise ValueError(f"{len(shared)} chunks of shared memory are too few for an image of {nbytes:,} bytes")
        with self._lock:
            under_way: deque[_Copy] = deque()
            slots: list[HostBuffer] = []

            def land() -> HostBuffer | None:
                copy = under_way.popleft()
                copy.done.wait()
                if on_prefix is not None:
                    on_prefix(copy.end)
                return copy.slot

            try:
                at = start
                while at < nbytes:
                    number, inside = divmod(at, shared[0].nbytes)
                    chunk = shared[number]
                    count = min(self._pool.chunk_nbytes, chunk.nbytes - inside, nbytes - at)
                    source: HostBuffer = chunk
                    slot: HostBuffer | None = None
                    if not (chunk.pinned or self._direct):
                        slot = self._free_slot(slots, under_way, land)
                        self._memmove.copy_from_host(slot, 0, chunk, inside, count)
                        source, inside = slot, 0
                    self._stream.copy_from_host(target, at, source, inside, count)
                    at += count
                    under_way.append(_Copy(self._stream.record(), at, slot))
                while under_way:
                    land()
            except BaseException:
                with suppress(DeviceError):  # a device that is lost copies nothing any more
                    self._stream.synchronize()
                raise
            finally:
                for slot in slots:
                    self._pool.give(slot)
        return max(nbytes - start, 0)

    def _free_slot(self, slots: list[HostBuffer], under_way: deque[_Copy], land: Callable[[], HostBuffer | None]) -> HostBuffer:
        if len(slots) < 2:
            slots.append(self._pool.take())
            return slots[-1]
        while (slot := land()) is None:
            pass  # copies from pinned chunks come before it
        return slot

    def close(self) -> None:
        """Gives back the stream and the slots."""
        with self._lock:
            try:
                self._stream.close()
            finally:
                if self._own_pool:
                    self._pool.close()
