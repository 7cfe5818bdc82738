"""The hybrid histogram of Azure's researchers (Serverless in the Wild, ATC'20): unload, and be back just in time.

Per model, idle times (from the end of its work to the next request) in bins of a minute, 240 of them. Where most fall
outside, a forecast of the next one; where they are too few or show no pattern (CV of the bin counts below 2), 240 minutes
without unloading; else away until 0.9 x the 5th percentile, there until 1.1 x the 99th. Rounded as two public
implementations have it: down to the minute for the first, up for the second. Pure; a look costs 240 additions, and an
arrival constant time. Taught in chapter 09.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, floor
from typing import ClassVar

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

_MINUTE = 60.0
Forecaster = Callable[[Sequence[float]], float | None]
"""The next idle time in seconds from those before it, oldest first; None where it cannot say. One that remembers more than it
is given may offer `save` and `restore`, and is saved with the policy."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Seconds after the end of its work: the model is away until `prewarm` (0: it never goes) and there until `alive`."""

    prewarm: float
    alive: float


@dataclass(slots=True)
class IdleTimes:
    """One model's histogram. `counts[i]` idle times were from i up to i + 1 minutes; `outside` were longer than all bins."""

    counts: list[int]
    outside: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def add(self, seconds: float) -> None:
        minute = int(seconds // _MINUTE)
        self.recent.append(seconds)
        if minute < len(self.counts):
            self.counts[minute] += 1
        else:
            self.outside += 1

    def variation(self) -> float:
        """The coefficient of variation of the bin counts: 0 for a flat histogram, large for one with a peak."""
        total = sum(self.counts)
        if not total:
            return 0.0
        mean = total / len(self.counts)
        return float((sum((count - mean) ** 2 for count in self.counts) / len(self.counts)) ** 0.5 / mean)

    def percentile_bin(self, share: float) -> int:
        """The first bin up to which at least this share of the idle times inside lies."""
        needed = share * sum(self.counts)
        return next(i for i, upto in enumerate(accumulate(self.counts)) if upto >= needed and upto)


@dataclass(slots=True)
class HybridHistogram(Saveable):
    """`forecaster` answers where most idle times are too long for the histogram (the paper fits an ARIMA); without one, or where it
    cannot say, the model stays for the whole range. A request that comes before its pre-warm takes its place."""

    saved_parts: ClassVar[tuple[str, ...]] = ("forecaster",)
    forecaster: Forecaster | None = None
    bins: int = 240
    too_few: int = 10
    too_many_outside: float = 0.5
    least_variation: float = 2.0
    forecast_margin: float = 0.15
    _idle: dict[str, IdleTimes] = field(default_factory=dict, init=False)
    _ended: dict[str, float] = field(default_factory=dict, init=False)
    _alive_until: dict[str, float] = field(default_factory=dict, init=False)
    _due: dict[str, float] = field(default_factory=dict, init=False)
    """When a model is to be pre-warmed."""

    def __post_init__(self) -> None:
        if self.bins < 1 or self.too_few < 1 or not 0 <= self.forecast_margin < 1:
            raise ValueError("a hybrid histogram needs at least one bin and one sample, and a margin from 0 up to 1")

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return ()

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        name = model.spec.name
        ended, due = self._ended.pop(name, None), self._due.pop(name, None)
        if ended is not None:
            self._idle.setdefault(name, IdleTimes([0] * self.bins)).add(now - ended)
        return () if due is None or due <= now else (Prewarm(now, name, Warmth.READY, 0),)

    def windows(self, idle: IdleTimes | None) -> Windows:
        """What the idle times so far ask for."""
        whole = Windows(0.0, self.bins * _MINUTE)
        if idle is None:
            return whole
        inside = sum(idle.counts)
        if idle.outside > self.too_many_outside * (inside + idle.outside):
            ahead = self.forecaster(tuple(idle.recent)) if self.forecaster is not None else None
            if ahead is None or not ahead > 0:
                return whole
            return Windows((1 - self.forecast_margin) * ahead, (1 + self.forecast_margin) * ahead)
        if inside + idle.outside < self.too_few or idle.variation() < self.least_variation:
            return whole
        head, tail = idle.percentile_bin(0.05), idle.percentile_bin(0.99) + 1
        return Windows(floor(0.9 * head) * _MINUTE, ceil(1.1 * tail) * _MINUTE)

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        name = instance.model
        if name is None:
            return Stay(0.0)
        if not instance.uses:  # it was started ahead of its next request, or its request went elsewhere
            return Stay(max(self._alive_until.get(name, now) - now, 0.0))
        if cluster.models[name].running == 0:
            self._ended.setdefault(name, now)  # asked again about one that is idle already, it has been so since then
        windows = self.windows(self._idle.get(name))
        self._alive_until[name] = now + windows.alive
        if not windows.prewarm:
            return Stay(windows.alive)
        self._due[name] = now + windows.prewarm
        return Stay(0.0, again=Prewarm(self._due[name], name, Warmth.READY))

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return now

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0)

    def on_delete(self, model: ModelState) -> None:
        for known in (self._idle, self._ended, self._alive_until, self._due):
            known.pop(model.spec.name, None)
