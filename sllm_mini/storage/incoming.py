"""An image in DRAM that others push in, block by block and in any order, instead of this store reading it from its source.

A block is a run of whole hash chunks, so each is checked by itself before anybody may read it; whoever has the same index cuts the same
blocks. The image is on its way like any other: it can be attached meanwhile, and its layers are ready as their blocks land.
What never comes is read from the model's own source (`fall_back`). Taught in chapter 10; the transfers are `cluster.blocks`.
Costs one hash pass over the bytes; no copy, but of blocks that lie in two chunks of memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.checkpoint.index import Index
from sllm_mini.errors import IntegrityError, LoadCancelled, StoreError
from sllm_mini.loading.reader import open_reader
from sllm_mini.storage.arrivals import Arrivals, image_places
from sllm_mini.storage.chunks import pieces_of
from sllm_mini.storage.holdings import Lease
from sllm_mini.storage.shared_chunk import SharedChunk
from sllm_mini.storage.sources import Origin

PEERS = "peers"
"""Where pushed bytes come from, in `Figures.moved`."""
_READERS = 8
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class HashChunk:
    """One hash chunk: `file_offset` is in its partition, `offset` in the image."""

    partition: int
    file_offset: int
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Block:
    """What one transfer carries: consecutive hash chunks of the image."""

    offset: int
    nbytes: int
    chunks: tuple[HashChunk, ...]


def cut_blocks(index: Index, block_nbytes: int) -> list[Block]:
    """An image in blocks of at most `block_nbytes`, in execution order. Raises ValueError for less than one hash chunk (2 MiB). Pure."""
    if block_nbytes < CHUNK_NBYTES:
        raise ValueError(f"blocks of {block_nbytes:,} bytes cannot be checked one by one; give at least {CHUNK_NBYTES:,}")
    blocks: list[Block] = []
    taken: list[HashChunk] = []
    start = offset = 0
    for number, partition in enumerate(index.partitions):
        for at in range(0, partition.nbytes, CHUNK_NBYTES):
            nbytes = min(CHUNK_NBYTES, partition.nbytes - at)
            if taken and offset + nbytes - start > block_nbytes:
                blocks.append(Block(start, offset - start, tuple(taken)))
                taken, start = [], offset
            place = at // CHUNK_NBYTES * DIGEST_HEX
            taken.append(HashChunk(number, at, offset, nbytes, partition.digests[place : place + DIGEST_HEX]))
            offset += nbytes
    if taken:
        blocks.append(Block(start, offset - start, tuple(taken)))
    return blocks


class BlockSource(Protocol):
    """What blocks can be sent from: an `Incoming`, or a whole image (`HeldBlocks`)."""

    blocks: list[Block]

    def wait_block(self, block: int, timeout: float | None = None) -> bool:
        """Whether the block is there, or came within `timeout` seconds (None: waits for ever). Raises the error that ended its image."""
        ...

    def reading(self, block: int) -> AbstractContextManager[list[memoryview]]:
        """The bytes of a block that is there; they stay as they are until the block of code ends."""
        ...


class HeldBlocks:
    """The blocks of an image that is whole, for as long as its lease lasts. Safe from several threads."""

    def __init__(self, lease: Lease, block_nbytes: int) -> None:
        self.blocks = cut_blocks(lease.image.checkpoint.index, block_nbytes)
        self._chunks = lease.image.chunks

    def wait_block(self, block: int, timeout: float | None = None) -> bool:
        return True

    @contextmanager
    def reading(self, block: int) -> Iterator[list[memoryview]]:
        yield views_of(self._chunks, self.blocks[block].offset, self.blocks[block].nbytes)


class Incoming(Arrivals):
    """See the module; made by `Store.receive`. Its end, good or bad, is noted once nobody reads or writes a block any more, so that no
    late byte lands in memory that another model has by then. `close` ends it if it is not whole. Safe from several threads."""

    def __init__(self, lease: Lease, block_nbytes: int, open_source: Callable[[], AbstractContextManager[Origin]]) -> None:
        super().__init__(lease.image.checkpoint)
        self.blocks = cut_blocks(self.checkpoint.index, block_nbytes)
        self.moved: Counter[str] = Counter()
        """Bytes that landed, by where they came from."""
        self.noted = threading.Event()
        """Set once the store has taken note of its end."""
        self._lease, self._open_source = lease, open_source
        self._chunks = lease.image.chunks
        self._absent = {number for number, block in enumerate(self.blocks) if block.offset + block.nbytes > lease.image.resident_nbytes}
        self._writing: set[int] = set()
        self._users = 0
        self._closed = False
        self._why: BaseException | None = None
        self._layer_blocks: dict[int, set[int]] = {number: set() for number in self._missing}
        starts = [block.offset for block in self.blocks]
        for tensor, offset in image_places(self.checkpoint.index):
            self._layer_blocks[tensor.layer] |= {n for n in overlapping(starts, offset, tensor.nbytes) if n in self._absent}
        if self.blocks and (inside := self.checkpoint.nbytes % self._chunks[0].nbytes):
            self._chunks[-1].clear(inside)  # before anybody can look
        self._note()
        threading.Thread(target=self._back_ahead, name="sllm-incoming-pages", daemon=True).start()

    def missing(self) -> list[int]:
        """The blocks that have not landed, in order."""
        with self._changed:
            return sorted(self._absent)

    def wait_block(self, block: int, timeout: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._why is not None or block not in self._absent, timeout)
            self._raise_if_ended()
            return block not in self._absent

    @contextmanager
    def reading(self, block: int) -> Iterator[list[memoryview]]:
        """See `BlockSource`. Raises StoreError for a block that has not landed, and the error that ended the image."""
        with self._using():
            with self._changed:
                if block in self._absent:
                    raise StoreError(f"block {block} of {self.checkpoint.path} has not landed; wait for it first")
            yield views_of(self._chunks, self.blocks[block].offset, self.blocks[block].nbytes)

    @contextmanager
    def writing(self, block: int, source: str = PEERS) -> Iterator[list[memoryview]]:
        """Memory for a block that is missing; when the block of code ends well, the block is hashed and lands.

        Raises IntegrityError for bytes that are not the model's, which leaves the block missing; StoreError for a block that is there
        or that another thread writes; OutOfMemoryError; the error that ended the image."""
        with self._using():
            with self._changed:
                if block not in self._absent or block in self._writing:
                    raise StoreError(f"block {block} of {self.checkpoint.path} is there or on its way; ask `missing` first")
                self._writing.add(block)
            try:
                found = self.blocks[block]
                for number, _, _ in pieces_of(found.offset, found.nbytes, self._chunks[0].nbytes):
                    self._chunks[number].back()
                yield views_of(self._chunks, found.offset, found.nbytes)
                self._verify(found)
                with self._changed:
                    self._absent.discard(block)
                    self.moved[source] += found.nbytes
                    self._note()
            finally:
                with self._changed:
                    self._writing.discard(block)

    def fall_back(self, blocks: Sequence[int] | None = None) -> None:
        """Reads blocks that are missing (None: all) from the model's own source, checked as well. Raises what reading it raises."""
        with self._open_source() as origin, ExitStack() as opened:
            index = origin.checkpoint.index
            readers = [
                opened.enter_context(closing(open_reader(origin.checkpoint, number, direct=False, stopped=lambda: self._why is not None)))
                for number in range(len(index.partitions))
            ]

            def read(chunk: HashChunk) -> None:
                views = views_of(self._chunks, chunk.offset, chunk.nbytes)
                whole = views[0] if len(views) == 1 else memoryview(bytearray(chunk.nbytes))
                readers[chunk.partition].read(whole, chunk.file_offset, cached=True)
                if len(views) > 1:  # a remote reader checks whole hash chunks, and would read one that is cut twice
                    at = 0
                    for view in views:
                        view[:] = whole[at : at + len(view)]
                        at += len(view)

            def bring(number: int) -> None:
                with self.writing(number, origin.place):
                    for _ in reading.map(read, self.blocks[number].chunks):
                        pass

            wanted = [number for number in self.missing() if blocks is None or number in set(blocks)]
            reading = opened.enter_context(ThreadPoolExecutor(_READERS, thread_name_prefix="sllm-fall-back"))
            # Few blocks at once, so that they land about in order: whoever they are passed on to need not wait for the last.
            with ThreadPoolExecutor(_BLOCKS_AT_ONCE, thread_name_prefix="sllm-fall-back-blocks") as bringing:
                for _ in bringing.map(bring, wanted):
                    pass

    def end(self, error: BaseException | None = None) -> None:
        """Ends it: with an error, or as given up if blocks are missing. The first word counts; what is whole stays whole."""
        with self._changed:
            if self._absent and self._why is None:
                self._why = error or LoadCancelled("not all of its blocks came", path=self.checkpoint.path)
                self._changed.notify_all()
            self._settle()

    def cancel(self) -> None:
        """Ends it; nothing more lands."""
        self.end(LoadCancelled("its receiving was ended", path=self.checkpoint.path))

    def close(self) -> None:
        """Ends it unless it is whole, and gives up the lease that keeps the image in memory; returns once nobody reads a block and the store has
        taken note."""
        self.end()
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
        self.noted.wait()
        self._lease.close()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        with self._changed:
            self._raise_if_ended()
            if self._closed:
                raise StoreError(f"the incoming image of {self.checkpoint.path} was closed; ask the store for the model")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._settle()
                self._changed.notify_all()

    def _raise_if_ended(self) -> None:
        if self._why is not None:
            raise self._why.with_traceback(None)

    def _note(self) -> None:
        """Says which layers are whole now."""
        present = self.checkpoint.nbytes - sum(self.blocks[number].nbytes for number in self._absent)
        ready = [layer for layer, blocks in self._layer_blocks.items() if not blocks & self._absent]
        self.arrived([layer for layer in ready if layer in self._missing], present)
        self._settle()

    def _settle(self) -> None:
        """Passes the end on to those who wait, once nothing is read or written. The lock is held."""
        if self._why is not None and not self._users:
            super().end(self._why)
        elif not self._absent:
            super().end()

    def _verify(self, block: Block) -> None:
        for chunk in block.chunks:
            views = views_of(self._chunks, chunk.offset, chunk.nbytes)
            if chunk_digest(views[0] if len(views) == 1 else memoryview(b"".join(views))) != chunk.digest:
                entry = self.checkpoint.index.partitions[chunk.partition]
                raise IntegrityError("what came is not what was written; ask another for it", path=self.checkpoint.path / entry.file, offset=chunk.file_offset)

    def _back_ahead(self) -> None:
        """Memory for the blocks to come, so that a link does not wait for page faults."""
        try:
            for chunk in self._chunks:
                with self._using():
                    chunk.back()
        except BaseException as error:  # noqa: BLE001 - it is the image's result; a writer meets it too
            self.end(error)


def views_of(chunks: Sequence[SharedChunk], offset: int, nbytes: int) -> list[memoryview]:
    """The bytes `[offset, offset + nbytes)` of an image that lies in `chunks`, in order."""
    return [chunks[number].view[inside : inside + count] for number, inside, count in pieces_of(offset, nbytes, chunks[0].nbytes)]


def overlapping(starts: Sequence[int], offset: int, nbytes: int) -> range:
    """The numbers of the blocks in which a tensor lies; `starts` are theirs."""
    return range(bisect_right(starts, offset) - 1, bisect_left(starts, offset + nbytes)) if nbytes else range(0)
