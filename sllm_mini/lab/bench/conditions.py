"""The state of the machine before a sample: files in the page cache or out of it, memory that the host has backed.

No claim is taken on trust: residency is asked of the kernel before each sample. Shown in chapter 02.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sllm_mini.device.cpu import HostMemory, available_nbytes
from sllm_mini.errors import UnsupportedError
from sllm_mini.loading.residency import cached_nbytes, drop_cached

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PAGE_CACHE = "1"
_RESIDUE_SHARE = 0.01
_STEP_NBYTES = 8 << 20
_WARMING = 3


def make_cold(paths: Sequence[Path]) -> None:
    """Makes the page cache forget files. Raises UnsupportedError if more than 1 % of them stays, naming the folder; as
    root the whole page cache is dropped before giving up."""
    for path in paths:
        with _opened(path) as fd:
            drop_cached(fd)
    stays, total = resident_nbytes(paths)
    if stays > _RESIDUE_SHARE * total and os.geteuid() == 0:
        # Not at once: it would also make every worker read its libraries again, and that would be measured.
        with suppress(OSError):  # in a container root may not; what stays is said below
            _DROP_CACHES.write_text(_PAGE_CACHE, encoding="ascii")
        stays, total = resident_nbytes(paths)
    if stays > _RESIDUE_SHARE * total:
        raise UnsupportedError(f"{stays:,} of {total:,} bytes stay in the page cache, so it is not cold; close what maps {paths[0].parent}")


def make_warm(paths: Sequence[Path]) -> None:
    """Reads files into the page cache, more than once where the system drops parts meanwhile. Raises UnsupportedError if
    they do not stay there."""
    there, total = resident_nbytes(paths)
    for _ in range(_WARMING):
        if there == total:
            return
        for path in paths:
            with path.open("rb", buffering=0) as file:
                buffer = bytearray(_STEP_NBYTES)
                while file.readinto(buffer):
                    pass
        there, total = resident_nbytes(paths)
    if there < (1 - _RESIDUE_SHARE) * total:
        raise UnsupportedError(f"only {there:,} of {total:,} bytes stay in the page cache, so it is not warm; free memory")


def back_memory(nbytes: int) -> None:
    """Populates and frees that much memory (or most of what is available), so that a virtual machine's host has it
    backed: hosts take free memory back within seconds, and a load would measure the host instead."""
    available = available_nbytes()
    HostMemory(min(nbytes, available * 3 // 4) if available else nbytes, populate=True).close()


def resident_nbytes(paths: Sequence[Path]) -> tuple[int, int]:
    """(bytes in the page cache, bytes in all) of files. Raises UnsupportedError where the kernel does not say."""
    there = total = 0
    for path in paths:
        with _opened(path) as fd:
            size = os.fstat(fd).st_size
            found = cached_nbytes(fd, 0, size)
        if found is None:
            raise UnsupportedError(f"this kernel does not say what the page cache holds of {path}")
        there, total = there + found, total + size
    return there, total


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
