"""The words every floor shares: tiers, the warmth ladder, ids, epochs, spans of time, progress.

Plain data, no behaviour beyond arithmetic; costs nothing to import. Taught in chapter 00.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

ModelId = NewType("ModelId", str)
NodeId = NewType("NodeId", str)
RequestId = NewType("RequestId", int)
Epoch = NewType("Epoch", int)
"""Grows by one whenever ownership changes hands; an answer from an older epoch is ignored."""


class _Named(IntEnum):
    """A number that prints as its name; as JSON it stays a number."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)


class Tier(_Named):
    """Where a model's bytes are, from the slowest to the fastest (design of ServerlessLLM, OSDI'24)."""

    REMOTE = 0
    DISK = 1
    DRAM = 2
    DEVICE = 3


class Warmth(_Named):
    """How far a start has climbed. RainbowCake's Bare, Lang and User are PROCESS, RUNTIME and the three above."""

    COLD = 0
    PROCESS = 1
    RUNTIME = 2
    DRAM = 3
    DEVICE = 4
    READY = 5


@dataclass(frozen=True, slots=True)
class Span:
    """A named stretch of time, `[start, end)` in seconds of the machine's monotonic clock.

    The monotonic clock is one for all processes of a machine, so spans of a parent and its child share an axis.
    `nbytes` is what was moved in it (0 where nothing was), `warmth` the rung of the ladder it climbs to.
    """

    name: str
    start: float
    end: float
    lane: str = "main"
    nbytes: int = 0
    warmth: Warmth | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class SpanRecorder:
    """Collects spans: `with recorder.span("read", lane="disk", nbytes=n): ...`. Safe from several threads
    (it only appends). A span whose body raises is still recorded: time that failed was still spent."""

    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str, *, lane: str = "main", nbytes: int = 0, warmth: Warmth | None = None) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(name, start, time.monotonic(), lane, nbytes, warmth))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work has come, in bytes."""

    done_nbytes: int
    total_nbytes: int

    @property
    def fraction(self) -> float:
        return 1.0 if self.total_nbytes == 0 else self.done_nbytes / self.total_nbytes


ProgressCallback = Callable[[Progress], None]
