"""Where a model's bytes come from when they are in no memory: its own folder, the disk cache, or the remote address.

A name stands for one version, the one that was registered; whatever else is found at its source later is refused, so a
model never becomes a mixture of two. Taught in chapter 03.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.index import INDEX_FILE
from sllm_mini.errors import StoreError, WriteError
from sllm_mini.storage.disk import DiskCache
from sllm_mini.storage.filling import Filling, lock_folder
from sllm_mini.storage.remote import RemoteCheckpoint, open_remote
from sllm_mini.storage.source import RemoteOptions

DISK, REMOTE = "disk", "remote"


@dataclass(frozen=True, slots=True)
class Version:
    """What was registered: `checkpoint` has its index and a folder with its companions, `cache_name` its name in the disk
    cache ("" for a model that lies on the disk by itself)."""

    source: str
    checkpoint: Checkpoint
    cache_name: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """An opened source, to be closed after the load. `place` is "disk" or "remote"; `uncached` says why the disk cache
    does not get what is read, if it does not."""

    checkpoint: Checkpoint
    place: str
    uncached: str | None = None

    def close(self) -> None:
        """Publishes what the disk cache got. Raises what writing it raises."""
        if isinstance(self.checkpoint, RemoteCheckpoint):
            try:
                self.checkpoint.close()
            finally:
                shutil.rmtree(self.checkpoint.path.parent, ignore_errors=True)


class Sources:
    """Opens sources. `cache` is None for a store without a disk budget. Safe from several threads, one per model.

    Until `close`, or the end of the process, `folder` is this store's alone: two would remove what the other is reading. The
    kernel keeps that lock, so none is left by a crash. Raises StoreError if another store has it, WriteError if it cannot
    be made."""

    def __init__(self, folder: Path, cache: DiskCache | None, options: RemoteOptions) -> None:
        self.cache = cache
        self._folder, self._options = folder / "remote", options
        self._fillings: WeakValueDictionary[str, Filling] = WeakValueDictionary()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"no folder can be made there: {error.strerror}", path=self._folder) from error
        self._lock = lock_folder(self._folder)
        if self._lock is None:
            raise StoreError(f"another store works in {folder}; ask that one, close it, or give this one a folder of its own")
        for left in self._folder.glob(".opened-*"):  # by a store that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Lets another store have the folder. May be called twice."""
        lock, self._lock = self._lock, None
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked has the descriptor too
            os.close(lock)

    def look(self, name: str, source: str) -> Version:
        """Reads the index of a source. Raises what `open_checkpoint` and `open_remote` raise, StoreError once closed."""
        self._require_open()
        if "://" not in source:
            return Version(source, open_checkpoint(source))
        origin = Origin(remote := self._open_remote(source), REMOTE)
        try:
            # Named by its content, so that what is registered keeps its companions, whatever is found there later.
            folder = self._folder / remote.cache_name
            with suppress(FileExistsError):
                _rename(remote.path, folder)
            found = os.stat(folder / INDEX_FILE)
            return Version(source, Checkpoint(folder, remote.index, (found.st_dev, found.st_ino, found.st_mtime_ns)), remote.cache_name)
        finally:
            origin.close()

    def open(self, name: str, version: Version, make_room: Callable[[int], None]) -> Origin:
        """The nearest source of exactly that version. `make_room(nbytes)` is asked to evict from the disk cache; if it
        does not, the load runs without it. Raises StoreError if the source has another version by now."""
        if not version.cache_name:
            return Origin(_same(open_checkpoint(version.source), version, name), DISK)
        if self.cache is not None:
            cached = self.cache.find(version.cache_name)
            if cached is not None:
                return Origin(_same(cached, version, name), DISK)
        remote = self._open_remote(version.source, version.checkpoint.path)
        try:
            _same(remote, version, name)
            if self.cache is None:
                return Origin(remote, REMOTE, "the store has no disk budget")
            lacking = self.cache.lacking_nbytes(remote.index, version.cache_name)
            if lacking:
                make_room(lacking)
            uncached = remote.fill_cache(self.cache)
            if remote.remote.filling is not None:
                self._fillings[version.cache_name] = remote.remote.filling
            return Origin(remote, REMOTE, uncached)
        except BaseException:
            Origin(remote, REMOTE).close()
            raise

    def nearest_source(self, version: Version) -> str:
        """What another process opens to load it by itself: its copy in the disk cache, else its source."""
        cached = None if self.cache is None or not version.cache_name else self.cache.find(version.cache_name)
        return version.source if cached is None else os.fspath(cached.path)

    def is_cached(self, version: Version) -> bool:
        return self.cache is not None and self.cache.find(version.cache_name) is not None

    def on_disk(self, version: Version) -> tuple[int, bool] | None:
        """The bytes that the disk cache has of it, and whether more are coming; None if it has none."""
        if self.cache is None or not version.cache_name:
            return None
        filling = self._fillings.get(version.cache_name)
        if filling is not None and filling.reason is None:
            return filling.done_nbytes, True
        return (version.checkpoint.nbytes, False) if self.cache.holds(version.cache_name) else None

    def forget(self, version: Version, *, companions: bool = False) -> int:
        """Drops what the disk cache has of it, and returns the bytes; with `companions` also what registering it kept.
        Raises StoreError once closed."""
        self._require_open()
        if not version.cache_name:
            return 0
        if companions:
            shutil.rmtree(version.checkpoint.path, ignore_errors=True)
        return 0 if self.cache is None else self.cache.remove(version.cache_name)

    def _require_open(self) -> None:
        if self._lock is None:
            raise StoreError("the store is closed; open it again")

    def _open_remote(self, url: str, known: Path | None = None) -> RemoteCheckpoint:
        """Opens it in a hidden folder of its own, which `Origin.close` removes. What a version that is registered has of its
        companions is not read again."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=".opened-", dir=self._folder))
        except OSError as error:
            raise WriteError(f"no folder can be made there: {error.strerror}", path=self._folder) from error
        try:
            if known is not None and known.is_dir():
                with suppress(OSError):  # a full disk: then the companions are read, or that says it
                    shutil.copytree(known, folder / "checkpoint")
            return open_remote(url, folder / "checkpoint", options=self._options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _rename(folder: Path, target: Path) -> None:
    """Raises FileExistsError if the target is there."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(os.fspath(target)) from None
        raise WriteError(f"it cannot be kept there: {error.strerror}", path=target) from error


def _same(found: Checkpoint, version: Version, name: str) -> Checkpoint:
    if found.index != version.checkpoint.index:
        raise StoreError(f"{name} changed at its source since it was registered; register it again to use the new one")
    return found
