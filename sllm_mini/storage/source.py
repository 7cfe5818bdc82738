"""What a remote folder is to the rest of this floor: files of a known size whose ranges can be read into memory, and
attempts that go on where the last one was interrupted.

No error names a query, a user or a password, and none is chained to one that does. Taught in chapter 03.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sllm_mini.errors import LoadCancelled, RemoteError

_T = TypeVar("_T")
_USER = re.compile(r"://[^/]*@")
"""Up to the last @ before a path: a password may hold anything but a slash."""
_UNREACHED_SECONDS = 1.0
"""For so long a server that nobody has reached yet is asked again; one that was reached may only be restarting."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How remote files are read. `timeout_seconds`: a connection on which nothing arrives for so long counts as lost.
    `deadline_seconds`: a read that gets no byte for so long, over all its attempts, has failed. `backoff_seconds`: the
    pause before the second attempt; it doubles up to 5 s. `connections`: kept open to one server. `ranges`: of one model asked
    for at once, 0 for as many as a load has readers. `storage`: what `fsspec` wants to know, credentials included
    ("headers" for http); never shown."""

    timeout_seconds: float = 10.0
    deadline_seconds: float = 20.0
    backoff_seconds: float = 0.1
    connections: int = 32
    ranges: int = 0
    storage: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or self.deadline_seconds <= 0 or self.backoff_seconds <= 0:
            raise ValueError("timeout_seconds, deadline_seconds and backoff_seconds must be positive")
        if self.connections < 1:
            raise ValueError(f"connections is {self.connections}; it must be at least 1")
        if self.ranges < 0:
            raise ValueError(f"ranges is {self.ranges}; it must be at least 1, or 0 for no limit")


class Interrupted(Exception):
    """What may go better the next time: a lost connection, a busy server. Never leaves this floor."""


class Unreached(Interrupted):
    """A server that was never reached, and that no patience will bring: nothing listens there, or its name is unknown."""


class Differs(Exception):
    """The file is not as it was when its size was learnt: gone, shorter, longer. Never leaves this floor."""


class Source(Protocol):
    """The files of one remote folder. Safe from several threads until closed."""

    url: str
    """The folder's address without user, password and query: fit to be shown."""

    def nbytes(self, file: str, *, ranged: bool = False) -> int:
        """The size of a file, in one request; with `ranged` its ranges must be answered too. Raises Interrupted, Differs or
        RemoteError."""
        ...

    def stream(self, file: str, offset: int, view: memoryview, total_nbytes: int) -> Iterator[int]:
        """Fills `view` with the bytes from `offset` of a file of `total_nbytes`, in one request; yields how many more
        bytes have arrived, and may end early. Raises Interrupted, Differs or RemoteError."""
        ...

    def close(self) -> None: ...


def shown(url: str) -> str:
    """An address without what may be secret, user, password, query and fragment, that names of files can be put behind.
    Whatever it chains: simplecache::https://… too."""
    return _USER.sub("://", url).partition("?")[0].partition("#")[0].rstrip("/")


def redacted(url: str) -> str:
    """An address as it is told to others: that it has a user, a password or a query is seen, and not which. A path is
    itself."""
    if "://" not in url:
        return url
    place, query, _ = _USER.sub("://***@", url).partition("?")
    return place.partition("#")[0] + ("?***" if query else "")


def never() -> bool:
    return False


_asking = threading.local()


def unwanted() -> bool:
    """Whether nobody waits any more for what this thread is asking a remote for, in an `attempt`."""
    return bool(getattr(_asking, "stopped", never)())


@contextmanager
def _asking_until(stopped: Callable[[], bool]) -> Iterator[None]:
    _asking.stopped = stopped
    try:
        yield
    finally:
        del _asking.stopped


def attempt(
    place: str, options: RemoteOptions, work: Callable[[Callable[[], None]], _T],
    *, offset: Callable[[], int] | None = None, stopped: Callable[[], bool] = never,
) -> _T:  # fmt: skip
    """Does `work` on the file at `place` again until it is not interrupted; it gets a function to call whenever bytes arrive.

    Raises RemoteError, naming the place and the byte `offset()`, once nothing has arrived for `deadline_seconds`, or for a
    second from a server that is Unreached; LoadCancelled as soon as `stopped()`; and what `work` raises, but for Interrupted."""
    last = time.monotonic()
    pause = options.backoff_seconds

    def arrived() -> None:
        nonlocal last, pause
        if stopped():
            raise LoadCancelled("the load has ended", path=place)
        last, pause = time.monotonic(), options.backoff_seconds

    while True:
        try:
            with _asking_until(stopped):
                return work(arrived)
        except Interrupted as error:
            reason, unreached = str(error), isinstance(error, Unreached)
        if stopped():
            raise LoadCancelled("the load has ended", path=place)
        patience = min(options.deadline_seconds, _UNREACHED_SECONDS) if unreached else options.deadline_seconds
        left = last + patience - time.monotonic()
        if left <= 0 and unreached:
            raise refusal(reason, place) if place.startswith("http") else RemoteError(reason, path=place)
        if left <= 0:
            raise RemoteError(
                f"nothing came for {options.deadline_seconds:g} seconds ({reason}); see whether the server can be reached and load it again",
                path=place, offset=None if offset is None else offset(),
            )  # fmt: skip
        end = time.monotonic() + min(pause, left)
        while (rest := end - time.monotonic()) > 0:
            if stopped():
                raise LoadCancelled("the load has ended", path=place)
            time.sleep(min(rest, 0.1))
        pause = min(2 * pause, 5.0)


def fetch(
    source: Source, file: str, offset: int, view: memoryview, total_nbytes: int, options: RemoteOptions,
    *, stopped: Callable[[], bool] = never, placed: Callable[[int], None] | None = None,
) -> int:  # fmt: skip
    """Fills `view`, each attempt going on at the byte that is missing; calls `placed` with how many bytes are there, in
    order. Returns how often it had to begin again. Raises RemoteError, Differs or LoadCancelled."""
    at = attempts = 0

    def work(arrived: Callable[[], None]) -> None:
        nonlocal at, attempts
        attempts += 1
        for count in source.stream(file, offset + at, view[at:], total_nbytes):
            arrived()
            at += count
            if placed is not None:
                placed(at)
        if at < len(view):
            raise Interrupted("the connection ended early")

    if len(view):
        attempt(f"{source.url}/{file}", options, work, offset=lambda: offset + at, stopped=stopped)
    return max(attempts - 1, 0)


def refusal(sentence: str, place: str) -> RemoteError:
    """The error of a sentence that names its address itself."""
    error = RemoteError(sentence)
    error.path = place
    return error


def unreached(error: BaseException, server: str) -> Unreached | None:
    """What is to be raised if an exception of another library comes from a server that is not there; None if it does not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return Unreached(f"{server} refuses the connection; is a server running there?")
        if isinstance(cause, socket.gaierror):
            return Unreached(f"the name of {server} does not resolve; check the address and the network")
        cause = cause.__cause__ or cause.__context__
    return None


def reason_of(error: object) -> str:
    """What may be shown of an exception of another library."""
    strerror = getattr(error, "strerror", None)  # texts of other libraries quote addresses with their queries
    return f"{type(error).__name__}: {strerror}" if isinstance(strerror, str) else type(error).__name__
