"""What a live cluster writes down, so that a driver that was killed can be resumed: requests and every token shown. Chapter 08.

    folder/ledger.bin       requests, tokens, ends: written before a reader sees them
    folder/events.jsonl     the event log (`control.replay`)
    folder/controller.bin   the controller, and how much of the log it has seen: every few seconds
    folder/deployments.json what was deployed

A record is its length, a checksum and MessagePack; one that was cut off by the end of its writer ends the journal. What is written
reaches the page cache: a killed process loses nothing, a machine that loses power may. On a full disk it waits in memory until there is
room, and a killed process loses it. Costs one `pwrite` a delivery of tokens (some 3 us).
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct

from sllm_mini.cluster.appending import MOST_NBYTES, AppendFile
from sllm_mini.errors import FormatError, SllmError, WriteError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.ownership.messages import Finish, Token
from sllm_mini.types import Epoch

_HEAD_NBYTES = 8


class Opened(Struct, frozen=True, tag=True):
    """A request was taken, `at` so many seconds after the cluster was opened. `session` is its bytes."""

    number: int
    request_id: str
    model: str
    prefix: str
    at: float
    session: bytes


class Taken(Struct, frozen=True, tag=True):
    at: float
    tokens: list[Token]


class Ended(Struct, frozen=True, tag=True):
    request_id: str
    finish: Finish | None
    error: str | None


_Record = Opened | Taken | Ended
_decode = msgspec.msgpack.Decoder(_Record).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Past:
    """A request as the journal has it. Times of `pieces` are seconds since the cluster was opened."""

    opened: Opened
    pieces: list[LedgerPiece] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None


class Journal:
    """Appends to one file, which is made where it is not there. `now` gives the seconds that are written. Safe from several threads.

    What the disk does not take waits for `retry`, and `error` says why. Once more than `most_nbytes` wait the journal is `lost`: what the
    readers have is right, but it could not be resumed, so whoever owns the journal takes no request then.
    """

    def __init__(self, path: Path, now: Callable[[], float], most_nbytes: int = MOST_NBYTES) -> None:
        self.path = path
        self._now = now
        self._lock = threading.Lock()
        self._file = AppendFile(path, most_nbytes=most_nbytes)

    @property
    def error(self) -> str:
        return self._file.error

    @property
    def lost(self) -> bool:
        return self._file.lost

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._file.nbytes

    def opened(self, number: int, request_id: str, model: str, prefix: str, at: float, session: bytes) -> None:
        self._write(Opened(number, request_id, model, prefix, at, session))

    def taken(self, tokens: Sequence[Token]) -> None:
        self._write(Taken(self._now(), list(tokens)))

    def ended(self, request_id: str, finish: Finish | None, error: str | None) -> None:
        self._write(Ended(request_id, finish, error))

    def retry(self) -> None:
        """Writes what waits. Raises WriteError where it waits still, or is lost."""
        with self._lock:
            if not self._file.retry():
                raise WriteError(self._file.error)

    def compact(self) -> None:
        """Rewrites the file with the requests that are not over, and the last one, whose number the next ones follow; nothing is written by
        others meanwhile. Raises WriteError, and the file stays as it is."""
        with self._lock:
            beside = self.path.with_suffix(".new")
            try:
                known = read_journal(self.path)
                last = max((past.opened.number for past in known), default=0)
                with open(beside, "wb") as file:
                    for past in known:
                        if not past.over or past.opened.number == last:
                            file.writelines(map(_framed, _retold(past)))
                self._file.become(beside)
            except OSError as error:
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
                raise WriteError(f"the journal cannot be rewritten ({error.strerror}); free some space", path=self.path) from error

    def close(self) -> None:
        """What is said afterwards is not written."""
        with self._lock:
            self._file.close()

    def _write(self, record: _Record) -> None:
        frame = _framed(record)
        with self._lock:
            self._file.append(frame)


def read_journal(path: Path) -> list[Past]:
    """The requests of a journal in the order they were opened, each as it stood when the last whole record was written; none for
    a file that is not there. Raises FormatError for a record that is whole and says what cannot be."""
    requests: dict[str, Past] = {}
    for offset, record in _records(path):
        if isinstance(record, Opened):
            requests[record.request_id] = Past(record)
            continue
        names = [token.request_id for token in record.tokens] if isinstance(record, Taken) else [record.request_id]
        if not requests.keys() >= set(names):
            raise FormatError("the journal speaks of a request that it never opened; it cannot be resumed", path=path, offset=offset)
        if isinstance(record, Ended):
            requests[record.request_id].finish, requests[record.request_id].error = record.finish, record.error
            continue
        for token in record.tokens:
            past = requests[token.request_id]
            past.pieces.append(LedgerPiece(token.position, token.token_id, token.text, Epoch(token.epoch), record.at, token.logprob, token.top, token.vector))
            past.finish = token.finish
    return list(requests.values())


def repair(path: Path) -> None:
    """Cuts off a last record that is not whole, so that more can be appended."""
    if path.exists():
        os.truncate(path, max((end for end, _ in _records(path)), default=0))


def write_whole(path: Path, data: bytes) -> None:
    """The file has these bytes, or those it had before. Raises WriteError."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):  # the room that it took is needed
            beside.unlink(missing_ok=True)
        raise WriteError(f"it cannot be written ({error.strerror}); free some space", path=path) from error


def _framed(record: _Record) -> bytes:
    body = _encode(record)
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


def _retold(past: Past) -> Iterator[_Record]:
    yield past.opened
    for piece in past.pieces:
        yield Taken(piece.arrived, [Token(past.opened.request_id, piece.epoch, piece.position, piece.token_id, piece.text, None, piece.logprob, piece.top, piece.vector)])
    if past.over:
        yield Ended(past.opened.request_id, past.finish, past.error)


def _records(path: Path) -> Iterator[tuple[int, _Record]]:
    """Each whole record with the byte at which it ends."""
    data = memoryview(path.read_bytes() if path.exists() else b"")
    start = 0
    while start + _HEAD_NBYTES <= len(data):
        end = start + _HEAD_NBYTES + int.from_bytes(data[start : start + 4], "little")
        body = data[start + _HEAD_NBYTES : end]
        if end > len(data) or zlib.crc32(body) != int.from_bytes(data[start + 4 : start + 8], "little"):
            return
        try:
            yield end, _decode(body)
        except msgspec.DecodeError as error:
            raise FormatError(f"the journal has a record that says what cannot be ({error}); it was written by another version", path=path, offset=start) from error
        start = end


class Saved(Struct, frozen=True):
    """`controller.bin`: the controller, and how many bytes of the log it has seen."""

    now: float
    log_nbytes: int
    controller: bytes

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def read(cls, path: Path) -> Saved:
        """Raises SllmError for a file that is not there, or not one of these."""
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise SllmError(f"{path} is no saved controller ({error}); nothing can be resumed from this folder: open a new cluster") from error
