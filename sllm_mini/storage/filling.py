"""One model on its way into the disk cache: space reserved, chunks written once their hashes are right, then published.

What an earlier attempt left, killed or cut off, is gone on with: a hash chunk of it is believed only when it is read and
its hash matches the index, so nothing is scanned beforehand and nothing half written is ever used. Where the file system
can reserve space it is reserved at once, so that a full disk is met before the first byte. Taught in chapter 03.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.checkpoint.index import Index

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def lock_folder(folder: Path, *, make: bool = False) -> int | None:
    """A descriptor that holds the lock of a folder until it is closed; None if somebody else holds it or the folder is
    not there."""
    if make:
        folder.mkdir(mode=0o700, exist_ok=True)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


class Filling:
    """See the module; made by `DiskCache.fill`. Safe from several threads until closed.

    A write that fails (a full disk, above all) ends the filling, removes what was written, and says why in `reason`:
    the load that fills it goes on without it."""

    def __init__(
        self, folder: Path, target: Path, index: Index, small_files: Mapping[str, bytes | Path], lock: int, locked: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.reason: str | None = None
        self._folder, self._target, self._index, self._locked = folder, target, index, locked
        self._change = threading.Lock()
        self._fds: list[int] = []
        self._direct_fds: list[int | None] = []
        self._present: list[bytearray] = []
        self._hoped: list[bytearray] = []
        try:
            for file, content in small_files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, folder / file)
                else:
                    (folder / file).write_bytes(content)
            for entry in index.partitions:
                fd = os.open(folder / entry.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._fds.append(fd)
                self._direct_fds.append(_open_direct(folder / entry.file))
                _reserve(fd, entry.file_nbytes)
                count = len(entry.digests) // DIGEST_HEX
                self._present.append(bytearray(count))
                self._hoped.append(_chunks_with_data(fd, entry.file_nbytes, count))
        except BaseException:
            for fd in self._open_fds():
                os.close(fd)
            raise
        self._missing = sum(len(present) for present in self._present)
        self.done_nbytes = 0
        """Bytes of chunks that are there and right."""
        self._lock = lock

    @property
    def complete(self) -> bool:
        """True once every chunk is there and right."""
        return self._missing == 0 and self.reason is None

    def read(self, partition: int, number: int, view: memoryview) -> bool:
        """Fills `view` with a hash chunk if it is there and right; costs a read and a hash of it."""
        if self.reason is not None or not self._hoped[partition][number]:
            return False
        try:
            right = os.preadv(self._fds[partition], [view], number * CHUNK_NBYTES) == len(view) and chunk_digest(view) == self._digest(partition, number)
        except OSError:
            right = False  # a broken disk: the remote has the bytes too
        with self._change:
            if right:
                self._mark(partition, number)
            else:
                self._hoped[partition][number] = 0
        return right

    def write(self, partition: int, number: int, view: memoryview) -> None:
        """Keeps a hash chunk, which must be right. Around the page cache where the memory is aligned for it: on a virtual
        machine whose memory the host had taken back, writing through it cost 3 s of processor time a GB, around it 0.05."""
        if self.reason is not None or self._present[partition][number]:
            return
        fd, direct = self._fds[partition], self._direct_fds[partition]
        at = 0
        while at < len(view):
            try:
                at += os.pwrite(fd if direct is None else direct, view[at:], number * CHUNK_NBYTES + at)
            except OSError as error:
                if direct is None or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    self.drop(f"the disk cache could not be filled: {error.strerror}")
                    return
                direct = None
        with self._change:
            self._mark(partition, number)
            self._hoped[partition][number] = 1

    def drop(self, reason: str) -> None:
        """Ends the filling and removes what was written."""
        with self._change:
            if self.reason is not None:
                return
            self.reason = reason
        with self._locked():
            shutil.rmtree(self._folder, ignore_errors=True)
        for fd in self._fds:
            with suppress(OSError):
                os.ftruncate(fd, 0)  # not closed: another thread may be writing, and the number may be given to others

    def publish(self) -> Path | None:
        """Makes it a checkpoint that others see, in one rename after an fsync, if it is complete; returns where, or None
        with the reason in `reason`."""
        if not self.complete:
            return None
        try:
            for name in os.listdir(self._folder):
                _sync(self._folder / name)
            _sync(self._folder)
            with self._locked():
                os.rename(self._folder, self._target)
            _sync(self._target.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                self.drop(f"the disk cache could not be filled: {error.strerror}")
                return None
            self.drop("another process has put it into the disk cache meanwhile")
        return self._target

    def close(self) -> None:
        """Ends it. What is not published stays for the next attempt."""
        with self._change:
            self.reason = self.reason or "it is closed"
            fds = self._open_fds()
            self._fds, self._direct_fds = [], []
            if self._lock >= 0:
                fds.append(self._lock)
            self._lock = -1
        for fd in fds:
            os.close(fd)

    def _open_fds(self) -> list[int]:
        return self._fds + [fd for fd in self._direct_fds if fd is not None]

    def _mark(self, partition: int, number: int) -> None:
        if not self._present[partition][number]:
            self._present[partition][number] = 1
            self._missing -= 1
            self.done_nbytes += min(CHUNK_NBYTES, self._index.partitions[partition].file_nbytes - number * CHUNK_NBYTES)

    def _digest(self, partition: int, number: int) -> str:
        return self._index.partitions[partition].digests[number * DIGEST_HEX : (number + 1) * DIGEST_HEX]


def _reserve(fd: int, nbytes: int) -> None:
    """Gives a file its size and, where the file system can, its space. Raises OSError if the disk is full."""
    size = os.fstat(fd).st_size
    while nbytes and _libc.fallocate(fd, 0, 0, nbytes) != 0:  # not posix_fallocate, which writes zeros where it cannot
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    if size != nbytes:
        os.ftruncate(fd, nbytes)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None  # a file system without direct I/O


def _chunks_with_data(fd: int, nbytes: int, count: int) -> bytearray:
    """1 for each hash chunk whose every byte has been written, as far as the file system knows."""
    found = bytearray(count)
    at = 0
    while at < nbytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole
            return bytearray(b"\1" * count)  # it does not say: every chunk is looked at
        first, last = -(-start // CHUNK_NBYTES), count if at >= nbytes else at // CHUNK_NBYTES
        found[first:last] = b"\1" * max(0, last - first)
    return found


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
