"""HydraServe's split fetch: several nodes each bring a share of the weights, so no one link carries them all.

NSDI'26: pipeline parallelism for the start only. The first token comes after 1/pp of the bytes; afterwards the shares are
brought together. Here the nodes that lend their links are named in the plan, at most `most_parts` of them, and only as many
as make it faster: all wait for the slowest share. Pure. Taught in chapters 08 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from msgspec.structs import replace

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import Candidate, choose_node, fit, most_recent, near_nodes
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, RequestState
from sllm_mini.types import Tier, Warmth


@dataclass(slots=True)
class SplitFetch:
    """The start that is ready soonest; where its weights come from REMOTE, shared out among nodes with an idle link."""

    estimator: Estimator = field(default_factory=Estimator)
    most_parts: int = 4
    most_considered: int = 8

    def __post_init__(self) -> None:
        if self.most_parts < 1 or self.most_considered < 1:
            raise ValueError(f"a fetch in {self.most_parts} parts over {self.most_considered} nodes brings nothing; give at least 1")

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        nodes = near_nodes(model, cluster, self.most_considered)
        found = [one for node in nodes if (one := fit(model, node, cluster, self.estimator, now)) is not None]
        remote = choose_node(one for one in found if one.plan.tier is Tier.REMOTE and self._from(one.plan, cluster) < Warmth.DRAM)
        if remote is not None:
            found.append(self._shared_out(remote, model, cluster, now))
        chosen = choose_node(found)
        return None if chosen is None else chosen.plan

    def _from(self, plan: Plan, cluster: Cluster) -> Warmth:
        return Warmth.COLD if plan.reuse is None else cluster.instances[plan.reuse].warmth

    def _shared_out(self, whole: Candidate, model: ModelState, cluster: Cluster, now: float) -> Candidate:
        """The same start, in as many parts as make it quickest; the quickest idle links help."""
        spec, home = model.spec, cluster.nodes[whole.plan.node]
        idle = [node for node in islice(cluster.open_nodes(0, 0), self.most_considered) if node is not home and node.loads_until <= now]
        idle.sort(key=lambda node: (-self.estimator.bandwidth(node, Tier.REMOTE), node.spec.name))
        links = [home, *idle][: self.most_parts]
        warmth = self._from(whole.plan, cluster)
        best = whole
        for count in range(2, len(links) + 1):
            slowest = max(self.estimator.load(node, spec, Tier.REMOTE, now, count) for node in links[:count])
            seconds = self.estimator.base(spec, warmth) + slowest
            if seconds < best.seconds:
                parts = tuple(node.spec.name for node in links[:count])
                best = Candidate(replace(whole.plan, parts=parts, estimate_seconds=seconds), seconds)
        return best
