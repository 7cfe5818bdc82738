"""Checkpoints on the other side of a network: opened from their index, read by ranges when they are loaded.

`start_load(open_remote(url, folder))` loads like from a disk: many ranges in flight, straight into place, every hash
checked, and an interrupted read goes on at the byte that is missing. Opening one costs the index, the companions and one
small request per partition. Taught in chapter 03; the remote tier of ServerlessLLM (OSDI'24) and λScale.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.hashing import bytes_digest
from sllm_mini.checkpoint.index import INDEX_FILE, CompanionEntry, PartitionEntry, decode_index
from sllm_mini.checkpoint.publish import publish
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError, RemoteError
from sllm_mini.storage.disk import DiskCache
from sllm_mini.storage.remote_reader import Remote, RemoteReader, Traffic, read_index, read_whole
from sllm_mini.storage.source import Differs, RemoteOptions, Source, attempt, never, shown
from sllm_mini.storage.source_files import open_source

MAX_COMPANIONS_NBYTES = 1 << 30
"""Of all companions of a remote checkpoint: they are read into memory one by one, and kept on the disk."""
_CHECKS = 8


@dataclass(frozen=True, slots=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose tensors are remote. `path` is a local folder that holds its index and companions; `url` its
    address without credentials. Safe from several threads. Close it when it is not loaded any more: what the disk cache
    got becomes visible then. A load that runs keeps it open until its end."""

    url: str
    remote: Remote = field(repr=False, compare=False)

    @property
    def cache_name(self) -> str:
        """The name of exactly this version of it in a disk cache; holds no credentials."""
        return self._versions + hashlib.sha256(self.remote.raw_index).hexdigest()[:16]

    @property
    def traffic(self) -> Traffic:
        """What its loads have read so far."""
        return self.remote.traffic

    def fill_cache(self, cache: DiskCache) -> str | None:
        """From now on loads also write what they read to a disk cache, and take from it what an interrupted download
        left there. Returns None, or why it is not done (no room, above all: remove `cache.lacking_nbytes` first);
        loads then run without it and say so in their report's `fallback`. Call it before the first load."""
        files: dict[str, bytes | Path] = {entry.file: self.path / entry.file for entry in self.index.companions}
        found = cache.fill(self.cache_name, self.index, {INDEX_FILE: self.remote.raw_index} | files, replaces=self._versions)
        if isinstance(found, str):
            self.remote.no_cache = found
            return found
        self.remote.filling = found
        return None

    def open_reader(self, number: int, *, direct: bool = False, stopped: Callable[[], bool] = never) -> RemoteReader:
        """A reader of one partition; `direct` has no meaning here. Raises RemoteError once it is closed."""
        return RemoteReader(self.remote, number, stopped)

    def open_partition(self, number: int, flags: int = 0) -> NoReturn:
        """Raises CheckpointError: there is no local file."""
        raise CheckpointError("its bytes are remote; load it, or open the copy in the disk cache", path=f"{self.url}/{self.index.partitions[number].file}")

    def close(self) -> None:
        """Ends its connections and publishes what the disk cache got, if that is everything; else the next attempt goes
        on with it. May be called twice."""
        self.remote.close()

    def __enter__(self) -> RemoteCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _versions(self) -> str:
        # A strong hash: another address must not be able to put its bytes in this one's place.
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", self.url.rpartition("/")[2]).lstrip(".-")[:60] or "model"
        return f"{stem}-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}-"


def open_remote(url: str, folder: str | os.PathLike[str], *, options: RemoteOptions | None = None) -> RemoteCheckpoint:
    """Opens the checkpoint at an address that `fsspec` knows (file://, http(s)://, s3://, hf://OWNER/REPO[@REVISION]/…).

    Its index and companions are put into `folder`, whose directory is replaced whole if they changed. Raises RemoteError
    if it cannot be reached or is not there, FormatError for an index that breaks a rule or is too large, IntegrityError
    for companions or partitions that are not what the index says, UnsupportedError for an address that no installed file
    system reads, WriteError if `folder` cannot be written. Not for two threads on one folder.
    """
    options = options or RemoteOptions()
    source = attempt(shown(url), options, lambda _: open_source(url, options))
    try:
        raw = read_index(source, options)
        index = decode_index(raw, f"{source.url}/{INDEX_FILE}")
        _check_companions(index.companions, source)
        with ThreadPoolExecutor(min(_CHECKS, max(1, len(index.partitions)))) as threads:
            list(threads.map(lambda entry: _check_partition(entry, source, options), index.partitions))
        path = Path(os.path.abspath(folder))
        if not _holds(path, raw, index.companions):
            with publish(path, overwrite=True) as work:
                (work / INDEX_FILE).write_bytes(raw)
                for entry in index.companions:
                    (work / entry.file).write_bytes(_companion(entry, source, options))
        found = os.stat(path / INDEX_FILE)
        return RemoteCheckpoint(path, index, (found.st_dev, found.st_ino, found.st_mtime_ns), source.url, Remote(source, options, raw, index))
    except BaseException:
        source.close()
        raise


def _check_companions(entries: list[CompanionEntry], source: Source) -> None:
    total = sum(entry.nbytes for entry in entries)
    if total > MAX_COMPANIONS_NBYTES:
        raise FormatError(f"its companions have {total:,} bytes; at most {MAX_COMPANIONS_NBYTES:,} are read", path=f"{source.url}/{INDEX_FILE}")


def _check_partition(entry: PartitionEntry, source: Source, options: RemoteOptions) -> None:
    place = f"{source.url}/{entry.file}"
    try:
        nbytes = attempt(place, options, lambda _: source.nbytes(entry.file, ranged=True))
    except Differs as error:
        raise RemoteError(f"{error}, but the index names it; upload the checkpoint again", path=place) from None
    if nbytes != entry.file_nbytes:
        raise IntegrityError(f"it has {nbytes:,} bytes instead of {entry.file_nbytes:,}; upload the checkpoint again", path=place, offset=min(nbytes, entry.file_nbytes))


def _holds(path: Path, raw: bytes, companions: list[CompanionEntry]) -> bool:
    """Whether a folder has this index and these companions already."""
    try:
        return (path / INDEX_FILE).read_bytes() == raw and all(_is_right((path / entry.file).read_bytes(), entry) for entry in companions)
    except OSError:
        return False


def _is_right(content: bytes, entry: CompanionEntry) -> bool:
    return len(content) == entry.nbytes and bytes_digest(content) == entry.digest


def _companion(entry: CompanionEntry, source: Source, options: RemoteOptions) -> bytes:
    content = read_whole(source, entry.file, entry.nbytes, options)
    if not _is_right(content, entry):
        raise IntegrityError("its bytes are not those that were written; upload the checkpoint again", path=f"{source.url}/{entry.file}")
    return content
