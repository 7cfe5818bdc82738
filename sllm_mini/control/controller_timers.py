"""What a controller has asked to be woken for. Timers that were given up or have fired are forgotten, so late ones are ignored.

Pure; one thread at a time. Part of `controller`; taught in chapter 08.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from sllm_mini.control.messages import AnyAction, SetTimer


class Wake(IntEnum):
    """What a timer is for; its key is an instance, or the name of a model."""

    REST = 0
    """An idle instance has stayed as long as it should."""
    PREWARM = 1
    TICK = 2
    """The autoscaler wants to be asked."""
    RETRY = 3
    """A start has failed, and the next may be tried."""
    PATIENCE = 4
    """A request has queued as long as its autoscaler allows."""


class Timer(NamedTuple):
    wake: Wake
    key: int | str
    at: float
    warmth: int = 0
    """Of a pre-warming."""


class Timers:
    """Ids from a counter; each pending one with what it is for."""

    def __init__(self, actions: list[AnyAction]) -> None:
        self._actions = actions
        self.count = 0
        self.pending: dict[int, Timer] = {}

    def set(self, wake: Wake, key: int | str, at: float, warmth: int = 0) -> int:
        timer = self.count
        self.count += 1
        self.pending[timer] = Timer(wake, key, at, warmth)
        self._actions.append(SetTimer(timer, at))
        return timer

    def sooner(self, timer: int | None, wake: Wake, key: int | str, at: float, warmth: int = 0) -> int:
        """A timer that fires by `at`: the one there is, which may fire early and is set again then, or a new one for it."""
        if timer is not None:
            if self.pending[timer].at <= at:
                return timer
            del self.pending[timer]
        return self.set(wake, key, at, warmth)

    def drop(self, timer: int | None) -> None:
        if timer is not None:
            del self.pending[timer]

    def fired(self, timer: int) -> Timer | None:
        """What it was for; None: for nothing any more."""
        return self.pending.pop(timer, None)
