"""A bound to compare with: keep-alive that knows when each model is next asked for. Pure. Taught in chapter 09.

It thinks of one instance of each model: where several requests run at once it can still find none ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

_AFTER_SECONDS = 1e-3
"""So that an arrival comes before the timer of the instance that waits for it."""


@dataclass(slots=True)
class Clairvoyant:
    """`next_arrival(model, now)` is when its next request comes, at `now` or later, None if none does; it says the same whenever
    it is asked, so nothing is to be saved. `estimator`: the controller's. An idle instance stays for the next request only if
    that is no later than a start takes; else it goes at once and is there again just in time."""

    next_arrival: Callable[[str, float], float | None]
    estimator: Estimator
    first: bool = True
    """Whether even a model's first request finds it ready."""

    def _start_seconds(self, model: ModelState, cluster: Cluster, now: float) -> float:
        node = next(iter(cluster.nodes.values()), None)
        return self.estimator.start(node, model.spec, Warmth.COLD, node.tier(model.spec.name), now) if node is not None else 0.0

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        arrival = self.next_arrival(model.spec.name, now) if self.first else None
        if arrival is None:
            return ()
        return [Prewarm(max(arrival - self._start_seconds(model, cluster, now), now), model.spec.name, Warmth.READY)]

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        return ()

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        model = cluster.models.get(instance.model or "")
        arrival = self.next_arrival(model.spec.name, now) if model is not None else None
        if model is None or arrival is None:
            return Stay(0.0)
        start = self._start_seconds(model, cluster, now)
        if arrival - now <= start:
            return Stay(arrival - now + _AFTER_SECONDS)
        return Stay(0.0, again=Prewarm(arrival - start, model.spec.name, Warmth.READY))

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        """Belady's: whose next request is furthest goes first."""
        arrival = self.next_arrival(instance.model, now) if instance.model is not None else None
        return float("-inf") if arrival is None else -arrival

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0)
