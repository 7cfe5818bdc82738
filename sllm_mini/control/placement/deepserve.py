"""DeepServe's Algorithm 1: where load is balanced, the instance that has read the same beginning; else the least loaded.

An instance remembers the prefixes of the requests that it was last given here, as its KV cache would, until it is started
anew. What it takes from the queue of itself is not seen. Pure; a look at the model's open instances for each request.
Taught in chapter 08.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import choose_node, fit, near_nodes
from sllm_mini.control.policy import Plan
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState, RequestState


@dataclass(slots=True)
class PrefixOrLeastLoaded(Saveable):
    """Load is balanced while the most and the least loaded open instance are no more than `imbalance` requests apart. Starts
    go where they are ready soonest. `remembered` prefixes per instance."""

    estimator: Estimator = field(default_factory=Estimator)
    imbalance: int = 2
    remembered: int = 64
    most_considered: int = 8
    _prefixes: dict[int, tuple[int, dict[str, None]]] = field(default_factory=dict, init=False)
    """By instance, with its epoch: the prefix used last at the end."""

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        loads = {id: len(one.requests) + one.reserved for id, one in model.open.items()}
        chosen = None
        if request.prefix and max(loads.values()) - min(loads.values()) <= self.imbalance:
            shared = {id: self._shared(one, request.prefix) for id, one in model.open.items()}
            longest = max(shared, key=shared.__getitem__)
            chosen = model.open[longest] if shared[longest] else None
        if chosen is None:
            chosen = model.open[min(loads, key=loads.__getitem__)]
        if request.prefix:
            self._remember(chosen, request.prefix, cluster)
        return chosen

    def _remember(self, instance: InstanceState, prefix: str, cluster: Cluster) -> None:
        held = self._known(instance)
        if held is None:
            held = {}
            self._prefixes[instance.id] = instance.epoch, held
            if len(self._prefixes) > 2 * len(cluster.instances) + 16:
                self._prefixes = {id: known for id, known in self._prefixes.items() if id in cluster.instances}
        held.pop(prefix, None)
        held[prefix] = None
        if len(held) > self.remembered:
            del held[next(iter(held))]

    def _known(self, instance: InstanceState) -> dict[str, None] | None:
        epoch, held = self._prefixes.get(instance.id, (-1, None))
        return held if epoch == instance.epoch else None

    def _shared(self, instance: InstanceState, prefix: str) -> int:
        """Characters of the longest remembered prefix that this one begins with, or that begins with this one."""
        known = self._known(instance)
        if not known:
            return 0
        if prefix in known:
            return len(prefix)
        return max((min(len(one), len(prefix)) for one in known if one.startswith(prefix) or prefix.startswith(one)), default=0)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        nodes = near_nodes(model, cluster, self.most_considered)
        chosen = choose_node(one for node in nodes if (one := fit(model, node, cluster, self.estimator, now)) is not None)
        return None if chosen is None else chosen.plan
