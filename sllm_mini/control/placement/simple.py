"""Placement that looks at one thing: nothing at all, what is free, or where the weights are. Pure. Taught in chapter 08."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import choose_node, fit, most_recent, near_nodes
from sllm_mini.control.policy import Plan
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import InstanceState, ModelState, NodeState, RequestState, held_nbytes
from sllm_mini.types import Tier, Warmth

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class Draws(Saveable):
    """Numbers that look random and are a function of a seed and a count (SplitMix64), so that a replay draws them again."""

    seed: int = 0
    count: int = field(default=0, init=False)

    def below(self, n: int) -> int:
        """From 0 up to n - 1."""
        self.count += 1
        z = (self.seed + self.count * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return (z ^ (z >> 31)) * n >> 64


def shuffled(cluster: Cluster, draws: Draws) -> Iterator[NodeState]:
    """Every node once, each order equally likely; one draw for each that is taken."""
    names = list(cluster.nodes)
    while names:
        place = draws.below(len(names))
        names[place], names[-1] = names[-1], names[place]
        yield cluster.nodes[names.pop()]


@dataclass(slots=True)
class Anywhere(Saveable):
    """Random: any node that has the devices, free or idle; any of its instances. Costs a list of all nodes and of the model's
    open instances, and a look at nodes until one will do."""

    saved_parts: ClassVar[tuple[str, ...]] = ("draws",)
    estimator: Estimator = field(default_factory=Estimator)
    draws: Draws = field(default_factory=Draws)

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        ids = list(model.open)
        return model.open[ids[self.draws.below(len(ids))]]

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        if next(cluster.open_nodes(model.spec.devices, 0), None) is None:
            return None
        fits = (fit(model, node, cluster, self.estimator, now) for node in shuffled(cluster, self.draws))
        return next((one.plan for one in fits if one is not None), None)


@dataclass(slots=True)
class AvailabilityFirst(Saveable):
    """"Serverless", as ServerlessLLM's paper calls what platforms do: a random node among those with free devices, whatever it
    has stored; where none is free, one whose idle instances can go. Costs a list of all nodes and a look at nodes until one
    is free."""

    saved_parts: ClassVar[tuple[str, ...]] = ("draws",)
    estimator: Estimator = field(default_factory=Estimator)
    draws: Draws = field(default_factory=Draws)

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        if next(cluster.open_nodes(model.spec.devices, 0), None) is None:
            return None
        second: Plan | None = None
        for node in shuffled(cluster, self.draws):
            if second is not None and len(node.free_devices) < model.spec.devices:
                continue
            candidate = fit(model, node, cluster, self.estimator, now)
            if candidate is not None:
                if not candidate.plan.give_way:
                    return candidate.plan
                second = second or candidate.plan
        return second


def _may_hold(node: NodeState, devices: int, nbytes: int, cluster: Cluster) -> bool:
    """Whether it will have so much free one day: all but what instances hold that are the least their models are to have."""
    room, memory = node.spec.devices, node.spec.dram_nbytes
    if room < devices or memory < nbytes:
        return False
    for each in node.instances.values():
        owner = cluster.models.get(each.model or "")
        if owner is not None and each.target is Warmth.READY and owner.ready + len(owner.starting) <= owner.spec.min_instances:
            room, memory = room - len(each.devices), memory - each.held_nbytes
    return room >= devices and memory >= nbytes


@dataclass(slots=True)
class LocalityFirst:
    """Only where the weights are: the node with the fastest tier, waiting for it while it is busy. A model that no node has stored
    goes where it can start first; nor counts a node that is too small for it, or whose devices and memory are kept for others for
    good (`min_instances`). Costs a look at every node that has the model."""

    estimator: Estimator = field(default_factory=Estimator)
    most_considered: int = 8

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return most_recent(model)

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        spec, nodes = model.spec, cluster.nodes
        nbytes = held_nbytes(spec, Warmth.READY)
        tiers = {name: tier for name, tier in model.cached_on.items() if _may_hold(nodes[name], spec.devices, nbytes, cluster)}
        tiers.update((one.node, Tier.DRAM) for one in model.asleep.values())
        best = max(tiers.values(), default=None)
        local = [nodes[name] for name, tier in tiers.items() if tier is best]
        near = local or near_nodes(model, cluster, self.most_considered)
        chosen = choose_node(one for node in near if (one := fit(model, node, cluster, self.estimator, now)) is not None)
        return None if chosen is None else chosen.plan
