"""The `Cluster` protocol in virtual time: what is asked of it is kept with its time, and the whole simulation run again when an
answer is read.

The simulation is deterministic and what comes later changes nothing before it, so a run that knows one request more is the same up
to its arrival. Costs a few milliseconds a run for some tens of requests, which is what it is for: to hold the simulated cluster
to the same tests as the live ones. `simulate` is the call for traces. Taught in chapter 08.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, nan
from types import TracebackType
from typing import Self

from msgspec.structs import replace as changed

from sllm_mini.cluster.accounting import account_of
from sllm_mini.cluster.api import (
    Ask,
    Cluster,
    Deployment,
    Listener,
    Metrics,
    NodeReport,
    Outcome,
    RefusedError,
    RequestReport,
    keep_alive_seconds,
)
from sllm_mini.cluster.bases import check_deploy, check_no_adapters, text_source
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.live.prompts import Prompts
from sllm_mini.cluster.reports import asked_warm, node_reports
from sllm_mini.cluster.simulated.driver import SimulatedCluster
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.rerun import Rerun
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.cluster.simulated.run import result_of
from sllm_mini.cluster.simulated.stream import SimulatedStream
from sllm_mini.cluster.subscription import Subscription
from sllm_mini.cluster.tally import Tally
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.replay import Recorder
from sllm_mini.errors import ModelError, SllmError, UnsupportedError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.types import Epoch, Warmth

_TICK_SECONDS = 1e-6
"""Between two things that are asked for at once, so that they keep their order."""


class SimulatedDriver:
    """See the module. Times are virtual and pass in `wait`, `sleep` and when a stream is read. Of `options` only what a store may
    hold counts. A request gives as many tokens as it may; their ids are 0 and their texts empty, and those that a move holds back come
    at its end. Safe from several threads."""

    def __init__(self, nodes: Sequence[m.NodeSpec], control: ControlOptions, options: LiveOptions) -> None:
        self._lock = threading.RLock()
        self._control, self._options = control, options
        self._now, self._prompts = 0.0, Prompts()
        self._specs = {spec.name: spec for spec in nodes}
        self._joined = {spec.name: (spec, 1) for spec in nodes}
        self._nodes = list(nodes)
        self._first: list[m.ModelSpec] = []
        self._on_disk: tuple[str, ...] = ()
        """Models of the beginning whose checkpoints lie in folders, which every node sees."""
        self._trace: list[TraceRequest] = []
        self._ids: dict[str, int] = {}
        self._events: list[tuple[float, m.AnyEvent]] = []
        self._deployments: dict[str, Deployment] = {}
        self._subscriptions: list[Subscription] = []
        self._ran: Rerun | None = None

    # Asked for

    def deploy(self, deployment: Deployment) -> None:
        with self._lock:
            check_deploy(deployment, self._deployments)
            before = self._deployments[deployment.spec.name].keep_alive if deployment.spec.name in self._deployments else None
            self._deployments[deployment.spec.name] = deployment
            if not self._trace and all(isinstance(event, m.KeepAliveAsked) for _, event in self._events) and deployment.spec.name not in {spec.name for spec in self._first}:
                self._first.append(deployment.spec)
                self._on_disk += () if "://" in deployment.source else (deployment.spec.name,)
            else:
                self._happens(m.ModelDeployed(deployment.spec))
            if deployment.keep_alive != before:
                self._happens(m.KeepAliveAsked(deployment.spec.name, keep_alive_seconds(deployment.keep_alive)))

    def delete(self, model: str) -> None:
        with self._lock:
            check_no_adapters(model, self._deployments.values(), "cannot be deleted")
            if self._deployments.pop(model, None) is not None:
                self._happens(m.ModelDeleted(model))

    def prewarm(self, model: str, warmth: Warmth = Warmth.READY, keep_alive: float | None = None) -> None:
        with self._lock:
            self._deployed(model)
            for event in asked_warm(model, warmth, keep_alive):
                self._happens(event)

    def unload(self, model: str) -> None:
        with self._lock:
            self._deployed(model)
            self._happens(m.UnloadAsked(model))

    def submit(self, ask: Ask) -> SimulatedStream:
        with self._lock:
            if ask.embed:
                raise UnsupportedError("a simulated cluster makes no embeddings; ask for a text, or open a live one")
            deployment, keep_alive = self._deployed(ask.model), keep_alive_seconds(ask.keep_alive)
            waiting = self.metrics().waiting if len(self._trace) >= self._options.max_waiting else 0
            if waiting >= self._options.max_waiting:
                raise RefusedError(503, f"{waiting} requests wait, and no more are taken; try again later", 1.0)
            session = self._prompts.session(ask, text_source(deployment, self._deployments), "simulated")
            if session.request_id in self._ids:
                raise ValueError(f"request {session.request_id!r} is known already; give each request an id of its own")
            self._ids[session.request_id] = len(self._trace)
            self._trace.append(TraceRequest(self._tick(), ask.model, session.prompt_length, ask.max_new_tokens, ask.prefix or None))
            if keep_alive is not None:
                self._happens(m.KeepAliveAsked(ask.model, keep_alive))
            return SimulatedStream(self, session.request_id)

    def stream(self, request_id: str) -> SimulatedStream:
        with self._lock:
            if request_id not in self._ids:
                raise ModelError(f"request {request_id!r} is not known; it was never taken")
            return SimulatedStream(self, request_id)

    def add_node(self, spec: m.NodeSpec) -> None:
        with self._lock:
            if spec.name in self._specs:
                raise SllmError(f"a node {spec.name} is alive; give another name")
            self._specs[spec.name] = spec
            self._joined[spec.name] = spec, self._joined.get(spec.name, (spec, 0))[1] + 1
            self._happens(m.NodeJoined(self._with_disk(spec)))

    def kill_node(self, name: str) -> None:
        with self._lock:
            if self._specs.pop(name, None) is None:
                raise SllmError(f"there is no node {name} that is alive; nodes() has those that are")
            self._happens(m.NodeLost(name))

    def cancel(self, request_id: str) -> None:
        """As the stream's."""
        with self._lock:
            if self.report(request_id).outcome is None:
                self._happens(m.RequestCancelled(self._ids[request_id]))

    # Read

    @property
    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds
        self._tell()

    def subscribe(self, request_id: str, listener: Listener) -> Callable[[], None]:
        """As the stream's; called whenever time has passed."""
        subscription = Subscription(partial(self._read, request_id), listener)
        with self._lock:
            self._subscriptions = [each for each in self._subscriptions if not each.ended] + [subscription]
        subscription.look()
        return subscription.end

    def wait(self, until: Callable[[Cluster], bool], timeout: float) -> bool:
        with self._lock:
            end = self._now + timeout
            ran = self._run(end)
            times = {record.now for record in ran.records}.union(*(ran.times(number) for number in range(len(self._trace))))
            for at in [self._now, *sorted(at for at in times if self._now < at < end), end]:
                self._now = at
                self._tell()
                if until(self):
                    return True
            return False

    def nodes(self) -> list[NodeReport]:
        with self._lock:
            controller = self._control.controller()
            for record in self._run(self._now).records:
                if record.now > self._now:
                    break
                controller.handle(record.event, record.now)
            return node_reports(controller.cluster, self._joined, {})

    embeds = False

    def models(self) -> list[Deployment]:
        with self._lock:
            return list(self._deployments.values())

    def metrics(self) -> Metrics:
        """Of what has happened by now."""
        with self._lock:
            tally, reports = Tally(), [self.report(request_id) for request_id in self._ids]
            for report in reports:
                if report.outcome is not None:
                    tally.add(report)
            waiting = sum(report.outcome is None and report.assigned != report.assigned for report in reports)
            running = sum(report.outcome is None for report in reports) - waiting
            return tally.metrics(account_of(self.log(), self._now), waiting=waiting, running=running)

    def log(self) -> Iterable[bytes]:
        with self._lock:
            ran, header = self._run(self._now), self._control.header()
            head = [] if header is None else [header.to_line()]
            return [*head, *(line for line, record in zip(ran.lines, ran.records, strict=True) if record.now <= self._now)]

    def result(self) -> SimulationResult:
        """Of all that was submitted, to its end, which may be later than now."""
        with self._lock:
            return self._run(self._now).result

    def report(self, request_id: str) -> RequestReport:
        """As it stands now."""
        with self._lock:
            number, now = self._ids[request_id], self._now
            asked, ran = self._trace[number], self._run(now)
            times = [at for at in ran.times(number) if at <= now]
            report = RequestReport(request_id, asked.model, asked.arrival_seconds, input_tokens=asked.input_tokens, output_tokens=len(times), first=times[0] if times else nan)
            given = [at for at in ran.given(number) if at <= now]
            row = ran.rows.get(number)
            if given:
                report = replace(report, assigned=given[0], restarts=len(given) - 1)
            if row is None or row.end > now:
                return report
            tier, load_seconds = ran.start_of(row)
            outcome: Outcome = "answered" if row.outcome == "answered" else "refused" if row.outcome == "refused" else "cancelled"
            report = replace(report, rung=row.warmth, tier=tier, load_seconds=load_seconds, migrations=row.migrations)
            return replace(report, ended=row.end, outcome=outcome, reason=ran.reason(number), finish="length" if outcome == "answered" else None)

    def pieces(self, request_id: str) -> Iterator[LedgerPiece]:
        """As the stream's; time passes to each."""
        number = self._ids[request_id]
        first = self._trace[number].input_tokens
        index = 0
        while True:
            with self._lock:
                ran = self._run(self._now)
                times, row = ran.times(number), ran.rows.get(number)
                if index >= len(times):
                    if row is None:
                        raise ModelError(f"request {request_id!r} is never answered as things are; give the cluster room for its model, or cancel it")
                    self._now = max(self._now, row.end)
                    break
                at = times[index]
                self._now = max(self._now, at)
            self._tell()
            yield LedgerPiece(first + index, 0, "", Epoch(1), at)
            index += 1
        self._tell()
        if row.outcome == "refused":
            raise RefusedError.read(ran.reason(number))

    def end_of(self, request_id: str) -> float:
        """When it ends; infinity where it does not."""
        with self._lock:
            row = self._run(self._now).rows.get(self._ids[request_id])
            return inf if row is None else row.end

    def close(self) -> None:
        """Nothing is left open by it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Parts

    def _deployed(self, model: str) -> Deployment:
        if model not in self._deployments:
            raise RefusedError(404, f"there is no model {model}; deploy it first")
        return self._deployments[model]

    def _read(self, request_id: str, start: int) -> tuple[Sequence[LedgerPiece], RequestReport | None]:
        """Its pieces by now, from `start` on, and its report where they are all."""
        with self._lock:
            report, number = self.report(request_id), self._ids[request_id]
            times, first = self._run(self._now).times(number), self._trace[number].input_tokens
            pieces = [LedgerPiece(first + index, 0, "", Epoch(1), times[index]) for index in range(start, report.output_tokens)]
            return pieces, None if report.outcome is None else report

    def _tell(self) -> None:
        """Time has passed."""
        for subscription in self._subscriptions:
            subscription.look()

    def _tick(self) -> float:
        self._now += _TICK_SECONDS
        return self._now

    def _happens(self, event: m.AnyEvent) -> None:
        self._events.append((self._tick(), event))

    def _with_disk(self, spec: m.NodeSpec) -> m.NodeSpec:
        return changed(spec, disk=tuple(dict.fromkeys((*spec.disk, *self._on_disk))))

    def _run(self, until: float) -> Rerun:
        asked = len(self._trace), len(self._events), len(self._first), until
        if self._ran is None or self._ran.asked != asked:
            controller, lines = self._control.controller(), list[bytes]()
            node = self._options.node
            options = SimulationOptions(store_dram_nbytes=node.store_dram_nbytes, store_disk_nbytes=node.store_disk_nbytes or None, until=until)
            cluster = SimulatedCluster(Recorder(controller, lines.append), map(self._with_disk, self._nodes), self._first, options)
            cluster.run(self._trace, self._events)
            errors = {} if controller.estimator is None else controller.estimator.errors()
            self._ran = Rerun(asked, self._trace, lines, result_of(cluster, self._control.names(), errors, 0.0))
        return self._ran
