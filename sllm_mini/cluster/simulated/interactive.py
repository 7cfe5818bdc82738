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
from math import inf, nan
from types import TracebackType
from typing import Self

from msgspec.structs import replace as changed

from sllm_mini.cluster.api import Ask, Cluster, Deployment, NodeReport, Outcome, RefusedError, RequestReport
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.live.prompts import Prompts
from sllm_mini.cluster.reports import node_reports
from sllm_mini.cluster.simulated.driver import SimulatedCluster
from sllm_mini.cluster.simulated.options import SimulationOptions
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.cluster.simulated.run import result_of
from sllm_mini.cluster.simulated.table import RequestRow
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.replay import Recorder, read_log
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.types import Epoch, Tier, Warmth

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
        self._ran: _Ran | None = None

    # Asked for

    def deploy(self, deployment: Deployment) -> None:
        with self._lock:
            self._deployments[deployment.spec.name] = deployment
            if not self._trace and not self._events and deployment.spec.name not in {spec.name for spec in self._first}:
                self._first.append(deployment.spec)
                self._on_disk += () if "://" in deployment.source else (deployment.spec.name,)
            else:
                self._happens(m.ModelDeployed(deployment.spec))

    def delete(self, model: str) -> None:
        with self._lock:
            if self._deployments.pop(model, None) is not None:
                self._happens(m.ModelDeleted(model))

    def submit(self, ask: Ask) -> SimulatedStream:
        with self._lock:
            deployment = self._deployments.get(ask.model)
            if deployment is None:
                raise RefusedError(404, f"there is no model {ask.model}; deploy it first")
            session = self._prompts.session(ask, deployment, "simulated")
            if session.request_id in self._ids:
                raise ValueError(f"request {session.request_id!r} is known already; give each request an id of its own")
            self._ids[session.request_id] = len(self._trace)
            self._trace.append(TraceRequest(self._tick(), ask.model, session.prompt_length, ask.max_new_tokens, ask.prefix or None))
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

    def wait(self, until: Callable[[Cluster], bool], timeout: float) -> bool:
        with self._lock:
            end = self._now + timeout
            ran = self._run(end)
            times = {record.now for record in ran.records}.union(*(ran.times(number) for number in range(len(self._trace))))
            for at in [self._now, *sorted(at for at in times if self._now < at < end), end]:
                self._now = at
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
            return replace(report, ended=row.end, outcome=outcome, reason=ran.reason(number))

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
            yield LedgerPiece(first + index, 0, "", Epoch(1), at)
            index += 1
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

    def _tick(self) -> float:
        self._now += _TICK_SECONDS
        return self._now

    def _happens(self, event: m.AnyEvent) -> None:
        self._events.append((self._tick(), event))

    def _with_disk(self, spec: m.NodeSpec) -> m.NodeSpec:
        return changed(spec, disk=tuple(dict.fromkeys((*spec.disk, *self._on_disk))))

    def _run(self, until: float) -> _Ran:
        asked = len(self._trace), len(self._events), len(self._first), until
        if self._ran is None or self._ran.asked != asked:
            controller, lines = self._control.controller(), list[bytes]()
            node = self._options.node
            options = SimulationOptions(store_dram_nbytes=node.store_dram_nbytes, store_disk_nbytes=node.store_disk_nbytes or None, until=until)
            cluster = SimulatedCluster(Recorder(controller, lines.append), map(self._with_disk, self._nodes), self._first, options)
            cluster.run(self._trace, self._events)
            errors = {} if controller.estimator is None else controller.estimator.errors()
            self._ran = _Ran(asked, self._trace, lines, result_of(cluster, self._control.names(), errors, 0.0))
        return self._ran


class _Ran:
    """One run, and what its log says of each request."""

    def __init__(self, asked: object, trace: Sequence[TraceRequest], lines: list[bytes], result: SimulationResult) -> None:
        self.asked, self.lines, self.result, self._trace = asked, lines, result, trace
        self.records = list(read_log(lines))
        self.rows = {row.request: row for row in result.requests}
        self._times: dict[int, list[float]] = {}

    def given(self, number: int) -> list[float]:
        """When it was assigned."""
        return [record.now for record in self.records for action in record.actions if isinstance(action, m.Assign) and action.request == number]

    def times(self, number: int) -> list[float]:
        """When each of its tokens comes: from an assignment on, prefill and decoding go on until it ends or is interrupted."""
        if number not in self._times:
            self._times[number] = self._find_times(number)
        return self._times[number]

    def _find_times(self, number: int) -> list[float]:
        asked, times, began = self._trace[number], list[float](), inf
        prefill = decode = 0.0

        def until(end: float) -> None:
            first = began + prefill * (asked.input_tokens + len(times))
            times.extend(at for place in range(1, asked.output_tokens - len(times) + 1) if (at := first + place * decode) <= end + 1e-9)

        for record in self.records:
            event = record.event
            if isinstance(event, m.ModelDeployed) and event.model.name == asked.model and record.now <= asked.arrival_seconds:
                prefill, decode = event.model.prefill_seconds_per_token, event.model.decode_seconds_per_token
            elif isinstance(event, m.RequestProgressed | m.RequestFinished | m.RequestCancelled) and event.request == number and began < inf:
                until(record.now)
                began = inf
                if isinstance(event, m.RequestFinished):  # what a move held back
                    times.extend([record.now] * (asked.output_tokens - len(times)))
            for action in record.actions:
                if isinstance(action, m.Assign) and action.request == number:
                    began = record.now
                elif isinstance(action, m.Preempt) and action.request == number:
                    until(record.now)
                    began = inf
        return times

    def start_of(self, row: RequestRow) -> tuple[Tier | None, float]:
        """Where the start that it waited for read the weights, and for how long."""
        if row.warmth == Warmth.READY:
            return None, 0.0
        reached = [
            record.event for record in self.records if isinstance(record.event, m.InstanceReached) and record.event.instance == row.instance and record.now <= row.start
        ]  # fmt: skip
        return (reached[-1].tier, reached[-1].load_seconds or 0.0) if reached else (None, 0.0)

    def reason(self, number: int) -> str:
        """Why it was refused."""
        refused = (action.reason for record in self.records for action in record.actions if isinstance(action, m.Refuse) and action.request == number)
        return next(refused, "")


class SimulatedStream:
    """See `api.Stream`."""

    def __init__(self, driver: SimulatedDriver, request_id: str) -> None:
        self._driver, self.request_id = driver, request_id

    def __iter__(self) -> Iterator[LedgerPiece]:
        return self._driver.pieces(self.request_id)

    def wait(self, timeout: float | None = None) -> RequestReport:
        driver = self._driver
        end = driver.end_of(self.request_id)
        if timeout is None and end == inf:
            raise ModelError(f"request {self.request_id!r} is never answered as things are; give the cluster room for its model, or cancel it")
        if timeout is not None and end > driver.now + timeout:
            driver.sleep(timeout)
            raise TimeoutError(f"request {self.request_id!r} had not ended after {timeout} seconds of simulated time")
        driver.sleep(max(0.0, end - driver.now))
        return driver.report(self.request_id)

    def cancel(self) -> None:
        self._driver.cancel(self.request_id)

    @property
    def report(self) -> RequestReport:
        return self._driver.report(self.request_id)
