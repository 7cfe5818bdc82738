"""How fast this disk can be read, and what the page cache gives instead.

The disk's limit is the best of a sweep of direct reads (O_DIRECT, several sizes and depths) into huge pages. Buffers
of 4 KiB pages would split each request into segments and cap it (2 to 3 times slower on the disk this was written
on), so a limit taken with them would flatter every loader. Beside it: what a plain buffered read gets from the same
disk, and what reading or mapping costs once the page cache holds the file. Costs a file of `file_nbytes`, unlinked
as soon as it is open (it vanishes with the process, whatever happens), and a little time over `budget_seconds`.
Taught in chapter 02.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import Event

import numpy as np

# Here and not where it is used: while numpy.random is being imported a Ctrl-C is swallowed, and numpy puts it off
# until the first use, which would be in the midst of measuring.
from numpy.random import default_rng

from sllm_mini.device.cpu import HostMemory, available_nbytes, cpu_count
from sllm_mini.errors import SllmError
from sllm_mini.loading.probe_kernel import DirectIo, measure_direct_io
from sllm_mini.loading.probe_samples import (
    Deadline,
    Measurement,
    Samples,
    Skipped,
    reason_of,
    run_threads,
    sample_in_rounds,
)
from sllm_mini.loading.reader import read_whole

MIB = 1 << 20
SWEEP = ((16 * MIB, 1), (16 * MIB, 2), (16 * MIB, 4), (4 * MIB, 4), (4 * MIB, 8))
"""(chunk bytes, threads): one thread keeps one request in flight, so threads are the queue's depth."""

_WRITE_NBYTES = 16 * MIB
_FREE_SPACE_SHARE = 4
_CACHED_MEMORY_SHARE = 4


@dataclass(frozen=True, slots=True)
class _ProbeFile:
    """An unlinked file of random bytes, opened twice: `direct_fd` is -1 where the file system refuses O_DIRECT."""

    nbytes: int
    buffered_fd: int
    direct_fd: int


