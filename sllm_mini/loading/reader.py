"""Reads one partition, around the page cache where that is allowed and from it where it already holds the bytes.

Direct reads need the file offset, the length and the address to be multiples of the block; the format pads files so
that they always are. Where a file system refuses, the reader falls back by itself and says so. Taught in chapter 02.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import LoadError
from sllm_mini.loading.residency import cached_nbytes

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class Reader(Protocol):
    """One partition, wherever its bytes are: on a disk (`PartitionReader`) or behind a network. Safe from several threads
    until closed."""

    @property
    def path(self) -> Path | str:
        """What errors name: a file, or an address."""
        ...

    fallback: str | None
    """Why reads are not made as asked for; None if they are."""
    fd: int
    """The file, for mapping what `is_cached` says is there; -1 where there is none."""

    def is_cached(self, offset: int, nbytes: int) -> bool: ...

    def read(self, view: memoryview, offset: int, *, cached: bool) -> bool:
        """Fills `view` from `offset` of the partition; returns whether it went around the page cache."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HasReaders(Protocol):
    """A checkpoint whose bytes are not in its folder (see `storage.remote`). Its readers check every hash themselves."""

    def open_reader(self, number: int, *, direct: bool, stopped: Callable[[], bool]) -> Reader:
        """`stopped` says that nobody waits for its reads any more, so that one that hangs may end."""
        ...


def open_reader(checkpoint: Checkpoint, number: int, *, direct: bool, stopped: Callable[[], bool]) -> Reader:
    """The reader of partition `number`. Raises what opening its file raises."""
    if isinstance(checkpoint, HasReaders):
        return checkpoint.open_reader(number, direct=direct, stopped=stopped)
    return PartitionReader(checkpoint, number, direct=direct)


class PartitionReader:
    """One partition, open for buffered and, where possible, direct reads. Safe from several threads until closed."""

    def __init__(self, checkpoint: Checkpoint, number: int, *, direct: bool) -> None:
        self.path: Path = checkpoint.path / checkpoint.index.partitions[number].file
        self.fallback: str | None = None
        """Why reads are buffered although direct ones were asked for; None if they are not."""
        self._around_cache = direct
        self.fd = checkpoint.open_partition(number)
        self._direct_fd: int | None = None
        self._polluted: list[tuple[int, int]] = []
        if direct:
            try:
                self._direct_fd = checkpoint.open_partition(number, os.O_DIRECT)
            except OSError as error:
                self.fallback = f"direct I/O refused ({error.strerror})"
                self._forbid_reading_ahead()
            except BaseException:
                os.close(self.fd)
                raise

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """True if the page cache holds all of the range; False also where the system does not say."""
        return cached_nbytes(self.fd, offset, nbytes) == nbytes

    def read(self, view: memoryview, offset: int, *, cached: bool) -> bool:
        """Fills `view` from `offset` and returns whether the read went around the page cache.

        Where direct reads were asked for and are refused, what reads put into the page cache is dropped at the end. Raises LoadError, naming the file and the byte, for a read error or a file that ends early.
        """
        direct = self._direct_fd is not None and not cached
        at = 0
        while at < len(view):
            fd = self._direct_fd if direct and self._direct_fd is not None else self.fd
            try:
                count = os.preadv(fd, [view[at:]], offset + at)
            except OSError as error:
                if direct and error.errno in _NO_DIRECT:
                    self.fallback = f"a direct read was refused ({error.strerror})"
                    self._forbid_reading_ahead()
                    direct = False
                    continue
                raise LoadError(f"it cannot be read: {error.strerror}", path=self.path, offset=offset + at) from error
            if count == 0:
                raise LoadError(f"the file ends here; {len(view) - at:,} more bytes were expected", path=self.path, offset=offset + at)
            at += count
        if self._around_cache and not direct and not cached:
            self._polluted.append((offset, len(view)))
        return direct

    def _forbid_reading_ahead(self) -> None:
        """What the kernel reads ahead for one thread would look to another as if the page cache had held it before."""
        with suppress(OSError):  # advice: a file system may refuse it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        with suppress(OSError):  # advice: a file system may refuse it
            for offset, nbytes in self._polluted:  # not sooner: one thread's reading ahead would bring back another's
                os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        for fd in (self.fd, self._direct_fd):
            if fd is not None:
                os.close(fd)
        self._direct_fd = None


def read_whole(fd: int, into: memoryview, offset: int) -> None:
    """Fills `into` from `offset` of a file, as plainly as can be. Raises OSError for a read that fails, LoadError for a
    file that ends before that."""
    done = 0
    while done < len(into):
        got = os.preadv(fd, [into[done:]], offset + done)
        if got == 0:
            raise LoadError(f"the file ends here; {len(into) - done:,} more bytes were expected", offset=offset + done)
        done += got
