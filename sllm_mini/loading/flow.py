"""What the threads of one load share: its settings, its error, its report and the spans it records.

Everything here is guarded by one condition, `changed`, which is told whenever a thread may have something to do again.
Taught in chapter 02.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.checkpoint.index import Index
from sllm_mini.errors import IntegrityError
from sllm_mini.loading.plan import Chunk
from sllm_mini.types import SpanRecorder


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a load is done. `chunk_nbytes`: bytes per read (a load in place that is given no options reads 4 MiB at a time,
    see `IN_PLACE`). `threads`: reads in flight. `ring_chunks`: chunks of host
    memory on the way to a GPU, or to tensors that exist already. `direct`: read around the page cache where possible.
    `use_cached`: take from the page cache what it already holds. `map_cached`: on a CPU, map that instead of copying
    it; a mapped file must not be truncated in place while its tensors live (this package only ever replaces files
    whole)."""

    chunk_nbytes: int = 16 << 20
    threads: int = 8
    ring_chunks: int = 12
    direct: bool = True
    use_cached: bool = True
    map_cached: bool = True

    def __post_init__(self) -> None:
        if self.chunk_nbytes <= 0 or self.chunk_nbytes % CHUNK_NBYTES:
            raise ValueError(f"chunk_nbytes is {self.chunk_nbytes:,}; it must be a positive multiple of {CHUNK_NBYTES:,}")
        if self.threads < 1 or self.ring_chunks < 1:
            raise ValueError("threads and ring_chunks must be at least 1")


IN_PLACE = LoadOptions(chunk_nbytes=4 << 20)
"""How a load straight into host memory is done unless told otherwise. Smaller reads are as fast there, and the reads
under way do not end all at once, to be hashed one after another while the disk has nothing to do; on the way to a GPU
each chunk costs a copy too, so there fewer and larger ones keep up with a faster link."""


@dataclass(slots=True)
class LoadReport:
    """What a load did: bytes read around the page cache, copied from it, and mapped from it; bytes whose hashes a GPU
    computed; when it started on the monotonic clock and the seconds to its last byte; what it could not do as it was
    asked to (direct reads, hashing on the GPU) and did another way, and why."""

    direct_nbytes: int = 0
    buffered_nbytes: int = 0
    mapped_nbytes: int = 0
    device_hashed_nbytes: int = 0
    started: float = 0.0
    seconds: float = 0.0
    fallback: str | None = None

    @property
    def nbytes(self) -> int:
        return self.direct_nbytes + self.buffered_nbytes + self.mapped_nbytes


class Flow:
    """See the module. `on_chunk` is called once for each chunk whose bytes are in place and right."""

    def __init__(self, index: Index, options: LoadOptions, *, verify: bool, recorder: SpanRecorder | None, on_chunk: Callable[[Chunk], None]) -> None:
        self.options, self.verify = options, verify
        self.report = LoadReport()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self._index, self._recorder, self._on_chunk = index, recorder, on_chunk

    def stop(self, error: BaseException) -> None:
        """Ends the load with `error`, unless one has ended it already."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def has_failed(self) -> bool:
        """Whether the load is over without all its bytes, so that what is still under way is wanted by nobody."""
        return self.error is not None

    def span(self, name: str, chunk: Chunk) -> AbstractContextManager[None]:
        if self._recorder is None:
            return nullcontext()
        return self._recorder.span(name, lane=threading.current_thread().name, nbytes=chunk.nbytes)

    def check(self, chunk: Chunk, view: memoryview, path: Path | str) -> None:
        """Hashes a chunk's bytes on the host, if hashes are wanted; raises IntegrityError naming the first wrong one."""
        if self.verify:
            with self.span("hash", chunk):
                self.compare(chunk, path, (chunk_digest(view[at : at + CHUNK_NBYTES]) for at in range(0, len(view), CHUNK_NBYTES)))

    def compare(self, chunk: Chunk, path: Path | str, digests: Iterable[str]) -> None:
        """Compares the digests of a chunk's hash chunks, in their order, with those of the index."""
        expected = self._index.partitions[chunk.partition].digests
        first = chunk.file_offset // CHUNK_NBYTES
        for number, digest in enumerate(digests, first):
            if digest != expected[number * DIGEST_HEX : (number + 1) * DIGEST_HEX]:
                raise IntegrityError("a byte in the chunk that starts here is not the one that was written", path=path, offset=number * CHUNK_NBYTES)

    def count(self, chunk: Chunk, *, direct: bool = False, mapped: bool = False, device_hashed: bool = False) -> None:
        """Adds a chunk that was read (or mapped) to the report."""
        with self.changed:
            if mapped:
                self.report.mapped_nbytes += chunk.nbytes
            elif direct:
                self.report.direct_nbytes += chunk.nbytes
            else:
                self.report.buffered_nbytes += chunk.nbytes
            if device_hashed:
                self.report.device_hashed_nbytes += chunk.nbytes

    def arrived(self, chunk: Chunk) -> None:
        """Says that a chunk is in place; after a failure nobody is told any more."""
        with self.changed:
            failed = self.error is not None
        if not failed:
            self._on_chunk(chunk)

    def forget(self) -> None:
        """Drops the callback: the handle holds the pipeline, and a way back would keep the tensors until a collection."""
        self._on_chunk = _nothing


def _nothing(_: object) -> None:
    return None
