"""Instances that could be made to leave a busy node, how many devices are missing there, and which to take. Pure. Chapter 08."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.fit import climbs_from, lacking, plan_for, spare
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, Phase
from sllm_mini.types import Warmth


@dataclass(frozen=True, slots=True)
class Shortage:
    """`devices` that running instances must leave, once all that are free or idle are taken as `plan` says."""

    devices: int
    plan: Plan


def shortage(model: ModelState, node: NodeState, cluster: Cluster, estimator: Estimator, now: float) -> Shortage | None:
    """None where devices are not what is missing: the node is too small, there are enough, or memory is short even when all that is
    idle gives way (what victims would free of it is not counted)."""
    if model.spec.devices > node.spec.devices:
        return None
    reuse = climbs_from(model, node, cluster)
    devices, nbytes = lacking(model.spec, node, reuse)
    idle = list(spare(model, node, cluster, reuse))
    devices -= sum(len(one.devices) for one in idle)
    if devices <= 0:
        return None
    nbytes -= sum(one.held_nbytes for one in idle if one.devices)
    leaving = []
    for one in idle:
        if one.devices:
            leaving.append(one)
        elif nbytes > 0 and one.held_nbytes:
            leaving.append(one)
            nbytes -= one.held_nbytes
    return None if nbytes > 0 else Shortage(devices, plan_for(model, node, reuse, leaving, estimator, now))


def victims(node: NodeState, model: ModelState, cluster: Cluster, give_way: Sequence[int] = ()) -> list[InstanceState]:
    """Busy instances of other models here all of whose requests run: none is on its way from or to it, and none is kept by
    `min_instances`, of which those that `give_way` are none any more. Oldest request first."""
    busy = [
        one
        for one in node.instances.values()
        if one.requests and one.devices and one.model != model.spec.name and not one.draining and not one.climbing and not one.reserved
        and all(request.phase is Phase.RUNNING for request in one.requests.values())
    ]  # fmt: skip
    busy.sort(key=lambda one: (min(request.order for request in one.requests.values()), one.id))
    left: dict[str, int] = {}
    for id in give_way:
        idle = cluster.instances[id]
        if idle.warmth is Warmth.READY:
            left[idle.spec.name] = left.get(idle.spec.name, cluster.models[idle.spec.name].ready) - 1
    found = []
    for one in busy:
        theirs = cluster.models[one.spec.name]
        ready = left.setdefault(one.spec.name, theirs.ready)
        if not theirs.spec.min_instances or ready > theirs.spec.min_instances:
            left[one.spec.name] -= 1
            found.append(one)
    return found


def cheapest_cover(costs: Sequence[float], devices: Sequence[int], needed: int) -> list[int] | None:
    """Which items to take so that their devices are at least `needed`, for the least sum of costs; None if all are too few.

    0/1 knapsack by dynamic programming, O(items x needed). Of equal sums the first found, so the order of items decides. No item
    is taken for nothing: without any one of them the devices would be too few.
    """
    if needed <= 0:
        return []
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * needed]
    for item, (cost, gives) in enumerate(zip(costs, devices, strict=True)):
        for have in range(needed, 0, -1):
            before, now = best[max(have - gives, 0)], best[have]
            if gives and before is not None and (now is None or before[0] + cost < now[0]):
                best[have] = before[0] + cost, (*before[1], item)
    found = best[needed]
    return None if found is None else list(found[1])
