"""The controller's requests: how they come, run, end, fail, and wait until their patience is over.

Part of `controller`; taught in chapter 08. Each event has the method of its name.
"""

from __future__ import annotations

from sllm_mini.control import messages as m
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_plans import Plans
from sllm_mini.control.controller_scale import Scaling
from sllm_mini.control.controller_timers import Timers, Wake
from sllm_mini.control.controller_warmth import Warming
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Autoscaler
from sllm_mini.control.state import ModelState, Phase, RequestState


class Requests:
    """`max_failures` of one request, then an error is the answer."""

    def __init__(
        self, cluster: Cluster, plans: Plans, scaling: Scaling, warming: Warming, timers: Timers, autoscaler: Autoscaler, estimator: Estimator | None,
        actions: list[m.AnyAction], max_failures: int,
    ) -> None:  # fmt: skip
        self._cluster, self._plans, self._scaling, self._warming, self._timers = cluster, plans, scaling, warming, timers
        self._autoscaler, self._estimator, self._actions, self._max_failures = autoscaler, estimator, actions, max_failures

    def arrived(self, event: m.RequestArrived, now: float) -> None:
        cluster = self._cluster
        if event.request in cluster.requests:
            return
        model = cluster.models.get(event.model)
        if model is None or model.deleted:
            self._actions.append(m.Refuse(event.request, f"404: there is no model {event.model}; deploy it first"))
            return
        if not self._autoscaler.admits(model, now):
            self._actions.append(m.Refuse(event.request, f"429: too many requests wait for model {event.model}; try again later"))
            return
        warmth = cluster.warmest(model)
        request = cluster.add_request(event.request, model, event.input_tokens, event.prefix, now)
        instance = self._scaling.choose(model, request, now) if model.open and not model.queue else None
        if instance is not None:
            self._plans.assign(request, instance, model, now)
        else:
            cluster.enqueue(request, model)
            if model.open:
                self._scaling.serve(model, now)
            if self._autoscaler.queue_seconds is not None and model.patience is None:
                model.patience = self._timers.set(Wake.PATIENCE, event.model, now + self._autoscaler.queue_seconds)
        self._warming.arrived(model, warmth, now)
        model.arrivals += 1
        model.last_arrival = now
        self._autoscaler.observe(model, now)
        if model.tick is None and self._autoscaler.tick_seconds is not None:
            model.tick = self._timers.set(Wake.TICK, event.model, now + self._autoscaler.tick_seconds)
        self._scaling.grow(model, now, True)

    def progressed(self, event: m.RequestProgressed, now: float) -> None:
        request = self.current(event.request, event.epoch)
        if request is not None:
            request.output_tokens = event.output_tokens

    def finished(self, event: m.RequestFinished, now: float) -> None:
        request = self.current(event.request, event.epoch)
        if request is not None:
            if self._estimator is not None:
                spec = self._cluster.models[request.model].spec
                self._estimator.observe_finished(request, spec, event.output_tokens, event.seconds)
            self.end(request, now)

    def failed(self, event: m.RequestFailed, now: float) -> None:
        request = self.current(event.request, event.epoch)
        if request is None:
            return
        instance = self._cluster.instances[request.instance]  # type: ignore[index]
        if self.blame(request, now, "it failed"):
            return
        self._plans.requeue(request, now)
        self._plans.settle(instance, now)

    def cancelled(self, event: m.RequestCancelled, now: float) -> None:
        request = self._cluster.requests.get(event.request)
        if request is not None:
            self.end(request, now)

    def current(self, id: int, epoch: int) -> RequestState | None:
        """The running request that an event is about, unless it comes from before the last decision about it."""
        request = self._cluster.requests.get(id)
        return None if request is None or request.epoch != epoch or request.phase == Phase.QUEUED else request

    def blame(self, request: RequestState, now: float, what: str, settle: bool = True) -> bool:
        """It has failed once more; True where that was once too often, and it was refused."""
        request.failures += 1
        if request.failures < self._max_failures:
            return False
        self._actions.append(m.Refuse(request.id, f"500: {what} {request.failures} times"))
        self.end(request, now, settle)
        return True

    def end(self, request: RequestState, now: float, settle: bool = True) -> None:
        """It is answered, refused or not wanted any more: what it had goes to the next, where its instance lives (`settle`)."""
        cluster = self._cluster
        model = cluster.models[request.model]
        del cluster.requests[request.id]
        if request.phase == Phase.QUEUED:
            cluster.dequeue(request, model)
        else:
            instance = cluster.instances[request.instance]  # type: ignore[index]
            target = cluster.unmove(request)
            cluster.leave(request)
            if settle:
                self._plans.settle(instance, now)
            if target is not None:
                self._plans.settle(target, now)
        if cluster.models.get(request.model) is not model:  # deleted, and forgotten when its last instance had gone
            return
        self._autoscaler.observe(model, now)
        if model.deleted:
            self._warming.forget(model)

    def refuse_all(self, model: ModelState, reason: str, now: float) -> None:
        """Those of this model that wait."""
        for request in list(model.queue):
            self._actions.append(m.Refuse(request.id, reason))
            self.end(request, now)

    def lose_patience(self, model: ModelState, now: float) -> None:
        """Requests that have queued too long are refused; what has run before and came back to the queue is not."""
        patience = self._autoscaler.queue_seconds
        if patience is None:
            return
        for request in [each for each in model.queue if not each.epoch]:
            if request.arrived + patience > now:
                model.patience = self._timers.set(Wake.PATIENCE, model.spec.name, request.arrived + patience)
                return
            self._actions.append(m.Refuse(request.id, f"429: it has waited {now - request.arrived:g} s for model {request.model}; try again later"))
            self.end(request, now)
