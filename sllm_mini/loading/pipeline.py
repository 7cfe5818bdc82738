"""The pipeline: many reads in flight, hashing and device copies overlapped with them, chunks reused.

On a CPU target a chunk is read (or mapped from the page cache) straight into place, so each byte is moved once. On a
GPU it is read into one of a ring of pinned chunks, checked, and copied asynchronously; the slot is read into again
when its copy is done, so host memory grows by the ring alone. Rebuilt from ServerlessLLM's loader (OSDI'24), without
its synchronous copies, its discarded errors and its whole-model pool. Taught in chapter 02.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.device.base import Buffer, Device, Event, HostBuffer, Stream
from sllm_mini.device.cpu import HostMemory
from sllm_mini.errors import IntegrityError, LoadError, SllmError
from sllm_mini.loading.plan import Chunk, LoadPlan
from sllm_mini.loading.reader import PartitionReader
from sllm_mini.types import SpanRecorder


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a load is done. `chunk_nbytes`: bytes per read. `threads`: reads in flight. `ring_chunks`: pinned chunks
    per GPU. `direct`: read around the page cache where possible. `use_cached`: take from the page cache what it
    already holds. `map_cached`: on a CPU, map that instead of copying it; a mapped file must not be truncated in place
    while its tensors live (this package only ever replaces files whole)."""

    chunk_nbytes: int = 16 << 20
    threads: int = 4
    ring_chunks: int = 8
    direct: bool = True
    use_cached: bool = True
    map_cached: bool = True

    def __post_init__(self) -> None:
        if self.chunk_nbytes <= 0 or self.chunk_nbytes % CHUNK_NBYTES:
            raise ValueError(f"chunk_nbytes is {self.chunk_nbytes:,}; it must be a positive multiple of {CHUNK_NBYTES:,}")
        if self.threads < 1 or self.ring_chunks < 1:
            raise ValueError("threads and ring_chunks must be at least 1")


@dataclass(slots=True)
class LoadReport:
    """What a load did: bytes read around the page cache, copied from it, and mapped from it; when it started on the
    monotonic clock and the seconds to its last byte; why direct reads were given up, if they were."""

    direct_nbytes: int = 0
    buffered_nbytes: int = 0
    mapped_nbytes: int = 0
    started: float = 0.0
    seconds: float = 0.0
    fallback: str | None = None

    @property
    def nbytes(self) -> int:
        return self.direct_nbytes + self.buffered_nbytes + self.mapped_nbytes


def next_chunk(pending: Sequence[Chunk], free_slots: Sequence[int]) -> int | None:
    """Which chunk to read next: the position in `pending` (execution order) of the first chunk whose device has a
    free slot, None if none has. Reading in execution order is what lets inference start before the load ends; looking
    past a device whose slots are full keeps the disk busy while its copies catch up."""
    for position, chunk in enumerate(pending):
        if free_slots[chunk.device] > 0:
            return position
    return None


