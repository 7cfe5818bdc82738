"""What a start on one node would take: who gives way, what it can climb from, how long it takes. Pure. Chapter 08."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, held_nbytes
from sllm_mini.types import Warmth


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and what it costs: `seconds` until READY as estimated, `moved` requests that it disturbs."""

    plan: Plan
    seconds: float
    moved: int = 0


def choose_node(candidates: Iterable[Candidate]) -> Candidate | None:
    """The one that is ready soonest, to the millisecond (no estimate is better than that); of equals the one that disturbs fewest
    requests, then the one for which fewest idle instances give way, then by the node's name. None of none."""
    return min(candidates, key=lambda one: (round(one.seconds, 3), one.moved, len(one.plan.give_way), one.plan.node), default=None)


def climbs_from(model: ModelState, node: NodeState, cluster: Cluster) -> InstanceState | None:
    """The warmest idle instance here that a start of this model can climb from: its own, asleep, or a process without a model.
    One of its own from before it was given new figures is none."""
    name = node.spec.name
    if model.asleep:
        few = model.asleep if len(model.asleep) <= len(node.instances) else node.instances
        own = [one for id, one in few.items() if one.node == name and id in model.asleep and one.spec == model.spec]
        if own:
            return max(own, key=lambda one: one.warmth)
    return next(cluster.sleeping(name, model.spec.runtime), None)


def lacking(spec: ModelSpec, node: NodeState, reuse: InstanceState | None) -> tuple[int, int]:
    """Devices and bytes that a start here needs beside what is free and what it climbs from; 0 or less: nothing."""
    devices, nbytes = spec.devices - len(node.free_devices), held_nbytes(spec, Warmth.READY)
    if reuse is not None:
        devices -= len(reuse.devices)
        nbytes = max(nbytes, held_nbytes(spec, reuse.warmth)) - reuse.held_nbytes
    return devices, nbytes - node.free_nbytes


def spare(model: ModelState, node: NodeState, cluster: Cluster, reuse: InstanceState | None) -> Iterator[InstanceState]:
    """Idle instances here that can give way, in order of rank: none that is READY for the same model, which would be started only
    to be thrown out in turn, and none that another's `min_instances` keep."""
    gone: dict[str, int] = {}
    for idle in cluster.idle_instances(node.spec.name):
        if idle is reuse:
            continue
        if idle.warmth is Warmth.READY and idle.model is not None:
            if idle.model == model.spec.name:
                continue
            theirs = cluster.models[idle.model]
            if theirs.spec.min_instances:
                gone[idle.model] = gone.get(idle.model, 0) + 1
                if theirs.ready - gone[idle.model] < theirs.spec.min_instances:
                    continue
        yield idle


def fit(model: ModelState, node: NodeState, cluster: Cluster, estimator: Estimator, now: float) -> Candidate | None:
    """A start on what is free or idle here; None if that is not enough. Idle instances give way in order of rank, and none for
    nothing. Costs a look at them."""
    reuse = climbs_from(model, node, cluster)
    devices, nbytes = lacking(model.spec, node, reuse)
    leaving: list[InstanceState] = []
    if devices > 0 or nbytes > 0:
        if devices > node.idle_devices or nbytes > node.idle_nbytes:
            return None
        for idle in spare(model, node, cluster, reuse):
            if nbytes <= 0 and not idle.devices:
                continue
            leaving.append(idle)
            devices -= len(idle.devices)
            nbytes -= idle.held_nbytes
            if devices <= 0 and nbytes <= 0:
                break
        else:
            return None
        for idle in leaving[-2::-1]:  # what a later one made superfluous stays, the highest rank first
            if devices + len(idle.devices) <= 0 and nbytes + idle.held_nbytes <= 0:
                leaving.remove(idle)
                devices += len(idle.devices)
                nbytes += idle.held_nbytes
    plan = plan_for(model, node, reuse, leaving, estimator, now)
    return Candidate(plan, plan.estimate_seconds)


def plan_for(model: ModelState, node: NodeState, reuse: InstanceState | None, leaving: list[InstanceState], estimator: Estimator, now: float) -> Plan:
    """With the seconds it takes were it begun now."""
    tier = node.tier(model.spec.name)
    seconds = estimator.start(node, model.spec, Warmth.COLD if reuse is None else reuse.warmth, tier, now)
    give_way = tuple(idle.id for idle in leaving)
    return Plan(node.spec.name, reuse=None if reuse is None else reuse.id, give_way=give_way, tier=tier, estimate_seconds=seconds)


def most_recent(model: ModelState) -> InstanceState:
    """Of the instances that take a request, the one used last: the others fall idle, and can be let go."""
    return model.open[next(reversed(model.open))]


def near_nodes(model: ModelState, cluster: Cluster, most: int) -> Iterator[NodeState]:
    """The nodes worth a look: those with a sleeping instance of it, those that have its weights (fastest tier first, then the
    shortest queue), and those with the devices that can load soonest; at most `most` of each kind.

    Of more than `4 * most` nodes that have its weights, so many are looked at, and among the first `4 * most` that can load
    soonest those that have them too: the cost does not grow with the nodes.
    """
    nodes, tiers, wide = cluster.nodes, model.cached_on, 4 * most
    seen: dict[str, None] = {one.node: None for one in islice(model.asleep.values(), most)}
    seen.update(dict.fromkeys(nsmallest(most, islice(tiers, wide), key=lambda name: (-tiers[name], nodes[name].loads_until, name))))
    looked = wide if len(tiers) > wide else most
    for place, node in enumerate(islice(cluster.open_nodes(model.spec.devices, 0), looked)):
        if place < most or node.spec.name in tiers:
            seen[node.spec.name] = None
    return (nodes[name] for name in seen)