def measure_disk(
    directory: str | os.PathLike[str],
    *,
    file_nbytes: int = 1 << 30,
    budget_seconds: float = 12.0,
    rounds: int = 3,
) -> Samples:
    """Measures the disk under `directory`: "disk_write", "disk_direct_read", "disk_buffered_read",
    "cached_read" and "cached_map".

    The file is smaller than asked for where the disk is slow or nearly full; every measurement says how many bytes
    it moved. Raises OSError if no file can be made in `directory`; everything else that fails is in `skipped`.
    """
    if file_nbytes < _WRITE_NBYTES:
        raise ValueError(
            f"a file of {file_nbytes:,} bytes is too small to measure a disk; use at least {_WRITE_NBYTES:,}"
        )
    direct_io = measure_direct_io(directory)
    with _probe_file(directory, direct_io) as (buffered_fd, direct_fd):
        space = os.fstatvfs(buffered_fd)
        wanted = min(file_nbytes, space.f_bavail * space.f_frsize // _FREE_SPACE_SHARE)
        try:
            written, write_seconds = _write(buffered_fd, direct_fd, wanted, Deadline(budget_seconds / 4))
        except OSError as error:
            return Samples(skipped=(Skipped("disk", f"the probe's file could not be written: {reason_of(error)}"),))
        if written == 0:
            return Samples(
                skipped=(
                    Skipped("disk", f"only {space.f_bavail * space.f_frsize:,} bytes are free on this disk; free some"),
                )
            )
        file = _ProbeFile(written, buffered_fd, direct_fd)
        samples = Samples((Measurement("disk_write", "written and flushed", written, (write_seconds,)),))
        if direct_fd < 0:
            samples += Samples(skipped=(Skipped("disk_direct_read", direct_io.reason),))
        else:
            samples += _direct_reads(file, Deadline(budget_seconds * 0.4), rounds)
        samples += _buffered_reads(file, Deadline(budget_seconds * 0.15), rounds)
        return samples + _cached_reads(file, Deadline(budget_seconds * 0.2), rounds)


@contextmanager
def _probe_file(directory: str | os.PathLike[str], direct_io: DirectIo) -> Iterator[tuple[int, int]]:
    fd, path = tempfile.mkstemp(dir=directory, prefix=".sllm-mini-probe-")
    direct_fd, linked = -1, True
    try:
        if direct_io.works:
            # Writing directly leaves the page cache as it was, so the first read really asks the disk.
            with suppress(OSError):
                direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        # A file system that will not unlink an open file keeps it until the end.
        with suppress(OSError):
            os.unlink(path)
            linked = False
        yield fd, direct_fd
    finally:
        os.close(fd)
        if direct_fd >= 0:
            os.close(direct_fd)
        if linked:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _write(buffered_fd: int, direct_fd: int, nbytes: int, deadline: Deadline) -> tuple[int, float]:
    """Writes random bytes, so that no disk can compress or share them, until `nbytes` or the deadline."""
    fd = direct_fd if direct_fd >= 0 else buffered_fd
    buffer = HostMemory(_WRITE_NBYTES, populate=True)
    words = np.frombuffer(buffer.view, dtype=np.uint64)
    generator = default_rng(0)
    written, seconds = 0, 0.0
    while written + _WRITE_NBYTES <= nbytes and not (written and deadline.passed):
        words[:] = generator.integers(0, 1 << 64, size=words.size, dtype=np.uint64)
        start = time.perf_counter()
        done = 0
        while done < _WRITE_NBYTES:
            done += os.pwrite(fd, buffer.view[done:], written + done)
        seconds += time.perf_counter() - start
        written += _WRITE_NBYTES
    start = time.perf_counter()
    os.fsync(fd)
    return written, max(seconds + time.perf_counter() - start, 1e-9)


def _direct_reads(file: _ProbeFile, deadline: Deadline, rounds: int) -> Samples:
    chunk, threads = SWEEP[-1]
    try:
        first = seconds_to_read(file.direct_fd, min(file.nbytes, chunk * threads), chunk, threads)
    except (OSError, SllmError) as error:
        return Samples(skipped=(Skipped("disk_direct_read", reason_of(error)),))
    rate = min(file.nbytes, chunk * threads) / max(first, 1e-9)
    # As much of the file as this disk can give every setting in every round; all settings read the same bytes.
    affordable = int(rate * deadline.remaining_seconds / (len(SWEEP) * rounds)) // _WRITE_NBYTES * _WRITE_NBYTES
    nbytes = min(file.nbytes, max(affordable, 4 * _WRITE_NBYTES))
    settings = {
        f"{chunk // MIB} MiB × {threads} thread{'s' * (threads > 1)}": partial(
            seconds_to_read, file.direct_fd, nbytes, chunk, threads
        )
        for chunk, threads in SWEEP
    }
    return sample_in_rounds("disk_direct_read", nbytes, settings, rounds=rounds, deadline=deadline)


def _buffered_reads(file: _ProbeFile, deadline: Deadline, rounds: int) -> Samples:
    nbytes = min(file.nbytes, 256 * MIB)

    def uncached() -> float:
        os.posix_fadvise(file.buffered_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return seconds_to_read(file.buffered_fd, nbytes, 16 * MIB, 1)

    return sample_in_rounds(
        "disk_buffered_read", nbytes, {"1 thread, not cached": uncached}, rounds=rounds, deadline=deadline
    )


def seconds_to_read(fd: int, nbytes: int, chunk_nbytes: int, threads: int) -> float:
    """Seconds to read the first `nbytes` in chunks that threads claim in order, each into huge pages of its own."""
    buffer = HostMemory(chunk_nbytes * threads, populate=True)
    claims = count()

    def work(worker: int, stop: Event) -> None:
        mine = buffer.view[worker * chunk_nbytes : (worker + 1) * chunk_nbytes]
        while not stop.is_set() and (at := next(claims) * chunk_nbytes) < nbytes:
            read_whole(fd, mine[: min(chunk_nbytes, nbytes - at)], at)

    return run_threads(threads, work)


def _cached_reads(file: _ProbeFile, deadline: Deadline, rounds: int) -> Samples:
    limit = available_nbytes() // _CACHED_MEMORY_SHARE or 64 * MIB
    nbytes = min(file.nbytes, 512 * MIB, max(limit // MIB * MIB, MIB))
    threads = cpu_count()
    try:
        # Into as much memory as a load would fill: a small buffer reused would sit in the processor's cache.
        target = HostMemory(nbytes, populate=True)
        _copy_cached(file.buffered_fd, target, 1)  # brings the file into the page cache
    except (OSError, SllmError) as error:
        return Samples(skipped=(Skipped("cached_read", reason_of(error)),))
    settings: dict[str, Callable[[], float]] = {"1 thread": partial(_copy_cached, file.buffered_fd, target, 1)}
    if threads > 1:
        settings[f"{threads} threads"] = partial(_copy_cached, file.buffered_fd, target, threads)
    samples = sample_in_rounds("cached_read", nbytes, settings, rounds=rounds, deadline=deadline)
    mapping = {"mapped and populated": partial(_map_cached, file.buffered_fd, nbytes)}
    return samples + sample_in_rounds("cached_map", nbytes, mapping, rounds=rounds, deadline=deadline)


def _copy_cached(fd: int, target: HostMemory, threads: int) -> float:
    claims, step = count(), 4 * MIB

    def work(worker: int, stop: Event) -> None:
        while not stop.is_set() and (at := next(claims) * step) < target.nbytes:
            read_whole(fd, target.view[at : at + step], at)

    return run_threads(threads, work)


def _map_cached(fd: int, nbytes: int) -> float:
    start = time.perf_counter()
    with mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ):
        return time.perf_counter() - start
