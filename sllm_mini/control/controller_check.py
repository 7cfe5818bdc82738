"""Whether what a policy answers can be: a plan that can be carried out as the cluster is, times and counts that are none below 0.

A policy that is wrong is told so in an SllmError; a wrong plan, before anything changes. Pure; costs some microseconds a
plan, and well below one for any other answer. Part of `controller`; taught in chapter 08.
"""

from __future__ import annotations

from math import inf

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.policy import Plan, Prewarm, Stay
from sllm_mini.control.state import InstanceState, ModelState, held_nbytes
from sllm_mini.errors import SllmError
from sllm_mini.types import Warmth


def check_stay(instance: InstanceState, stay: Stay) -> None:
    """Raises SllmError for seconds that are none, or below 0."""
    if stay.seconds is not None and not stay.seconds >= 0:
        raise SllmError(f"the keep-alive policy keeps instance {instance.id} of {instance.spec.name} for {stay.seconds} s; let it answer 0 or more, or None for good")


def check_rank(instance: InstanceState, rank: float) -> None:
    """Raises SllmError for what is in no order."""
    if rank != rank:
        raise SllmError(f"the keep-alive policy ranks instance {instance.id} of {instance.spec.name} as {rank}; let it answer a number")


def check_prewarm(prewarm: Prewarm) -> None:
    """Raises SllmError for a time that does not come, or a count below 0."""
    if not -inf < prewarm.at < inf or prewarm.count < 0:
        raise SllmError(f"the keep-alive policy pre-warms {prewarm.count} of {prewarm.model} at {prewarm.at}; let it name a time that comes, and 0 or more")


def check_desired(model: ModelState, desired: int) -> None:
    """Raises SllmError for less than none, or more than the model may have."""
    if not 0 <= desired <= model.spec.max_instances:
        raise SllmError(f"the autoscaler desires {desired} instances of {model.spec.name}; let it answer from 0 up to its max_instances, {model.spec.max_instances}")


def check_plan(cluster: Cluster, model: ModelState, plan: Plan, target: Warmth) -> None:
    """Raises SllmError naming what is wrong."""
    problem = _problem(cluster, model, plan, target)
    if problem is not None:
        raise SllmError(f"the placement policy plans to start {model.spec.name} on node {plan.node}, but {problem}; correct the policy")


def _problem(cluster: Cluster, model: ModelState, plan: Plan, target: Warmth) -> str | None:
    node = cluster.nodes.get(plan.node)
    if node is None or not all(part in cluster.nodes for part in plan.parts):
        return "there is no such node, or none of one that is to fetch a part"
    spec = model.spec
    victims = [move.victim for move in plan.moves]
    involved = [*plan.give_way, *plan.preempted, *victims, *([] if plan.reuse is None else [plan.reuse])]
    if len(dict.fromkeys(involved)) < len(involved):
        return "an instance is named twice"
    for id in involved:
        instance = cluster.instances.get(id)
        if instance is None or instance.node != plan.node:
            return f"instance {id} is not there"
    if plan.reuse is not None and not _can_climb(cluster.instances[plan.reuse], model, target):
        return f"instance {plan.reuse} is not idle, is warm enough, or is another's, so it cannot be reused"
    for id in plan.give_way:
        if cluster.instances[id].idle_since is None:
            return f"instance {id} is not idle, so it cannot give way"
    for id in (*plan.preempted, *victims):
        instance = cluster.instances[id]
        if instance.draining or instance.incoming or not instance.requests:
            return f"instance {id} runs nothing, drains or awaits a request, so it cannot be freed"
    devices, nbytes = len(node.free_devices), node.free_nbytes
    for id in involved:
        devices += len(cluster.instances[id].devices)
        nbytes += cluster.instances[id].held_nbytes
    needed = held_nbytes(spec, target) if plan.reuse is None else max(held_nbytes(spec, target), held_nbytes(spec, cluster.instances[plan.reuse].warmth))
    if devices < (spec.devices if target >= Warmth.DEVICE else 0) or nbytes < needed:
        return f"that gives {devices} devices and {nbytes:,} bytes of memory, and it needs {spec.devices} and {needed:,}"
    return _move_problem(cluster, plan)


def _can_climb(instance: InstanceState, model: ModelState, target: Warmth) -> bool:
    if instance.idle_since is None or instance.warmth >= target:
        return False
    if instance.model is None:
        return instance.runtime in (None, model.spec.runtime)
    return instance.model == model.spec.name


def _move_problem(cluster: Cluster, plan: Plan) -> str | None:
    room: dict[int, int] = {}
    free: dict[str, tuple[int, int]] = {}
    for move in plan.moves:
        victim = cluster.instances[move.victim]
        coming = sum(request.target is None for request in victim.requests.values())
        if move.instance is None:
            node = cluster.nodes.get(move.node)
            if node is None or move.node == plan.node:
                return f"node {move.node} is not another node, so instance {victim.id} cannot be moved there"
            devices, nbytes = free.get(move.node, (len(node.free_devices), node.free_nbytes))
            spec = cluster.models[victim.spec.name].spec
            free[move.node] = devices, nbytes = devices - spec.devices, nbytes - held_nbytes(spec, Warmth.READY)
            if devices < 0 or nbytes < 0 or spec.concurrency < coming:
                return f"node {move.node} has no free room for what moves there"
            continue
        target = cluster.instances.get(move.instance)
        if target is None or target.id in (each.victim for each in plan.moves) or target.model != victim.model:
            return f"instance {move.instance} cannot take the requests of instance {victim.id}"
        room[target.id] = room.get(target.id, target.room) - coming
        if target.warmth < Warmth.READY or target.draining or room[target.id] < 0 or target.id in plan.give_way:
            return f"instance {target.id} is not READY with room for the requests of instance {victim.id}"
    return None
