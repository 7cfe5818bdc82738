"""Models kept on the local disk within a budget: a folder of whole checkpoints, and downloads that are still hidden.

`FOLDER/NAME/` is a published checkpoint like any other; `FOLDER/.NAME.filling/` one that is being filled, or whose
filling was killed (`filling`). The folder is the only record: what it costs is what the file system says it occupies.
Several processes may share it: a lock on the folder orders them, and a lock on a hidden folder says that its filler is
alive. Whom to evict is the caller's choice (`sllm_mini.eviction`). Taught in chapter 03; the local SSD tier of
ServerlessLLM (OSDI'24).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.index import INDEX_FILE, Index
from sllm_mini.checkpoint.layout import align_up
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError, UnsupportedError, WriteError
from sllm_mini.storage.filling import Filling, lock_folder

_BLOCK = 4096
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_FILLING = ".filling"
_REMOVED = ".removed"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One entry: `nbytes` on the disk, `last_used` in seconds of the wall clock, `complete` if it can be loaded (else a
    download to be gone on with), `busy` if somebody is filling it now: then it cannot be removed."""

    name: str
    path: Path
    nbytes: int
    last_used: float
    complete: bool
    busy: bool


class DiskCache:
    """See the module. Makes `folder` if it is not there. Raises ValueError for a budget below one block, UnsupportedError
    for a folder that other users may write to, WriteError if it cannot be made. Safe from several threads and processes."""

    def __init__(self, folder: str | os.PathLike[str], budget_nbytes: int) -> None:
        if budget_nbytes < _BLOCK:
            raise ValueError(f"a disk cache of {budget_nbytes:,} bytes holds nothing; give it at least {_BLOCK:,}")
        self.folder = Path(os.path.abspath(folder))
        self.budget_nbytes = budget_nbytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except OSError as error:
            raise WriteError(f"it cannot be made: {error.strerror}", path=self.folder) from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise UnsupportedError(f"{self.folder}: other users may write to it, so what it holds cannot be trusted; use a folder of your own (chmod go-w)")
        with self._locked():
            for path in self._hidden(_REMOVED):
                _delete(path)

    @property
    def used_nbytes(self) -> int:
        """What the file system says that all entries occupy; of a download, all that it has reserved."""
        return sum(_occupied(path) for path in self._folders() if not path.name.endswith(_REMOVED))

    @property
    def free_nbytes(self) -> int:
        """What the budget has left; negative if the budget was made smaller than what is there."""
        return self.budget_nbytes - self.used_nbytes

    def entries(self) -> list[CachedModel]:
        """All entries, the longest unused first."""
        found = []
        with self._locked():  # asking whether one is busy takes its lock for a moment
            for path in self._folders():
                hidden = path.name.startswith(".")
                if hidden and not path.name.endswith(_FILLING):
                    continue
                try:
                    used = path.stat().st_mtime
                except FileNotFoundError:
                    continue  # its filler gave it up just now
                name = path.name[1 : -len(_FILLING)] if hidden else path.name
                found.append(CachedModel(name, path, _occupied(path), used, complete=not hidden, busy=hidden and _is_busy(path)))
        return sorted(found, key=lambda entry: (entry.last_used, entry.name))

    def holds(self, name: str) -> bool:
        """Whether a whole checkpoint of a name is there; looks no further, and is no use of it."""
        return (self.folder / _checked(name) / INDEX_FILE).is_file()

    def find(self, name: str) -> Checkpoint | None:
        """The whole checkpoint of a name, now the last used one, or None. One whose index or file sizes are wrong is
        removed; wrong bytes are found when it is loaded: then `remove` it and load again."""
        path = self.folder / _checked(name)
        try:
            checkpoint = open_checkpoint(path)
        except (FormatError, IntegrityError):
            self.remove(name)
            return None
        except CheckpointError:
            return None
        with suppress(OSError):
            os.utime(path)
        return checkpoint

    def lacking_nbytes(self, index: Index, name: str) -> int:
        """How many bytes must be removed before `fill` has room for a model; 0 if it has. What an earlier attempt has
        reserved for it counts as room. A model for which more is lacking than there is can never be cached."""
        needed = _needed(index)
        kept = _occupied(self._filling(name))
        return max(0, self.used_nbytes - kept + max(needed, kept) - self.budget_nbytes)

    def remove(self, name: str) -> int:
        """Removes an entry, whole or half filled, and returns the bytes it gave back; 0 if there is none or it is being
        filled. Files of it that are open stay readable and their space taken until they are closed, so a load that runs
        ends well; a checkpoint opened before cannot be loaded again, which says that it was removed."""
        with self._locked():
            return self._remove(self.folder / _checked(name)) + self._remove_abandoned(self._filling(name))

    def fill(self, name: str, index: Index, small_files: Mapping[str, bytes | Path], *, replaces: str = "") -> Filling | str:
        """Reserves the disk space of a model and returns what to fill it with, or one clause that says why not: the
        budget or the disk has no room, it is there already, or another process is filling it (then read the remote
        without a cache). Abandoned downloads whose names start with `replaces` are removed first: other versions of
        it. `small_files` are the index and the companions. Raises ValueError for a name that is no plain file name."""
        target, folder = self.folder / _checked(name), self._filling(name)
        with self._locked():
            if target.exists():
                return "the disk cache holds it already"
            for path in self._hidden(_FILLING):
                if replaces and path != folder and path.name.startswith(f".{replaces}"):
                    self._remove_abandoned(path)
            lock = lock_folder(folder, make=True)
            if lock is None:
                return "another process is filling the disk cache with it"
            lacking = self.lacking_nbytes(index, name)
            if lacking:
                os.close(lock)
                if not any(folder.iterdir()):
                    folder.rmdir()
                return f"the disk cache of {self.budget_nbytes:,} bytes has no room for it ({lacking:,} bytes are lacking)"
            try:
                return Filling(folder, target, index, small_files, lock, self._locked)
            except OSError as error:
                _delete(folder)
                os.close(lock)
                return f"the disk cache cannot be filled: {error.strerror}"

    def _remove(self, path: Path) -> int:
        nbytes = _occupied(path)
        gone = self.folder / f".{path.name.lstrip('.')}-{time.time_ns()}{_REMOVED}"
        try:
            path.rename(gone)  # at once for whoever looks, and a kill in the midst leaves nothing that could be believed
        except FileNotFoundError:
            return 0
        _delete(gone)
        return nbytes

    def _remove_abandoned(self, path: Path) -> int:
        lock = lock_folder(path)
        if lock is None:
            return 0
        try:
            return self._remove(path)
        finally:
            os.close(lock)

    def _filling(self, name: str) -> Path:
        return self.folder / f".{_checked(name)}{_FILLING}"

    def _folders(self) -> list[Path]:
        return [Path(entry.path) for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]

    def _hidden(self, suffix: str) -> list[Path]:
        return [path for path in self._folders() if path.name.startswith(".") and path.name.endswith(suffix)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, over threads and processes."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _checked(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name[:200]!r} is not a name that a cache entry may have; use letters, digits, '.', '_' and '-'")
    return name


