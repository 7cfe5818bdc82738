"""OpenWhisk's stem cells: runtimes without a function, made before anybody asks, more where cold starts were seen.

`initialCount` of each runtime from the start; reactive: at a cold start, ⌊cold starts of the last minute / threshold⌋ x
increment more than `minCount`, at most `maxCount`, each for `ttl`. Pure; constant time. Taught in chapter 09.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.policy import KeepAlive, Prewarm, Stay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

_MINUTE = 60.0


@dataclass(slots=True)
class StemCells(Saveable):
    """Stem cells beside `inner`, which decides over what has a model. A cold arrival makes as many anew as are wanted then, so
    one that a queued request takes later is missed until the next; one that nobody takes for `ttl_seconds` goes, but for the
    initial ones."""

    saved_parts: ClassVar[tuple[str, ...]] = ("inner",)
    inner: KeepAlive
    initial: int = 2
    least: int = 1
    most: int = 4
    ttl_seconds: float = 120.0
    threshold: int = 1
    increment: int = 1
    _cold: dict[str, deque[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if min(self.initial, self.least, self.increment) < 0 or self.most < self.least or self.threshold < 1 or not self.ttl_seconds >= 0:
            raise ValueError("stem cells need counts of 0 or more, at most no less than least, a threshold of at least 1, and a ttl of 0 s or more")

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        own = self.inner.on_deploy(model, cluster, now)
        return [*own, Prewarm(now, model.spec.name, Warmth.RUNTIME, self.initial)] if self.initial else own

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        own = self.inner.on_arrival(model, cluster, now, warmth)
        if warmth >= Warmth.DRAM:
            return own
        recent = self._cold.setdefault(model.spec.runtime, deque())
        recent.append(now)
        return [*own, Prewarm(now, model.spec.name, Warmth.RUNTIME, max(self.initial, self.wanted(model.spec.runtime, now)))]

    def wanted(self, runtime: str, now: float) -> int:
        """How many reactive stem cells of a runtime there should be now."""
        recent = self._cold.get(runtime, deque())
        while recent and recent[0] <= now - _MINUTE:
            recent.popleft()
        return min(self.least + len(recent) // self.threshold * self.increment, self.most) if recent else 0

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        if instance.model is not None:
            return self.inner.stay(instance, cluster, now)
        others = sum(one.warmth is Warmth.RUNTIME and one.id != instance.id for one in cluster.sleeping(None, instance.runtime or ""))
        return Stay(None if instance.warmth is Warmth.RUNTIME and others < self.initial else self.ttl_seconds)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return self.inner.rank(instance, cluster, now)

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return self.inner.gave_way(instance, rank, now)

    def on_delete(self, model: ModelState) -> None:
        if hasattr(self.inner, "on_delete"):
            self.inner.on_delete(model)
