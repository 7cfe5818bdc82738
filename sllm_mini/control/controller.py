"""The controller: one event in, the actions that follow from it out. The same object runs under every driver of `cluster`.

    controller = Controller(placement, keep_alive, autoscaler)
    actions = controller.handle(RequestArrived(0, "opt-1.3b", 20), now=3.5)

Deterministic: ids come from counters, time is an argument, and what is walked over is in an order that does not depend on
chance, so that replaying a recorded log gives the recorded actions (`replay`). What an older decision left behind (another
epoch, an unknown id, a timer that was given up) is ignored. A request that a driver has ended just before it is told to
migrate or preempt it must therefore be reported again, with the new epoch.

Requests of a model are served in order of arrival: what was interrupted comes back to its old place in the queue. Where
something becomes free, models that are short of instances are asked again, longest wait first; after one that found no
room anywhere, those that need no less are not asked. Raises SllmError where a policy returns what cannot be.
Pure; one thread at a time. A warm request (arrival and finish) costs some ten microseconds and what the policies take;
nothing is walked over but what is changed, and nothing grows with the number of requests served. Taught in chapter 08.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from msgspec import msgpack

from sllm_mini.control import messages as m
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_plans import Plans
from sllm_mini.control.controller_requests import Requests
from sllm_mini.control.controller_saved import load, save
from sllm_mini.control.controller_scale import Scaling
from sllm_mini.control.controller_timers import Timers, Wake
from sllm_mini.control.controller_warmth import Warming
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Autoscaler, KeepAlive, Placement
from sllm_mini.control.state import InstanceState, ModelState, Phase
from sllm_mini.types import Warmth


class Controller:
    """`max_failures` of one request, or starts of a model in a row that fail, before an error is the answer, and
    migrations of a request that fail before it is left where it is. After a start that failed the model waits `retry_seconds`, twice as long each time, before the next."""

    def __init__(
        self,
        placement: Placement,
        keep_alive: KeepAlive,
        autoscaler: Autoscaler,
        estimator: Estimator | None = None,
        *,
        max_failures: int = 3,
        retry_seconds: float = 1.0,
    ) -> None:
        if max_failures < 1 or not retry_seconds > 0:
            raise ValueError(f"{max_failures} failures and {retry_seconds} s cannot be; give at least 1 and more than 0 s")
        self.placement, self.keep_alive, self.autoscaler, self.estimator = placement, keep_alive, autoscaler, estimator
        self.max_failures, self.retry_seconds = max_failures, retry_seconds
        self.now = float("-inf")
        self._build(Cluster())

    def _build(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._actions: list[m.AnyAction] = []
        self.timers = Timers(self._actions)
        self.warming = Warming(cluster, self.keep_alive, self.timers, self._actions, self._parts())
        self.plans = Plans(cluster, self.warming, self.keep_alive, self.estimator, self._actions)
        self.scaling = Scaling(
            cluster, self.plans, self.warming, self.placement, self.autoscaler, self.max_failures, lambda *refused: self.requests.refuse_all(*refused)
        )
        self.requests = Requests(cluster, self.plans, self.scaling, self.warming, self.timers, self.autoscaler, self.estimator, self._actions, self.max_failures)
        # One method for each event, named as it is: `RequestArrived` goes to `requests.arrived`, `NodeLost` to `_node_lost`.
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            event: getattr(self.requests, event.__name__.removeprefix("Request").lower())
            if event.__name__.startswith("Request")
            else getattr(self, re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), event.__name__))
            for event in m.Event.__subclasses__()
        }

    def handle(self, event: m.AnyEvent, now: float) -> list[m.AnyAction]:
        """What is to be done about it, in order. A `now` before an earlier one counts as that one."""
        actions, plans, warming = self._actions, self.plans, self.warming
        actions.clear()
        if now < self.now:
            now = self.now
        self.now = now
        cluster = self.cluster
        if cluster.until and cluster.until[0][0] <= now:
            cluster.advance(now)
        self._handlers[type(event)](event, now)
        if plans.ask:
            self.scaling.ask_all(now)
        if warming.freed:
            warming.freed = False
            if cluster.short():
                self.scaling.retry(now)
        return actions.copy()

    # To be saved, and to go on elsewhere

    def snapshot(self) -> dict[str, Any]:
        """All that it knows as plain data, to print and to compare; not what its policies have learned."""
        return {"now": self.now, "cluster": self.cluster.snapshot()} | save(self.timers, self.warming, self.plans)

    def to_bytes(self) -> bytes:
        """Between two events. Policies and estimators that learn may offer `save() -> bytes` and `restore(bytes)`, and are
        saved with it; those that do not begin anew."""
        learned = [part.save() if hasattr(part, "save") else None for part in self._parts()]
        return msgpack.encode(self.snapshot() | {"learned": learned})

    def restore(self, data: bytes) -> None:
        """Becomes what `to_bytes` was called on; made with the same policies and options, and without a past."""
        saved = msgpack.decode(data)
        self.now = saved["now"]
        self._build(Cluster.from_snapshot(saved["cluster"]))
        load(saved, self.timers, self.warming, self.plans)
        for part, learned in zip(self._parts(), saved["learned"], strict=True):
            if learned is not None:
                part.restore(learned)

    def _parts(self) -> tuple[Any, ...]:
        return self.placement, self.keep_alive, self.autoscaler, self.estimator

    # Nodes, models, stores

    def _node_joined(self, event: m.NodeJoined, now: float) -> None:
        self._node_lost(m.NodeLost(event.node.name), now)  # one of that name has started anew
        self.cluster.add_node(event.node)
        self.warming.freed = True

    def _node_lost(self, event: m.NodeLost, now: float) -> None:
        lost = [self.cluster.nodes[name] for name in dict.fromkeys((event.node, *event.also)) if name in self.cluster.nodes]
        if lost:
            self.plans.lose([instance for node in lost for instance in node.instances.values()], now)
            for node in lost:
                self.cluster.remove_node(node.spec.name)
            self.scaling.node_lost()

    def _model_deployed(self, event: m.ModelDeployed, now: float) -> None:
        known = self.cluster.models.get(event.model.name)
        for pending in [] if known is None or known.spec == event.model else list(self.plans.pending.values()):
            if pending.model == event.model.name:  # what it has booked is by the old figures
                self.plans.abandon(pending, now)
        model = self.cluster.add_model(event.model)
        self.warming.least_changed(model, now)
        self.warming.deployed(model, now)
        self.plans.ask[event.model.name] = True

    def _model_deleted(self, event: m.ModelDeleted, now: float) -> None:
        model = self.cluster.models.get(event.model)
        if model is not None:
            model.deleted = True
            for instance in [each for each in model.instances.values() if each.idle_since is not None]:
                self.warming.descend(instance, Warmth.COLD, now)
            if event.model in self.cluster.models:
                self.warming.forget(model)

    def _prewarm_asked(self, event: m.PrewarmAsked, now: float) -> None:
        model = self.cluster.models.get(event.model)
        if model is None or model.deleted or any(each.target >= event.warmth for each in model.instances.values()):
            return
        if not self.warming.count_warm(model, event.warmth, 1):
            self.scaling.prewarm(model, event.warmth, 1, now, give_way=True)

    def _unload_asked(self, event: m.UnloadAsked, now: float) -> None:
        model = self.cluster.models.get(event.model)
        if model is not None:
            self.warming.unload(model, now)

    def _keep_alive_asked(self, event: m.KeepAliveAsked, now: float) -> None:
        model = self.cluster.models.get(event.model)
        if model is not None and not model.deleted:
            self.warming.keep_for(model, event.seconds, now)

    def _cached(self, event: m.Cached, now: float) -> None:
        if event.node in self.cluster.nodes:
            self.cluster.cached(event.node, event.model, event.tier)

    def _evicted(self, event: m.Evicted, now: float) -> None:
        if event.node in self.cluster.nodes:
            self.cluster.evicted(event.node, event.model, event.tier)

    # Instances

    def _instance_reached(self, event: m.InstanceReached, now: float) -> None:
        cluster = self.cluster
        instance = cluster.instances.get(event.instance)
        if instance is None or instance.epoch != event.epoch or not instance.climbing or instance.id in self.plans.pending:
            return
        if event.whole and instance.target == Warmth.READY:
            self._started(instance, event, instance.warmth)
        instance.reached_from = event.tier
        cluster.reached(instance, event.whole)
        self.plans.migrate_to(instance, now)
        self.plans.settle(instance, now)
        self.warming.freed = True

    def _instance_loaded(self, event: m.InstanceLoaded, now: float) -> None:
        instance = self.cluster.instances.get(event.instance)
        if instance is not None and instance.epoch == event.epoch and instance.loading:
            self._started(instance, event, instance.climbed_from)
            instance.reached_from = event.tier
            self.cluster.whole(instance)

    def _started(self, instance: InstanceState, event: m.InstanceReached | m.InstanceLoaded, warmth: Warmth) -> None:
        """A start from `warmth` is over with every byte: that is what one learns from."""
        model = self.cluster.models.get(instance.spec.name)
        if model is None:
            return
        model.failed_starts = 0
        if self.estimator is not None:
            self.estimator.observe_start(
                self.cluster.nodes[instance.node], instance.spec, warmth, event.tier, event.seconds, event.queued_seconds, instance.predicted_seconds,
                instance.parts, event.load_seconds,
            )  # fmt: skip

    def _instance_failed(self, event: m.InstanceFailed, now: float) -> None:
        instance = self.cluster.instances.get(event.instance)
        if instance is None or instance.epoch != event.epoch:
            return
        model = self.cluster.models.get(instance.spec.name)
        starting = instance.target == Warmth.READY and (instance.climbing or instance.loading) and instance.id not in self.plans.pending
        for request in [] if instance.loading else list(instance.requests.values()):  # weights that do not come are no request's fault
            self.requests.blame(request, now, f"its instance failed ({event.reason})", settle=False)
        self.plans.lose([instance], now)
        if starting and model is not None and model.spec.name in self.cluster.models:
            self._start_failed(model, event.reason, now)

    def _start_failed(self, model: ModelState, reason: str, now: float) -> None:
        model.failed_starts += 1
        if model.failed_starts >= self.max_failures and not model.ready and not model.starting:
            self.requests.refuse_all(model, f"503: model {model.spec.name} did not start ({reason})", now)
            model.failed_starts = 0
        if model.spec.name in self.cluster.models and not model.held_back:
            model.held_back = True
            wait = self.retry_seconds * 2 ** max(0, model.failed_starts - 1)
            self.timers.set(Wake.RETRY, model.spec.name, now + wait)

    def _migration_finished(self, event: m.MigrationFinished, now: float) -> None:
        request = self.requests.current(event.request, event.epoch)
        if request is None or request.phase != Phase.MIGRATING:
            return
        source = self.cluster.instances[request.instance]  # type: ignore[index]
        request.output_tokens = event.output_tokens
        if self.estimator is not None:
            self.estimator.observe_migration(request, event.output_tokens, event.seconds, request.predicted_seconds)
        self.cluster.moved(request)
        self.plans.settle(source, now)

    def _migration_failed(self, event: m.MigrationFailed, now: float) -> None:
        request = self.requests.current(event.request, event.epoch)
        if request is not None and request.phase == Phase.MIGRATING:
            self.plans.failed(request, now)

    # Timers

    def _timer_fired(self, event: m.TimerFired, now: float) -> None:
        timer = self.timers.fired(event.timer)
        if timer is None:
            return
        if timer.wake is Wake.REST:
            self.warming.due(self.cluster.instances[timer.key], now)  # type: ignore[index]
        elif timer.wake is Wake.PREWARM:
            missing = self.warming.prewarm_due(timer, now)
            if missing is not None:
                self.scaling.prewarm(missing[0], Warmth(timer.warmth), missing[1], now)
        elif (model := self.cluster.models.get(str(timer.key))) is None:
            return
        elif timer.wake is Wake.RETRY:
            model.held_back = False
            self.scaling.ask(model.spec.name, now, True)
        elif timer.wake is Wake.PATIENCE:
            model.patience = None
            self.requests.lose_patience(model, now)
        else:
            model.tick = None
            self.scaling.grow(model, now, True)
            if self.autoscaler.scales_down:
                self.scaling.shrink(model, now)
                if model.spec.name not in self.cluster.models:
                    return
            if self.autoscaler.tick_seconds is not None and (model.running or model.queue or model.instances):
                model.tick = self.timers.set(Wake.TICK, model.spec.name, now + self.autoscaler.tick_seconds)