class Pipeline:
    """Carries out a plan on its own threads. `start`, then `join`; `stop` ends it early. Internal to this floor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: LoadPlan,
        devices: Sequence[Device],
        buffers: Sequence[Buffer],
        options: LoadOptions,
        *,
        verify: bool,
        recorder: SpanRecorder | None,
        on_chunk: Callable[[Chunk], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.report = LoadReport()
        self._checkpoint, self._plan, self._options, self._verify = checkpoint, plan, options, verify
        self._devices, self._buffers = devices, buffers
        self._recorder, self._on_chunk, self._on_end = recorder, on_chunk, on_end
        self._changed = threading.Condition()
        self._pending = list(plan.chunks)
        self._error: BaseException | None = None
        self._free_slots = [len(plan.chunks) if device.is_host else options.ring_chunks for device in devices]
        self._slots: list[list[HostBuffer]] = [[] for _ in devices]
        self._streams: dict[int, Stream] = {}
        self._copies: dict[int, queue.SimpleQueue[tuple[Event, HostBuffer, Chunk] | None]] = {}
        self._copy_lock = threading.Lock()
        self._readers: list[PartitionReader] = []
        self._threads: list[threading.Thread] = []
        self._running = 0

    def start(self) -> None:
        """Opens the files and starts the threads. Raises, leaving nothing behind, if either cannot be done."""
        self.report.started = time.monotonic()
        try:
            for number in range(len(self._checkpoint.index.partitions)):
                self._readers.append(PartitionReader(self._checkpoint, number, direct=self._options.direct))
            for number, device in enumerate(self._devices):
                if not device.is_host and self._plan.device_nbytes[number]:
                    self._streams[number] = device.stream()
                    self._copies[number] = queue.SimpleQueue()
        except BaseException:
            self._release()
            raise
        readers = min(self._options.threads, max(len(self._pending), 1))
        self._running = readers
        self._threads = [threading.Thread(target=self._read_chunks, name=f"sllm-read-{number}") for number in range(readers)]
        self._threads += [threading.Thread(target=self._finish_copies, args=(number,), name=f"sllm-copy-{number}") for number in self._copies]
        finisher = threading.Thread(target=self._finish, args=(list(self._threads),), name="sllm-load")
        started: list[threading.Thread] = []
        try:
            for thread in (*self._threads, finisher):
                thread.start()
                started.append(thread)
        except RuntimeError as error:  # the system gives no more threads: end those that it gave
            self.stop(error)
            for copies in self._copies.values():
                copies.put(None)
            for thread in started:
                thread.join()
            self._release()
            raise LoadError(f"no thread can be started to read it ({error}); fewer `threads` may do", path=self._checkpoint.path) from error
        self._threads.append(finisher)

    def stop(self, error: BaseException) -> None:
        """Ends the load with `error` unless it has ended already; reads in flight finish first."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._pending.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until every thread has gone."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _read_chunks(self) -> None:
        try:
            while (chunk := self._take()) is not None:
                if self._devices[chunk.device].is_host:
                    self._place(chunk)
                else:
                    self._send(chunk)
        except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by wait()
            self.stop(error)
        finally:
            with self._changed:
                self._running -= 1
                if self._running == 0:
                    for copies in self._copies.values():
                        copies.put(None)

    def _take(self) -> Chunk | None:
        with self._changed:
            while self._pending:
                position = next_chunk(self._pending, self._free_slots)
                if position is not None:
                    chunk = self._pending.pop(position)
                    self._free_slots[chunk.device] -= 1
                    return chunk
                self._changed.wait()
        return None

    def _place(self, chunk: Chunk) -> None:
        """Straight into place on the host: mapped if the page cache holds it, else read into populated pages."""
        buffer = self._buffers[chunk.device]
        if not isinstance(buffer, HostMemory):
            raise TypeError("a host device gave a buffer that is not host memory")
        reader = self._readers[chunk.partition]
        view = buffer.view[chunk.device_offset : chunk.device_offset + chunk.nbytes]
        cached = self._options.use_cached and reader.is_cached(chunk.file_offset, chunk.nbytes)
        # A kernel with pages larger than the format's blocks cannot map every chunk.
        mapped = cached and self._options.map_cached and not (chunk.file_offset | chunk.device_offset | chunk.nbytes) % mmap.PAGESIZE
        if mapped:
            with self._span("map", chunk):
                buffer.map_file(chunk.device_offset, reader.fd, chunk.file_offset, chunk.nbytes)
        else:
            with self._span("pages", chunk):
                buffer.populate(chunk.device_offset, chunk.nbytes)
            with self._span("read", chunk):
                direct = reader.read(view, chunk.file_offset, cached=cached)
        self._check(view, chunk)
        self._count(chunk, mapped=mapped, direct=not mapped and direct)
        self._done(chunk)

    def _send(self, chunk: Chunk) -> None:
        """Through a pinned slot to a GPU; the copy goes on while this thread reads the next chunk."""
        device, reader = self._devices[chunk.device], self._readers[chunk.partition]
        with self._changed:
            slot = self._slots[chunk.device].pop() if self._slots[chunk.device] else None
        if slot is None:
            slot = device.allocate_host(self._options.chunk_nbytes)
        view = slot.view[: chunk.nbytes]
        cached = self._options.use_cached and reader.is_cached(chunk.file_offset, chunk.nbytes)
        with self._span("read", chunk):
            direct = reader.read(view, chunk.file_offset, cached=cached)
        self._check(view, chunk)
        self._count(chunk, mapped=False, direct=direct)
        stream = self._streams[chunk.device]
        with self._copy_lock:  # the event must be recorded right after its own copy
            stream.copy_from_host(self._buffers[chunk.device], chunk.device_offset, slot, 0, chunk.nbytes)
            event = stream.record()
        self._copies[chunk.device].put((event, slot, chunk))

    def _finish_copies(self, number: int) -> None:
        """Waits for copies in their order and hands their slots back. After a failure it still waits for each, since
        a copy in flight reads from its slot."""
        while (item := self._copies[number].get()) is not None:
            event, slot, chunk = item
            try:
                with self._span("copy", chunk):
                    event.wait()
            except BaseException as error:  # noqa: BLE001 - whatever it is, readers that wait for this slot must not wait for ever
                self.stop(error)
                continue
            with self._changed:
                self._slots[number].append(slot)
                self._free_slots[number] += 1
                self._changed.notify_all()
            self._done(chunk)

    def _check(self, view: memoryview, chunk: Chunk) -> None:
        if not self._verify:
            return
        entry = self._checkpoint.index.partitions[chunk.partition]
        with self._span("hash", chunk):
            for at in range(0, len(view), CHUNK_NBYTES):
                number = (chunk.file_offset + at) // CHUNK_NBYTES
                if chunk_digest(view[at : at + CHUNK_NBYTES]) != entry.digests[number * DIGEST_HEX : (number + 1) * DIGEST_HEX]:
                    path = self._readers[chunk.partition].path
                    raise IntegrityError("a byte in the chunk that starts here is not the one that was written", path=path, offset=chunk.file_offset + at)

    def _count(self, chunk: Chunk, *, mapped: bool, direct: bool) -> None:
        with self._changed:
            if mapped:
                self.report.mapped_nbytes += chunk.nbytes
            elif direct:
                self.report.direct_nbytes += chunk.nbytes
            else:
                self.report.buffered_nbytes += chunk.nbytes

    def _done(self, chunk: Chunk) -> None:
        with self._changed:
            failed = self._error is not None
        if not failed:
            self._on_chunk(chunk)

    def _span(self, name: str, chunk: Chunk) -> AbstractContextManager[None]:
        if self._recorder is None:
            return nullcontext()
        return self._recorder.span(name, lane=threading.current_thread().name, nbytes=chunk.nbytes)

    def _finish(self, workers: list[threading.Thread]) -> None:
        for thread in workers:
            thread.join()
        self.report.fallback = next((reader.fallback for reader in self._readers if reader.fallback), None)
        self.report.seconds = time.monotonic() - self.report.started
        self._release()
        on_end = self._on_end
        # The handle holds this pipeline: callbacks that lead back to it would keep the tensors until a garbage collection.
        self._on_chunk = _nothing
        self._on_end = _nothing
        on_end(self._error)

    def _release(self) -> None:
        """Gives back everything but the target's memory. A stream of a lost device may refuse to close: then that is
        the load's error, unless it has one already."""
        closers: list[Callable[[], None]] = [reader.close for reader in self._readers]
        closers += [stream.close for stream in self._streams.values()]
        closers += [slot.close for slots in self._slots for slot in slots]
        for close in closers:
            try:
                close()
            except SllmError as error:
                self._error = self._error or error
        self._slots = []
        self._streams.clear()
        self._buffers = ()  # the handle decides how long they live
        link = self._error
        while link is not None:  # a kept error must not keep the memory its frames looked at
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__


def _nothing(_: object) -> None:
    return None
