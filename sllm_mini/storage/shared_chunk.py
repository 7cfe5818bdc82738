"""A piece of memory that is handed to other processes and that only this process can write.

An anonymous file (`memfd`), sealed so that nobody who gets its descriptor can write, grow or cut it, not even with the
store's own user id. Costs its bytes and one descriptor; fresh memory costs 4 KiB page faults (~0.3 s/GB) or huge ones (a
tenth). Taught in chapters 03 and 05.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Literal

from sllm_mini.device.base import ALIGNMENT, Device, Pinned
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.errors import OutOfMemoryError, UnsupportedError
from sllm_mini.storage.mapping import AddressRange

if TYPE_CHECKING:
    import torch

HugePages = Literal["auto", "hugetlb", "never"]
"""`auto`: transparent huge pages where the kernel allows them for shared memory. `hugetlb`: pages that somebody reserved
(vm.nr_hugepages) as long as there are free ones, then as `auto`. `never`: 4 KiB pages."""

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1: whoever can write now still can, nobody else ever will
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15


class SharedChunk:
    """`nbytes` (a multiple of 2 MiB) of shared memory: writable here, by descriptor readable anywhere.

    A `HostBuffer`. `lent` must be set before its descriptor `fd` leaves the process. It has no memory before `back`.
    Raises OutOfMemoryError when the system gives no descriptor or no huge pages, UnsupportedError where memory cannot
    be sealed. Safe from several threads, but for reading and writing while it is closed.
    """

    def __init__(self, nbytes: int, *, huge_pages: HugePages = "auto", device: Device | None = None) -> None:
        self.nbytes = nbytes
        self.lent = False
        self.fresh = True
        """Nothing was ever written into it: it is zero."""
        self.hugetlb = False
        self._device = device
        self._pin: Pinned | None = None
        self._backing = threading.Lock()
        self.backed = False
        """Whether `back` has given it memory."""
        self._closed = False
        self._range = AddressRange(nbytes)
        if huge_pages == "hugetlb":
            try:
                self.fd = self._open(os.MFD_HUGETLB | os.MFD_HUGE_2MB)
                self.hugetlb = True
            except OutOfMemoryError:
                self.fd = self._open(0)  # none is free
        else:
            self.fd = self._open(0)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self._close_fd.atexit = False
        if not self.hugetlb:
            self._range.advise(_MADV_NOHUGEPAGE if huge_pages == "never" else _MADV_HUGEPAGE)

    def _open(self, flags: int) -> int:
        """A new memory file, mapped writable here, then sealed."""
        try:
            fd = os.memfd_create("sllm-chunk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        except OSError as error:
            raise OutOfMemoryError(f"the system gave no memory file of {self.nbytes:,} bytes ({error.strerror}); raise the limit on open files (ulimit -n) or use larger chunks") from error
        try:
            os.ftruncate(fd, self.nbytes)
            self._range.map(0, fd, self.nbytes, shared=True)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EINVAL:
                raise UnsupportedError("this kernel cannot seal memory against other processes' writes; use Linux 5.1 or newer") from error
            raise OutOfMemoryError(f"the system gave no memory file of {self.nbytes:,} bytes ({error.strerror}); ask for smaller chunks") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def address(self) -> int:
        return self._range.address

    @property
    def view(self) -> memoryview:
        return self._range.view

    @property
    def pinned(self) -> bool:
        return self._pin is not None and self._pin.pinned

    def back(self) -> None:
        """Gives it memory, and pins that for the GPU if there is one; does nothing the second time, or once it is closed.
        Raises OutOfMemoryError when the host has no more. The GIL is free meanwhile; a second caller waits for the first."""
        with self._backing:
            if self.backed or self._closed:
                return
            free = available_nbytes()
            # Linux promises more than it has: past the last free page comes the out-of-memory killer, not an error.
            if not self.hugetlb and free and self.nbytes > free:
                raise OutOfMemoryError(f"the host has {free:,} bytes free and a chunk needs {self.nbytes:,}; free some or give the store a smaller budget")
            self._range.populate(0, self.nbytes, write=True)
            if self._device is not None:
                self._pin = self._device.pin(self.address, self.nbytes)
            self.backed = True

    def clear(self, offset: int) -> None:
        """Makes everything from `offset` on zero, unless it still is: what another model left there is not lent."""
        if not self.fresh and offset < self.nbytes:
            ctypes.memset(self.address + offset, 0, self.nbytes - offset)

    def kernel_nbytes(self) -> int:
        """Memory that the kernel says the chunk has."""
        return os.fstat(self.fd).st_blocks * 512

    def page_nbytes(self) -> int:
        """The size of the pages it got: 2 MiB if the kernel maps most of it so, else the small size. Reads
        /proc/self/smaps, which takes milliseconds per GB of the process; 0 if it has no memory yet."""
        if not self.backed:
            return 0
        return ALIGNMENT if self.hugetlb or _huge_nbytes(self.address) * 2 > self.nbytes else mmap.PAGESIZE

    def tensor(self) -> torch.Tensor:
        return self._range.tensor()

    def close(self) -> None:
        """Gives up the descriptor, the pin and this object's hold on the memory. The kernel frees the memory once no
        view of it is left here and no process maps it or holds its descriptor. Waits for a thread that backs it."""
        with self._backing:
            self._closed = True
            pin, self._pin = self._pin, None
        try:
            if pin is not None:
                pin.close()  # before the addresses go
        finally:
            self._range.close()
            self._close_fd()


def _huge_nbytes(address: int) -> int:
    """Bytes of the mapping that starts at `address` which huge pages map; 0 where the kernel does not say."""
    start, inside, found = f"{address:x}-", False, 0
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if " " in name:  # the line that opens a mapping, "from-to rwxp …"
                if inside:
                    break
                inside = line.startswith(start)
            elif inside and name == "ShmemPmdMapped":
                found += int(value.split()[0]) * 1024
    return found
