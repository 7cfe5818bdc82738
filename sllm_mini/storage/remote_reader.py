"""One partition of a remote checkpoint as a load reads it: ranges into place, checked, and kept on the way.

Each hash chunk is compared with the index while the next one arrives, and written to the disk cache that is being
filled, if there is one: one pass, and no byte is asked for twice. What the cache has already from an earlier attempt is
taken from it. Taught in chapter 03.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, DIGEST_HEX, chunk_digest
from sllm_mini.checkpoint.index import INDEX_FILE, MAX_INDEX_NBYTES, Index
from sllm_mini.checkpoint.layout import align_up
from sllm_mini.errors import FormatError, IntegrityError, LoadError, RemoteError, SllmError
from sllm_mini.storage.source import Differs, RemoteOptions, Source, attempt, fetch, never

if TYPE_CHECKING:
    from sllm_mini.storage.filling import Filling

CHANGED = "the checkpoint changed since it was opened; open it again to get the new one"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the reads of a remote checkpoint cost: bytes put in place that came from the remote, and from the disk cache;
    bytes of the remote that were wrong and asked for again; attempts that were interrupted."""

    remote_nbytes: int = 0
    cached_nbytes: int = 0
    repeated_nbytes: int = 0
    interruptions: int = 0


@dataclass(slots=True)
class Remote:
    """What the readers of one remote checkpoint share. Closed when nobody reads it any more."""

    source: Source
    options: RemoteOptions
    raw_index: bytes
    index: Index
    filling: Filling | None = None
    no_cache: str | None = None
    traffic: Traffic = Traffic()
    lock: threading.Lock = field(default_factory=threading.Lock)
    readers: int = 0
    closing: bool = False
    turns: AbstractContextManager[object] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = threading.Semaphore(self.options.ranges) if self.options.ranges else nullcontext()

    def count(self, *, remote: int = 0, cached: int = 0, repeated: int = 0, interruptions: int = 0) -> None:
        with self.lock:
            was = self.traffic
            self.traffic = replace(
                was, remote_nbytes=was.remote_nbytes + remote, cached_nbytes=was.cached_nbytes + cached,
                repeated_nbytes=was.repeated_nbytes + repeated, interruptions=was.interruptions + interruptions,
            )  # fmt: skip

    def enter(self) -> None:
        with self.lock:
            if self.closing:
                raise RemoteError("it was closed; open it again", path=self.source.url)
            self.readers += 1

    def leave(self) -> None:
        with self.lock:
            self.readers -= 1
            last = self.closing and self.readers == 0
        if last:
            self.release()

    def close(self) -> None:
        with self.lock:
            first, self.closing = not self.closing, True
            last = first and self.readers == 0
        if last:
            self.release()

    def release(self) -> None:
        self.source.close()
        if self.filling is not None:
            self.filling.publish()
            self.filling.close()

    def explain(self, partition: int, offset: int, reason: str, stopped: Callable[[], bool]) -> SllmError:
        """The error for bytes that are not what the index says: had the checkpoint been replaced, or is it damaged?"""
        place = f"{self.source.url}/{self.index.partitions[partition].file}"
        try:
            now = read_index(self.source, self.options, stopped=stopped)
        except (RemoteError, FormatError):
            now = b""
        if now == self.raw_index:
            return IntegrityError(f"{reason}, though its index has not changed; upload it again, or wait until its upload has ended", path=place, offset=offset)
        if self.filling is not None:
            self.filling.drop(CHANGED)
        return RemoteError(CHANGED if now else f"{reason}, and its index cannot be read any more; see whether it was removed", path=place, offset=offset)


def read_index(source: Source, options: RemoteOptions, *, stopped: Callable[[], bool] = never) -> bytes:
    """The bytes of a remote checkpoint's index, not looked into. Raises RemoteError, or FormatError if it is too large."""
    return read_whole(source, INDEX_FILE, MAX_INDEX_NBYTES, options, stopped=stopped)


def read_whole(source: Source, file: str, limit_nbytes: int, options: RemoteOptions, *, stopped: Callable[[], bool] = never) -> bytes:
    """The bytes of a small remote file. Raises RemoteError, or FormatError if it has more than `limit_nbytes`: its
    size is known before memory is asked for."""
    place = f"{source.url}/{file}"
    try:
        nbytes = attempt(place, options, lambda _: source.nbytes(file), stopped=stopped)
        if nbytes > limit_nbytes:
            raise FormatError(f"it has {nbytes:,} bytes; at most {limit_nbytes:,} are read", path=place)
        content = bytearray(nbytes)
        fetch(source, file, 0, memoryview(content), nbytes, options, stopped=stopped)
    except Differs as error:
        hint = "; name the folder of a checkpoint, made by `sllm-mini convert`" if file == INDEX_FILE else ""
        raise RemoteError(f"{error}{hint}", path=place) from None
    return bytes(content)


