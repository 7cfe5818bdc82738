"""FaasCache: keep-alive is caching, so an instance goes only for another, the one that saves least for its size first.

Greedy-dual-size-frequency (Cherkasova, 1998) as FaasCache applies it (ASPLOS'21): clock + uses x seconds of a cold start /
bytes. Pure; constant time. Taught in chapter 09.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.eviction import Resident, greedy_dual_priority
from sllm_mini.types import Warmth


@dataclass(slots=True)
class GreedyDual(Saveable):
    """The clock is the rank of the last idle one that gave way, so that what was popular long ago ages. Uses are counted per
    model, over all its instances, as in FaasCache's code. `estimator`: the controller's, which learns what a start takes."""

    estimator: Estimator
    _clock: float = field(default=0.0, init=False)
    _uses: dict[str, int] = field(default_factory=dict, init=False)

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return ()

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        self._uses[model.spec.name] = self._uses.get(model.spec.name, 0) + 1
        return ()

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        return Stay(None)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        if instance.model is None:
            return self._clock
        node, spec = cluster.nodes[instance.node], cluster.models[instance.model].spec
        quiet = max(now, node.loads_until)  # who loads here just now says nothing of what a start costs
        saved = self.estimator.start(node, spec, Warmth.COLD, node.tier(spec.name), quiet)
        nbytes = max(spec.nbytes + spec.process_nbytes + spec.runtime_nbytes, 1)
        return greedy_dual_priority(Resident(spec.name, nbytes, nbytes, now, self._uses.get(spec.name, 0), saved, self._clock))

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        self._clock = max(self._clock, rank)  # one that was at work has none: its rank is 0
        return Stay(0.0)

    def on_delete(self, model: ModelState) -> None:
        self._uses.pop(model.spec.name, None)
