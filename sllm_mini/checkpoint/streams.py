"""Streams storages into files, slab by slab, on several threads: the one way this package writes large files.

Each thread fills one slab (16 MiB), hashes it if asked, and writes it once. Memory grows by threads × slab, whatever
the size of the files. Taught in chapter 01.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, chunk_digests
from sllm_mini.checkpoint.source import StorageReader
from sllm_mini.device.cpu import HostMemory
from sllm_mini.errors import WriteError
from sllm_mini.types import Progress, ProgressCallback

SLAB_NBYTES = 8 * CHUNK_NBYTES


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file to write: `storages[i]` from byte `starts[i]` (ascending, without overlap), zeros between them."""

    name: str
    nbytes: int
    starts: Sequence[int]
    storages: Sequence[StorageReader]


def write_files(
    folder: Path, plans: Sequence[FilePlan], *, threads: int, progress: ProgressCallback | None = None, digest: bool = False
) -> list[list[str]]:
    """Creates the files in `folder` and returns, with `digest`, the digests of each file's 2 MiB chunks.

    Raises WriteError if the disk has too little room, OSError for what the file system refuses later, and whatever a
    storage raises; files already begun are left to the caller (see `publish`).
    """
    _check_space(folder, sum(plan.nbytes for plan in plans))
    digests = [[""] * (-(-plan.nbytes // CHUNK_NBYTES) if digest else 0) for plan in plans]
    local = threading.local()
    lock = threading.Lock()
    stop = threading.Event()
    total = sum(plan.nbytes for plan in plans)
    done = 0

    def write_slab(fd: int, number: int, at: int) -> None:
        nonlocal done
        if stop.is_set():
            return
        if not hasattr(local, "memory"):
            local.memory = HostMemory(SLAB_NBYTES)
        view = local.memory.view[: min(SLAB_NBYTES, plans[number].nbytes - at)]
        _fill(view, at, plans[number])
        if digest:
            first = at // CHUNK_NBYTES
            found = chunk_digests(view)
            digests[number][first : first + len(found)] = found
        _write_all(fd, view, at)
        with lock:
            done += len(view)
            if progress is not None:
                progress(Progress(done, total))

    fds: list[int] = []
    try:
        for plan in plans:
            fds.append(os.open(folder / plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            os.ftruncate(fds[-1], plan.nbytes)
        with ThreadPoolExecutor(threads, thread_name_prefix="sllm-write") as pool:
            jobs = [
                pool.submit(write_slab, fd, number, at)
                for number, fd in enumerate(fds)
                for at in range(0, plans[number].nbytes, SLAB_NBYTES)
            ]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # on Ctrl-C or a failure, what is still queued ends at once
        for job in jobs:
            job.result()
    finally:
        for fd in fds:
            os.close(fd)
    return digests


def _check_space(folder: Path, nbytes: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if nbytes > free:
        raise WriteError(f"{nbytes:,} bytes are to be written and the disk has {free:,} free", path=folder.parent)


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


def _write_all(fd: int, view: memoryview, at: int) -> None:
    while len(view):
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
