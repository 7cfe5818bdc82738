"""Chunks on their way through host memory: read into a slot, checked, copied on, and the slot used again.

The way to a GPU, and to tensors that exist already on any device. Copies are asynchronous on a stream of their own, so
a reader goes on with the next chunk; a slot is free again once its copy is done, so host memory grows by the ring
alone. On a GPU the hashes are computed there, of what arrived there, by `csrc/xxh3_leaves.cu` on a second stream, so
that neither the processor nor the copies wait for them. Taught in chapter 02.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sllm_mini.device.base import Buffer, Device, Event, HostBuffer
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.errors import UnsupportedError
from sllm_mini.loading.device_hash import DeviceHash
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.plan import Chunk
from sllm_mini.loading.pool import ChunkPool
from sllm_mini.loading.reader import Reader


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a chunk and where it goes."""

    chunk_offset: int
    nbytes: int
    target: Buffer
    target_offset: int


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int
    buffer: HostBuffer


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy under way: `done` is the end of it and of its hashing."""

    chunk: Chunk
    slot: _Slot
    done: Event


class Ring:
    """The ring of one device. `pieces` says where the parts of a chunk go; `whole`: each chunk lies in one piece on the
    device, in memory nobody else uses yet, so that it can be hashed there. Safe from several threads, but for `close`."""

    def __init__(
        self, flow: Flow, device: Device, pieces: Callable[[Chunk], Sequence[Piece]], readers: list[Reader], *, whole: bool, pool: ChunkPool | None
    ) -> None:
        self._flow, self._pieces, self._readers = flow, pieces, readers
        self._pool = ChunkPool(device, chunk_nbytes=flow.options.chunk_nbytes, chunks=flow.options.ring_chunks) if pool is None else pool
        self._own_pool = pool is None
        self.free_slots = flow.options.ring_chunks
        self.readers = flow.options.threads
        self._made: list[_Slot] = []
        self._free: list[_Slot] = []
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._copy_lock = threading.Lock()
        self._hash: DeviceHash | None = None
        self._stream = device.stream()
        try:
            if isinstance(self._stream, CudaStream) and not whole:
                self._stream.wait_for_torch()  # the tensors may still be in use
            if flow.verify and whole and isinstance(device, CudaDevice):
                self._hash = DeviceHash(device, slots=self.free_slots, chunk_nbytes=flow.options.chunk_nbytes)
        except UnsupportedError as error:
            flow.report.fallback = str(error)
        except BaseException:
            self.close()
            raise

    def threads(self) -> list[tuple[str, Callable[[], None]]]:
        """What it wants done beside the reads: (name, work)."""
        return [("copy", self._finish_copies)]

    def deliver(self, chunk: Chunk) -> None:
        """Reads a chunk and sends it on its way. The caller has counted `free_slots` down, so there is a slot."""
        flow, reader = self._flow, self._readers[chunk.partition]
        slot = self._slot()
        view = slot.buffer.view[: chunk.nbytes]
        cached = flow.options.use_cached and reader.is_cached(chunk.file_offset, chunk.nbytes)
        with flow.span("read", chunk):
            direct = reader.read(view, chunk.file_offset, cached=cached)
        if self._hash is None:
            flow.check(chunk, view, reader.path)
        flow.count(chunk, direct=direct, device_hashed=self._hash is not None)
        pieces = self._pieces(chunk)
        with self._copy_lock:  # an event must be recorded right after its own copies
            for piece in pieces:
                self._stream.copy_from_host(piece.target, piece.target_offset, slot.buffer, piece.chunk_offset, piece.nbytes)
            done = self._stream.record()
            if self._hash is not None:
                done = self._hash.enqueue(slot.number, pieces[0].target, pieces[0].target_offset, chunk.nbytes, done)
        self._copies.put(_Copy(chunk, slot, done))

    def finish(self) -> None:
        """No further chunk will come: the thread of the copies ends after the last of them."""
        self._copies.put(None)

    def close(self) -> None:
        """Gives the slots back once no copy can touch them. Raises DeviceError if a lost device refuses to close."""
        try:
            if self._hash is not None:
                self._hash.close()
        finally:
            try:
                self._stream.close()
            finally:
                for slot in self._made:
                    self._pool.give(slot.buffer)
                self._made, self._free = [], []
                if self._own_pool:
                    self._pool.close()

    def _slot(self) -> _Slot:
        with self._flow.changed:
            if self._free:
                return self._free.pop()
        buffer = self._pool.take()
        with self._flow.changed:
            self._made.append(_Slot(len(self._made), buffer))
            return self._made[-1]

    def _finish_copies(self) -> None:
        """Waits for copies in their order and hands their slots back. After a failure it still waits for each, since
        a copy in flight reads from its slot."""
        while (copy := self._copies.get()) is not None:
            try:
                with self._flow.span("copy", copy.chunk):
                    copy.done.wait()
                if self._hash is not None:
                    digests = self._hash.digests(copy.slot.number, copy.chunk.nbytes)
                    self._flow.compare(copy.chunk, self._readers[copy.chunk.partition].path, digests)
            except BaseException as error:  # noqa: BLE001 - whatever it is, readers that wait for this slot must not wait for ever
                self._flow.stop(error)
                continue
            with self._flow.changed:
                self._free.append(copy.slot)
                self.free_slots += 1
                self._flow.changed.notify_all()
            self._flow.arrived(copy.chunk)
