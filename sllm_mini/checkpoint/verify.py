"""Proves that every byte of a checkpoint is the byte that was written.

Reads each file once, in threads, and compares chunk digests, so the first damaged chunk is named with its place.
Costs one pass over the bytes at the speed of the disk. Taught in chapter 01.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.checkpoint.safetensors_file import FileBytes
from sllm_mini.device.cpu import HostMemory, cpu_count
from sllm_mini.errors import IntegrityError
from sllm_mini.types import Progress, ProgressCallback


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved: bytes and files whose hashes hold, and the seconds it took."""

    nbytes: int
    files: int
    seconds: float


def verify_checkpoint(
    path: str | os.PathLike[str] | Checkpoint, *, threads: int | None = None, progress: ProgressCallback | None = None
) -> VerifyReport:
    """Checks index, companions and every chunk of every partition.

    Raises what `open_checkpoint` raises, and IntegrityError naming file and byte for a chunk whose digest differs.
    Memory grows by 2 MiB a thread. `progress` is called on the reading threads, one call at a time. Safe from several
    threads.
    """
    started = time.monotonic()
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    for companion in checkpoint.index.companions:
        checkpoint.read_companion(companion.file)
    local = threading.local()
    lock = threading.Lock()
    stop = threading.Event()
    done = 0

    def check(fd: int, number: int, chunk: int) -> None:
        nonlocal done
        if stop.is_set():
            return
        if not hasattr(local, "memory"):
            local.memory = HostMemory(CHUNK_NBYTES)
        entry = checkpoint.index.partitions[number]
        at = chunk * CHUNK_NBYTES
        view = local.memory.view[: min(CHUNK_NBYTES, entry.file_nbytes - at)]
        FileBytes(fd, checkpoint.path / entry.file, 0, entry.file_nbytes).read_into(at, view)
        if chunk_digest(view) != entry.digests[chunk * DIGEST_HEX : (chunk + 1) * DIGEST_HEX]:
            raise IntegrityError(f"one or more of the {len(view):,} bytes from here are not those that were written", path=checkpoint.path / entry.file, offset=at)
        with lock:
            done += len(view)
            if progress is not None:
                progress(Progress(done, checkpoint.nbytes))

    fds: list[int] = []
    try:
        for number in range(len(checkpoint.index.partitions)):
            fds.append(checkpoint.open_partition(number))
        with ThreadPoolExecutor(threads or cpu_count(), thread_name_prefix="sllm-verify") as pool:
            jobs = [
                pool.submit(check, fd, number, chunk)
                for number, fd in enumerate(fds)
                for chunk in range(-(-checkpoint.index.partitions[number].file_nbytes // CHUNK_NBYTES))
            ]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        for job in jobs:
            job.result()
    finally:
        for fd in fds:
            os.close(fd)
    return VerifyReport(checkpoint.nbytes + sum(entry.nbytes for entry in checkpoint.index.companions), len(fds) + len(checkpoint.index.companions), time.monotonic() - started)
