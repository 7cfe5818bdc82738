"""Where a model's bytes come from when they are in no memory: its own folder, the disk cache, or the remote address.

A name stands for one version, the one that was registered; whatever else is found at its source later is refused, so a
model never becomes a mixture of two. Taught in chapter 03.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.errors import StoreError
from sllm_mini.storage.disk import DiskCache
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
            self.checkpoint.close()


class Sources:
    """Opens sources. `cache` is None for a store without a disk budget. Safe from several threads, one per model."""

    def __init__(self, folder: Path, cache: DiskCache | None, options: RemoteOptions) -> None:
        self.cache = cache
        self._folder, self._options = folder, options

    def look(self, name: str, source: str) -> Version:
        """Reads the index of a source. Raises what `open_checkpoint` and `open_remote` raise."""
        if "://" not in source:
            return Version(source, open_checkpoint(source))
        with open_remote(source, self._folder / "remote" / name, options=self._options) as remote:
            return Version(source, Checkpoint(remote.path, remote.index, remote.identity), remote.cache_name)

    def open(self, name: str, version: Version, make_room: Callable[[int], None]) -> Origin:
        """The nearest source of exactly that version. `make_room(nbytes)` is asked to evict from the disk cache; if it
        does not, the load runs without it. Raises StoreError if the source has another version by now."""
        if not version.cache_name:
            return Origin(_same(open_checkpoint(version.source), version, name), DISK)
        if self.cache is not None:
            cached = self.cache.find(version.cache_name)
            if cached is not None:
                return Origin(_same(cached, version, name), DISK)
        # Into a folder of its own: what was registered keeps its companions, whatever is found there now.
        remote = open_remote(version.source, self._folder / "remote" / f"{name}.now", options=self._options)
        try:
            _same(remote, version, name)
            if self.cache is None:
                return Origin(remote, REMOTE, "the store has no disk budget")
            lacking = self.cache.lacking_nbytes(remote.index, version.cache_name)
            if lacking:
                make_room(lacking)
            return Origin(remote, REMOTE, remote.fill_cache(self.cache))
        except BaseException:
            remote.close()
            raise

    def forget(self, version: Version) -> None:
        """Drops what the disk cache has of it."""
        if self.cache is not None and version.cache_name:
            self.cache.remove(version.cache_name)


def _same(found: Checkpoint, version: Version, name: str) -> Checkpoint:
    if found.index != version.checkpoint.index:
        raise StoreError(f"{name} changed at its source since it was registered; register it again to use the new one")
    return found
