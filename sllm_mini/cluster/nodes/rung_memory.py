"""What workers hold on each rung, measured now and then: to count a process's pages takes some 10 ms, and a start has five rungs.

Measured is the first climb that ends on a rung, the second that passes it (a model's first start is the one that is waited for most), and
each tenth; between them a rung has the figures of the one before, and 0 where there are none yet. Explained in chapter 08.
"""

from __future__ import annotations

import threading

from msgspec.structs import replace

from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.types import Warmth

_EVERY = 10
_Key = tuple[str, Warmth]


class RungMemory:
    """Of one node. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[_Key, Rung] = {}
        self._climbs: dict[_Key, int] = {}

    def due(self, model: str, warmth: Warmth, *, last: bool) -> bool:
        """Whether this climb is one to measure; `last`: it ends there."""
        with self._lock:
            count = self._climbs[model, warmth] = self._climbs.get((model, warmth), -1) + 1
            return count % _EVERY == 0 if (model, warmth) in self._known else last or count > 0

    def told(self, model: str, rung: Rung, *, measured: bool) -> Rung:
        """The rung with its memory."""
        with self._lock:
            if measured:
                self._known[model, rung.warmth] = rung
                return rung
            known = self._known.get((model, rung.warmth), rung)
        return replace(rung, private_nbytes=known.private_nbytes, proportional_nbytes=known.proportional_nbytes)

    def forget(self, model: str) -> None:
        """It was deleted."""
        with self._lock:
            for keys in (self._known, self._climbs):
                for key in [key for key in keys if key[0] == model]:
                    del keys[key]
