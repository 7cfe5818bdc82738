"""How the controller keeps instances warm: idle ones rest and descend as their keep-alive policy says, others are pre-warmed.

One outstanding timer for each instance and one for each (model, warmth) that is to be pre-warmed: when what it waits for has
moved, it fires early and is set again, so that a warm request sets none. Part of `controller`; taught in chapter 09.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from math import inf

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_check import check_prewarm, check_rank, check_stay
from sllm_mini.control.controller_timers import Timer, Timers, Wake
from sllm_mini.control.messages import AnyAction, Descend
from sllm_mini.control.policy import Forgetting, KeepAlive, Prewarm
from sllm_mini.control.state import InstanceState, ModelState
from sllm_mini.types import Warmth

_REST = Wake.REST
_COLD, _RUNTIME, _DRAM, _READY = Warmth.COLD, Warmth.RUNTIME, Warmth.DRAM, Warmth.READY


class Warming:
    """`freed` is set where something became free or idle, so that models which are short of instances are asked again; `ask`
    are models to be asked at the end of the event in any case, with whether they may preempt or move others."""

    def __init__(self, cluster: Cluster, keep_alive: KeepAlive, timers: Timers, actions: list[AnyAction], learners: Sequence[object] = ()) -> None:
        self._cluster, self._keep_alive, self._timers, self._actions = cluster, keep_alive, timers, actions
        self._learners = [part for part in learners if isinstance(part, Forgetting)]
        self.freed = False
        self.ask: dict[str, bool] = {}
        self.prewarms: dict[tuple[str, Warmth], tuple[int, float, int]] = {}
        """Timer, when it is due, and how many there are to be."""

    def rest(self, instance: InstanceState, now: float) -> None:
        """It has nothing to do: idle at its warmth for as long as its policy says, then at the next one."""
        cluster, keep_alive = self._cluster, self._keep_alive
        self.freed = True
        # To descend is no use: who has been idle longest stays the first to give way.
        rank = keep_alive.rank(instance, cluster, now if instance.rested is None else instance.rested)
        check_rank(instance, rank)
        cluster.rest(instance, rank, now)
        stay = keep_alive.stay(instance, cluster, now)
        check_stay(instance, stay)
        seconds, then = stay.seconds, stay.then
        instance.then = then if then < instance.warmth else Warmth(instance.warmth - 1)
        if instance.model is not None:
            model = cluster.models[instance.model]
            if model.keep_alive is not None:
                seconds, instance.then = (None if model.keep_alive < 0 else model.keep_alive), _COLD
            if model.deleted:
                seconds, instance.then = 0.0, _COLD
            elif model.ready <= model.spec.min_instances and self._is_needed(instance):
                seconds = None
        if stay.again is not None:
            self.plan(stay.again)
        if seconds is None or seconds == inf:
            instance.warm_until = None
        elif seconds > 0:
            until = instance.warm_until = now + seconds
            instance.timer = self._timers.sooner(instance.timer, _REST, instance.id, until)
        else:
            self.descend(instance, instance.then, now)

    def descend(self, instance: InstanceState, warmth: Warmth, now: float) -> None:
        """An instance without requests keeps less, at once; without room for its weights in memory, no weights."""
        self.freed = True
        if not self._cluster.fits(instance, warmth):
            warmth = min(warmth, _RUNTIME)
        instance.epoch += 1
        self._actions.append(Descend(instance.id, warmth, instance.epoch))
        self.fall(instance, warmth)
        if warmth > _COLD:
            self.rest(instance, now)

    def fall(self, instance: InstanceState, warmth: Warmth) -> None:
        """As `Cluster.fall`, and nothing is left of one that is gone."""
        name = instance.model
        self._cluster.fall(instance, warmth)
        if warmth == _COLD:
            self._timers.drop(instance.timer)
            instance.timer = None
        if name is not None:
            model = self._cluster.models[name]
            if model.queue:  # its policy had left them waiting for this instance, or for others
                self.ask.setdefault(name, True)
            self.forget(model)

    def forget(self, model: ModelState) -> None:
        """A deleted model that has nothing left is no longer known."""
        if model.deleted and not (model.running or model.queue or model.instances):
            self._timers.drop(model.tick)
            self._timers.drop(model.patience)
            for warmth in Warmth:
                self._timers.drop(self.prewarms.pop((model.spec.name, warmth), (None,))[0])
            self._cluster.remove_model(model)
            for learner in self._learners:
                learner.on_delete(model)

    def due(self, instance: InstanceState, now: float) -> None:
        """Its timer has fired."""
        instance.timer = None
        if instance.warm_until is None:
            return
        if instance.warm_until <= now and self._is_needed(instance):
            instance.warm_until = None
        elif instance.warm_until <= now:
            self.descend(instance, instance.then, now)
        else:
            instance.timer = self._timers.set(Wake.REST, instance.id, instance.warm_until)

    def _is_needed(self, instance: InstanceState) -> bool:
        """One of the least that its model is to have ready, which stay whatever the keep-alive says."""
        if instance.warmth < _READY:
            return False
        model = self._cluster.models[instance.spec.name]
        return not model.deleted and model.ready <= model.spec.min_instances

    def deployed(self, model: ModelState, now: float) -> None:
        for prewarm in self._keep_alive.on_deploy(model, self._cluster, now):
            self.plan(prewarm)

    def least_changed(self, model: ModelState, now: float) -> None:
        """Those that only its `min_instances` kept are let go where it has more than it now asks for."""
        for instance in [each for each in model.open.values() if each.idle_since is not None and each.warm_until is None]:
            if model.ready > model.spec.min_instances:
                self._cluster.wake(instance)
                self.rest(instance, now)

    def unload(self, model: ModelState, now: float) -> None:
        """Its idle instances end, coldest first, but for those that it is to have in any case."""
        for instance in sorted((each for each in model.instances.values() if each.idle_since is not None), key=lambda each: (each.warmth, each.id)):
            if not self._is_needed(instance):
                self.descend(instance, _COLD, now)

    def keep_for(self, model: ModelState, seconds: float | None, now: float) -> None:
        """As a client asks: also those that are idle already, counted from now."""
        if model.keep_alive == seconds:
            return
        model.keep_alive = seconds
        for instance in [each for each in model.instances.values() if each.idle_since is not None]:
            self._cluster.wake(instance)
            self.rest(instance, now)

    def arrived(self, model: ModelState, warmth: Warmth, now: float) -> None:
        for prewarm in self._keep_alive.on_arrival(model, self._cluster, now, warmth):
            self.plan(prewarm)

    def plan(self, prewarm: Prewarm) -> None:
        """Of two for the same model and warmth only the one that was asked for last holds."""
        check_prewarm(prewarm)
        key = (prewarm.model, prewarm.warmth)
        timer = self.prewarms[key][0] if key in self.prewarms else None
        if not prewarm.count:  # the timer stays: it fires for nothing, or serves the next
            if timer is not None:
                self.prewarms[key] = timer, -inf, 0
            return
        timer = self._timers.sooner(timer, Wake.PREWARM, prewarm.model, prewarm.at, prewarm.warmth)
        self.prewarms[key] = timer, prewarm.at, prewarm.count

    def prewarm_due(self, timer: Timer, now: float) -> tuple[ModelState, int] | None:
        """The model to be pre-warmed now and how many are missing, if any."""
        key = (str(timer.key), Warmth(timer.warmth))
        _, at, count = self.prewarms.pop(key)
        model = self._cluster.models.get(key[0])
        if at > now:
            self.prewarms[key] = self._timers.set(Wake.PREWARM, key[0], at, key[1]), at, count
        elif model is not None and not model.deleted and (missing := count - self.count_warm(model, key[1], count)) > 0:
            return model, missing
        return None

    def count_warm(self, model: ModelState, warmth: Warmth, enough: int) -> int:
        """Idle ones, and those that climb there for nobody yet; of more than `enough` no more are counted."""
        cluster, runtime = self._cluster, model.spec.runtime
        warm: Iterable[InstanceState]
        if warmth == _READY:
            warm = (each for each in chain(model.open.values(), model.starting.values()) if each.idle_since is not None or (each.climbing and not each.incoming))
        elif warmth >= _DRAM:
            warm = (each for each in model.instances.values() if each.target >= warmth and (each.idle_since is not None or (each.climbing and not each.incoming)))
        else:
            climbing = (each for each in cluster.prewarming.values() if each.target >= warmth and each.runtime in (None, runtime))
            warm = chain((each for each in cluster.sleeping(None, runtime) if each.warmth >= warmth), climbing)
        return sum(1 for _ in islice(warm, enough))
