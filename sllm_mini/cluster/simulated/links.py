"""What loads contend for: a link that serves one load after another, or one that all loads share evenly.

Taught in chapter 08. `submit` a load, ask `next_at` when the next one is over, `take` what is over by then. A change costs
O(log n) for n loads at once. Pure; the clock is an argument.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What a link serves; a queue tells it how long it waited, at most, in all the links it waited in."""

    queued_seconds: float


LoadT = TypeVar("LoadT", bound=Queued)


class Link(Protocol[LoadT]):
    version: int
    """Grows with each change, so that a completion that was planned before it can be told apart."""

    def submit(self, load: LoadT, seconds: float, now: float) -> None:
        """A load that would take `seconds` alone."""
        ...

    def next_at(self) -> float | None:
        """When the next load is over, if nothing changes."""
        ...

    def take(self, now: float) -> list[LoadT]:
        """The loads that are over, in order."""
        ...


class QueuedLink(Generic[LoadT]):
    """One load at a time, in order of arrival, as ServerlessLLM's nodes do."""

    __slots__ = ("_free_at", "_queue", "version")

    def __init__(self) -> None:
        self.version = 0
        self._free_at = 0.0
        self._queue: deque[tuple[float, LoadT]] = deque()

    def submit(self, load: LoadT, seconds: float, now: float) -> None:
        begin = max(now, self._free_at)
        load.queued_seconds = max(load.queued_seconds, begin - now)
        self._free_at = begin + seconds
        self._queue.append((self._free_at, load))
        self.version += 1

    def next_at(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def take(self, now: float) -> list[LoadT]:
        over = []
        while self._queue and self._queue[0][0] <= now:
            over.append(self._queue.popleft()[1])
        self.version += 1
        return over


class SharedLink(Generic[LoadT]):
    """All loads at once, each with an equal share (processor sharing). What one gets grows alike for all, so a load is over
    when that common measure reaches what it was at its begin plus its own seconds."""

    __slots__ = ("_heap", "_measure", "_number", "_since", "version")

    def __init__(self) -> None:
        self.version = 0
        self._heap: list[tuple[float, int, LoadT]] = []
        self._measure = 0.0
        self._since = 0.0
        self._number = 0

    def submit(self, load: LoadT, seconds: float, now: float) -> None:
        self._advance(now)
        self._number += 1
        heappush(self._heap, (self._measure + seconds, self._number, load))
        self.version += 1

    def next_at(self) -> float | None:
        return self._since + (self._heap[0][0] - self._measure) * len(self._heap) if self._heap else None

    def take(self, now: float) -> list[LoadT]:
        # The first is over because its time has come, whatever the last bit of a sum says; others at once with it.
        over = []
        if self._heap and (at := self.next_at()) is not None and at <= now:
            self._measure = max(self._measure, self._heap[0][0])
            self._since = now
            while self._heap and self._heap[0][0] <= self._measure:
                over.append(heappop(self._heap)[2])
        else:
            self._advance(now)
        self.version += 1
        return over

    def _advance(self, now: float) -> None:
        if self._heap:
            self._measure += (now - self._since) / len(self._heap)
        self._since = now