class RemoteReader:
    """A reader of one partition, as `loading` wants it. `stopped` says that the load has ended, so that attempts end
    within a second, a request under way to an HTTP address included (another within `timeout_seconds`). Safe from several threads until closed."""

    fd = -1
    verified = True
    """What it reads has been compared with the index."""

    def __init__(self, remote: Remote, number: int, stopped: Callable[[], bool] = never) -> None:
        remote.enter()
        self._remote, self._number, self._stopped = remote, number, stopped
        self._entry = remote.index.partitions[number]
        self.path = f"{remote.source.url}/{self._entry.file}"
        self._open = True

    @property
    def fallback(self) -> str | None:
        """Why the disk cache is not being filled although it was asked for; None if it is, or was not."""
        filling = self._remote.filling
        return self._remote.no_cache if filling is None else filling.reason

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """False: nothing of it is in this machine's page cache under a descriptor of ours."""
        return False

    def read(self, view: memoryview, offset: int, *, cached: bool = False) -> bool:
        """Fills `view` from `offset`, wherever the bytes are; False, since it is no direct read.

        A range that cuts hash chunks costs the whole of them, in memory of its own, since their hashes are checked.
        Raises LoadError for a range behind the end; RemoteError when nothing comes for `deadline_seconds`, or the checkpoint changed; IntegrityError for
        bytes that stay wrong when they are asked for again; LoadCancelled once `stopped`."""
        behind = offset + len(view) - self._entry.file_nbytes
        if behind > 0:
            raise LoadError(f"the file ends here; {behind:,} more bytes were expected", path=self.path, offset=self._entry.file_nbytes)
        start = offset // CHUNK_NBYTES * CHUNK_NBYTES
        end = min(align_up(offset + len(view), CHUNK_NBYTES), self._entry.file_nbytes)
        if (start, end) == (offset, offset + len(view)):
            self._read_chunks(view, offset)
        else:
            whole = memoryview(bytearray(end - start))
            self._read_chunks(whole, start)
            view[:] = whole[offset - start : offset - start + len(view)]
        return False

    def close(self) -> None:
        if self._open:
            self._open = False
            self._remote.leave()

    def _read_chunks(self, view: memoryview, offset: int) -> None:
        """Whole hash chunks: from the cache what it has, the rest in as few requests as there are gaps."""
        filling, gap = self._remote.filling, 0
        for at in range(0, len(view), CHUNK_NBYTES):
            piece = view[at : at + CHUNK_NBYTES]
            if filling is not None and filling.read(self._number, (offset + at) // CHUNK_NBYTES, piece):
                self._remote.count(cached=len(piece))
                self._fetch(view[gap:at], offset + gap)
                gap = at + len(piece)
        self._fetch(view[gap:], offset + gap)

    def _fetch(self, view: memoryview, offset: int) -> None:
        wrong: list[int] = []
        done = 0

        def placed(nbytes: int) -> None:
            nonlocal done
            while done < nbytes and (nbytes == len(view) or nbytes - done >= CHUNK_NBYTES):
                end = min(done + CHUNK_NBYTES, len(view))
                if not self._keep(view[done:end], offset + done):
                    wrong.append(done)
                done = end

        self._request(view, offset, placed)
        for at in wrong:  # damaged on its way, perhaps
            piece = view[at : at + CHUNK_NBYTES]
            self._request(piece, offset + at)
            self._remote.count(repeated=len(piece))
            if not self._keep(piece, offset + at):
                raise self._remote.explain(self._number, offset + at, "a byte in the chunk that starts here is not the one that was written", self._stopped)

    def _request(self, view: memoryview, offset: int, placed: Callable[[int], None] | None = None) -> None:
        remote, entry = self._remote, self._entry
        try:
            with remote.turns:
                again = fetch(remote.source, entry.file, offset, view, entry.file_nbytes, remote.options, stopped=self._stopped, placed=placed)
        except Differs as error:
            raise remote.explain(self._number, offset, str(error), self._stopped) from None
        remote.count(interruptions=again)

    def _keep(self, piece: memoryview, offset: int) -> bool:
        """Whether a chunk is right; if so it is counted and goes to the cache."""
        number = offset // CHUNK_NBYTES
        if chunk_digest(piece) != self._entry.digests[number * DIGEST_HEX : (number + 1) * DIGEST_HEX]:
            return False
        self._remote.count(remote=len(piece))
        if self._remote.filling is not None:
            self._remote.filling.write(self._number, number, piece)
        return True
