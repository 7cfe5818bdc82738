"""The CPU as a device, and host memory done well: aligned, on huge pages, populated before it is needed.

A fresh 4 KiB-page mapping costs ~320 ms per GB in page faults, huge pages ~40 (chapter 02 measures both), so
`allocate` asks for huge pages and lets the caller populate while reads are already in flight. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING

from sllm_mini.device.base import ALIGNMENT, Buffer, Event, HostBuffer, check_range, require_size
from sllm_mini.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

_MADV_POPULATE_READ = 22  # Linux 5.14
_MADV_POPULATE_WRITE = 23
_MAP_FIXED = 16
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memmove.restype = None


class HostMemory:
    """An anonymous private mapping that starts on a 2 MiB boundary.

    The mapping is unmapped when the last memoryview, tensor or array over it is gone: `close()` drops this object's
    own reference and never pulls memory from under a tensor. Not safe to close from several threads at once.
    """

    pinned = False

    def __init__(self, nbytes: int, *, huge_pages: bool = True, populate: bool = False) -> None:
        require_size(nbytes)
        self.nbytes = nbytes
        self._view: memoryview | None = None
        # Whole huge pages, and room to move the start to the next boundary: the advice below never leaves the mapping.
        huge_nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        try:
            mapping = mmap.mmap(-1, huge_nbytes + ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(
                f"the host gave no mapping of {nbytes:,} bytes ({error}); {available_nbytes():,} are free, ask for less"
            ) from error
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        skip = -start % ALIGNMENT
        self._address = start + skip
        self._view = memoryview(mapping)[skip : skip + nbytes]
        if nbytes >= ALIGNMENT:
            # Advice only: a kernel without transparent huge pages refuses and 4 KiB pages serve. Where its mode is
            # "always", memory that should have small pages must say so.
            _libc.madvise(self._address, huge_nbytes, _MADV_HUGEPAGE if huge_pages else _MADV_NOHUGEPAGE)
        if populate:
            self.populate(0, nbytes)

    @property
    def address(self) -> int:
        if self._view is None:
            raise DeviceError("this host buffer was closed; take a new one")
        return self._address

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise DeviceError("this host buffer was closed; take a new one")
        return self._view

    def populate(self, offset: int, nbytes: int) -> None:
        """Backs `[offset, offset + nbytes)` with pages now, keeping what is already written there.

        Pages touched that the range shares with its neighbours are backed too. Raises OutOfMemoryError when the
        host has no page to give. Safe from several threads on disjoint ranges; the GIL is free meanwhile.
        """
        check_range("host", self, offset, nbytes)
        if nbytes == 0:
            return
        start = (self.address + offset) // _PAGE * _PAGE
        end = self.address + offset + nbytes
        if _libc.madvise(start, end - start, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOMEM, errno.EFAULT):
            raise OutOfMemoryError(
                f"the host could not back {nbytes:,} bytes with memory; {available_nbytes():,} are free, ask for less"
            )
        # EINVAL: a kernel older than 5.14. Read and write back one byte a page, with the GIL free as above.
        import numpy

        pages = numpy.frombuffer(self.view, dtype=numpy.uint8)[start + _PAGE - self._address : offset + nbytes : _PAGE]
        numpy.bitwise_or(pages, 0, out=pages)
        self.view[offset] = self.view[offset]

    def map_file(self, offset: int, fd: int, file_offset: int, nbytes: int, *, populate: bool = True) -> None:
        """Replaces `[offset, offset + nbytes)` by a private mapping of a file: nothing is copied until it is written.

        Both offsets and the end must be multiples of the page size. Pages in the page cache are mapped at once, or,
        without `populate`, when `populate_mapped` is called or they are touched. A write goes to this process alone; a
        file that others truncate meanwhile kills the reader, so map only files that are replaced, never changed in
        place. Raises DeviceError if the kernel refuses.
        """
        check_range("host", self, offset, nbytes)
        if nbytes == 0:
            return
        place = self.address + offset
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if _libc.mmap(place, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, file_offset) != place:
            raise DeviceError(f"{nbytes:,} bytes of a file could not be mapped ({os.strerror(ctypes.get_errno())})")
        if populate:
            self.populate_mapped(offset, nbytes)

    def populate_mapped(self, offset: int, nbytes: int) -> None:
        """Maps the pages of a file in a range that `map_file` has put there, so that no use of them faults. Safe from
        several threads, which work side by side; the GIL is free meanwhile."""
        check_range("host", self, offset, nbytes)
        # Populating for reading maps what is cached; for writing (MAP_POPULATE) it would copy every page.
        _libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_READ)

    def tensor(self) -> torch.Tensor:
        import torch

        if self.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.view, dtype=torch.uint8)

    def close(self) -> None:
        self._view = None


def available_nbytes() -> int:
    """Bytes the kernel says can be had without swapping (MemAvailable), 0 where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _require_free(nbytes: int) -> None:
    # Linux promises more than it has: populating past the last free page wakes the out-of-memory killer, not us.
    free = available_nbytes()
    if free and nbytes > free:
        raise OutOfMemoryError(
            f"the host has {free:,} bytes free and {nbytes:,} were asked for; free some or load a smaller model"
        )


class _Done:
    """The event of a device whose work is finished when the call returns."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class CpuStream:
    """A stream whose work is done at once, in the calling thread, with the GIL released for the copy."""

    handle = 0

    def copy_from_host(self, dst: Buffer, dst_offset: int, src: HostBuffer, src_offset: int, nbytes: int) -> None:
        _copy(dst, dst_offset, src, src_offset, nbytes)

    def copy_to_host(self, dst: HostBuffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        _copy(dst, dst_offset, src, src_offset, nbytes)

    def copy_on_device(self, dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        _copy(dst, dst_offset, src, src_offset, nbytes)

    def record(self) -> Event:
        return _Done()

    def wait_for(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        return None

    def close(self) -> None:
        return None


def _copy(dst: Buffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
    check_range("destination", dst, dst_offset, nbytes)
    check_range("source", src, src_offset, nbytes)
    _libc.memmove(dst.address + dst_offset, src.address + src_offset, nbytes)


class HostRange:
    """A range of host memory that somebody else owns, left as it is: the CPU's answer to `Device.pin`."""

    __slots__ = ("address", "nbytes")
    pinned = False

    def __init__(self, address: int, nbytes: int) -> None:
        require_size(nbytes)
        self.address = address
        self.nbytes = nbytes

    def close(self) -> None:
        return None


class CpuDevice:
    """The processor and its memory. Safe to use from several threads."""

    name = "cpu"
    is_host = True

    def free_nbytes(self) -> int:
        return available_nbytes()

    def allocate(self, nbytes: int) -> HostMemory:
        _require_free(nbytes)
        return HostMemory(nbytes)

    def allocate_host(self, nbytes: int) -> HostMemory:
        _require_free(nbytes)
        return HostMemory(nbytes, populate=True)

    def pin(self, address: int, nbytes: int) -> HostRange:
        return HostRange(address, nbytes)

    def stream(self) -> CpuStream:
        return CpuStream()

    def synchronize(self) -> None:
        return None


def cpu_count() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))
