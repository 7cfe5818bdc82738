"""The loop: a heap of what comes next, each event through `Controller.handle`, each action carried out in simulated time.

Requests run in closed form: a stretch of prefill and decoding has one planned end, which is dropped by its version when a
move, a preemption or a loss comes first. Arrivals stream from the trace, one at a time. Costs some 5 us a request beside
the controller's own; memory holds what is going on, never what was (but for the rows and spans asked for). Taught in
chapter 08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf
from typing import Any, Protocol

from msgspec.structs import replace

from sllm_mini.cluster.simulated.machines import ARRIVAL, EXTERNAL, FINISH, LINK, MOVED, PAUSE, READY, ROOM, RUNG, TIMER
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.parts import Instance, Model, Run, SimulationError
from sllm_mini.cluster.simulated.serving import READY_BUSY, READY_IDLE, Serving
from sllm_mini.cluster.simulated.table import ANSWERED, CANCELLED, CHUNK_ROWS, REFUSED, ROW_NBYTES, pack_row
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.messages import (
    AnyAction,
    AnyEvent,
    Assign,
    Descend,
    InstanceFailed,
    KeepAliveAsked,
    Migrate,
    ModelDeleted,
    ModelDeployed,
    ModelSpec,
    NodeJoined,
    NodeLost,
    NodeSpec,
    Preempt,
    PrewarmAsked,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    SetTimer,
    Start,
    TimerFired,
    UnloadAsked,
)
from sllm_mini.types import Warmth

_BUFFER = CHUNK_ROWS * ROW_NBYTES
PROGRESS_EVERY = 1 << 13
"""Requests between two words about how far it is."""


class Machine(Protocol):
    """What it drives: a `Controller`, or whatever else answers events with actions."""

    def handle(self, event: AnyEvent, now: float) -> list[AnyAction]: ...


class SimulatedCluster(Serving):
    """Nodes and models in simulated time under one controller. `run` once; then read `table`, `account`, `spans`, `events`.

    Raises SimulationError where the controller asks for what cannot be done. One thread at a time.
    """

    def __init__(self, controller: Machine, nodes: Iterable[NodeSpec], models: Iterable[ModelSpec], options: SimulationOptions | None = None) -> None:
        super().__init__(options or SimulationOptions())
        self.now = 0.0
        self.events: dict[str, int] = {}
        """How many of each kind the controller was told."""
        self.arrived = 0
        self.waiting_seconds = 0.0
        """The integral of how many requests were in the system (Little's law)."""
        self._handle = controller.handle
        self._joined = 0
        self._closed = False
        models = list(models)
        self._unknown = Model(ModelSpec(name="unknown", nbytes=0), -1)
        for spec in models:  # known before the nodes, whose disks name them
            self._deploy(spec)
        for node in nodes:
            self._outside(NodeJoined(node), 0.0)
        for spec in models:
            self._outside(ModelDeployed(spec), 0.0)

    def run(
        self,
        trace: Iterable[TraceRequest],
        events: Iterable[tuple[float, AnyEvent]] = (),
        on_progress: Callable[[int, float], None] | None = None,
    ) -> None:
        """Until all requests of the trace are answered. `events` happen beside it at their times: nodes are lost and come
        back, models are deployed or deleted, requests (by their place in the trace, from 0) cancelled, instances fail.
        `on_progress(requests, seconds)` is called now and then."""
        heap, handle, runs, models, tick, table = self._heap, self._handle, self._runs, self._models, self._tick, self.table
        gpu_seconds, byte_seconds, spans, slow = self.account.gpu_seconds, self.account.byte_seconds, self.spans, self._slow
        if self._closed:
            raise SimulationError("this cluster has run already; make a new one")
        self._closed = True
        for at, event in events:
            heappush(heap, (at, EXTERNAL, tick(), event, 0))
        arrivals = iter(trace)
        upcoming = next(arrivals, None)
        next_at = inf if upcoming is None else upcoming.arrival_seconds
        number, finished, timers, real, until = 0, 0, 0, 0.0, self.options.until
        now, last, waiting = self.now, 0.0, 0.0
        while True:
            if heap and (heap[0][0] < next_at or (heap[0][0] == next_at and heap[0][1] < ARRIVAL)):
                if upcoming is None and not runs and heap[0][0] > until:
                    break
                now, kind, _, thing, version = heappop(heap)
            elif upcoming is not None:
                now, kind = next_at, ARRIVAL
            else:
                break
            waiting += len(runs) * (now - last)
            last = now
            if kind == FINISH:
                if thing.version != version:
                    continue
                run: Run = thing
                instance: Instance = run.instance  # type: ignore[assignment]
                del instance.runs[run.id]
                instance.active -= 1
                if not instance.active:
                    seconds = now - instance.since
                    gpu_seconds[READY_BUSY] += instance.ndevices * seconds
                    byte_seconds[READY_BUSY] += instance.held_nbytes * seconds
                    instance.since, instance.slot = now, READY_IDLE
                elif slow:
                    self._rescale(instance, now)
                if run.moving is not None:
                    self._leave_target(run, now)
                if spans is not None:
                    self._span(instance, "run", Warmth.READY, run.entered, now, run.id)
                first = run.first
                if first != first:  # not seen by an interruption: it is where the closed form says
                    first = run.since + (min(run.prefill + run.decode, run.work) - run.done) / run.rate
                del runs[run.id]
                table.buffer += pack_row(
                    run.id, run.model.number, run.arrived, run.start, first, now, run.input_tokens, run.output_tokens, run.rung, run.migrations, run.preemptions,
                    instance.id, ANSWERED,
                )  # fmt: skip
                if len(table.buffer) >= _BUFFER:
                    table.settle()
                finished += 1
                real = now
                actions = handle(RequestFinished(run.id, run.output_tokens, now - run.assigned, run.epoch), now)
            elif kind == ARRIVAL:
                name = upcoming.model  # type: ignore[union-attr]
                runs[number] = Run(
                    number, models.get(name) or self._unknown, now, upcoming.input_tokens, upcoming.output_tokens, upcoming.duration_seconds  # type: ignore[union-attr]
                )  # fmt: skip
                actions = handle(RequestArrived(number, name, upcoming.input_tokens, upcoming.prefix or ""), now)  # type: ignore[union-attr]
                number += 1
                upcoming = next(arrivals, None)
                next_at = inf if upcoming is None else upcoming.arrival_seconds
                if next_at < now:
                    raise SimulationError(f"request {number} of the trace arrives at {next_at} s, after one at {now} s; sort the trace by arrival")
                real = now
                if on_progress is not None and not number % PROGRESS_EVERY:
                    self._count_events(number, finished, timers)
                    on_progress(number, now)
            elif kind == TIMER:
                if upcoming is None and now - real > self.options.patience_seconds:
                    break
                timers += 1
                actions = handle(TimerFired(thing), now)
            else:
                self._happen(kind, thing, version, now)
                real = now
                continue
            for action in actions:
                if type(action) is Assign:
                    self._assign(action, now)
                elif type(action) is SetTimer:
                    heappush(heap, (action.at if action.at > now else now, TIMER, tick(), action.timer, 0))
                else:
                    self._do(action, now)
        self.now = max(now, until) if not runs else now
        self.arrived, self.waiting_seconds = number, waiting + len(runs) * (self.now - last)
        self._count_events(number, finished, timers)
        self._settle(self.now)
        table.settle()

    def _count_events(self, arrived: int, finished: int, timers: int) -> None:
        """The three kinds that the loop counts itself; all others are counted as they are told."""
        self.events |= {"RequestArrived": arrived, "RequestFinished": finished, "TimerFired": timers}

    def _happen(self, kind: int, thing: Any, version: int, now: float) -> None:
        """All that is planned but the ends of requests, and timers."""
        if kind == LINK:
            if thing.version == version:
                self._loads_over(thing, now)
        elif kind == READY:
            self._reached(thing, now)
        elif kind == RUNG:
            self._climbed_to_load(thing, now)
        elif kind == ROOM:
            self._make_room(thing, now)
        elif kind == PAUSE:
            self._pause(thing, version, now)
        elif kind == MOVED:
            self._moved(thing, version, now)
        else:
            self._outside(thing, now)

    def _tell(self, event: AnyEvent, now: float) -> None:
        name = type(event).__name__
        self.events[name] = self.events.get(name, 0) + 1
        for action in self._handle(event, now):
            self._do(action, now)

    def _do(self, action: AnyAction, now: float) -> None:
        if isinstance(action, Assign):
            self._assign(action, now)
        elif isinstance(action, SetTimer):
            heappush(self._heap, (max(action.at, now), TIMER, self._tick(), action.timer, 0))
        elif isinstance(action, Start):
            self._start(action, now)
        elif isinstance(action, Descend):
            self._descend(action, now)
        elif isinstance(action, Migrate):
            self._migrate(action, now)
        elif isinstance(action, Preempt):
            self._preempt(action, now)
        else:
            self._end(self._runs[action.request], REFUSED, now)

    # What happens from outside

    def _outside(self, event: AnyEvent, now: float) -> None:
        if isinstance(event, NodeJoined):
            self._add_node(event.node, self._joined, now)
            self._joined += 1
        elif isinstance(event, ModelDeployed):
            self._deploy(event.model)
        elif isinstance(event, RequestCancelled):
            if event.request in self._runs:
                self._end(self._runs[event.request], CANCELLED, now)
        elif isinstance(event, NodeLost):
            self._lose_node(event, now)
            return
        elif isinstance(event, InstanceFailed):
            instance = self._instances.get(event.instance)
            if instance is not None:
                self._lose([instance], replace(event, epoch=instance.epoch), now)
            return
        elif not isinstance(event, ModelDeleted | PrewarmAsked | UnloadAsked | KeepAliveAsked):
            raise SimulationError(f"{type(event).__name__} is for the simulation to say; give nodes, models, cancelled requests and failed instances")
        self._tell(event, now)

    def _deploy(self, spec: ModelSpec) -> None:
        if spec.name not in self._models:
            self.table.models.append(spec.name)
        self._add_model(spec, len(self.table.models) - 1)

    def _lose_node(self, event: NodeLost, now: float) -> None:
        node = self._nodes.get(event.node)
        if node is None:
            raise SimulationError(f"at {now:.6g} s the node {event.node} was to be lost, and there is none of that name")
        if event.also:
            raise SimulationError(f"at {now:.6g} s {len(event.also) + 1} nodes were to be lost together; give each an event of its own")
        robbed = [load for load in self._split.values() if event.node in load.sources and load.node is not node]
        instances = list(node.instances.values())
        self._remove_node(node, now)
        self._lose(instances, event, now)
        for load in robbed:
            if load.wanted:
                self._lose([load.instance], InstanceFailed(load.instance.id, f"{event.node}, which fetched a share of its weights, is gone", load.epoch), now)
