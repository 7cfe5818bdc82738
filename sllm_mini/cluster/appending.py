"""A file that only grows, record by record, on a disk that may be full. Part of `journal` and of a live cluster's log; chapter 08.

What the disk does not take waits in memory, in order, and goes with the next `retry`: meanwhile the file ends after a whole record, or
in one that is cut off. Costs one `pwrite` a record (some 3 us), and the memory of what waits.
"""

from __future__ import annotations

import os
from pathlib import Path

MOST_NBYTES = 64 << 20


class AppendFile:
    """Goes on after the last byte of `path`, which is made where it is not there; with `new` it must not be there. Once more than
    `most_nbytes` wait it is `lost`: nothing is written any more, and the file stays as it is. Raises OSError where it cannot be opened. One
    thread at a time."""

    def __init__(self, path: Path, *, new: bool = False, most_nbytes: int = MOST_NBYTES) -> None:
        self.path, self.lost = path, False
        self.error = ""
        """Why something waits, or is lost."""
        self._most_nbytes = most_nbytes
        self._waiting, self._waiting_nbytes = list[bytes](), 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if new else 0), 0o600)
        self.nbytes = os.fstat(self._file).st_size
        """Of whole records, without those that wait."""

    def append(self, record: bytes) -> None:
        """Never raises; nothing once it is closed or lost."""
        if self._file < 0 or self.lost:
            return
        if not self.error and self._wrote(record):
            return
        self._waiting.append(record)
        self._waiting_nbytes += len(record)
        if self._waiting_nbytes > self._most_nbytes:
            self.lost = True
            self.error = f"{self.path} cannot be written, and no more than {self._most_nbytes:,} bytes wait; free some space and open the cluster again"
            self._waiting.clear()

    def retry(self) -> bool:
        """Whether all that was appended is in the file now."""
        if not self.error or self._file < 0 or self.lost:
            return not self.error
        if self._wrote(b"".join(self._waiting)):
            self._waiting.clear()
            self.error, self._waiting_nbytes = "", 0
        return not self.error

    def become(self, beside: Path) -> None:
        """Takes the place of the file; what waits goes on after that. Raises OSError, and nothing is changed."""
        file = os.open(beside, os.O_WRONLY | os.O_CLOEXEC)
        try:
            nbytes = os.fstat(file).st_size
            os.replace(beside, self.path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file, self.nbytes = file, nbytes

    def close(self) -> None:
        """After a last try."""
        self.retry()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _wrote(self, data: bytes) -> bool:
        try:
            written = os.pwrite(self._file, data, self.nbytes)  # at its place, so that a part of it is written over later
        except OSError as error:
            written, self.error = 0, f"{self.path} cannot be written ({error.strerror}); free some space"
        else:
            self.error = "" if written == len(data) else f"{self.path} cannot be written whole; free some space"
        if not self.error:
            self.nbytes += written
        return not self.error
