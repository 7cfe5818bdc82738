"""Shepherd*: the node where the start is quickest, and whoever runs there is stopped (ServerlessLLM's name for its comparison).

Start-up times are estimated as ServerlessLLM does, but a busy node is had by preemption: what ran there is queued again and
begins anew. A request that was preempted `most_preemptions` times is left alone, or two models could throw each other out
for ever. Pure. Taught in chapter 08.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from msgspec.structs import replace

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import Candidate, choose_node, fit, most_recent, near_nodes
from sllm_mini.control.placement.victims import cheapest_cover, shortage, victims
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, RequestState
from sllm_mini.types import Tier


@dataclass(slots=True)
class Preempting:
    """Considers a busy node only where the weights are: in DRAM or on disk. Of its instances those go that free
    enough devices for the fewest seconds of work lost."""

    estimator: Estimator = field(default_factory=Estimator)
    most_preemptions: int = 1
    most_considered: int = 8

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        found, busy = self._fits(model, cluster, now)
        soonest = min((one.seconds for one in found), default=inf)
        for node in busy[: self.most_considered]:
            candidate = self._preempting(model, node, cluster, soonest, now)
            if candidate is not None:
                found.append(candidate)
        chosen = choose_node(found)
        return None if chosen is None else chosen.plan

    def choose_harmless(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        chosen = choose_node(self._fits(model, cluster, now)[0])
        return None if chosen is None else chosen.plan

    def _fits(self, model: ModelState, cluster: Cluster, now: float) -> tuple[list[Candidate], list[NodeState]]:
        """What can start with nobody stopped, and the nodes with the weights where nothing can."""
        found, busy = [], []
        for node in near_nodes(model, cluster, self.most_considered):
            candidate = fit(model, node, cluster, self.estimator, now)
            if candidate is not None:
                found.append(candidate)
            elif node.tier(model.spec.name) > Tier.REMOTE:
                busy.append(node)
        return found, busy

    def _preempting(self, model: ModelState, node: NodeState, cluster: Cluster, soonest: float, now: float) -> Candidate | None:
        """A start on this node at once, if that can be sooner than `soonest`."""
        need = shortage(model, node, cluster, self.estimator, now)
        if need is None or need.plan.estimate_seconds >= soonest:
            return None
        usable = [one for one in victims(node, model, cluster, need.plan.give_way) if all(each.preemptions < self.most_preemptions for each in one.requests.values())]
        lost = [sum(now - each.assigned for each in one.requests.values()) for one in usable]
        chosen = cheapest_cover(lost, [len(one.devices) for one in usable], need.devices)
        if chosen is None:
            return None
        plan = replace(need.plan, preempted=tuple(usable[index].id for index in chosen))
        return Candidate(plan, plan.estimate_seconds, sum(len(usable[index].requests) for index in chosen))
