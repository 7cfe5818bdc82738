"""Knative's pod autoscaler (KPA): a stable window, a panic window, and never down while in panic.

Follows knative/serving's `autoscaler.go` and its documented defaults: windows of 60 s and 6 s, panic at twice what is ready,
a look every 2 s, a target of 100 x 70 %. Concurrency is known exactly here, so a window's mean is an integral over time,
at a grain of one second as Knative's buckets have; a window that began less than its length ago counts from its beginning.
Pure; constant time and some 60 numbers per model. Taught in chapter 10.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, floor
from typing import ClassVar

from sllm_mini.control.autoscale.simple import within
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import ModelState


@dataclass(slots=True)
class Windows:
    """The mean of a step function over the last seconds: areas at whole seconds, as far back as the longest window. It is
    `value` since `since`, and what it was before has the `area`."""

    length_seconds: int
    since: float
    value: float = 0.0
    area: float = 0.0
    areas: deque[tuple[float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not self.areas:
            self.areas.append((self.since, self.area))

    def advance(self, now: float) -> None:
        """The value that was set last held until now."""
        second = floor(self.since) + 1
        if second < floor(now) - self.length_seconds:  # nothing changed for longer than anybody looks back
            start = floor(now) - self.length_seconds - 1
            self.area += self.value * (start - self.since)
            self.since = start
            self.areas.clear()
            self.areas.append((start, self.area))
            second = start + 1
        while second <= now:
            self.area += self.value * (second - self.since)
            self.since = second
            self.areas.append((second, self.area))
            second += 1
        self.area += self.value * (now - self.since)
        self.since = now
        while len(self.areas) > 1 and self.areas[1][0] <= now - self.length_seconds:
            self.areas.popleft()

    def set(self, value: float, now: float) -> None:
        self.advance(now)
        self.value = value

    def mean(self, seconds: float, now: float) -> float:
        """Over the last `seconds`, from the whole second at which they began on; over less where the record is shorter."""
        self.advance(now)
        at, area = self.areas[0]
        for time, value in reversed(self.areas):
            if time <= now - seconds:
                at, area = time, value
                break
        span = now - at
        return (self.area - area) / span if span > 0 else self.value


@dataclass(slots=True)
class _Scaling:
    """What is remembered of one model. `over_since` is the last tick over the panic threshold, None outside of panic."""

    windows: Windows
    decided: float
    desired: int
    over_since: float | None = None
    most: int = 0


@dataclass(slots=True)
class KnativePodAutoscaler(Saveable):
    """Knative's KPA. `target` is concurrency per instance, of which `utilisation` is aimed at. `max_scale_up` and
    `max_scale_down` bound one decision by a factor of what is ready. From zero the first request starts one instance at once
    (Knative's activator). Its scale-to-zero grace period, which bounds how long networking may take, has no part here."""

    target: float = 100.0
    utilisation: float = 0.7
    stable_seconds: int = 60
    panic_fraction: float = 0.1
    panic_threshold: float = 2.0
    max_scale_up: float = 1000.0
    max_scale_down: float = 2.0
    tick_seconds: float | None = 2.0
    scales_down: ClassVar[bool] = True
    queue_seconds: ClassVar[float | None] = None
    _models: dict[str, _Scaling] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not (self.target > 0 and 0 < self.utilisation <= 1 and self.stable_seconds >= 1 and 0 < self.panic_fraction <= 1):
            raise ValueError("a Knative autoscaler needs a target above 0, a utilisation and a panic fraction up to 1, and a window of at least a second")
        if not (self.panic_threshold > 1 and self.max_scale_up > 1 and self.max_scale_down > 1 and (self.tick_seconds or 0) > 0):
            raise ValueError("a Knative autoscaler needs a panic threshold and scale rates above 1, and a tick above 0 seconds")

    def observe(self, model: ModelState, now: float) -> None:
        concurrency = model.running + len(model.queue)
        known = self._models.get(model.spec.name)
        if known is None:
            known = self._models[model.spec.name] = _Scaling(Windows(self.stable_seconds, now), float("-inf"), 0)
        known.windows.set(concurrency, now)

    def desired(self, model: ModelState, now: float) -> int:
        known = self._models.get(model.spec.name)
        if known is None:
            return within(model, 0)
        if now - known.decided >= (self.tick_seconds or 0.0):
            known.decided, known.desired = now, self._decide(known, model.ready, now)
        waiting = bool(model.queue) and not model.ready and not model.starting
        return within(model, max(known.desired, 1) if waiting else known.desired)

    def _decide(self, known: _Scaling, ready: int, now: float) -> int:
        """One tick, as `Autoscaler.Scale` has it."""
        per_instance = self.target * self.utilisation
        pods = max(ready, 1)
        lowest, highest = floor(pods / self.max_scale_down), ceil(pods * self.max_scale_up)
        stable = ceil(known.windows.mean(self.stable_seconds, now) / per_instance)
        panic = ceil(known.windows.mean(self.stable_seconds * self.panic_fraction, now) / per_instance)
        over = panic / pods >= self.panic_threshold
        stable, panic = (min(max(wanted, lowest), highest) for wanted in (stable, panic))
        if over:
            known.over_since = now
        elif known.over_since is not None and now - known.over_since > self.stable_seconds:
            known.over_since, known.most = None, 0
        if known.over_since is None:
            return stable
        known.most = max(known.most, stable, panic)
        return known.most

    def on_delete(self, model: ModelState) -> None:
        self._models.pop(model.spec.name, None)

    def admits(self, model: ModelState, now: float) -> bool:
        return True
