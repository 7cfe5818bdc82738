"""Memory by descriptor: addresses into which chunks of shared memory are mapped, and given back exactly once.

The client's side of the store's DRAM (design.md calls it attaching): an image that lies in the store's chunks becomes one
contiguous range of this process, with no copy. Pages are shared with the store and with every other client until they
are written; a write copies its page first and is seen by nobody else. Costs one `mmap` a chunk, some microseconds, and
no memory but page tables (2 MiB per GiB of 4 KiB pages). Taught in chapter 05.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sllm_mini.device.base import ALIGNMENT, check_range, require_size
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MADV_POPULATE_READ = 22  # Linux 5.14
MADV_POPULATE_WRITE = 23
_FAILED = ctypes.c_void_p(-1).value
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class AddressRange:
    """`nbytes` of addresses from a 2 MiB boundary, unreadable until descriptors are mapped into them.

    They are unmapped when this object, closed or not, and every memoryview and tensor made from it are gone. Raises
    OutOfMemoryError if there are not as many addresses. Safe from several threads, but for `close`.
    """

    def __init__(self, nbytes: int) -> None:
        require_size(nbytes)
        self.nbytes = nbytes
        # Whole huge pages, so that the last one fits; what is skipped before the boundary stays reserved and unused.
        length = -(-nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        start = _libc.mmap(None, length, PROT_NONE, flags, -1, 0)
        if start in (None, _FAILED):
            raise OutOfMemoryError(f"the system gave no {nbytes:,} bytes of addresses ({os.strerror(ctypes.get_errno())}); raise the limit on virtual memory")
        self._address = -(-start // ALIGNMENT) * ALIGNMENT
        array = (ctypes.c_ubyte * nbytes).from_address(self._address)
        self._after: list[Callable[[], object]] = []
        # Every view and tensor made from the memoryview keeps the array. Not at exit: a tensor may outlive us.
        weakref.finalize(array, _unmap, start, length, os.getpid(), self._after).atexit = False
        self._view: memoryview | None = memoryview(array).cast("B")

    @property
    def address(self) -> int:
        if self._view is None:
            raise DeviceError("this mapped memory was closed; map it again")
        return self._address

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise DeviceError("this mapped memory was closed; map it again")
        return self._view

    def tensor(self) -> torch.Tensor:
        import torch

        return torch.frombuffer(self.view, dtype=torch.uint8) if self.nbytes else torch.empty(0, dtype=torch.uint8)

    def map(self, offset: int, fd: int, nbytes: int, *, shared: bool) -> None:
        """Maps the first `nbytes` of a descriptor at `offset`: `shared`, writes reach it; else they stay here.

        `offset` must be a multiple of 2 MiB, `nbytes` of the descriptor's page size. Raises DeviceError."""
        place = self.address + offset
        # No reserve: of memory that is shared until it is written, only what is written will ever be needed.
        flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | MAP_NORESERVE) | MAP_FIXED
        if _libc.mmap(place, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != place:
            code = ctypes.get_errno()
            kind = OutOfMemoryError if code == errno.ENOMEM else DeviceError
            raise kind(f"{nbytes:,} bytes of shared memory could not be mapped ({os.strerror(code)}); vm.max_map_count or too few huge pages may be the limit")

    def advise(self, advice: int) -> None:
        """Advice on all of it, which a kernel may refuse."""
        _libc.madvise(self.address, self.nbytes, advice)

    def populate(self, offset: int, nbytes: int, *, write: bool) -> None:
        """Faults the pages of a range in now: for `write` they are made if they are not there, else only mapped.

        What is written there stays. Raises OutOfMemoryError when the host has no page to give. The GIL is free
        meanwhile; safe from several threads."""
        check_range("mapped", self, offset, nbytes)
        if nbytes == 0:
            return
        start = (self.address + offset) // _PAGE * _PAGE
        end = self.address + offset + nbytes
        if _libc.madvise(start, end - start, MADV_POPULATE_WRITE if write else MADV_POPULATE_READ) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OutOfMemoryError(
                f"the host could not back {nbytes:,} bytes of shared memory ({os.strerror(code)}); {available_nbytes():,} are free, ask for less"
            )
        # A kernel older than 5.14: touch one byte a page.
        import numpy

        pages = numpy.frombuffer(self.view, dtype=numpy.uint8)[start - self._address : offset + nbytes : _PAGE]
        if write:
            numpy.bitwise_or(pages, 0, out=pages)
        else:
            pages.max()

    def when_unmapped(self, callback: Callable[[], object]) -> None:
        """`callback` is called once, right after the addresses are given back; see `MappedImage`."""
        self._after.append(callback)

    def close(self) -> None:
        self._view = None


def _unmap(start: int, length: int, owner: int, after: list[Callable[[], object]]) -> None:
    _libc.munmap(start, length)
    if os.getpid() == owner:  # a forked child has mappings of its own, but what they were lent for is its parent's
        for callback in after:
            callback()


class MappedImage:
    """An image in another process's chunks as one contiguous host buffer of this process; writes stay here.

    `fds` hold `chunk_nbytes` each, in order, and together the `nbytes` of the image (or of the prefix that is there);
    all are closed, also after an error. `on_unmap` is called exactly once, after the last tensor or view of the image is
    gone and its memory unmapped: on whatever thread that happens, perhaps in the middle of a collection, so it must not
    block nor take a lock (put something into a `queue.SimpleQueue`); it must not refer to the image. It is not called
    after an error here, nor at the end of the process, nor in a forked child. Private copies of huge pages of hugetlb
    kind need free ones: without them a write ends the process that wrote, and nobody else.

    Raises DeviceError for descriptors that do not hold what they should or that their owner could cut off while they
    are mapped, OutOfMemoryError if there are no addresses. Safe from several threads, but for `close`.
    """

    pinned = False

    def __init__(self, fds: Sequence[int], chunk_nbytes: int, nbytes: int, *, on_unmap: Callable[[], object] | None = None) -> None:
        self.nbytes = nbytes
        try:
            self._range = _map_private(fds, chunk_nbytes, nbytes)
        finally:
            for fd in fds:
                os.close(fd)
        if on_unmap is not None:
            self._range.when_unmapped(on_unmap)

    @property
    def address(self) -> int:
        return self._range.address

    @property
    def view(self) -> memoryview:
        return self._range.view

    def populate_read(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Maps the pages of a range (by default all) now, so that no reader stops for them; copies nothing. Costs
        about as much as the first touch it saves, without the traps. Raises OutOfMemoryError."""
        self._range.populate(offset, self.nbytes - offset if nbytes is None else nbytes, write=False)

    def tensor(self) -> torch.Tensor:
        """All of it as a flat uint8 tensor; writable, and a write is this process's own."""
        return self._range.tensor()

    def close(self) -> None:
        """Drops this object's hold: unmapped now if no tensor or view is left, else with the last of them."""
        self._range.close()


def _map_private(fds: Sequence[int], chunk_nbytes: int, nbytes: int) -> AddressRange:
    if chunk_nbytes <= 0 or chunk_nbytes % ALIGNMENT or len(fds) != -(-nbytes // chunk_nbytes):
        raise DeviceError(f"{len(fds)} chunks of {chunk_nbytes:,} bytes cannot be an image of {nbytes:,}; ask the store for it again")
    addresses = AddressRange(nbytes)
    for number, fd in enumerate(fds):
        offset = number * chunk_nbytes
        length = -(-min(chunk_nbytes, nbytes - offset) // ALIGNMENT) * ALIGNMENT
        try:
            fits = os.fstat(fd).st_size >= length and bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:  # no memory file at all
            fits = False
        if not fits:  # reading past the end of a file kills the reader, so it must never get shorter
            raise DeviceError(f"descriptor {number} of an image is no sealed chunk of {length:,} bytes; ask the store for it again")
        addresses.map(offset, fd, length, shared=False)
    return addresses
