"""A limit on bytes per second, as a link has one: what stands for a network where all nodes are on one machine (chapter 10)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Lets `bytes_per_second` pass, and up to `burst_nbytes` more after a pause, which also makes up for sleeps that end late.

    Safe from several threads, which share the rate in the order of their calls. Raises ValueError for a rate or a burst that is not positive."""

    def __init__(
        self, bytes_per_second: float, burst_nbytes: int = 64 << 10, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        if not bytes_per_second > 0 or burst_nbytes < 1:
            raise ValueError(f"a bucket of {burst_nbytes} bytes at {bytes_per_second} bytes/s lets nothing pass; give both above 0")
        self.bytes_per_second = bytes_per_second
        self._burst_seconds = burst_nbytes / bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free = clock()

    def take(self, nbytes: int) -> None:
        """Returns when the link would have moved `nbytes` more."""
        with self._lock:
            now = self._clock()
            self._free = max(self._free, now - self._burst_seconds) + nbytes / self.bytes_per_second
            seconds = self._free - now
        if seconds > 0:
            self._sleep(seconds)
