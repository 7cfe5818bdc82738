"""One model under one autoscaler in virtual time: requests come, instances take a while to start, nothing else can go wrong.

The objects of `control.autoscale` are asked as the controller asks them: at each arrival, and at each tick of theirs. There is
room on nodes for every instance, each takes as long to start as `starts` says, requests fill one instance before
the next, and an idle instance goes as its autoscaler says or after `keep_alive_seconds`. The whole cluster, with nodes that
fill up, is the simulator of `cluster`; here one question is left: how many, and when. Computed, not measured. Chapter 10.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.multicast import plan_seconds, summarize
from sllm_mini.control.policy import Autoscaler
from sllm_mini.control.state import InstanceState, ModelState, RequestState
from sllm_mini.lab.multicast_plots import build_plan
from sllm_mini.types import Warmth


class Starts(Protocol):
    """When `count` new instances that are asked for now are ready."""

    def begin(self, now: float, count: int) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class FixedStart:
    """Each takes the same time, whoever starts beside it."""

    seconds: float

    def begin(self, now: float, count: int) -> Sequence[float]:
        return [now + self.seconds] * count


@dataclass(slots=True)
class PlannedStart:
    """Each is ready with its last block, as the scale-out plan `plan` (of `PLAN_NAMES`) has it, one tick a block.

    A plan begins when the one before it is over, because both begin at the same source's link. From one source, also the k-way form.
    """

    plan: str
    blocks: int
    block_seconds: float
    _free: float = field(default=0.0, init=False)

    def begin(self, now: float, count: int) -> Sequence[float]:
        built = build_plan(self.plan, count, self.blocks, ways=1)
        begin = max(now, self._free)
        self._free = begin + plan_seconds(built.ticks, 1.0, 1.0 / self.block_seconds)
        return [begin + tick * self.block_seconds for tick in summarize(built).complete[built.sources :]]


@dataclass(frozen=True, slots=True)
class Moment:
    """What there was once something had happened at `time`."""

    time: float
    desired: int
    ready: int
    running: int
    queued: int


@dataclass(frozen=True, slots=True)
class Course:
    """What happened, in order of time. `waits` are seconds in the queue, one for each request that ran."""

    name: str
    moments: tuple[Moment, ...]
    waits: tuple[float, ...]
    refused: int
    instance_seconds: float
    starts: int

    def wait(self, share: float) -> float:
        """The wait that this share of the requests that ran did not exceed; 0 where none ran."""
        return sorted(self.waits)[ceil(share * len(self.waits)) - 1] if self.waits else 0.0

    @property
    def mean_wait(self) -> float:
        return statistics.fmean(self.waits) if self.waits else 0.0

    @property
    def most_ready(self) -> int:
        return max(moment.ready for moment in self.moments)


def evenly(*phases: tuple[float, float]) -> list[float]:
    """Arrivals from second 0: for each (seconds, requests a second) in turn as many as that gives, evenly spaced."""
    times, begin = [], 0.0
    for seconds, rate in phases:
        times += [begin + (number + 0.5) / rate for number in range(round(seconds * rate))]
        begin += seconds
    return times


def drive(
    name: str,
    scaler: Autoscaler,
    arrivals: Sequence[float],
    starts: Starts,
    *,
    service_seconds: float,
    concurrency: int,
    end: float,
    ready: int = 0,
    keep_alive_seconds: float = 60.0,
) -> Course:
    """What `scaler` makes of `arrivals` (ascending seconds) until `end`, beginning with `ready` instances. Pure but for the scaler's memory.

    A request takes `service_seconds` once it runs, `concurrency` of them run in an instance. Costs some microseconds an event.
    """
    run = _Run(scaler, starts, ModelState(ModelSpec(name="model", nbytes=1, concurrency=concurrency)), service_seconds, keep_alive_seconds)
    run.model.ready = ready
    run.add(0.0, "begin", 0)
    for number, time in enumerate(arrivals):
        run.add(time, "arrive", number)
    if scaler.tick_seconds is not None:
        run.add(scaler.tick_seconds, "tick", 0)  # a look at no record at all would find no traffic
    while run.events and run.events[0][0] <= end:
        run.step()
    run.note(end)
    return Course(name, tuple(run.moments), tuple(run.waits), run.refused, run.instance_seconds, run.started)


class _Run:
    """The state of one drive: a heap of events, the model as the autoscaler sees it, since when each spare instance is idle."""

    def __init__(self, scaler: Autoscaler, starts: Starts, model: ModelState, service_seconds: float, keep_alive_seconds: float) -> None:
        self.scaler, self.starts, self.model = scaler, starts, model
        self.service_seconds, self.keep_alive_seconds = service_seconds, keep_alive_seconds
        self.events: list[tuple[float, int, str, int]] = []
        self.idle: list[float] = []  # the one used last at the end, as the controller picks it
        self.moments: list[Moment] = []
        self.waits: list[float] = []
        self.refused = self.started = self.desired = 0
        self.instance_seconds = 0.0
        self._count = 0
        self._last = 0.0

    def add(self, time: float, kind: str, number: int) -> None:
        self._count += 1
        heapq.heappush(self.events, (time, self._count, kind, number))

    def step(self) -> None:
        now, _, kind, number = heapq.heappop(self.events)
        model = self.model
        self.instance_seconds += (now - self._last) * (model.ready + len(model.starting))
        self._last = now
        if kind == "arrive":
            self._arrive(number, now)
        elif kind == "finish":
            model.running -= 1
        elif kind == "ready":
            del model.starting[number]
            model.ready += 1
        elif kind == "late" and model.queue and model.queue[0].id == number:
            model.queue.popleft()
            self.refused += 1
        self._run_queued(now)
        self.scaler.observe(model, now)
        if kind == "arrive":
            self.scale(now)
        elif kind == "tick" and self.scaler.tick_seconds is not None:
            self.scale(now, may_go=self.scaler.scales_down)
            self.add(now + self.scaler.tick_seconds, "tick", 0)
        if not self.scaler.scales_down:
            self._let_go(now)
        self.note(now)

    def note(self, now: float) -> None:
        self.moments.append(Moment(now, self.desired, self.model.ready, self.model.running, len(self.model.queue)))

    def scale(self, now: float, *, may_go: bool = False) -> None:
        model = self.model
        self.desired = self.scaler.desired(model, now)
        missing = self.desired - model.ready - len(model.starting)
        if missing > 0:
            for time in self.starts.begin(now, missing):
                self.started += 1
                model.starting[self.started] = InstanceState(self.started, "node", model.spec, "model", "python", Warmth.COLD, Warmth.READY)
                self.add(time, "ready", self.started)
        elif may_go:
            gone = min(-missing, len(self.idle))
            del self.idle[:gone]
            model.ready -= gone

    def _arrive(self, number: int, now: float) -> None:
        if not self.scaler.admits(self.model, now):
            self.refused += 1
            return
        self.model.queue.append(RequestState(number, "model", 1, "", now))
        if self.scaler.queue_seconds is not None:
            self.add(now + self.scaler.queue_seconds, "late", number)

    def _run_queued(self, now: float) -> None:
        model = self.model
        while model.queue and model.running < model.ready * model.spec.concurrency:
            request = model.queue.popleft()
            self.waits.append(now - request.arrived)
            model.running += 1
            self.add(now + self.service_seconds, "finish", request.id)
        spare = model.ready - ceil(model.running / model.spec.concurrency)
        del self.idle[spare:]
        if spare > len(self.idle):
            self.idle += [now] * (spare - len(self.idle))
            self.add(now + self.keep_alive_seconds, "idle", 0)

    def _let_go(self, now: float) -> None:
        while self.idle and self.idle[0] + self.keep_alive_seconds <= now:
            del self.idle[0]
            self.model.ready -= 1
