"""An opened checkpoint: its checked index and safe access to its files. Reads no tensor bytes.

Files are opened relative to the directory and never through a symbolic link, so a checkpoint cannot point outside
itself. Costs one read of the index and one stat per file. Taught in chapter 01.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.hashing import bytes_digest
from sllm_mini.checkpoint.index import INDEX_FILE, MAX_INDEX_NBYTES, CompanionEntry, Index, decode_index
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose index was checked against its files. Immutable, safe to use from several threads."""

    path: Path
    index: Index

    @property
    def nbytes(self) -> int:
        """Bytes of all partitions, padding included."""
        return self.index.total_nbytes

    def open_partition(self, number: int, flags: int = 0) -> int:
        """A read-only descriptor of a data file (the caller closes it), its size checked again."""
        entry = self.index.partitions[number]
        fd = _open(self.path / entry.file, flags)
        try:
            _check_size(fd, self.path / entry.file, entry.file_nbytes)
        except CheckpointError:
            os.close(fd)
            raise
        return fd

    def read_companion(self, file: str) -> bytes:
        """The bytes of one companion file, checked against their digest."""
        entry = next((entry for entry in self.index.companions if entry.file == file), None)
        if entry is None:
            raise CheckpointError(f"the checkpoint carries no {file}", path=self.path)
        return _read_companion(self.path, entry)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint directory.

    Raises CheckpointError if there is none, FormatError if its index breaks a rule, IntegrityError if a file is
    missing, truncated, too long, or not listed in the index.
    """
    directory = Path(path)
    index_path = directory / INDEX_FILE
    if not directory.is_dir():
        raise CheckpointError("there is no such directory" if not directory.exists() else "it is not a directory", path=directory)
    if not os.path.lexists(index_path):
        hint = "; convert it first with `sllm-mini convert`" if any(directory.glob("*.safetensors")) else ""
        raise CheckpointError(f"it holds no {INDEX_FILE}, so it is not a checkpoint{hint}", path=directory)
    index = decode_index(_read_small(index_path, MAX_INDEX_NBYTES), index_path)
    sizes = {entry.file: entry.file_nbytes for entry in index.partitions} | {entry.file: entry.nbytes for entry in index.companions}
    for file, nbytes in sizes.items():
        fd = _open(directory / file, 0)
        try:
            _check_size(fd, directory / file, nbytes)
        finally:
            os.close(fd)
    known = {INDEX_FILE, *sizes}
    extra = sorted(file for file in os.listdir(directory) if file.startswith("data-") and file not in known)
    if extra:
        raise IntegrityError("it is not listed in the index; remove it or convert the model again", path=directory / extra[0])
    return Checkpoint(directory, index)


def _open(path: Path, flags: int) -> int:
    try:
        # O_NONBLOCK: a pipe put in a file's place must not hang us; regular files ignore it.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except FileNotFoundError as error:
        raise IntegrityError("the index names it but it is missing", path=path) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError("it is a symbolic link; a checkpoint holds plain files only", path=path) from error
        if error.errno == errno.EINVAL and flags:
            raise
        raise CheckpointError(f"it cannot be opened: {error.strerror}", path=path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError("it is not a plain file", path=path)
    return fd


def _check_size(fd: int, path: Path, nbytes: int) -> None:
    size = os.fstat(fd).st_size
    if size != nbytes:
        what = "truncated" if size < nbytes else "too long"
        raise IntegrityError(f"it is {what}: {size:,} bytes instead of {nbytes:,}", path=path, offset=min(size, nbytes))


def _read_small(path: Path, limit: int) -> bytes:
    fd = _open(path, 0)
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_size > limit:
            raise FormatError(f"it has {os.fstat(fd).st_size:,} bytes; at most {limit:,} are read", path=path)
        try:
            return file.read()
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error.strerror}", path=path) from error


def _read_companion(directory: Path, entry: CompanionEntry) -> bytes:
    content = _read_small(directory / entry.file, max(entry.nbytes, 1))
    if len(content) != entry.nbytes or bytes_digest(content) != entry.digest:
        raise IntegrityError("its bytes are not those that were written; convert the model again", path=directory / entry.file)
    return content
