"""How the controller carries out a placement's plans: who gives way, who is moved first, and only then the start.

A plan with moves takes time. Until they are done, its instance is there already, counted among its model's `starting` and
holding what is free of what it needs, but no `Start` has been given for it; those that are to give way are kept for it. If
a move fails or somebody in it is lost, all of that is undone, nothing is lost, and the model is asked again.
Part of `controller`; taught in chapter 08.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_check import check_plan
from sllm_mini.control.controller_warmth import Warming
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import AnyAction, Assign, Migrate, ModelSpec, Preempt, Start
from sllm_mini.control.policy import KeepAlive, Plan
from sllm_mini.control.state import InstanceState, ModelState, NodeState, Phase, RequestState, held_nbytes
from sllm_mini.types import Tier, Warmth

_COLD, _DRAM, _DEVICE, _READY = Warmth.COLD, Warmth.DRAM, Warmth.DEVICE, Warmth.READY
_REMOTE_TIER, _DISK_TIER, _DRAM_TIER, _DEVICE_TIER = Tier.REMOTE, Tier.DISK, Tier.DRAM, Tier.DEVICE


@dataclass(slots=True, eq=False)
class Pending:
    """A plan that waits for its moves. `leaving` are victims and idle instances that give way, by id."""

    plan: Plan
    model: str
    booked: int
    before: ModelSpec
    """What the booked instance was last started by, to be had again if it is not."""
    leaving: tuple[int, ...]
    targets: tuple[int, ...] = ()


class Plans:
    """All are told the time, and leave their actions in the controller's list."""

    def __init__(self, cluster: Cluster, warming: Warming, keep_alive: KeepAlive, estimator: Estimator | None, actions: list[AnyAction]) -> None:
        self._cluster, self._warming, self._keep_alive, self._estimator, self._actions = cluster, warming, keep_alive, estimator, actions
        self.pending: dict[int, Pending] = {}
        """By the instance that is booked."""
        self.ask = warming.ask

    def carry_out(self, model: ModelState, plan: Plan, now: float, target: Warmth = _READY) -> None:
        """Raises SllmError, with nothing changed, for a plan that cannot be: it is the policy's mistake."""
        check_plan(self._cluster, model, plan, target)
        if plan.moves:
            self._begin(model, plan, now)
            return
        for victim in plan.preempted:
            for request in list(self._cluster.instances[victim].requests.values()):
                self._preempt(request, now)
        climber = None if plan.reuse is None else self._cluster.instances[plan.reuse]
        self._make_room(plan, model.spec, (*plan.give_way, *plan.preempted), climber, target, now)
        instance = self._climber(model, plan, target, now)
        self._cluster.book(instance)
        self._start(instance, plan, now)

    # Room

    def _make_room(
        self, plan: Plan, spec: ModelSpec, leaving: tuple[int, ...], climber: InstanceState | None, target: Warmth, now: float
    ) -> None:
        """Each descends as its policy would have it, and further, first named first, while there is too little memory."""
        if not leaving:
            return
        cluster = self._cluster
        nbytes = held_nbytes(spec, target)
        if climber is not None:
            nbytes = max(nbytes, held_nbytes(spec, climber.warmth)) - climber.held_nbytes
        free = cluster.nodes[plan.node].free_nbytes
        victims = [cluster.instances[id] for id in leaving]
        levels = [self._level(victim, now) for victim in victims]
        free += sum(victim.held_nbytes - held_nbytes(victim.spec, level) for victim, level in zip(victims, levels, strict=True))
        for place, victim in enumerate(victims):
            if free < nbytes:
                free += held_nbytes(victim.spec, levels[place])
                levels[place] = _COLD
        # Those that are gone make room for the weights that others keep in memory.
        for victim, level in sorted(zip(victims, levels, strict=True), key=lambda pair: pair[1]):
            self._warming.descend(victim, level, now)

    def _level(self, victim: InstanceState, now: float) -> Warmth:
        """How warm it stays when it has to give way: less than now, and without devices."""
        stay = self._keep_alive.gave_way(victim, victim.rank, now)
        if stay.again is not None:
            self._warming.plan(stay.again)
        return min(stay.then, _DRAM if victim.devices else Warmth(victim.warmth - 1))

    def _climber(self, model: ModelState, plan: Plan, target: Warmth, now: float) -> InstanceState:
        cluster = self._cluster
        instance = cluster.spawn(cluster.nodes[plan.node], model.spec, now) if plan.reuse is None else cluster.instances[plan.reuse]
        cluster.climb(instance, model.spec, target)
        return instance

    def _start(self, instance: InstanceState, plan: Plan, now: float) -> None:
        cluster, spec, name = self._cluster, instance.spec, instance.spec.name
        node = cluster.nodes[instance.node]
        tier = node.tier(name) if plan.tier is None else plan.tier
        if instance.warmth >= _DRAM:
            tier = _DRAM_TIER if instance.warmth == _DRAM else _DEVICE_TIER
        instance.parts, instance.started = max(1, len(plan.parts)), now
        estimator = self._estimator
        instance.predicted_seconds = plan.estimate_seconds
        if estimator is not None and not plan.estimate_seconds:
            instance.predicted_seconds = estimator.start(node, spec, instance.warmth, tier, now, instance.parts)
        if instance.warmth < _DEVICE and instance.target >= _DRAM:
            for each in map(cluster.nodes.__getitem__, plan.parts or (instance.node,)):
                if estimator is not None:
                    until = now + estimator.load(each, spec, tier, now, instance.parts)
                else:
                    until = max(now, each.loads_until) + spec.nbytes / instance.parts / _bandwidth(each, tier)
                cluster.load(instance, each, until)
        instance.epoch += 1
        self._actions.append(
            Start(instance.id, instance.node, name, instance.warmth, instance.target, tier, instance.devices, instance.epoch, plan.parts)
        )

    def _preempt(self, request: RequestState, now: float) -> None:
        """Stopped, and queued again in its place; its model is asked, but may not preempt in turn within this event."""
        request.epoch += 1
        request.preemptions += 1
        self._actions.append(Preempt(request.id, request.instance, request.epoch))  # type: ignore[arg-type]
        request.output_tokens = 0
        self.requeue(request, now)
        self.ask[request.model] = False

    def assign(self, request: RequestState, instance: InstanceState, model: ModelState, now: float) -> None:
        """One that is not in the queue (any more)."""
        request.epoch += 1
        self._cluster.assign(request, instance, model, now)
        self._actions.append(Assign(request.id, instance.id, request.epoch))

    def requeue(self, request: RequestState, now: float) -> None:
        """From the instance it is on, and the one it moves to, back to its place in the queue."""
        target = self._cluster.unmove(request)
        self._cluster.leave(request)
        self._cluster.enqueue(request, self._cluster.models[request.model])
        self.ask.setdefault(request.model, True)
        if target is not None:
            self.settle(target, now)

    # Moves

    def _begin(self, model: ModelState, plan: Plan, now: float) -> None:
        cluster = self._cluster
        for id in plan.preempted:
            for request in list(cluster.instances[id].requests.values()):
                self._preempt(request, now)
        victims = [cluster.instances[move.victim] for move in plan.moves]
        leaving = (*plan.give_way, *plan.preempted, *(victim.id for victim in victims))
        for id in leaving:
            cluster.drain(cluster.instances[id], True)
        before = model.spec if plan.reuse is None else cluster.instances[plan.reuse].spec
        booked = self._climber(model, plan, _READY, now)
        cluster.book(booked)
        pending = self.pending[booked.id] = Pending(plan, model.spec.name, booked.id, before, leaving)
        for move, victim in zip(plan.moves, victims, strict=True):
            theirs = cluster.models[victim.spec.name]
            if move.instance is not None:
                target = cluster.instances[move.instance]
            else:
                target = self._climber(theirs, Plan(move.node), _READY, now)
                cluster.book(target)
                self._start(target, Plan(move.node), now)
            pending.targets += (target.id,)
            for request in list(victim.requests.values()):
                if request.target is None:
                    cluster.move(request, target)
            if not target.climbing:
                self.migrate_to(target, now)

    def migrate_to(self, target: InstanceState, now: float) -> None:
        """It is READY: those that wait to move here do."""
        for request in target.incoming.values():
            if request.phase == Phase.RUNNING:
                request.phase = Phase.MIGRATING
                request.epoch += 1
                if self._estimator is not None:
                    request.predicted_seconds = self._estimator.migration(request, target.spec, now)
                self._actions.append(Migrate(request.id, request.instance, target.id, request.epoch))  # type: ignore[arg-type]

    def advance(self, now: float) -> None:
        """A victim has one request less: a plan whose victims have none left goes on."""
        cluster = self._cluster
        for pending in list(self.pending.values()):
            if any(cluster.instances[id].requests or cluster.instances[id].incoming for id in pending.leaving):
                continue
            booked = cluster.instances[pending.booked]
            del self.pending[booked.id]
            self._make_room(pending.plan, booked.spec, pending.leaving, booked, _READY, now)
            cluster.book(booked)
            self._start(booked, pending.plan, now)

    def lose(self, instances: list[InstanceState], now: float) -> None:
        """They are gone, and what ran on them is queued again; plans that involve one are given up."""
        cluster = self._cluster
        targets: dict[int, InstanceState] = {}
        for instance in instances:
            for request in list(instance.incoming.values()):
                cluster.unmove(request)
            for request in list(instance.requests.values()):
                target = cluster.unmove(request)
                if target is not None:
                    targets[target.id] = target
                request.epoch += 1
                cluster.leave(request)
                cluster.enqueue(request, cluster.models[request.model])
            if instance.model is not None:
                self.ask.setdefault(instance.model, True)
        for instance in instances:
            self._warming.fall(instance, _COLD)
        gone = {instance.id for instance in instances}
        for pending in list(self.pending.values()):
            if not gone.isdisjoint((pending.booked, *pending.leaving, *pending.targets)):
                self.abandon(pending, now)
        for target in targets.values():
            if target.id in cluster.instances:
                self.settle(target, now)
        self._warming.freed = True

    def failed(self, request: RequestState, now: float) -> None:
        """It could not be moved and stays where it is. Counted, so that a policy need not try the same for ever."""
        request.failed_moves += 1
        target = self._cluster.unmove(request)
        if target is not None:
            self.settle(target, now)
        for pending in list(self.pending.values()):
            if request.instance in pending.leaving:
                self.abandon(pending, now)

    def abandon(self, pending: Pending, now: float) -> None:
        """All as if it had not been begun, but for requests that are on their way: those arrive."""
        cluster = self._cluster
        del self.pending[pending.booked]
        self.ask.setdefault(pending.model, True)
        booked = cluster.instances.get(pending.booked)
        if booked is not None:
            booked.spec = pending.before
            self._warming.fall(booked, booked.warmth)
            if booked.warmth > _COLD:
                self._warming.rest(booked, now)
        for id in pending.leaving:
            instance = cluster.instances.get(id)
            if instance is None:
                continue
            cluster.drain(instance, False)
            for request in instance.requests.values():
                if request.target is not None and request.phase == Phase.RUNNING:
                    target = cluster.unmove(request)
                    self.settle(target, now)  # type: ignore[arg-type]
            self.settle(instance, now)
        self._warming.freed = True

    def settle(self, instance: InstanceState, now: float) -> None:
        """It has room: the next of its model's queue run on it, or it rests. One that drains, climbs or is gone does neither."""
        if instance.draining:
            self.advance(now)
        elif instance.warmth == _READY:
            model = self._cluster.models[instance.spec.name]
            while model.queue and instance.room > 0:
                request = model.queue[0]
                self._cluster.dequeue(request, model)
                self.assign(request, instance, model, now)
            if not instance.requests and not instance.incoming and instance.idle_since is None:
                self._warming.rest(instance, now)
        elif not instance.climbing and instance.warmth > _COLD and instance.idle_since is None:
            self._warming.rest(instance, now)


def _bandwidth(node: NodeState, tier: Tier) -> float:
    spec = node.spec
    return {_REMOTE_TIER: spec.remote_bytes_per_second, _DISK_TIER: spec.disk_bytes_per_second}.get(tier, spec.dram_bytes_per_second)