def _needed(index: Index) -> int:
    """What a checkpoint occupies: whole blocks of every file, and of the folder and the index."""
    sizes = [entry.file_nbytes for entry in index.partitions] + [entry.nbytes for entry in index.companions]
    listing = sum(len(entry.digests) for entry in index.partitions) + 512 * len(index.tensors)
    return sum(align_up(size, _BLOCK) for size in sizes) + align_up(listing, _BLOCK) + 2 * _BLOCK


def _occupied(folder: Path) -> int:
    """Bytes of a folder on the disk: what its files were given, or will be when they are full, and its own."""
    total = 0
    try:
        total += folder.stat().st_blocks * 512
        for entry in os.scandir(folder):
            found = entry.stat(follow_symlinks=False)
            given = found.st_blocks * 512
            total += max(given, found.st_size) if folder.name.endswith(_FILLING) and entry.name != INDEX_FILE else given
    except FileNotFoundError:
        return total  # just published or removed
    return total


def _is_busy(folder: Path) -> bool:
    lock = lock_folder(folder)
    if lock is None:
        return folder.exists()
    os.close(lock)
    return False


def _delete(path: Path) -> None:
    with suppress(OSError):  # as far as it goes: what stays is hidden, and the next one tries again
        shutil.rmtree(path, ignore_errors=True)
