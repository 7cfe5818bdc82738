"""Streams storages into files, slab by slab, on several threads: the one way this package writes large files.

Each thread fills one slab (8 MiB), hashes it if asked, and writes it once, past the page cache where the file system
can: a new model is then as cold as a downloaded one after a reboot, and fresh cache pages, which cost more than the
disk on a machine short of memory, are not touched. Memory grows by threads × slab, whatever the size of the files.
Taught in chapter 01.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, chunk_digests
from sllm_mini.checkpoint.index import BLOCK_NBYTES
from sllm_mini.checkpoint.layout import align_up
from sllm_mini.checkpoint.source import StorageReader
from sllm_mini.device.cpu import HostMemory, cpu_count
from sllm_mini.errors import WriteError
from sllm_mini.types import Progress, ProgressCallback

SLAB_NBYTES = 4 * CHUNK_NBYTES
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_MAX_THREADS = 16  # beyond, memory would grow for nothing


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file to write: `storages[i]` from byte `starts[i]` (ascending, without overlap), zeros between them."""

    name: str
    nbytes: int
    starts: Sequence[int]
    storages: Sequence[StorageReader]


def write_files(
    folder: Path, plans: Sequence[FilePlan], *, threads: int | None = None, progress: ProgressCallback | None = None, digest: bool = False
) -> list[list[str]]:
    """Creates the files in `folder` and returns, with `digest`, the digests of each file's 2 MiB chunks.

    `threads`: None for two per processor, one filling while the other writes; `progress` is called on the calling
    thread. Space is taken first. Raises WriteError if the disk has too little room, OSError for what the file system
    refuses, and whatever a storage raises; files already begun are left to the caller (see `publish`).
    """
    total = sum(plan.nbytes for plan in plans)
    _check_space(folder, total)
    digests = [[""] * (-(-plan.nbytes // CHUNK_NBYTES) if digest else 0) for plan in plans]
    local = threading.local()
    stop = threading.Event()

    def write_slab(fd: int, number: int, at: int) -> int:
        if stop.is_set():
            return 0
        if not hasattr(local, "memory"):
            local.memory = HostMemory(SLAB_NBYTES)
        nbytes = min(SLAB_NBYTES, plans[number].nbytes - at)
        view = local.memory.view[:nbytes]
        _fill(view, at, plans[number])
        if digest:
            first = at // CHUNK_NBYTES
            found = chunk_digests(view)
            digests[number][first : first + len(found)] = found
        _write_all(fd, local.memory.view[: align_up(nbytes, BLOCK_NBYTES)], at)
        return nbytes

    fds: list[int] = []
    try:
        for plan in plans:
            fds.append(os.open(folder / plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            os.ftruncate(fds[-1], plan.nbytes)
            _reserve(fds[-1], plan.nbytes)
            _set_direct(fds[-1], True)
        with ThreadPoolExecutor(threads or min(2 * cpu_count(), _MAX_THREADS), thread_name_prefix="sllm-write") as pool:
            places = [(fd, number, at) for number, fd in enumerate(fds) for at in range(0, plans[number].nbytes, SLAB_NBYTES)]
            try:
                done = 0
                for job in as_completed([pool.submit(write_slab, *place) for place in places]):
                    done += job.result()
                    if progress is not None:
                        progress(Progress(done, total))
            finally:
                stop.set()  # on Ctrl-C or a failure, what is still queued ends at once
        for plan, fd in zip(plans, fds, strict=True):
            if plan.nbytes % BLOCK_NBYTES:
                os.ftruncate(fd, plan.nbytes)  # its last block was written whole
    finally:
        for fd in fds:
            os.close(fd)
    return digests


def _check_space(folder: Path, nbytes: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and nbytes > free:  # a file system without a size of its own says 0
        raise WriteError(f"{nbytes:,} bytes are to be written and the disk has {free:,} free", path=folder.parent)


def _reserve(fd: int, nbytes: int) -> None:
    """Takes a file's space now, where the file system can. Not os.posix_fallocate: where it cannot (9p, NFS 3, ramfs),
    that writes to every block instead, and fails on a file open for writing only."""
    if nbytes and _libc.fallocate(fd, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))


def _fill(view: memoryview, at: int, plan: FilePlan) -> None:
    """Fills `view` with file bytes `[at, at + len(view))`."""
    filled = 0
    number = max(bisect_right(plan.starts, at) - 1, 0)
    while number < len(plan.starts) and plan.starts[number] < at + len(view):
        start, storage = plan.starts[number], plan.storages[number]
        low, high = max(start, at), min(start + storage.nbytes, at + len(view))
        if low < high:
            view[filled : low - at] = bytes(low - at - filled)
            storage.read_into(low - start, view[low - at : high - at])
            filled = high - at
        number += 1
    view[filled:] = bytes(len(view) - filled)


def _set_direct(fd: int, on: bool) -> None:
    """Switches direct writes on, where the file system has them, or off."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _write_all(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        try:
            written = os.pwrite(fd, view, at)
        except OSError as error:
            # The file system wants larger blocks than ours, or wrote part of one: the page cache takes any bytes.
            if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(fd, False)
            continue
        view, at = view[written:], at + written
