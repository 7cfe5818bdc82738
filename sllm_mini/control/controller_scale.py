"""How the controller asks its policies: which instance takes a request, how many there should be, where the next one starts.

Part of `controller`; taught in chapters 08 and 10. A model that gets no instance is remembered as short of one, and asked
again when something is freed. One retry asks until nothing fits any more: under a policy that takes any room there is, its
cost grows with the number of different needs (devices, bytes) that wait and with what is placed, not with the number of
models; one that refuses room (locality) may be asked for each model that waits.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import chain

from msgspec import structs

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_check import check_desired
from sllm_mini.control.controller_plans import Plans
from sllm_mini.control.controller_warmth import Warming
from sllm_mini.control.policy import Autoscaler, Harmless, Placement, Plan
from sllm_mini.control.state import InstanceState, ModelState, RequestState, held_nbytes
from sllm_mini.errors import SllmError
from sllm_mini.types import Warmth


class Scaling:
    """Between the policies and `Plans`."""

    def __init__(
        self, cluster: Cluster, plans: Plans, warming: Warming, placement: Placement, autoscaler: Autoscaler, max_failed_moves: int,
        refuse_all: Callable[[ModelState, str, float], None],
    ) -> None:  # fmt: skip
        self._cluster, self._plans, self._warming, self._placement, self._autoscaler = cluster, plans, warming, placement, autoscaler
        self._max_failed_moves, self._refuse_all = max_failed_moves, refuse_all
        self._harmless = placement if isinstance(placement, Harmless) else None

    def prewarm(self, model: ModelState, warmth: Warmth, count: int, now: float, *, give_way: bool = False) -> None:
        """Where a placement would start it, were memory all that it needs below DEVICE; nothing gives way for a guess, and idle ones
        for what was asked for. One whose starts fail is not started ahead of them."""
        asked, spec = model, model.spec
        if model.held_back:
            return
        if warmth < Warmth.DEVICE:
            nbytes = spec.nbytes if warmth == Warmth.DRAM else 0
            runtime = spec.runtime_nbytes if warmth >= Warmth.RUNTIME else 0
            asked = ModelState(structs.replace(spec, devices=0, nbytes=nbytes, runtime_nbytes=runtime), cached_on=model.cached_on)
        for _ in range(count):
            if warmth == Warmth.READY and model.ready + len(model.starting) >= spec.max_instances:
                return
            plan = self._choose_node(asked, now, False)
            if plan is None or (plan.give_way and not give_way):
                return
            reuse = None if plan.reuse is None else self._cluster.instances.get(plan.reuse)
            if reuse is not None and reuse.warmth >= warmth:  # it is idle and there already; another is wanted beside it
                if warmth >= Warmth.DRAM or self._cluster.nodes[plan.node].free_nbytes < held_nbytes(asked.spec, warmth):
                    return
                plan, reuse = structs.replace(plan, reuse=None), None
            if warmth >= Warmth.DRAM and (reuse is None or reuse.model is None) and len(model.instances) >= spec.max_instances:
                return
            self._plans.carry_out(model, plan, now, warmth)

    def _choose_node(self, model: ModelState, now: float, disturb: bool) -> Plan | None:
        """What the placement plans, or where it may not do that, a plan of its that moves and preempts nobody."""
        plan = self._placement.choose_node(model, self._cluster, now)
        if plan is None or self._may(plan, disturb):
            return plan
        plan = None if self._harmless is None else self._harmless.choose_harmless(model, self._cluster, now)
        return plan if plan is None or self._may(plan, False) else None

    def _may(self, plan: Plan, disturb: bool) -> bool:
        """A request that could not be moved so often is moved no more, whoever plans it."""
        if not (plan.moves or plan.preempted):
            return True
        victims = [self._cluster.instances.get(move.victim) for move in plan.moves]
        return disturb and all(each.failed_moves < self._max_failed_moves for victim in victims if victim is not None for each in victim.requests.values())

    def _desired(self, model: ModelState, now: float) -> int:
        desired = self._autoscaler.desired(model, now)
        check_desired(model, desired)
        return max(desired, model.spec.min_instances)

    def choose(self, model: ModelState, request: RequestState, now: float) -> InstanceState | None:
        instance = self._placement.choose_instance(model, request, self._cluster, now)
        if instance is not None and instance.id not in model.open:
            raise SllmError(f"the placement policy gives request {request.id} to instance {instance.id}, which is not open for {request.model}; correct the policy")
        return instance

    def serve(self, model: ModelState, now: float) -> None:
        """Its queue, in order, to its open instances."""
        while model.queue and model.open:
            request = model.queue[0]
            instance = self.choose(model, request, now)
            if instance is None:
                return
            self._cluster.dequeue(request, model)
            self._plans.assign(request, instance, model, now)

    def ask_all(self, now: float) -> None:
        """The models that `Plans` wants asked, until there are none."""
        waiting = self._plans.ask
        while waiting:
            name = next(iter(waiting))
            self.ask(name, now, waiting.pop(name))

    def ask(self, name: str, now: float, disturb: bool) -> None:
        model = self._cluster.models.get(name)
        if model is not None:
            self.serve(model, now)
            self.grow(model, now, disturb)

    def grow(self, model: ModelState, now: float, disturb: bool) -> bool:
        """As many starts as its autoscaler wants; where `disturb`, others may be preempted or moved. False: there was no place
        for one, and it is asked again when something is freed."""
        wanted = self._desired(model, now)
        if model.queue and wanted < 1 <= model.spec.max_instances:
            wanted = 1
        if model.held_back or (model.deleted and not model.queue):
            wanted = 0
        while model.ready + len(model.starting) < wanted:
            plan = self._choose_node(model, now, disturb)
            if plan is None:
                self._refuse_too_large(model, now)
                if model.spec.name in self._cluster.models:
                    self._cluster.set_short(model, True)
                return False
            self._plans.carry_out(model, plan, now)
        if model.short:
            self._cluster.set_short(model, False)
        return True

    def _refuse_too_large(self, model: ModelState, now: float) -> None:
        """Where no node there is could ever start it and nothing of it runs, those that wait for it wait for nothing. While no node
        is known at all they wait for the first."""
        cluster, spec = self._cluster, model.spec
        nbytes = held_nbytes(spec, Warmth.READY)
        if not model.queue or not cluster.nodes or cluster.holds(spec.devices, nbytes) or model.running or model.ready or model.starting:
            return
        devices, memory = cluster.largest[0]
        self._refuse_all(
            model, f"503: model {spec.name} needs {spec.devices} devices and {nbytes:,} bytes of memory on one node, and the largest has {devices} and {memory:,}; add a larger node", now
        )

    def node_lost(self) -> None:
        """Those that wait for what only that node could have started are asked, and so refused."""
        lost = [ranked.ordered() for need, ranked in self._cluster.short().items() if not self._cluster.holds(*need)]
        for _, name in sorted(chain.from_iterable(lost)):
            self._plans.ask.setdefault(name, True)

    def shrink(self, model: ModelState, now: float) -> None:
        """Idle instances above what its autoscaler wants descend, as far as their keep-alive would have them later."""
        surplus = model.ready + len(model.starting) - self._desired(model, now)
        if surplus > 0:
            idle = sorted((each for each in model.open.values() if each.idle_since is not None), key=lambda each: (each.rank, each.id))
            for instance in idle[:surplus]:
                self._warming.descend(instance, instance.then, now)

    def retry(self, now: float) -> None:
        """Asks models that are short of instances, longest wait first. What one could not get because no node has so much,
        others that need as much cannot get either, and they are not asked. One that its policy refused although there is room
        stops nobody: under a policy that waits for certain nodes (locality) each model that is short may be asked."""
        cluster = self._cluster
        short = cluster.short()
        heads = [(ranked.rank(name), name, need) for need, ranked in short.items() if (name := ranked.first()) is not None]
        heapify(heads)
        failed: list[tuple[int, int]] = []
        refused: list[ModelState] = []
        while heads:
            _, name, need = heappop(heads)
            if any(need[0] >= devices and need[1] >= nbytes for devices, nbytes in failed):
                continue
            model = cluster.models.get(name)
            if model is None:
                continue
            if not self.grow(model, now, True):
                if next(cluster.open_nodes(*need), None) is None:
                    failed.append(need)
                    continue
                refused.append(model)
                cluster.set_short(model, False)
            if need in short and (following := short[need].first()) is not None:
                heappush(heads, (short[need].rank(following), following, need))
        for model in refused:
            if model.spec.name in cluster.models:
                cluster.set_short(model, True)
        self.ask_all(now)
        self._warming.freed = False
