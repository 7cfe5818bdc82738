"""Keep-alive by the clock: at once, 10 minutes, 20 minutes, for good, and with spare instances beside. Pure. Chapter 09.

AWS Lambda is reported to keep an idle environment some 10 minutes, Azure Functions 20 (second-hand). Provisioned
concurrency, minimum instances and always-ready instances are no policy of their own: they are a model's `min_instances`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import ClassVar

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.policy import KeepAlive, Prewarm, Stay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth


@dataclass(slots=True)
class FixedKeepAlive:
    """An idle instance stays `seconds`, then descends to `then`, and from there at the next look to COLD. The one that has been
    idle longest gives way first (LRU)."""

    seconds: float
    then: Warmth = Warmth.COLD

    def __post_init__(self) -> None:
        if isnan(self.seconds) or self.seconds < 0:
            raise ValueError(f"an instance cannot be kept for {self.seconds} s; give 0 or more")

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return ()

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        return ()

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        return Stay(self.seconds, self.then if instance.warmth > self.then else Warmth.COLD)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return now

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0, self.then if instance.warmth > self.then else Warmth.COLD)


class Forever(FixedKeepAlive):
    """Only another's need for room ends an instance (what a cache does)."""

    def __init__(self, then: Warmth = Warmth.COLD) -> None:
        super().__init__(0.0, then)

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        return Stay(None)


@dataclass(slots=True)
class Buffered(Saveable):
    """`spare` idle instances more than are at work or started for requests that wait, from the first day on and whenever a
    request takes one (Azure Premium's pre-warmed instances, as reported); else as `inner` says."""

    saved_parts: ClassVar[tuple[str, ...]] = ("inner",)
    inner: KeepAlive
    spare: int = 1

    def __post_init__(self) -> None:
        if self.spare < 1:
            raise ValueError(f"a buffer of {self.spare} instances is none; give at least 1")

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return [*self.inner.on_deploy(model, cluster, now), Prewarm(now, model.spec.name, Warmth.READY, self.spare)]

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        taken = -(-len(model.queue) // model.spec.concurrency)  # of those that climb, by those who wait
        return [*self.inner.on_arrival(model, cluster, now, warmth), Prewarm(now, model.spec.name, Warmth.READY, self.spare + taken)]

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        return self.inner.stay(instance, cluster, now)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return self.inner.rank(instance, cluster, now)

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return self.inner.gave_way(instance, rank, now)

    def on_delete(self, model: ModelState) -> None:
        if hasattr(self.inner, "on_delete"):
            self.inner.on_delete(model)
