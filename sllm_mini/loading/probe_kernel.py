"""What this kernel and file system allow: direct I/O and its block size, huge pages, page-cache queries, io_uring.

Each question is asked of the kernel itself at run time, never of its version number: kernels that report 4.4 and
sandboxes that refuse single calls exist. A refusal is an answer (`reason`), never an exception. Costs a 128 KiB file
and a dozen system calls. Safe from several threads. Taught in chapters 01 and 02.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.device.cpu import HostMemory
from sllm_mini.loading.probe_samples import reason_of

_SYS_IO_URING_SETUP = 425  # these two numbers are the same on every architecture Linux runs on
_SYS_CACHESTAT = 451
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES, _STATX_DIO_MEM_ALIGN_AT, _STATX_DIO_OFFSET_ALIGN_AT = 256, 152, 156
_AT_FDCWD = -100
_MADV_POPULATE_WRITE = 23
_LARGEST_BLOCK_NBYTES = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class DirectIo:
    """Whether files in a directory can be read around the page cache. `block_nbytes` (0 if not) is what offsets,
    lengths and addresses must be multiples of, as found by trying; the two alignments are what statx says, 0 where
    it does not say (Linux < 6.1, and file systems that do not answer)."""

    works: bool
    block_nbytes: int
    memory_alignment_nbytes: int
    offset_alignment_nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing a kernel may or may not offer; `reason` says why not, in the kernel's own words."""

    name: str
    works: bool
    reason: str = ""


def measure_direct_io(directory: str | os.PathLike[str]) -> DirectIo:
    """Tries direct reads on a file of its own in `directory`. Raises OSError only if no file can be made there."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".sllm-mini-probe-") as file:
        file.write(bytes(2 * _LARGEST_BLOCK_NBYTES))
        file.flush()
        os.fsync(file.fileno())
        memory, offset = _statx_alignments(file.name)
        try:
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            return DirectIo(False, 0, memory, offset, f"the file system refuses O_DIRECT ({reason_of(error)})")
        try:
            return _try_direct_reads(fd, memory, offset)
        finally:
            os.close(fd)


def _try_direct_reads(fd: int, memory: int, offset: int) -> DirectIo:
    buffer = HostMemory(2 * _LARGEST_BLOCK_NBYTES, populate=True)
    reason = ""
    block = 512
    while block <= _LARGEST_BLOCK_NBYTES:
        # Memory, offset and length are exact multiples of `block` and of nothing larger: the least that must work.
        try:
            if os.preadv(fd, [buffer.view[block : 2 * block]], block) == block:
                return DirectIo(True, block, memory, offset, "")
            reason = "a direct read came back short"
        except OSError as error:
            reason = f"direct reads fail ({reason_of(error)})"
        block *= 2
    return DirectIo(False, 0, memory, offset, reason)


def _statx_alignments(path: str) -> tuple[int, int]:
    """(memory, offset) alignment that statx reports for direct I/O on `path`, zeros where it does not."""
    out = ctypes.create_string_buffer(_STATX_NBYTES)
    try:
        statx = _libc.statx
    except AttributeError:  # a C library older than the call
        return 0, 0
    if statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, out) != 0:
        return 0, 0
    if not int.from_bytes(out.raw[:4], sys.byteorder) & _STATX_DIOALIGN:
        return 0, 0
    return (
        int.from_bytes(out.raw[_STATX_DIO_MEM_ALIGN_AT : _STATX_DIO_MEM_ALIGN_AT + 4], sys.byteorder),
        int.from_bytes(out.raw[_STATX_DIO_OFFSET_ALIGN_AT : _STATX_DIO_OFFSET_ALIGN_AT + 4], sys.byteorder),
    )


def measure_abilities() -> tuple[Ability, ...]:
    """Asks the running kernel for each call a fast loader likes to have."""
    return (
        _ability("cachestat", _try_cachestat),
        _ability("mincore", _try_mincore),
        _ability("populate_write", _try_populate_write),
        _ability("io_uring", _try_io_uring),
    )


def _ability(name: str, attempt: Callable[[], None]) -> Ability:
    try:
        attempt()
    except (OSError, MemoryError) as error:
        return Ability(name, False, reason_of(error))
    return Ability(name, True)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _try_cachestat() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"\0")
        file.flush()
        span, counts = (ctypes.c_uint64 * 2)(0, 1), (ctypes.c_uint64 * 5)()
        _check(
            _libc.syscall(ctypes.c_long(_SYS_CACHESTAT), ctypes.c_uint(file.fileno()), span, counts, ctypes.c_uint(0))
        )


def _try_mincore() -> None:
    buffer = HostMemory(mmap.PAGESIZE, huge_pages=False, populate=True)
    resident = (ctypes.c_ubyte * 1)()
    _check(_libc.mincore(ctypes.c_void_p(buffer.address), ctypes.c_size_t(mmap.PAGESIZE), resident))
    if not resident[0] & 1:
        raise OSError(errno.ENOSYS, "the kernel answers mincore, but not truthfully")


def _try_populate_write() -> None:
    buffer = HostMemory(mmap.PAGESIZE, huge_pages=False)
    _check(_libc.madvise(ctypes.c_void_p(buffer.address), ctypes.c_size_t(mmap.PAGESIZE), _MADV_POPULATE_WRITE))


def _try_io_uring() -> None:
    params = ctypes.create_string_buffer(120)  # struct io_uring_params, all zero: no options asked for
    os.close(_check(_libc.syscall(ctypes.c_long(_SYS_IO_URING_SETUP), ctypes.c_uint(1), params)))


def huge_page_mode() -> str:
    """How the kernel hands out 2 MiB pages to ordinary memory: "always", "madvise" (when asked), "never", or
    "unknown" where it does not say."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii").split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def file_system_of(directory: str | os.PathLike[str]) -> str:
    """The type of the file system that `directory` lies on ("ext4", "tmpfs", "9p", …), "unknown" if not listed."""
    place = os.path.realpath(directory)
    found, longest = "unknown", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields, kinds = mount.split(), source.split()
        if len(fields) < 5 or not kinds:
            continue
        point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        # The list is in mounting order, so of two mounts on one point the later one is seen.
        if inside and len(point) >= longest:
            found, longest = kinds[0], len(point)
    return found
