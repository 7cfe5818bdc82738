"""A channel that loses, doubles and delays what goes over it, both ways: late messages are overtaken by those after them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from sllm_mini.wire import Channel, Received, WireTimeout

LATE_SECONDS = 0.15


class Unreliable:
    """Each frame is lost, doubled or late with the chance `share` each. `counts` says how often. A `Channel` otherwise."""

    def __init__(self, channel: Channel, share: float, seed: int) -> None:
        self._channel, self._share = channel, share
        self.counts: Counter[str] = Counter()
        self._out, self._in = _Way(Random(seed), self), _Way(Random(seed + 1), self)

    @property
    def name(self) -> str:
        return self._channel.name

    def send(self, message: Any, *, payload: Any = None, timeout: float | None = None) -> None:
        for frame, bytes_ in self._out.through((message, payload)):
            self._channel.send(frame, payload=bytes_, timeout=timeout)

    def receive(self, timeout: float | None = None, *, into: Callable[[Any, int], Any] | None = None) -> Received[Any]:
        deadline = time.monotonic() + (3600 if timeout is None else timeout)
        while not self._in.ready:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WireTimeout("nothing came in time")
            self._in.ready += self._in.through(self._channel.receive(left, into=into))
        return self._in.ready.pop(0)

    def close(self) -> None:
        self._channel.close()

    def fate(self, chance: Random) -> str:
        drawn = chance.random() / self._share
        fate = ("lost", "doubled", "late")[int(drawn)] if drawn < 3 else "as it should be"
        self.counts[fate] += 1
        return fate


class _Way:
    """One direction; several threads may send."""

    def __init__(self, chance: Random, channel: Unreliable) -> None:
        self.ready: list[Received[Any]] = []
        self._chance, self._channel = chance, channel
        self._lock = threading.Lock()
        self._held: list[tuple[float, Any]] = []

    def through(self, frame: Any) -> list[Any]:
        """What comes out at the other end now that this went in."""
        with self._lock:
            now = time.monotonic()
            fate = self._channel.fate(self._chance)
            if fate == "late":
                self._held.append((now + LATE_SECONDS, frame))
            out = {"as it should be": [frame], "doubled": [frame, frame]}.get(fate, [])
            out += [held for due, held in self._held if due <= now]
            self._held = [(due, held) for due, held in self._held if due > now]
            return out
