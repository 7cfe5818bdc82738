"""What the kernel counted while a piece of work ran: reads, bytes, page faults, memory.

Seconds alone say that one loader is faster than another; these say why. The figures are this whole process's, all its
threads included, so measure one thing at a time. Costs some 50 µs. Shown in chapters 01 and 02.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_IO = Path("/proc/self/io")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(slots=True)
class Counters:
    """`read_calls`, `read_nbytes`: read system calls and what they returned. `disk_nbytes`: what the disk was asked for,
    by calls or by page faults. `minor_faults`: pages made or found without waiting for the disk; `major_faults`: with
    waiting. `user_seconds`, `system_seconds`: processor time. `peak_nbytes`: the most that resident memory grew. None
    where this kernel does not say."""

    seconds: float = 0.0
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    minor_faults: int = 0
    major_faults: int = 0
    read_calls: int | None = None
    read_nbytes: int | None = None
    disk_nbytes: int | None = None
    peak_nbytes: int | None = None


@contextmanager
def counted() -> Iterator[Counters]:
    """Counts the block's work into what it yields, which is filled when the block ends, also by an error.

    with counted() as work:
        tensors = load_tensors(path)
    print(work.minor_faults)
    """
    counters = Counters()
    resettable = _reset_peak()
    memory = _status_nbytes("VmRSS")
    io = _io()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    try:
        yield counters
    finally:
        counters.seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        counters.user_seconds = after.ru_utime - usage.ru_utime
        counters.system_seconds = after.ru_stime - usage.ru_stime
        counters.minor_faults = after.ru_minflt - usage.ru_minflt
        counters.major_faults = after.ru_majflt - usage.ru_majflt
        now = _io()
        if io is not None and now is not None:
            # The first asking counts itself as one read of this very file.
            counters.read_calls = now["syscr"] - io["syscr"] - 1
            counters.read_nbytes = now["rchar"] - io["rchar"] - io["own"]
            counters.disk_nbytes = now["read_bytes"] - io["read_bytes"]
        peak = _status_nbytes("VmHWM")
        if resettable and memory is not None and peak is not None:
            counters.peak_nbytes = max(peak - memory, 0)


def _io() -> dict[str, int] | None:
    try:
        file = os.open(_IO, os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(file, 4096).decode("ascii")  # one call, so that it can be taken off again
    finally:
        os.close(file)
    found = {key: int(value) for key, _, value in (line.partition(":") for line in text.splitlines())}
    return found | {"own": len(text)}


def _status_nbytes(field: str) -> int | None:
    try:
        with _STATUS.open(encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _reset_peak() -> bool:
    """Makes the kernel's high-water mark of this process start again; False where it will not."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
