"""An opened checkpoint: its checked index and safe access to its files. Reads no tensor bytes.

Files are opened relative to the open directory and never through a symbolic link, so a checkpoint cannot point outside
itself, and a checkpoint that is exchanged meanwhile is never read as a mixture of old and new. Costs one read of the
index and one stat per file. Taught in chapter 01.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sllm_mini.checkpoint.hashing import bytes_digest
from sllm_mini.checkpoint.index import INDEX_FILE, MAX_INDEX_NBYTES, Index, decode_index, encode_index
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError

_READ_BY_NAME = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".safetensors", ".bin")


_REPLACED = "the checkpoint was replaced or removed since it was opened; open it again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose index was checked against its files. Immutable, safe to use from several threads.

    It holds no descriptor. Each file is opened when it is asked for, and only if `index.json` is still the one read
    (`identity`: its device, inode and time of change); else CheckpointError says that it was replaced.
    """

    path: Path
    index: Index
    identity: tuple[int, int, int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all partitions, padding included."""
        return self.index.total_nbytes

    @property
    def digest(self) -> str:
        """A name for these weights, 16 hexadecimal characters: equal wherever the same checkpoint lies. Encodes the index."""
        return bytes_digest(encode_index(self.index))

    def open_partition(self, number: int, flags: int = 0) -> int:
        """A read-only descriptor of a data file (the caller closes it), its size checked again.

        A file system that refuses `flags` (such as O_DIRECT) raises its own OSError, everything else CheckpointError.
        """
        entry = self.index.partitions[number]
        with self._folder() as folder:
            return _open_sized(folder, self.path / entry.file, entry.file_nbytes, flags)

    def read_companion(self, file: str) -> bytes:
        """The bytes of one companion file, checked against their digest."""
        entry = next((entry for entry in self.index.companions if entry.file == file), None)
        if entry is None:
            raise CheckpointError(f"the checkpoint carries no {file}", path=self.path)
        path = self.path / entry.file
        with self._folder() as folder:
            content = _read(_open_sized(folder, path, entry.nbytes), path, entry.nbytes)
        if len(content) != entry.nbytes or bytes_digest(content) != entry.digest:
            raise IntegrityError("its bytes are not those that were written; convert the model again", path=path)
        return content

    @contextmanager
    def _folder(self) -> Iterator[int]:
        with _open_folder(self.path) as folder:
            try:
                found = _identity(os.stat(INDEX_FILE, dir_fd=folder, follow_symlinks=False))
            except OSError:
                found = None
            if found != self.identity:
                raise CheckpointError(_REPLACED, path=self.path)
            try:
                yield folder
            except IntegrityError as error:
                if _was_replaced(self.path, folder):  # just now, and the old files are being removed
                    raise CheckpointError(_REPLACED, path=self.path) from error
                raise


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint directory.

    Raises CheckpointError if there is none, FormatError if its index breaks a rule, IntegrityError if a file is
    missing, truncated, too long, or not listed in the index. Safe from several threads.
    """
    directory = Path(path)
    while True:
        with _open_folder(directory) as folder:
            try:
                return _open_whole(directory, folder)
            except CheckpointError:
                if not _was_replaced(directory, folder):
                    raise  # else a writer exchanged it while we looked: look at the new one


def _open_whole(directory: Path, folder: int) -> Checkpoint:
    present = os.listdir(folder)
    if INDEX_FILE not in present:
        hint = "; convert it first with `sllm-mini convert`" if any(file.endswith(".safetensors") for file in present) else ""
        raise CheckpointError(f"it holds no {INDEX_FILE}, so it is not a checkpoint{hint}", path=directory)
    index_path = directory / INDEX_FILE
    fd = _open(folder, index_path)
    identity = _identity(_stat(fd, index_path))
    index = decode_index(_read(fd, index_path, MAX_INDEX_NBYTES), index_path)
    sizes = {entry.file: entry.file_nbytes for entry in index.partitions} | {entry.file: entry.nbytes for entry in index.companions}
    for file, nbytes in sizes.items():
        os.close(_open_sized(folder, directory / file, nbytes))
    # What no hash covers must not be believed: libraries read such files by name when a model is built from a directory.
    extra = sorted(file for file in present if (file.startswith("data-") or file.endswith(_READ_BY_NAME)) and file not in {INDEX_FILE, *sizes})
    if extra:
        raise IntegrityError("it is not listed in the index; remove it or convert the model again", path=directory / extra[0])
    return Checkpoint(directory, index, identity)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    # The time too, since the inode number of a removed file may be given to a new one.
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _was_replaced(directory: Path, folder: int) -> bool:
    try:
        return not os.path.samestat(os.stat(directory), os.fstat(folder))
    except OSError:
        return False


@contextmanager
def _open_folder(directory: Path) -> Iterator[int]:
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such directory", path=directory) from error
    except NotADirectoryError as error:
        raise CheckpointError("it is not a directory", path=directory) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"it cannot be opened: {reason}", path=directory) from error
    try:
        yield folder
    finally:
        os.close(folder)


def _open(folder: int, path: Path, flags: int = 0) -> int:
    try:
        # O_NONBLOCK: a pipe put in a file's place must not hang us; regular files ignore it.
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, dir_fd=folder)
    except FileNotFoundError as error:
        raise IntegrityError("the index names it but it is missing", path=path) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError("it is a symbolic link; a checkpoint holds plain files only", path=path) from error
        if error.errno == errno.EINVAL and flags:
            raise
        raise CheckpointError(f"it cannot be opened: {error.strerror}", path=path) from error
    if not stat.S_ISREG(_stat(fd, path).st_mode):
        os.close(fd)
        raise FormatError("it is not a plain file", path=path)
    return fd


def _stat(fd: int, path: Path) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:  # a network file system may have lost it
        os.close(fd)
        raise CheckpointError(f"it cannot be read: {error.strerror}", path=path) from error


def _open_sized(folder: int, path: Path, nbytes: int, flags: int = 0) -> int:
    fd = _open(folder, path, flags)
    size = _stat(fd, path).st_size
    if size != nbytes:
        os.close(fd)
        what = "truncated" if size < nbytes else "too long"
        raise IntegrityError(f"it is {what}: {size:,} bytes instead of {nbytes:,}", path=path, offset=min(size, nbytes))
    return fd


def _read(fd: int, path: Path, limit: int) -> bytes:
    """All bytes of a small file; closes its descriptor."""
    size = _stat(fd, path).st_size
    with open(fd, "rb") as file:
        if size > limit:
            raise FormatError(f"it has {size:,} bytes; at most {limit:,} are read", path=path)
        try:
            return file.read(size + 1)
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error.strerror}", path=path) from error
