"""What a start on one node would take: who gives way, what it can climb from, how long it takes. Pure. Chapter 08."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, held_nbytes
from sllm_mini.types import Tier, Warmth

_COLD, _DRAM, _DEVICE, _READY = Warmth.COLD, Warmth.DRAM, Warmth.DEVICE, Warmth.READY
_REMOTE, _DRAM_TIER = Tier.REMOTE, Tier.DRAM
_BY_SECONDS_AND_NAME = itemgetter(0, 1)


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
    return cluster.sleeper(name, model.spec.runtime)


def lacking(spec: ModelSpec, node: NodeState, reuse: InstanceState | None) -> tuple[int, int]:
    """Devices and bytes that a start here needs beside what is free and what it climbs from; 0 or less: nothing."""
    devices, nbytes = spec.devices - len(node.free_devices), held_nbytes(spec, _READY)
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
        if idle.warmth is _READY and idle.model is not None:
            if idle.model == model.spec.name:
                continue
            theirs = cluster.models[idle.model]
            if theirs.spec.min_instances:
                gone[idle.model] = gone.get(idle.model, 0) + 1
                if theirs.ready - gone[idle.model] < theirs.spec.min_instances:
                    continue
        yield idle


def leaving_for(model: ModelState, node: NodeState, cluster: Cluster, reuse: InstanceState | None) -> list[InstanceState] | None:
    """Who has to give way for a start on what is free or idle here; None if that is not enough. Idle instances give way in order of
    rank, and none for nothing. Costs a look at them."""
    devices, nbytes = lacking(model.spec, node, reuse)
    if devices <= 0 and nbytes <= 0:
        return []
    if devices > node.idle_devices or nbytes > node.idle_nbytes:
        return None
    leaving: list[InstanceState] = []
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
    return leaving


def fit(model: ModelState, node: NodeState, cluster: Cluster, estimator: Estimator, now: float) -> Candidate | None:
    """A start on what is free or idle here; None if that is not enough."""
    reuse = climbs_from(model, node, cluster)
    leaving = leaving_for(model, node, cluster, reuse)
    if leaving is None:
        return None
    plan = plan_for(model, node, reuse, leaving, estimator, now)
    return Candidate(plan, plan.estimate_seconds)


def soonest(model: ModelState, nodes: Iterable[NodeState], cluster: Cluster, estimator: Estimator, now: float) -> tuple[Candidate | None, list[NodeState]]:
    """What `choose_node` takes of the fits on these nodes, and the nodes where a start would be sooner but does not fit, quickest
    first. Looks in order of the estimates, so that it need not look for room on the others."""
    spec, name, load = model.spec, model.spec.name, estimator.load
    asleep, runtime, bases = model.asleep, model.spec.runtime, dict[Warmth, float]()
    ways = []
    for node in nodes:
        reuse = climbs_from(model, node, cluster) if asleep else cluster.sleeper(node.spec.name, runtime)
        warmth = _COLD if reuse is None else reuse.warmth
        if warmth not in bases:  # of `Estimator.start`, what is the same on every node
            bases[warmth] = estimator.base(spec, warmth)
        seconds = bases[warmth]
        if warmth < _DEVICE:
            seconds += load(node, spec, _DRAM_TIER if warmth == _DRAM else node.cached.get(name, _REMOTE), now)
        ways.append((round(seconds, 3), node.spec.name, seconds, node, reuse))
    ways.sort(key=_BY_SECONDS_AND_NAME)
    best, best_seconds, busy = None, 0.0, []
    for rounded, _, seconds, node, reuse in ways:
        if best is not None and rounded > best_seconds:
            break
        leaving = leaving_for(model, node, cluster, reuse)
        if leaving is None:
            busy.append(node)
        elif best is None or len(leaving) < len(best.plan.give_way):
            best, best_seconds = Candidate(_planned(model, node, reuse, leaving, seconds), seconds), rounded
            if not leaving:
                break
    return best, busy


def plan_for(model: ModelState, node: NodeState, reuse: InstanceState | None, leaving: list[InstanceState], estimator: Estimator, now: float) -> Plan:
    """With the seconds it takes were it begun now."""
    seconds = estimator.start(node, model.spec, _COLD if reuse is None else reuse.warmth, node.tier(model.spec.name), now)
    return _planned(model, node, reuse, leaving, seconds)


def _planned(model: ModelState, node: NodeState, reuse: InstanceState | None, leaving: list[InstanceState], seconds: float) -> Plan:
    give_way = tuple([idle.id for idle in leaving])
    return Plan(node.spec.name, None if reuse is None else reuse.id, give_way, tier=node.tier(model.spec.name), estimate_seconds=seconds)


def most_recent(model: ModelState) -> InstanceState:
    """Of the instances that take a request, the one used last: the others fall idle, and can be let go."""
    return model.open[next(reversed(model.open))]


def near_nodes(model: ModelState, cluster: Cluster, most: int) -> list[NodeState]:
    """The nodes worth a look: those with a sleeping instance of it, those that have its weights (fastest tier first, then the
    shortest queue), those with a process that it can climb from, and those with the devices that can load soonest; at most
    `most` of each kind.

    Of more than `4 * most` nodes that have its weights, so many are looked at, and among the first `4 * most` that can load
    soonest those that have them too: the cost does not grow with the nodes.
    """
    nodes, tiers, wide, devices = cluster.nodes, model.cached_on, 4 * most, model.spec.devices
    seen: dict[str, None] = {one.node: None for one in islice(model.asleep.values(), most)}
    if len(tiers) > 1:
        seen.update(dict.fromkeys(sorted(islice(tiers, wide), key=lambda name: (-tiers[name], nodes[name].loads_until, name))[:most]))
    else:
        seen.update(dict.fromkeys(tiers))
    for one in islice(cluster.sleeping(None, model.spec.runtime), most):
        node = nodes[one.node]
        if len(node.free_devices) + node.idle_devices >= devices:
            seen[one.node] = None
    order = cluster.open_order(devices)
    for _, name in order[:most]:
        seen[name] = None
    if len(tiers) > wide:
        for _, name in order[most:wide]:
            if name in tiers:
                seen[name] = None
    return [nodes[name] for name in seen]
