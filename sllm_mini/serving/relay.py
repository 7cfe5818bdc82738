"""Streams of a cluster as an event loop reads them: no thread for each, one wake-up for whatever came together. Chapter 11.

Holds no text: what came and was not taken is a list of references to pieces that the ledger holds as well, at most as many as the
requests may write. Costs one `call_soon_threadsafe` for each delivery that finds the reader asleep.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from starlette.types import Receive

from sllm_mini.cluster.api import RequestReport, Stream
from sllm_mini.inference.ownership.ledger import LedgerPiece

T = TypeVar("T")


class Delivery(NamedTuple):
    """What came of one of the streams; with its report, where it is over."""

    choice: int
    pieces: Sequence[LedgerPiece]
    report: RequestReport | None


class Relay:
    """Reads streams from the loop on which it is entered; one task reads. Leaving it cancels those that are not over. With `whole` it wakes for
    the end of a stream only."""

    def __init__(self, streams: Sequence[Stream], *, whole: bool = False) -> None:
        self._streams, self._whole = streams, whole
        self._come: list[Delivery] = []
        self._reports = 0
        """How many of those are the end of a stream."""
        self._lock = threading.Lock()
        self._waking = False
        self._open, self._waiting = set(range(len(streams))), set(range(len(streams)))
        self._leave: list[Callable[[], None]] = []

    async def __aenter__(self) -> Relay:
        self._loop, self._awake = asyncio.get_running_loop(), asyncio.Event()
        try:
            for index, stream in enumerate(self._streams):
                self._leave.append(stream.subscribe(partial(self._told, index)))
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def open(self) -> bool:
        """Whether there is more to come than was taken."""
        return bool(self._open)

    @property
    def waiting(self) -> list[int]:
        """Those of which no piece has come, in order."""
        with self._lock:
            return sorted(self._waiting)

    async def next(self, timeout: float) -> list[Delivery]:
        """What came since, in order; waits for it as long as that. Empty where nothing came."""
        if not (self._reports if self._whole else self._come):
            try:
                async with asyncio.timeout(timeout):  # Python 3.11's wait_for loses a cancellation that comes together with what it waits for
                    await self._awake.wait()
            except TimeoutError:
                return []
        self._awake.clear()
        with self._lock:
            come, self._come, self._reports = self._come, [], 0
        self._open.difference_update(each.choice for each in come if each.report is not None)
        return come

    def _told(self, index: int, pieces: Sequence[LedgerPiece], report: RequestReport | None) -> None:
        """On whichever thread delivers."""
        with self._lock:
            self._come.append(Delivery(index, pieces, report))
            self._reports += report is not None
            self._waiting.discard(index)
            if self._waking or (self._whole and report is None):
                return
            self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return  # the loop has ended, and the reader with it

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
        self._awake.set()

    def _end(self) -> None:
        for leave in self._leave:
            leave()
        for index in self._open:
            self._streams[index].cancel()


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None where the client went away before: it is cancelled then. The request's body must have been read. A client that
    has closed its side for writing counts as gone: HTTP/1.1 servers cannot tell the two apart."""
    working, going = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, going):
            task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
