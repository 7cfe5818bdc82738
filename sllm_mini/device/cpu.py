"""The CPU as a device, and host memory done well: aligned, on huge pages, populated before it is needed.

A fresh 4 KiB-page mapping costs ~320 ms per GB in page faults, huge pages ~40 (chapter 02 measures both), so
`allocate` asks for huge pages and lets the caller populate while reads are already in flight. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
from typing import TYPE_CHECKING

from sllm_mini.device.base import ALIGNMENT, Buffer, Event, HostBuffer
from sllm_mini.errors import DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_HUGEPAGE = 14
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class HostMemory:
    """An anonymous private mapping that starts on a 2 MiB boundary.

    The mapping is unmapped when the last memoryview, tensor or array over it is gone: `close()` drops this object's
    own reference and never pulls memory from under a tensor. Not safe to close from several threads at once.
    """

    pinned = False

    def __init__(self, nbytes: int, *, huge_pages: bool = True, populate: bool = False) -> None:
        if nbytes < 0:
            raise ValueError(f"a buffer cannot have {nbytes} bytes; ask for 0 or more")
        self.nbytes = nbytes
        length = max(nbytes, 1) + ALIGNMENT
        try:
            mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host gave no mapping of {nbytes:,} bytes ({error}); {available_nbytes():,} are free") from error
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        skip = -start % ALIGNMENT
        self.address = start + skip
        self._view: memoryview | None = memoryview(mapping)[skip : skip + nbytes]
        if huge_pages and nbytes >= ALIGNMENT:
            # Advice only: a kernel without transparent huge pages refuses and 4 KiB pages serve.
            _libc.madvise(self.address, -(-nbytes // ALIGNMENT) * ALIGNMENT if skip + nbytes < length - ALIGNMENT else nbytes // _PAGE * _PAGE, _MADV_HUGEPAGE)
        if populate:
            self.populate(0, nbytes)

    @property
    def view(self) -> memoryview:
        if self._view is None:
            raise DeviceError("this host buffer was closed")
        return self._view

    def populate(self, offset: int, nbytes: int) -> None:
        """Backs `[offset, offset + nbytes)` with pages now, keeping what is already written there.

        Pages touched that the range shares with its neighbours are backed too. Raises OutOfMemoryError when the
        host has no page to give. Safe from several threads on disjoint ranges; the GIL is free meanwhile.
        """
        if nbytes <= 0:
            return
        start = (self.address + offset) // _PAGE * _PAGE
        end = self.address + offset + nbytes
        if _libc.madvise(start, end - start, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOMEM, errno.EFAULT):
            raise OutOfMemoryError(f"the host could not back {nbytes:,} bytes with memory; {available_nbytes():,} are free")
        view = self.view  # EINVAL: a kernel older than 5.14. Read and write back one byte a page.
        for at in range(offset, offset + nbytes, _PAGE):
            view[at] = view[at]

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
        _check_range("destination", dst, dst_offset, nbytes)
        _check_range("source", src, src_offset, nbytes)
        _libc.memmove(dst.address + dst_offset, src.address + src_offset, nbytes)

    def copy_to_host(self, dst: HostBuffer, dst_offset: int, src: Buffer, src_offset: int, nbytes: int) -> None:
        _check_range("destination", dst, dst_offset, nbytes)
        _check_range("source", src, src_offset, nbytes)
        _libc.memmove(dst.address + dst_offset, src.address + src_offset, nbytes)

    def record(self) -> Event:
        return _Done()

    def wait_for(self, event: Event) -> None:
        event.wait()

    def synchronize(self) -> None:
        return None

    def close(self) -> None:
        return None


def _check_range(what: str, buffer: Buffer, offset: int, nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > buffer.nbytes:
        raise DeviceError(f"bytes {offset:,} to {offset + nbytes:,} are outside the {what} buffer of {buffer.nbytes:,} bytes")


class CpuDevice:
    """The processor and its memory. Safe to use from several threads."""

    name = "cpu"
    is_host = True

    def free_nbytes(self) -> int:
        return available_nbytes()

    def allocate(self, nbytes: int) -> HostMemory:
        free = available_nbytes()
        if free and nbytes > free:
            raise OutOfMemoryError(f"the host has {free:,} bytes free and {nbytes:,} were asked for; free some or load a smaller model")
        return HostMemory(nbytes)

    def allocate_host(self, nbytes: int) -> HostMemory:
        return HostMemory(nbytes, populate=True)

    def stream(self) -> CpuStream:
        return CpuStream()

    def synchronize(self) -> None:
        return None


def cpu_count() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))
