"""Two experiments with direct reads: how many bytes must be under way, and what the memory they land in must be like.

Samples of the settings that are compared are taken in turn. Each sample costs `sample_seconds`, or one read of
`nbytes`; memory is given back at once. Call from one thread. Shown in chapter 02; drawn by `read_plots`.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from sllm_mini.device.cpu import HostMemory
from sllm_mini.errors import LoadError
from sllm_mini.lab.bench.conditions import back_memory, make_cold
from sllm_mini.lab.counters import counted
from sllm_mini.loading.probe_samples import run_threads
from sllm_mini.loading.reader import read_whole

MIB = 1 << 20
CHUNKS = (MIB // 8, MIB, 16 * MIB)
THREADS = (1, 2, 4, 8)


@dataclass(slots=True)
class InFlight:
    """Reads of `chunk_nbytes` by `threads`, one sample per round: bytes per second, and the mean seconds one read took.
    `direct` is False where the file system refuses to read around the page cache."""

    chunk_nbytes: int
    threads: int
    direct: bool
    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes asked for and not yet there, at any moment."""
        return self.chunk_nbytes * self.threads

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(self.rates)

    @property
    def wait_seconds(self) -> float:
        return statistics.median(self.waits)


def measure_in_flight(
    path: Path, *, chunks: Sequence[int] = CHUNKS, threads: Sequence[int] = THREADS, rounds: int = 3, sample_seconds: float = 0.2
) -> list[InFlight]:
    """Reads a file round and round for `sample_seconds` in every setting, into resident huge pages.

    Raises LoadError for a file smaller than the largest chunk, OSError if it cannot be read.
    """
    if path.stat().st_size < max(chunks):
        raise LoadError(f"it is smaller than one chunk of {max(chunks):,} bytes; read a larger file", path=path)
    with _opened(path) as (fd, direct):
        found = [InFlight(chunk, number, direct) for chunk in chunks for number in threads]
        memory = HostMemory(max(point.nbytes for point in found), populate=True)
        for _ in range(rounds):
            for point in found:
                if not direct:
                    make_cold([path])
                _sample(fd, path.stat().st_size, memory, point, sample_seconds)
    return found


def _sample(fd: int, file_nbytes: int, memory: HostMemory, point: InFlight, sample_seconds: float) -> None:
    claims, size = count(), point.chunk_nbytes
    places = file_nbytes // size
    waits: list[float] = []
    end = time.perf_counter() + sample_seconds

    def work(worker: int, stop: threading.Event) -> None:
        mine = memory.view[worker * size : (worker + 1) * size]
        while not stop.is_set() and (start := time.perf_counter()) < end:
            read_whole(fd, mine, next(claims) % places * size)
            waits.append(time.perf_counter() - start)

    seconds = run_threads(point.threads, work)
    point.rates.append(len(waits) * size / seconds)
    point.waits.append(statistics.fmean(waits))


@dataclass(frozen=True, slots=True)
class Pages:
    """A kind of memory to read into. `ready`: its pages are made "never" (each by the read that first touches it),
    "before" the first read, or "beside" the reads, by a thread that keeps ahead of them."""

    name: str
    huge: bool
    ready: str


PAGES = (
    Pages("4 KiB pages, made by the reads", huge=False, ready="never"),
    Pages("4 KiB pages, made before", huge=False, ready="before"),
    Pages("huge pages, made by the reads", huge=True, ready="never"),
    Pages("huge pages, made before", huge=True, ready="before"),
    Pages("huge pages, made beside the reads", huge=True, ready="beside"),
)


@dataclass(slots=True)
class PageRun:
    """One read of `nbytes` into fresh memory: seconds until its pages were made (0 where the reads make them), seconds of
    the reads, page faults of both."""

    pages: Pages
    nbytes: int
    making_seconds: float
    reading_seconds: float
    faults: int

    @property
    def seconds(self) -> float:
        return self.making_seconds + self.reading_seconds


def measure_pages(path: Path, *, nbytes: int = 512 * MIB, threads: int = 4, chunk_nbytes: int = 16 * MIB, rounds: int = 3) -> list[PageRun]:
    """Reads the first `nbytes` of a file into each kind of memory, in turn. Raises OSError if it cannot be read."""
    nbytes = min(nbytes, path.stat().st_size // chunk_nbytes * chunk_nbytes)
    if nbytes == 0:
        raise LoadError(f"it is smaller than one chunk of {chunk_nbytes:,} bytes; read a larger file", path=path)
    runs: list[PageRun] = []
    with _opened(path) as (fd, direct):
        for _ in range(rounds):
            for pages in PAGES:
                if not direct:
                    make_cold([path])
                back_memory(nbytes)  # else a virtual machine's host is measured, which has to find the memory first
                runs.append(_fill(fd, pages, nbytes, threads, chunk_nbytes))
    return runs


def _fill(fd: int, pages: Pages, nbytes: int, threads: int, chunk_nbytes: int) -> PageRun:
    memory = HostMemory(nbytes, huge_pages=pages.huge)
    claims, made, ahead = count(), [threading.Event() for _ in range(nbytes // chunk_nbytes)], pages.ready == "beside"

    def work(worker: int, stop: threading.Event) -> None:
        if ahead and worker == threads:
            try:
                for number, event in enumerate(made):
                    memory.populate(number * chunk_nbytes, chunk_nbytes)
                    event.set()
            finally:
                for event in made:  # after an error nobody may wait for the rest
                    event.set()
            return
        while not stop.is_set() and (number := next(claims)) < len(made):
            if ahead:
                made[number].wait()
            read_whole(fd, memory.view[number * chunk_nbytes : (number + 1) * chunk_nbytes], number * chunk_nbytes)

    with counted() as counters:
        start = time.perf_counter()
        if pages.ready == "before":
            memory.populate(0, nbytes)
        making = time.perf_counter() - start if pages.ready == "before" else 0.0
        reading = run_threads(threads + ahead, work)
    memory.close()
    return PageRun(pages, nbytes, making, reading, counters.minor_faults + counters.major_faults)


def median_pages(runs: Sequence[PageRun]) -> list[PageRun]:
    """The run of each kind whose seconds are the median."""
    kinds = dict.fromkeys(run.pages.name for run in runs)
    own = {name: sorted((run for run in runs if run.pages.name == name), key=lambda run: run.seconds) for name in kinds}
    return [found[len(found) // 2] for found in own.values()]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """A descriptor for direct reads, or for buffered ones where those are refused, and which of them it is."""
    try:
        fd, direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError:
        fd, direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    try:
        yield fd, direct
    finally:
        os.close(fd)
