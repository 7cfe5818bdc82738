"""ServerlessLLM's placement: the node where the model is ready soonest, also where others must first be moved away, live.

For a node that holds the weights but has no device left, victims are chosen by dynamic programming: of its busy instances
those that free enough devices for the least seconds of loading elsewhere and migrating (a 0/1 knapsack over devices). What
its public code leaves out is done here: victims are looked at in the order of arrival, a destination is used up by each
that goes there (devices, memory, seats), the loads queued there are counted, also those of this plan, and a victim that
finds no place is dropped and the rest chosen anew. Victims move at the same time, so a start waits for the slowest. A
request moves at most `most_migrations` times, and attempts that failed count. Pure: O(nodes looked at x victims x devices),
whatever the size of the cluster. Source: OSDI'24, section 6, and its repository. Taught in chapter 08.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from msgspec.structs import replace

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.departures import Departures, Taken
from sllm_mini.control.placement.fit import Candidate, choose_node, most_recent, near_nodes, soonest
from sllm_mini.control.placement.victims import cheapest_cover, shortage, victims
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, RequestState
from sllm_mini.types import Warmth


@dataclass(slots=True)
class StartupTimeOptimised:
    """`most_considered` nodes of each kind are looked at: with the weights near, free soonest, or to be freed. `migrate=False` leaves the
    moving out: the same estimates, but a busy node is no choice."""

    estimator: Estimator = field(default_factory=Estimator)
    most_migrations: int = 2
    most_considered: int = 8
    migrate: bool = True

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        best, busy = soonest(model, near_nodes(model, cluster, self.most_considered), cluster, self.estimator, now)
        name = model.spec.name
        if self.migrate and busy and (busy := [node for node in busy if name in node.cached]):
            found = [] if best is None else [best]
            least = inf if best is None else best.seconds
            ways = Departures(cluster, self.estimator, now, self.most_considered)
            for node in busy[: self.most_considered]:
                candidate = self._migrating(model, node, cluster, ways, least, now)
                if candidate is not None:
                    found.append(candidate)
                    least = min(least, candidate.seconds)
            best = choose_node(found)
        return None if best is None else best.plan

    def choose_harmless(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        best, _ = soonest(model, near_nodes(model, cluster, self.most_considered), cluster, self.estimator, now)
        return None if best is None else best.plan

    def _migrating(self, model: ModelState, node: NodeState, cluster: Cluster, ways: Departures, least: float, now: float) -> Candidate | None:
        """A start on this node after its cheapest victims have left, if that can be sooner than `least`."""
        need = shortage(model, node, cluster, self.estimator, now)
        if need is None or need.plan.estimate_seconds >= least:
            return None
        leaving = [one for one in victims(node, model, cluster, need.plan.give_way) if all(each.migrations + each.failed_moves < self.most_migrations for each in one.requests.values())]
        while leaving:
            found = [way for one in leaving if (way := ways.quickest(one, Taken())) is not None]
            chosen = cheapest_cover([way.seconds for way in found], [len(way.victim.devices) for way in found], need.devices)
            if chosen is None:
                return None
            departures, stuck = ways.together([found[index].victim for index in chosen])
            if stuck is None:
                left = max(way.seconds for way in departures)
                reuse = None if need.plan.reuse is None else cluster.instances[need.plan.reuse]
                # The node's queue of loads shortens while they leave.
                seconds = left + self.estimator.start(node, model.spec, Warmth.COLD if reuse is None else reuse.warmth, node.tier(model.spec.name), now + left)
                plan = replace(need.plan, moves=tuple(way.move for way in departures), estimate_seconds=seconds)
                return Candidate(plan, seconds, sum(len(way.victim.requests) for way in departures))
            leaving = [way.victim for way in found if way.victim is not stuck]
        return None
