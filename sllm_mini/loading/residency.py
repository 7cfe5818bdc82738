"""What the page cache already holds of a file, asked without touching the disk, and how to make it forget.

cachestat (Linux 6.5) answers for a range in microseconds; where it is missing, mincore over a mapping does, unless it
does not tell the truth. A non-waiting read would answer too, but it starts readahead and so reads half the file twice. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache

_SYS_CACHESTAT = 451  # the same number on every architecture
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def cached_nbytes(fd: int, offset: int, nbytes: int) -> int | None:
    """Bytes of `[offset, offset + nbytes)` of a file that the page cache holds, in whole pages; None if this system
    does not say. `offset` must be a multiple of the page size. Safe from several threads."""
    if nbytes <= 0:
        return 0
    wanted = (ctypes.c_uint64 * 2)(offset, nbytes)
    found = (ctypes.c_uint64 * 5)()
    if _libc.syscall(_SYS_CACHESTAT, fd, wanted, found, 0) == 0:
        return min(found[0] * _PAGE, nbytes)
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EOPNOTSUPP):
        return None  # EPERM above all: of a file that is neither ours nor writable nothing is said
    return _mincore(fd, offset, nbytes)


def drop_cached(fd: int) -> None:
    """Makes the page cache forget a file, so that the next read asks the disk; pages that somebody maps stay. Safe
    from several threads."""
    os.fsync(fd)  # the kernel keeps pages that are not on the disk yet
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@cache
def _mincore_tells() -> bool:
    """Whether mincore says what is so: some sandboxes call every page resident, also one that nobody ever touched."""
    page = _libc.mmap(None, _PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if page in (None, ctypes.c_void_p(-1).value):
        return False
    try:
        answer = ctypes.create_string_buffer(1)
        return _libc.mincore(ctypes.c_void_p(page), _PAGE, answer) == 0 and not answer.raw[0] & 1
    finally:
        _libc.munmap(page, _PAGE)


def _mincore(fd: int, offset: int, nbytes: int) -> int | None:
    # Of a file that is neither ours nor writable mincore calls every page resident, so as not to tell others' secrets.
    if not _mincore_tells() or not (os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)):
        return None
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        pages = ctypes.create_string_buffer(-(-nbytes // _PAGE))
        if _libc.mincore(address, nbytes, pages) != 0:
            return None
        return min(sum(page & 1 for page in pages.raw) * _PAGE, nbytes)
    finally:
        _libc.munmap(address, nbytes)
