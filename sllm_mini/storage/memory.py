"""A budget of memory that is handed to other processes, in chunks that only this process can write.

A chunk whose descriptor was lent is never used for another model: a late reader of it keeps the old bytes, and the kernel
frees them with its last mapping. So each load after an eviction has fresh memory to fault in; a `Stock` can do that
beforehand. Taught in chapters 03 and 05.

What a chunk that was never lent holds when it is used again is another model's bytes, until the new ones arrive, and who
attaches to a model that still loads can look at them. They are not cleared: zeros would cost 0.1 s/GB before the load may
begin, or come too late; nobody is told that those bytes are ready; and every client runs as the store's own user, who may
attach to any of its models anyway. Only what no load will ever write, behind the end of an image, is made zero.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from sllm_mini.device.base import ALIGNMENT, Device
from sllm_mini.errors import DeviceError, OutOfMemoryError
from sllm_mini.storage.shared_chunk import HugePages, SharedChunk
from sllm_mini.storage.stock import Stock

MAX_CHUNK_NBYTES = 256 << 20


class SharedPool:
    """Shared chunks of `chunk_nbytes` up to a budget. Safe from several threads; as a context manager it closes itself.

    `chunk_nbytes` is a multiple of 2 MiB, by default the power of two that makes 128 to 256 of the budget, at most
    256 MiB. `device`, a GPU, pins each chunk. `huge_pages`: see `HugePages`. Memory is asked for when it is taken and
    kept when it is given back, except that a chunk that was lent is freed: its bytes are still some reader's.

    `backed_nbytes`: of what is free, so much is backed, and pinned, ahead of need by a `Stock`, whenever nothing was taken
    for a moment and `busy()` is false. It costs that memory while nobody uses it, within the budget, and spares the next
    load its page faults. Raises ValueError for a budget smaller than one chunk, or for more to be backed than it.
    """

    def __init__(
        self, budget_nbytes: int, chunk_nbytes: int | None = None, device: Device | None = None, huge_pages: HugePages = "auto",
        *, backed_nbytes: int = 0, busy: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        if chunk_nbytes is None:
            chunk_nbytes = min(max(1 << (max(budget_nbytes, 1) // 256).bit_length(), ALIGNMENT), MAX_CHUNK_NBYTES)
        if chunk_nbytes <= 0 or chunk_nbytes % ALIGNMENT:
            raise ValueError(f"a chunk cannot have {chunk_nbytes:,} bytes; use a positive multiple of {ALIGNMENT:,}")
        if budget_nbytes < chunk_nbytes:
            raise ValueError(f"a budget of {budget_nbytes:,} bytes is smaller than one chunk of {chunk_nbytes:,}; give the pool more or smaller chunks")
        if huge_pages not in ("auto", "hugetlb", "never"):
            raise ValueError(f"huge_pages is {huge_pages!r}; use 'auto', 'hugetlb' or 'never'")
        if not 0 <= backed_nbytes <= budget_nbytes:
            raise ValueError(f"{backed_nbytes:,} bytes cannot be backed ahead within a budget of {budget_nbytes:,}; back at most the budget")
        self.budget_nbytes, self.chunk_nbytes = budget_nbytes, chunk_nbytes
        self._ready_goal = min(-(-backed_nbytes // chunk_nbytes), budget_nbytes // chunk_nbytes)
        self._device, self._huge_pages = device, huge_pages
        self._lock = threading.Lock()
        self._kept: deque[SharedChunk] = deque()
        """Free chunks, those without memory first."""
        self._taken: set[SharedChunk] = set()
        self._making = 0
        self._closed = False
        self._stock = Stock(self._next_to_back, busy) if self._ready_goal else None

    @property
    def used_nbytes(self) -> int:
        """Chunks that are taken."""
        with self._lock:
            return (len(self._taken) + self._making) * self.chunk_nbytes

    @property
    def free_nbytes(self) -> int:
        """What can still be taken, in whole chunks."""
        with self._lock:
            return (self.budget_nbytes // self.chunk_nbytes - len(self._taken) - self._making) * self.chunk_nbytes

    @property
    def ready_nbytes(self) -> int:
        """What can be taken that has its memory already."""
        with self._lock:
            return self._ready() * self.chunk_nbytes

    @property
    def trouble(self) -> str:
        """Why less is backed ahead than was asked for, if memory was refused; "" otherwise."""
        return "" if self._stock is None else self._stock.trouble

    def kernel_nbytes(self) -> int:
        """What the kernel says the pool's chunks occupy: those taken, once backed, and those kept for the next."""
        with self._lock:
            return sum(chunk.kernel_nbytes() for chunk in (*self._kept, *self._taken))

    def take(self, *, back: bool = True) -> SharedChunk:
        """A chunk that nobody else has or ever saw; without `back` it may have no memory yet. Its bytes are whatever
        the last model left.

        Raises OutOfMemoryError when the budget or the host has no more, DeviceError once closed, UnsupportedError
        where memory cannot be sealed."""
        with self._lock:
            if self._closed:
                raise DeviceError("this pool of shared memory was closed; make a new one")
            chunk = self._kept.pop() if self._kept else None
            if chunk is None and (len(self._taken) + self._making + 1) * self.chunk_nbytes > self.budget_nbytes:
                used = len(self._taken) * self.chunk_nbytes
                raise OutOfMemoryError(f"all {used:,} of {self.budget_nbytes:,} bytes of shared memory are taken; evict a model or raise the budget")
            self._making += 1
        if self._stock is not None:
            self._stock.touch()
        try:
            if chunk is None:
                chunk = self._new_chunk()
            if back:
                chunk.back()
        except BaseException:
            with self._lock:
                self._making -= 1
            if chunk is not None:
                chunk.close()
            raise
        with self._lock:
            self._making -= 1
            self._taken.add(chunk)
        return chunk

    def give(self, chunk: SharedChunk) -> None:
        """Hands a chunk back: kept for the next model, or freed if it was lent or the pool is closed. Raises
        ValueError for a chunk that was not taken from here."""
        with self._lock:
            if chunk not in self._taken:
                raise ValueError("this chunk was not taken from this pool, or was given back already")
            self._taken.remove(chunk)
            chunk.fresh = False
            kept = not (chunk.lent or self._closed)
            if kept:
                (self._kept.append if chunk.backed else self._kept.appendleft)(chunk)
        if not kept:
            chunk.close()
        if self._stock is not None:
            self._stock.touch()

    def fill(self) -> None:
        """Takes the whole budget's memory now, so that no load has to. Raises OutOfMemoryError."""
        taken: list[SharedChunk] = []
        try:
            while self.free_nbytes:
                taken.append(self.take())
        finally:
            for chunk in taken:
                self.give(chunk)

    def close(self) -> None:
        """Frees what is kept now, and what is taken when it is given back. Waits for at most one chunk to be backed."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, deque()
        if self._stock is not None:
            self._stock.close()
        for chunk in kept:
            chunk.close()

    def _new_chunk(self) -> SharedChunk:
        return SharedChunk(self.chunk_nbytes, huge_pages=self._huge_pages, device=self._device)

    def _ready(self) -> int:
        return sum(chunk.backed for chunk in self._kept)

    def _next_to_back(self) -> SharedChunk | None:
        """For the stock: a free chunk without memory, made if the budget has room for one; None if enough have theirs.
        Whoever takes it before it is backed gets it all the same. Raises what making a chunk raises."""
        with self._lock:
            ready = self._ready()
            if self._closed or ready >= self._ready_goal:
                return None
            if ready < len(self._kept):
                return next(chunk for chunk in reversed(self._kept) if not chunk.backed)
            if (len(self._taken) + self._making + ready + 1) * self.chunk_nbytes > self.budget_nbytes:
                return None
            self._kept.appendleft(self._new_chunk())
            return self._kept[0]

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
