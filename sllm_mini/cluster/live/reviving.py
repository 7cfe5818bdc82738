"""Nodes that were lost are started again, as somebody who looks after machines would have it. Chapter 08.

A node that is lost is started `seconds` later, and one that does not come up, or is lost again within half a minute, after twice as long each
time, up to 64 times as long. Lost so `limit` times in a row it is given up: what kills it is not chance. It comes back under its name as
its next incarnation: nothing that its old self says counts. Costs a thread for each node that is being brought back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from sllm_mini.control.messages import NodeSpec
from sllm_mini.errors import SllmError

_STEADY_SECONDS = 30.0
_MOST_DOUBLINGS = 6


@dataclass(slots=True, eq=False)
class _Node:
    """One that was lost at least once. `pending`: there is a loss that nobody has seen to; `failures`: how often it was started in a row;
    `due`: when it is started next."""

    spec: NodeSpec
    thread: threading.Thread | None = None
    pending: bool = False
    failures: int = 0
    came: float = -inf
    due: float = inf


class Reviver:
    """`join(spec)` returns when the node is there again, or raises SllmError. `is_away(name)` says that no node of the name is there or on
    its way; it raises SllmError where none will ever come again. `give_up(name, times)` is told. Safe from several threads."""

    def __init__(
        self, join: Callable[[NodeSpec], object], is_away: Callable[[str], bool], give_up: Callable[[str, int], object], now: Callable[[], float], limit: int, seconds: float,
    ) -> None:  # fmt: skip
        self._join, self._is_away, self._give_up, self._now, self._limit, self._seconds = join, is_away, give_up, now, limit, seconds
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._nodes: dict[str, _Node] = {}
        self.returned = 0
        """Nodes that came back."""
        self.failed = 0
        """Starts after which none came."""

    def lost(self, spec: NodeSpec) -> None:
        """A node that had joined is gone. Never waits."""
        with self._lock:
            if not self._limit or self._ending.is_set():
                return
            node = self._nodes.setdefault(spec.name, _Node(spec))
            node.spec, node.pending = spec, True
            if self._now() - node.came >= _STEADY_SECONDS:
                node.failures = 0
            if node.thread is None:
                node.due = self._now()
                node.thread = threading.Thread(target=self._bring_back, args=(node,), name=f"sllm-revive-{spec.name}", daemon=True)
                node.thread.start()

    def came(self, name: str) -> None:
        """A node has joined, whoever saw to it; told before it can be lost."""
        with self._lock:
            if name in self._nodes:
                self._nodes[name].came = self._now()

    def returning(self) -> dict[str, float]:
        """When those that are lost and not given up are started; in the past: they are coming up."""
        with self._lock:
            return {name: node.due for name, node in self._nodes.items() if node.due < inf}

    def stop(self) -> None:
        """No more are started. Never waits."""
        self._ending.set()

    def close(self) -> None:
        """Likewise, and waits for those that are coming up; whoever ends the cluster has made their `join` fail."""
        self.stop()
        with self._lock:
            threads = [node.thread for node in self._nodes.values() if node.thread is not None]
        for thread in threads:
            thread.join()

    def _bring_back(self, node: _Node) -> None:
        name = node.spec.name
        try:
            while (seconds := self._next(node)) is not None:
                if self._ending.wait(seconds) or not self._is_away(name):
                    continue
                try:
                    self._join(node.spec)
                    with self._lock:
                        self.returned, node.due = self.returned + 1, inf
                except (SllmError, OSError):
                    away = self._is_away(name)
                    with self._lock:
                        self.failed += 1
                        node.pending = node.pending or away
        except SllmError:  # the cluster has ended
            self.stop()
            self._next(node)

    def _next(self, node: _Node) -> float | None:
        """In how many seconds it is started; None where it need not be, or not any more."""
        with self._lock:
            if self._ending.is_set() or not node.pending:
                node.thread, node.due = None, inf
                return None
            times, given_up = node.failures, node.failures >= self._limit
            if not given_up:
                node.pending, node.failures = False, node.failures + 1
                seconds = self._seconds * 2 ** min(times, _MOST_DOUBLINGS)
                node.due = self._now() + seconds
                return seconds
            node.pending, node.failures, node.thread, node.due = False, 0, None, inf
        self._give_up(node.spec.name, times)
        return None
