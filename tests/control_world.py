"""A driver for tests of the controller: it believes nothing that the controller keeps, only what its actions say.

`World` holds the truth of a cluster (who has which device, how much memory, which request runs where) as the actions made
it, complains about an action that cannot be carried out, and makes up what happens next by a seeded chance. `recount`
computes every count and index of a controller's cluster from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from random import Random
from typing import Any
from zlib import crc32

from sllm_mini.control import messages as m
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller import Controller
from sllm_mini.control.policy import Move, Plan, Prewarm, Stay
from sllm_mini.control.replay import Recorder
from sllm_mini.control.state import InstanceState, ModelState, NodeState, Phase, RequestState, held_nbytes
from sllm_mini.types import Tier, Warmth

GB = 10**9


def chance(*what: object) -> int:
    """A number that is the same in every run and needs no state: policies by it survive a restart as they are."""
    return crc32(repr(what).encode())


# Policies that try everything


class AnyPlacement:
    """Every kind of plan that is possible now, by chance; from `calm_from` on no moves, no preemption, no request left waiting."""

    calm_from = inf

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        several = list(model.open.values())
        pick = chance("instance", request.id, request.epoch, now)
        return None if now < self.calm_from and pick % 11 == 0 else several[pick % len(several)]

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        pick = chance("node", model.spec.name, cluster.spawned, now)
        plans = [plan for node in cluster.nodes.values() if (plan := self._plan(node, model, cluster, pick, now)) is not None]
        return plans[pick % len(plans)] if plans else None

    def _plan(self, node: NodeState, model: ModelState, cluster: Cluster, pick: int, now: float) -> Plan | None:
        spec = model.spec
        nbytes = held_nbytes(spec, Warmth.READY)
        own = [each for each in model.asleep.values() if each.node == node.spec.name]
        reuse = (own + list(cluster.sleeping(node.spec.name, spec.runtime)))[:1] if pick % 3 else []
        devices = len(node.free_devices) + sum(len(each.devices) for each in reuse)
        free = node.free_nbytes + sum(each.held_nbytes for each in reuse)
        if reuse:
            nbytes = max(nbytes, held_nbytes(spec, reuse[0].warmth))
        give_way: list[int] = []
        for each in cluster.idle_instances(node.spec.name):
            if (devices < spec.devices or free < nbytes) and each not in reuse:
                give_way.append(each.id)
                devices, free = devices + len(each.devices), free + each.held_nbytes
        moves: list[Move] = []
        preempted: list[int] = []
        busy = [] if now >= self.calm_from else [each for each in node.instances.values() if each.requests and not each.draining and not each.incoming]
        spare = {each.spec.name: [len(each.free_devices), each.free_nbytes] for each in cluster.nodes.values() if each is not node}
        taken: dict[int, int] = {}
        for each in busy[: pick % 5]:
            if devices >= spec.devices and free >= nbytes:
                break
            theirs = cluster.models[each.spec.name]
            coming = len([r for r in each.requests.values() if r.target is None])
            target = next((t for t in theirs.open.values() if t.node != node.spec.name and t.room - taken.get(t.id, 0) >= coming), None)
            other = next((n for n, (d, b) in spare.items() if d >= theirs.spec.devices and b >= held_nbytes(theirs.spec, Warmth.READY)), None)
            if pick % 7 == 0:
                preempted.append(each.id)
            elif target is not None:
                taken[target.id] = taken.get(target.id, 0) + coming
                moves.append(Move(each.id, target.node, target.id))
            elif other is not None and coming <= theirs.spec.concurrency:
                spare[other][0] -= theirs.spec.devices
                spare[other][1] -= held_nbytes(theirs.spec, Warmth.READY)
                moves.append(Move(each.id, other))
            else:
                continue
            devices, free = devices + len(each.devices), free + each.held_nbytes
        if devices < spec.devices or free < nbytes:
            return None
        return Plan(node.spec.name, reuse[0].id if reuse else None, tuple(give_way), tuple(moves), tuple(preempted))


class AnyKeepAlive:
    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        pick = chance("arrival", model.spec.name, now)
        return [Prewarm(now + pick % 7, model.spec.name, Warmth(1 + pick % 5))] if pick % 2 else []

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return self.on_arrival(model, cluster, now + 1.0, Warmth.COLD)

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0, Warmth(chance("way", instance.id, now) % 4))

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        pick = chance("stay", instance.id, instance.epoch, now)
        again = Prewarm(now + pick % 9, instance.model, Warmth(1 + pick % 5), 1 + pick % 2) if instance.model is not None and pick % 4 == 0 else None
        return Stay((None, 0.0, 1.0, 5.0, 20.0, inf)[pick % 6], Warmth(pick // 6 % 5), again)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return float(chance("rank", instance.id, now) % 5)


@dataclass
class Concurrency:
    """One instance for so many requests."""

    tick_seconds: float | None = None
    queue: int = 8
    scales_down: bool = False
    queue_seconds: float | None = None

    def observe(self, model: ModelState, now: float) -> None:
        pass

    def desired(self, model: ModelState, now: float) -> int:
        wanted = ceil((model.running + len(model.queue)) / model.spec.concurrency)
        return min(max(wanted, model.spec.min_instances), model.spec.max_instances)

    def admits(self, model: ModelState, now: float) -> bool:
        return len(model.queue) < self.queue


# The truth, as the actions made it


@dataclass
class Process:
    node: str
    spec: m.ModelSpec
    warmth: Warmth
    epoch: int
    target: Warmth | None = None
    devices: tuple[int, ...] = ()
    requests: dict[int, int] = field(default_factory=dict)
    """With their epochs."""
    held: int = 0


def complain(ok: bool, action: object, why: str) -> None:
    assert ok, f"{why}: {action}"


class World:
    """One random history. `handle` gives an event to the controller and carries out what comes back."""

    def __init__(self, seed: int, *, tick_seconds: float | None = None) -> None:
        self.random, self.seed = Random(seed), seed
        self.placement = AnyPlacement()
        self.tick_seconds = tick_seconds
        self.controller = self.fresh()
        self.log: list[bytes] = []
        self.recorder = Recorder(self.controller, self.log.append)
        self.now = 0.0
        self.nodes: dict[str, m.NodeSpec] = {}
        self.specs: dict[str, m.ModelSpec] = {}
        self.processes: dict[int, Process] = {}
        self.started: dict[int, None] = {}
        self.loading: dict[int, int] = {}
        """Those that were reached before their last byte, with their epoch then."""
        """Processes that climb."""
        self.running: dict[int, int] = {}
        """Requests, with the process they are on."""
        self.moving: dict[int, tuple[int, int]] = {}
        """Target and epoch."""
        self.timers: dict[int, float] = {}
        self.known: dict[int, str] = {}
        self.over: dict[int, str] = {}
        self.past: list[m.AnyEvent] = []
        self.requests = 0
        self.area = self.waited = 0.0
        """Of requests over time, and of their times in the system, for Little's law."""
        self.arrived: dict[int, float] = {}

    def fresh(self) -> Controller:
        return Controller(self.placement, AnyKeepAlive(), Concurrency(self.tick_seconds, scales_down=self.seed % 2 == 0, queue_seconds=15.0 if self.seed % 5 == 0 else None), retry_seconds=2.0)

    # Actions

    def handle(self, event: m.AnyEvent) -> list[m.AnyAction]:
        self.past.append(event)
        actions = self.recorder.handle(event, self.now)
        for action in actions:
            getattr(self, "_" + type(action).__name__.lower())(action)
        return actions

    def _start(self, action: m.Start) -> None:
        node, spec = self.nodes[action.node], self.specs[action.model]
        process = self.processes.setdefault(action.instance, Process(action.node, spec, Warmth.COLD, 0))
        complain(process.node == action.node and process.warmth == action.warmth and process.target is None, action, "it is elsewhere or not so warm")
        complain(action.target > action.warmth and action.epoch > process.epoch and not process.requests, action, "it cannot climb")
        complain(len(set(action.devices)) == (spec.devices if action.target >= Warmth.DEVICE else 0), action, "a wrong number of devices")
        process.spec, process.target, process.epoch, process.devices = spec, action.target, action.epoch, action.devices
        self.started[action.instance] = None
        process.held = max(process.held, held_nbytes(spec, action.warmth), held_nbytes(spec, action.target))
        used = [device for each in self.processes.values() if each.node == action.node for device in each.devices]
        complain(len(set(used)) == len(used) and set(used) <= set(range(node.devices)), action, "a device is used twice")
        held = sum(each.held for each in self.processes.values() if each.node == action.node)
        complain(held <= node.dram_nbytes, action, "there is not so much memory")

    def _descend(self, action: m.Descend) -> None:
        process = self.processes[action.instance]
        complain(action.warmth < process.warmth and process.target is None, action, "it climbs, or is not so warm")
        complain(not process.requests and action.epoch > process.epoch, action, "it runs requests")
        complain(all(target != action.instance for target, _ in self.moving.values()), action, "requests are moving there")
        process.warmth, process.epoch, process.held = action.warmth, action.epoch, held_nbytes(process.spec, action.warmth)
        if action.warmth < Warmth.DEVICE:
            process.devices = ()
        if action.warmth == Warmth.COLD:
            del self.processes[action.instance]
        held = sum(each.held for each in self.processes.values() if each.node == process.node)
        complain(held <= self.nodes[process.node].dram_nbytes, action, "there is not so much memory")

    def _assign(self, action: m.Assign) -> None:
        process = self.processes[action.instance]
        complain(action.request in self.known and action.request not in self.running, action, "it is unknown or runs already")
        complain(process.warmth == Warmth.READY and process.spec.name == self.known[action.request], action, "it does not run there")
        coming = sum(target == action.instance for target, _ in self.moving.values())
        complain(len(process.requests) + coming < process.spec.concurrency, action, "there is no room")
        process.requests[action.request] = action.epoch
        self.running[action.request] = action.instance

    def _migrate(self, action: m.Migrate) -> None:
        source, target = self.processes[action.source], self.processes[action.target]
        complain(self.running.get(action.request) == action.source and action.request not in self.moving, action, "it does not run there")
        complain(target.warmth == Warmth.READY and target.spec.name == source.spec.name, action, "it cannot run there")
        coming = sum(each == action.target for each, _ in self.moving.values())
        complain(len(target.requests) + coming < target.spec.concurrency, action, "there is no room")
        complain(action.epoch > source.requests[action.request], action, "its epoch does not grow")
        source.requests[action.request] = action.epoch
        self.moving[action.request] = action.target, action.epoch

    def _preempt(self, action: m.Preempt) -> None:
        process = self.processes[action.instance]
        complain(self.running.pop(action.request) == action.instance, action, "it does not run there")
        complain(action.epoch > process.requests.pop(action.request), action, "its epoch does not grow")
        self.moving.pop(action.request, None)

    def _refuse(self, action: m.Refuse) -> None:
        complain(action.request in self.known, action, "it is unknown or over already")
        self.end(action.request, action.reason)

    def _settimer(self, action: m.SetTimer) -> None:
        complain(action.timer not in self.timers and self.now <= action.at < inf, action, "not a new timer, or not ahead")
        self.timers[action.timer] = action.at

    # Events

    def end(self, request: int, how: str) -> None:
        self.forget(request)
        del self.known[request]
        self.over[request] = how
        self.waited += self.now - self.arrived.pop(request)

    def forget(self, request: int) -> None:
        """It runs nowhere any more."""
        if request in self.running:
            self.processes[self.running.pop(request)].requests.pop(request)
        self.moving.pop(request, None)

    def pass_time(self, seconds: float) -> None:
        self.area += seconds * len(self.known)
        self.now += seconds

    def lose(self, process: int) -> None:
        for request in list(self.processes[process].requests):
            self.forget(request)
        for request in [request for request, (target, _) in self.moving.items() if target == process]:
            del self.moving[request]
        self.started.pop(process, None)
        self.loading.pop(process, None)
        del self.processes[process]

    def step(self, weights: dict[str, int]) -> None:
        """Something happens, by chance."""
        kinds = list(weights)
        (kind,) = self.random.choices(kinds, [weights[kind] for kind in kinds])
        if self.random.random() < 0.6:
            self.pass_time(self.random.choice((0.0, 0.1, 1.0, 6.0)))
        getattr(self, "do_" + kind)()

    def calm_down(self) -> None:
        """Nothing fails any more and there is a node large enough for any model: each request that waits is served in the end."""
        self.pass_time(1.0)
        self.placement.calm_from = self.now
        self.nodes["large"] = m.NodeSpec(
            name="large", devices=4, dram_nbytes=60 * GB, remote_bytes_per_second=GB, disk_bytes_per_second=3 * GB, dram_bytes_per_second=20 * GB
        )
        self.handle(m.NodeJoined(self.nodes["large"]))
        for name, model in list(self.controller.cluster.models.items()):
            if not model.deleted:  # asked again where its policy had left a request waiting
                self.handle(m.ModelDeployed(self.specs[name]))
        for _ in range(200):
            if not self.known:
                return
            self.pass_time(0.5)
            for what in (self.do_reach, self.do_moved, self.do_finish):
                for _ in range(len(self.started) + len(self.moving) + len(self.running)):
                    what()
                    self.check()
            if self.timers:
                timer = min(self.timers, key=lambda each: (self.timers[each], each))
                self.pass_time(max(0.0, self.timers.pop(timer) - self.now))
                self.handle(m.TimerFired(timer))
        raise AssertionError(f"requests {list(self.known)} of {set(self.known.values())} are never served")

    def do_join(self) -> None:
        name = f"n{self.random.randrange(4)}"
        if name in self.nodes:
            self._forget_node(name)
        models = tuple(f"m{each}" for each in range(6) if self.random.random() < 0.3)
        self.nodes[name] = m.NodeSpec(
            name=name, devices=self.random.randrange(5), dram_nbytes=self.random.randrange(5, 60) * GB, remote_bytes_per_second=GB,
            disk_bytes_per_second=3 * GB, dram_bytes_per_second=20 * GB, disk=models,
        )  # fmt: skip
        self.handle(m.NodeJoined(self.nodes[name]))

    def do_lose(self) -> None:
        if self.nodes:
            name = self.random.choice(list(self.nodes))
            self._forget_node(name)
            self.handle(m.NodeLost(name))

    def _forget_node(self, name: str) -> None:
        for id in [id for id, each in self.processes.items() if each.node == name]:
            self.lose(id)
        del self.nodes[name]

    def do_deploy(self) -> None:
        name = f"m{self.random.randrange(6)}"
        if name in self.controller.cluster.models and not self.controller.cluster.models[name].deleted and self.random.random() < 0.7:
            return
        known = self.specs.get(name)  # one that is deployed anew may have changed, but for its devices
        spec = m.ModelSpec(
            name=name, nbytes=self.random.randrange(1, 20) * GB, devices=self.random.choice((0, 1, 1, 2)) if known is None else known.devices, concurrency=self.random.choice((1, 1, 2, 3)),
            min_instances=self.random.choice((0, 0, 0, 1)), max_instances=self.random.choice((1, 2, 9)), runtime=self.random.choice(("python", "node")),
            process_nbytes=self.random.choice((0, GB // 2, GB)), runtime_nbytes=self.random.choice((0, GB, 2 * GB)), process_seconds=0.2, runtime_seconds=1.0, ready_seconds=0.5,
        )  # fmt: skip
        self.specs[name] = spec
        self.handle(m.ModelDeployed(spec))

    def do_delete(self) -> None:
        self.handle(m.ModelDeleted(f"m{self.random.randrange(7)}"))

    def do_arrive(self) -> None:
        name = self.random.choice(list(self.specs)) if self.specs and self.random.random() < 0.95 else "gone"
        request, self.requests = self.requests, self.requests + 1
        self.known[request] = name
        self.arrived[request] = self.now
        self.handle(m.RequestArrived(request, name, self.random.randrange(1, 100)))

    def _some_request(self) -> tuple[int, int] | None:
        if not self.running:
            return None
        request = self.random.choice(list(self.running))
        return request, self.processes[self.running[request]].requests[request]

    def do_finish(self) -> None:
        if (some := self._some_request()) is not None:
            self.end(some[0], "answered")
            self.handle(m.RequestFinished(some[0], 50, 1.0, some[1]))

    def do_progress(self) -> None:
        if (some := self._some_request()) is not None:
            self.handle(m.RequestProgressed(some[0], self.random.randrange(50), some[1]))

    def do_fail(self) -> None:
        if (some := self._some_request()) is not None:
            self.forget(some[0])
            self.handle(m.RequestFailed(*some))

    def do_cancel(self) -> None:
        if self.known:
            request = self.random.choice(list(self.known))
            self.end(request, "cancelled")
            self.handle(m.RequestCancelled(request))

    def do_reach(self) -> None:
        if self.loading and self.random.random() < 0.4:
            id, epoch = self.loading.popitem()
            self.handle(m.InstanceLoaded(id, Tier.DISK, 2.0, 0.0, epoch))
        elif self.started:
            id = self.random.choice(list(self.started))
            process = self.processes[id]
            assert process.target is not None
            del self.started[id]
            process.warmth, process.target = process.target, None
            process.held = held_nbytes(process.spec, process.warmth)
            whole = process.warmth < Warmth.READY or self.random.random() < 0.7
            if not whole:
                self.loading[id] = process.epoch
            self.handle(m.InstanceReached(id, Tier.DISK, 1.0, 0.0, process.epoch, whole=whole))

    def do_break(self) -> None:
        if self.processes:
            id = self.random.choice(list(self.processes))
            epoch = self.processes[id].epoch
            self.lose(id)
            self.handle(m.InstanceFailed(id, "its process ended", epoch))

    def do_moved(self) -> None:
        if self.moving:
            request = self.random.choice(list(self.moving))
            target, epoch = self.moving[request]
            self.forget(request)
            self.processes[target].requests[request] = epoch
            self.running[request] = target
            self.handle(m.MigrationFinished(request, 0.5, 30, epoch))

    def do_stuck(self) -> None:
        if self.moving:
            request = self.random.choice(list(self.moving))
            self.handle(m.MigrationFailed(request, self.moving.pop(request)[1]))

    def do_timer(self) -> None:
        """The next one, when it is due; now and then any one, early."""
        if self.timers:
            early = self.random.random() < 0.1
            timer = self.random.choice(list(self.timers)) if early else min(self.timers, key=lambda each: (self.timers[each], each))
            at = self.timers.pop(timer)
            if not early:
                self.pass_time(max(0.0, at - self.now))
            self.handle(m.TimerFired(timer))

    def do_cache(self) -> None:
        if self.nodes:
            event = self.random.choice((m.Cached, m.Evicted))
            self.handle(event(self.random.choice([*self.nodes, "gone"]), f"m{self.random.randrange(7)}", self.random.choice((Tier.DISK, Tier.DRAM))))

    def do_ask(self) -> None:
        """What somebody asks of a model without a request."""
        name = f"m{self.random.randrange(7)}"
        asked: list[m.AnyEvent] = [
            m.PrewarmAsked(name, self.random.choice(list(Warmth)[1:])), m.UnloadAsked(name), m.KeepAliveAsked(name, self.random.choice((None, -1.0, 0.0, 2.0))),
        ]  # fmt: skip
        self.handle(self.random.choice(asked))

    def do_late(self) -> None:
        """An event that came before comes again, or one about a decision that was taken back, or about nobody: nothing follows."""
        stale: list[m.AnyEvent] = [
            m.RequestFinished(-1, 1, 1.0, 0), m.InstanceReached(-1, Tier.DISK, 1.0, 0.0, 0), m.InstanceLoaded(-1, Tier.DISK, 1.0, 0.0, 0), m.InstanceFailed(-1, "", 0), m.TimerFired(10**9),
            m.MigrationFinished(-1, 1.0, 1, 0), m.MigrationFailed(-1, 0), m.RequestCancelled(-1), m.RequestFailed(-1, 0), m.RequestProgressed(-1, 1, 0),
            m.NodeLost("gone"), m.ModelDeleted("gone"),
        ]  # fmt: skip
        repeatable = (m.RequestFinished, m.RequestFailed, m.InstanceReached, m.InstanceLoaded, m.InstanceFailed, m.MigrationFinished, m.MigrationFailed, m.TimerFired, m.RequestCancelled)  # fmt: skip
        stale += [event for event in self.past[-40:] if isinstance(event, repeatable)]
        for process in list(self.processes.values())[:3]:
            for request, epoch in process.requests.items():
                stale += [m.RequestFinished(request, 1, 1.0, epoch - 1), m.RequestFailed(request, epoch - 1), m.MigrationFinished(request, 1.0, 1, epoch - 1)]
        for id, each in list(self.processes.items())[:3]:
            stale += [m.InstanceReached(id, Tier.DISK, 1.0, 0.0, each.epoch - 1), m.InstanceFailed(id, "late", each.epoch - 1)]
        self.controller.cluster.advance(self.now)  # what was to be loaded by now is known to be
        before = self.controller.snapshot()
        event = self.random.choice(stale)
        assert self.handle(event) == [], f"{event} is late, yet something followed"
        self.past.pop()
        assert {**self.controller.snapshot(), "now": 0} == {**before, "now": 0}, f"{event} is late, yet something changed"

    # Checks

    def check(self) -> None:
        """The controller's picture is the truth, and its counts and indexes are those of a recount."""
        cluster = self.controller.cluster
        assert sorted(cluster.requests) == sorted(self.known)
        assert {r.id: r.instance for r in cluster.requests.values() if r.instance is not None} == self.running
        assert {r.id: (r.target, r.epoch) for r in cluster.requests.values() if r.phase == Phase.MIGRATING} == self.moving
        booked = self.controller.plans.pending
        assert sorted(id for id, each in cluster.instances.items() if id not in booked or each.warmth) == sorted(self.processes)
        for id, process in self.processes.items():
            instance = cluster.instances[id]
            assert (instance.warmth, instance.node, list(instance.requests)) == (process.warmth, process.node, list(process.requests))
            assert instance.epoch == process.epoch
            if id not in booked:
                assert (instance.devices, instance.held_nbytes) == (process.devices, process.held)
                assert instance.target == (process.warmth if process.target is None else process.target)
        recount(self.controller)


def recount(controller: Controller) -> None:
    cluster = controller.cluster
    everyone = cluster.instances.values()
    idle = [each for each in everyone if each.idle_since is not None]
    for each in everyone:
        busy = each.climbing or each.draining or each.requests or each.incoming
        assert (each.idle_since is None) == bool(busy), f"instance {each.id} is idle and busy, or neither"
        assert each.room >= 0
        assert (each.model is None) == (each.target < Warmth.DRAM)
        assert (each.runtime is None) == (each.target < Warmth.RUNTIME)
        assert not each.devices or each.target >= Warmth.DEVICE
        if each.timer is not None:
            assert controller.timers.pending[each.timer].key == each.id
        if each.idle_since is not None and each.warm_until is not None:
            assert each.timer is not None and controller.timers.pending[each.timer].at <= each.warm_until, f"nobody wakes instance {each.id} in time"
        assert each.draining == any(each.id in plan.leaving for plan in controller.plans.pending.values())
    resting = [timer.key for timer in controller.timers.pending.values() if timer.wake == 0]
    assert sorted(resting) == sorted(each.id for each in everyone if each.timer is not None), "one timer for each instance"
    order = [each.id for each in sorted(idle, key=lambda each: (each.rank, each.id))]
    for name, node in cluster.nodes.items():
        here = [each for each in everyone if each.node == name]
        assert list(node.instances.values()) == here
        taken = [device for each in here for device in each.devices]
        assert node.free_devices == [each for each in range(node.spec.devices) if each not in taken]
        assert len(taken) + len(node.free_devices) == node.spec.devices, "a device is booked twice or by nobody"
        assert node.free_nbytes >= 0 and node.free_nbytes == node.spec.dram_nbytes - sum(each.held_nbytes for each in here)
        idle_here = [each for each in here if each.idle_since is not None]
        assert [each.id for each in cluster.idle_instances(name)] == [id for id in order if cluster.instances[id].node == name]
        assert node.idle_devices == sum(len(each.devices) for each in idle_here)
        assert node.idle_nbytes == sum(each.held_nbytes for each in idle_here)
        assert node.climbing == sum(each.climbing for each in here)
        for runtime in ("python", "node"):
            asleep = [each.id for each in idle_here if each.model is None and each.runtime in (runtime, None)]
            found = list(cluster.sleeping(name, runtime))
            assert sorted(each.id for each in found) == asleep and found == sorted(found, key=lambda each: -each.warmth)
    for devices in range(5):
        open_nodes = [each for each in cluster.nodes.values() if len(each.free_devices) + each.idle_devices >= devices]
        assert list(cluster.open_nodes(devices)) == sorted(open_nodes, key=lambda each: (each.loads_until, len(each.free_devices) < devices, each.spec.name))
    waiting: dict[Any, list[str]] = {}
    for name, model in cluster.models.items():
        mine = [each for each in everyone if each.model == name]
        assert sorted(model.instances) == [each.id for each in mine]
        assert model.running == sum(len(each.requests) for each in mine)
        ready = [each for each in mine if each.warmth == Warmth.READY and not each.draining]
        assert model.ready == len(ready)
        assert sorted(model.open) == [each.id for each in ready if each.room]
        assert sorted(model.starting) == [each.id for each in mine if each.climbing and each.target == Warmth.READY]
        assert sorted(model.asleep) == [each.id for each in mine if each.idle_since is not None and each.warmth < Warmth.READY]
        queued = sorted((r for r in cluster.requests.values() if r.model == name and r.phase == Phase.QUEUED), key=lambda r: r.order)
        assert list(model.queue) == queued, "the queue is not in order of arrival"
        assert model.cached_on == {each: node.cached[name] for each, node in cluster.nodes.items() if name in node.cached}
        assert not model.deleted or model.queue or model.running or model.instances, "a deleted model stays"
        if model.short:
            waiting.setdefault((model.spec.devices, held_nbytes(model.spec, Warmth.READY)), []).append(name)
    assert {need: sorted(ranked.ranks()) for need, ranked in cluster.short().items()} == {need: sorted(names) for need, names in waiting.items()}
    for need, ranked in cluster.short().items():
        for name, rank in ranked.ranks().items():
            queue = cluster.models[name].queue
            assert rank == (queue[0].order if queue else 1 << 62), (need, name)
    for each in everyone:
        coming = [r for r in cluster.requests.values() if r.target == each.id]
        assert sorted(each.incoming) == sorted(r.id for r in coming)
    for name, node in cluster.nodes.items():
        linked = [each.id for each in everyone if name in each.links]
        assert set(node.loading) <= set(linked) and all(cluster.instances[id].climbing or cluster.instances[id].loading for id in linked), "who has come, or never will, keeps a link busy"
        assert node.loads_until == 0 or (node.loading and node.loads_until > controller.now)
    sizes = [(each.spec.devices, each.spec.dram_nbytes) for each in cluster.nodes.values()]
    assert all(cluster.holds(*size) for size in sizes) and set(cluster.largest) <= set(sizes)
    assert all(not (one[0] <= other[0] and one[1] <= other[1]) for one in cluster.largest for other in cluster.largest if one is not other)
    assert cluster.prewarming == {each.id: each for each in everyone if each.climbing and each.target < Warmth.DRAM}
    rates = [min(each.spec.remote_bytes_per_second, each.spec.disk_bytes_per_second) for each in cluster.nodes.values()]
    assert cluster.slowest == min(rates, default=float("inf"))
