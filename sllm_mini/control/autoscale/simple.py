"""Autoscalers that look at this moment only: per request, target concurrency, queue length, a bounded queue.

Each answers in constant time. Pure. Taught in chapter 10.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import ModelState


def within(model: ModelState, wanted: int) -> int:
    """`wanted`, within what the model's spec allows."""
    return min(max(wanted, model.spec.min_instances), model.spec.max_instances)


def _ceil_div(amount: int, share: float) -> int:
    return int(-(-amount // share))


@dataclass(slots=True)
class PerRequest:
    """As many instances as the requests there are need (AWS Lambda, OpenWhisk): nobody waits for somebody else's request."""

    tick_seconds: ClassVar[float | None] = None
    scales_down: ClassVar[bool] = False
    queue_seconds: ClassVar[float | None] = None

    def observe(self, model: ModelState, now: float) -> None:
        """Keeps nothing."""

    def desired(self, model: ModelState, now: float) -> int:
        return within(model, _ceil_div(model.running + len(model.queue), model.spec.concurrency))

    def admits(self, model: ModelState, now: float) -> bool:
        return True


@dataclass(slots=True)
class TargetConcurrency(Saveable):
    """ServerlessLLM's autoscaler: requests over `target`, rounded up, one instance more at a tick (its public code, which ticks
    once a second; there too an instance goes only when it has been idle as long as its keep-alive says)."""

    target: float = 2.0
    tick_seconds: float | None = 1.0
    scales_down: ClassVar[bool] = False
    queue_seconds: ClassVar[float | None] = None
    _step: dict[str, tuple[float, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.target > 0 or (self.tick_seconds is not None and not self.tick_seconds > 0):
            raise ValueError(f"a target of {self.target} requests every {self.tick_seconds} s scales nothing; give numbers above 0")

    def observe(self, model: ModelState, now: float) -> None:
        """Keeps nothing."""

    def desired(self, model: ModelState, now: float) -> int:
        wanted = within(model, _ceil_div(model.running + len(model.queue), self.target))
        there = model.ready + len(model.starting)
        if self.tick_seconds is None:
            return wanted
        since, allowed = self._step.get(model.spec.name, (float("-inf"), there))
        if now - since >= self.tick_seconds:  # one step from what is there, held until the next tick
            allowed = there + (wanted > there)
            self._step[model.spec.name] = now, allowed
        return within(model, min(allowed, max(wanted, there)))  # what the keep-alive has let go since then is not started again unasked

    def on_delete(self, model: ModelState) -> None:
        self._step.pop(model.spec.name, None)

    def admits(self, model: ModelState, now: float) -> bool:
        return True


@dataclass(slots=True)
class QueueLength:
    """Azure's target-based scaling: queue length over a target per instance, beside those that are at work (as reported)."""

    target: int = 16
    tick_seconds: ClassVar[float | None] = None
    scales_down: ClassVar[bool] = False
    queue_seconds: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"a target of {self.target} queued requests per instance scales nothing; give at least 1")

    def observe(self, model: ModelState, now: float) -> None:
        """Keeps nothing."""

    def desired(self, model: ModelState, now: float) -> int:
        at_work = _ceil_div(model.running, model.spec.concurrency)
        return within(model, at_work + _ceil_div(len(model.queue), self.target))

    def admits(self, model: ModelState, now: float) -> bool:
        return True


@dataclass(slots=True)
class BoundedQueue:
    """Google Cloud Run: an instance for `utilisation` of the concurrency there is; over capacity a request queues for at most
    `queue_seconds` and is then answered 429, at once if `most_queued` wait already (as reported; the second bound is ours)."""

    utilisation: float = 0.6
    queue_seconds: float | None = 60.0
    most_queued: int = 1000
    tick_seconds: ClassVar[float | None] = None
    scales_down: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1 or self.most_queued < 0:
            raise ValueError(f"a utilisation of {self.utilisation} and {self.most_queued} queued cannot be; give up to 1, and 0 or more")

    def observe(self, model: ModelState, now: float) -> None:
        """Keeps nothing."""

    def desired(self, model: ModelState, now: float) -> int:
        return within(model, _ceil_div(model.running + len(model.queue), model.spec.concurrency * self.utilisation))

    def admits(self, model: ModelState, now: float) -> bool:
        return len(model.queue) < self.most_queued
