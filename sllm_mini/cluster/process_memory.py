"""What one process costs in memory when it shares pages with others. Explained in chapter 05.

Resident size counts a shared page in full for every process that maps it, so the sum over forked processes is far more
than the machine has. What one more process costs is what is private to it; proportional size divides each shared page
by the number of its users and so adds up. Read from /proc/PID/smaps_rollup: some tens of milliseconds per GB in 4 KiB pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm_mini.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of one process: `resident`, `proportional` (PSS) and `private` (USS: what its end would give back)."""

    resident_nbytes: int
    proportional_nbytes: int
    private_nbytes: int


def memory_of(pid: int) -> ProcessMemory:
    """The memory of a process of this user, as the kernel counts it now. Safe from several threads.

    Raises UnsupportedError if the process is gone, is somebody else's, or the kernel does not say.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            next(file)  # the address range
            nbytes = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in file)}
    except (OSError, StopIteration) as error:
        raise UnsupportedError(f"/proc/{pid}/smaps_rollup cannot be read ({error}); check that process {pid} runs and is yours") from error
    return ProcessMemory(nbytes["Rss"], nbytes["Pss"], nbytes["Private_Clean"] + nbytes["Private_Dirty"])
